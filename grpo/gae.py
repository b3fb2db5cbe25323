"""PPO over a value head: advantages of tokens, and what the head is taught. Plain torch, as grpo/loss.py.

Knows nothing of models: values come from the policy (grpo/policy/actor_critic.py).

    build_actor_critic_loss(config)    the policy loss of grpo/loss.py over these advantages, and the value loss

Notation, over the T sampled tokens of a completion, whose reward is r; what others wrote in between is no step of it:
    V_t = value before token t, by the head as it was before the first optimizer step on the rollout; V_{T+1} = 0
    d_t = [t = T] r + gamma V_{t+1} - V_t
    A_t = sum_l (gamma lambda)^l d_{t+l}     GAE: Schulman et al. 2015, arXiv 1506.02438, equation 16
    R_t = A_t + V_t                          the return that the head is taught

The objective sees A whitened over the sampled tokens of its optimizer step, those of all ranks: (A - mean) / std, as in
the code of Ziegler et al. 2019 (arXiv 1909.08593). With lambda = gamma = 1, the default, A is r - V_t and R is r: a
reward that comes at the end reaches the first token of a long completion whole (Yuan et al. 2025, arXiv 2503.01491). A
completion that was cut off and still counts (--no-mask-truncated) has earned what it was paid, and nothing after it.

    loss = policy loss + sum_t weight_t * max((v_t - R_t)^2, (clip(v_t, V_t -+ value_clip) - R_t)^2) / 2

The two parts share no parameter, and AdamW asks for no gradient's size: a coefficient between them would do nothing.

The KL divergence is the term that every objective has (--kl-coef), not a part of the reward as in Ziegler 2019: its
gradient is right whatever gamma and lambda are, and the head learns what was earned and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from grpo.config import Config
from grpo.loss import Loss, Scorer, build_loss
from grpo.types import Batch

EPSILON = 1e-8  # under the root of the variance that advantages are whitened by: equal ones become 0
LEAST_SPREAD = 1e-12  # of the returns' variance, as a part of their mean square: less is the rounding of equal ones

# What is summed over sampled tokens for the metrics.
SUMS = ("value/tokens", "value/loss", "returns", "returns squared", "errors", "errors squared")


@runtime_checkable
class Critic(Scorer, Protocol):
    """What the preparation needs of a policy."""

    def values(self, batch: Batch) -> Tensor:
        """The value before each sampled token, [N], without gradient."""
        ...


def generalized_advantages(rewards: Tensor, values: Tensor, *, gamma: float, lam: float) -> Tensor:
    """A of S completions, [S, T]. rewards: [S]; values: [S, T], each completion's at the end of its row; what stands
    before them counts for nothing."""
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = gamma * after - values
    deltas[:, -1] += rewards
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(rewards)
    for token in reversed(range(values.shape[1])):
        running = deltas[:, token] + gamma * lam * running
        advantages[:, token] = running
    return advantages


def advantages_of(batch: Batch, values: Tensor, *, gamma: float, lam: float) -> Tensor:
    """A of the n sampled tokens of a batch, [n] float64 on the CPU, of their values [n].

    A step a token of the longest completion, all completions at once: on a CPU some microseconds each.
    """
    mask = batch.mask.cpu()
    sequence, reward = batch.sequence.cpu()[mask], batch.advantages.double().cpu()[mask]
    lengths = torch.bincount(sequence, minlength=batch.num_sequences)
    to_the_end = lengths.cumsum(0)[sequence] - torch.arange(len(sequence))  # tokens, its own included
    place = sequence, int(lengths.max()) - to_the_end
    grid = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.float64)
    rewards = torch.zeros(len(lengths), dtype=torch.float64).index_copy(0, sequence, reward)
    return generalized_advantages(rewards, grid.index_put(place, values.double().cpu()), gamma=gamma, lam=lam)[place]


def store_advantages(critic: Critic, batches: list[Batch], *, gamma: float, lam: float) -> None:
    """V, R and the whitened A of the batches of an optimizer step. Batches come with each completion's reward as the
    advantage of its tokens (grpo.advantages.earned)."""
    found = []
    for batch in batches:
        batch.old_values = critic.values(batch)
        values = batch.old_values[batch.mask]
        found.append(advantages_of(batch, values, gamma=gamma, lam=lam))
        batch.returns = _column(found[-1] + values.double().cpu(), batch)
    everywhere = critic.of_all_ranks(found).double().cpu()
    mean, spread = everywhere.mean(), (everywhere.var(correction=0) + EPSILON).sqrt()
    for batch, advantages in zip(batches, found, strict=True):
        batch.token_advantages = _column((advantages - mean) / spread, batch)


def _column(values: Tensor, batch: Batch) -> Tensor:
    """Values of the n sampled tokens as a column of the batch, [N] float32; 0 on the rest."""
    return torch.zeros_like(batch.advantages).masked_scatter(batch.mask, values.to(batch.advantages))


def value_loss(batch: Batch, *, clip: float) -> Tensor:
    """Half the squared error of each token's value, [N], or that of the value as it was, moved by `clip` at most, where
    that is larger: what is gained beyond that counts for nothing."""
    near = batch.old_values + (batch.values - batch.old_values).clamp(-clip, clip)
    return torch.maximum((batch.values - batch.returns) ** 2, (near - batch.returns) ** 2) / 2


@dataclass(frozen=True)
class ActorCriticLoss:
    """PPO: Schulman et al. 2017, arXiv 1707.06347, equation 9, with all choices made."""

    of_policy: Loss
    gamma: float
    lam: float
    clip: float

    @property
    def differentiable_entropy(self) -> bool:
        """See Loss.differentiable_entropy."""
        return self.of_policy.differentiable_entropy

    @torch.no_grad()
    def prepare(self, policy: Scorer, batches: list[Batch]) -> None:
        """See Loss.prepare."""
        assert isinstance(policy, Critic)
        self.of_policy.prepare(policy, batches)
        store_advantages(policy, batches, gamma=self.gamma, lam=self.lam)

    def prepare_step(self, policy: Scorer, batches: list[Batch]) -> None:
        """See Loss.prepare_step."""
        self.of_policy.prepare_step(policy, batches)

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See Loss.__call__. The batch has the values of the same pass."""
        loss, sums = self.of_policy(logprobs, entropy, replace(batch, advantages=batch.token_advantages))
        errors = value_loss(batch, clip=self.clip)
        with torch.no_grad():
            mask = batch.mask.double()
            returns, missed = batch.returns.double(), (batch.returns - batch.old_values).double()
            columns = (torch.ones_like(mask), errors, returns, returns**2, missed, missed**2)
            of_values = {name: (column * mask).sum() for name, column in zip(SUMS, columns, strict=True)}
        return loss + (batch.weights * errors).sum(), sums | of_values

    def summarize(self, sums: list[dict[str, Tensor]]) -> dict[str, float]:
        """See Loss.summarize."""
        totals = {name: sum(float(one[name]) for one in sums) for name in SUMS}
        tokens = totals["value/tokens"] or math.nan
        loss, returns, squares, missed, missed_squares = (totals[name] / tokens for name in SUMS[1:])
        return self.of_policy.summarize(sums) | {
            "value/loss": loss,
            "value/explained_variance": explained_variance(squares, returns, missed_squares, missed),
        }


def explained_variance(squares: float, mean: float, missed_squares: float, missed: float) -> float:
    """1 - var(R - V) / var(R), of mean squares and means; NaN where all returns are equal."""
    spread = squares - mean**2
    return 1 - (missed_squares - missed**2) / spread if spread > LEAST_SPREAD * squares else math.nan


def build_actor_critic_loss(config: Config) -> ActorCriticLoss:
    """The loss that a configuration asks for."""
    return ActorCriticLoss(build_loss(config), config.gamma, config.gae_lambda, config.value_clip)
