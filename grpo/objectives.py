"""Objectives for answers that somebody gave: likelihood (SFT) and preference (DPO). Plain torch, as grpo/loss.py.

Knows nothing of where answers come from, nor of models.

    Likelihood      -log p of the answers' tokens, by the step's weights: supervised fine-tuning
    Preference      of two answers to a prompt the better one is to gain on the other, from the reference policy on

Notation: p = policy_logprobs (with gradient), f = reference_logprobs. A pair is two completions of a batch that follow
each other, the chosen one first. With r(y) = sum_t p_t - f_t over an answer y, or its mean a token where the form
says so,

    margin = r(chosen) - r(rejected)            (beta r is the implicit reward: Rafailov 2023, equation 5)
    loss   = mean over pairs of form(margin) + sft_coef * (mean over the chosen answers' tokens of -p_t)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.config import Config
from grpo.gae import build_actor_critic_loss
from grpo.loss import Loss, Preparation, Scorer, build_loss, store_reference_logprobs
from grpo.types import Batch

Form = Callable[[Tensor], Tensor]  # margin [pairs] -> loss [pairs]
Term = Callable[[Tensor, Batch], Tensor]  # log p [N] -> a batch's share of what is added to the loss


@dataclass(frozen=True)
class Likelihood:
    """sum(weights * A * -p), with A = 1 for what is taught: the token mean where weights are 1 / tokens of the step.

    The same number as the cross-entropy that transformers and TRL's SFTTrainer take over all tokens of a step.
    """

    differentiable_entropy: bool = False

    def prepare(self, policy: Scorer, batches: list[Batch]) -> None:
        """See grpo.loss.Loss: no pass is needed."""

    def prepare_step(self, policy: Scorer, batches: list[Batch]) -> None:
        """See grpo.loss.Loss."""

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See grpo.loss.Loss."""
        loss = -(batch.weights * batch.advantages * logprobs).sum()
        mask = batch.mask.float()
        with torch.no_grad():
            sums = {"policy/loss": loss.detach(), "tokens": mask.sum(), "policy/entropy": (entropy * mask).sum()}
        return loss, sums

    def summarize(self, sums: list[dict[str, Tensor]]) -> dict[str, float]:
        """See grpo.loss.Loss."""
        totals = {name: sum(float(one[name]) for one in sums) for name in ("tokens", "policy/loss", "policy/entropy")}
        tokens = totals.pop("tokens") or math.nan
        return totals | {"policy/entropy": totals["policy/entropy"] / tokens}


# ---- forms of a preference: margin -> loss


def sigmoid(margin: Tensor, *, beta: float, smoothing: float) -> Tensor:
    """-log sigmoid(beta margin): Rafailov et al. 2023, arXiv 2305.18290, equation 7. smoothing: the share of pairs
    that are taken to be the wrong way round: conservative DPO, Mitchell 2023, "A note on DPO with noisy preferences",
    equation 3."""
    reward = beta * margin
    return -(1 - smoothing) * F.logsigmoid(reward) - smoothing * F.logsigmoid(-reward)


def robust(margin: Tensor, *, beta: float, smoothing: float) -> Tensor:
    """The same made unbiased, where so many pairs are the wrong way round: Ray Chowdhury et al. 2024, arXiv 2403.00409,
    equation 11."""
    reward = beta * margin
    turned = (1 - smoothing) * -F.logsigmoid(reward) - smoothing * -F.logsigmoid(-reward)
    return turned / (1 - 2 * smoothing)


def ipo(margin: Tensor, *, beta: float) -> Tensor:
    """(margin - 1 / (2 beta))^2: Azar et al. 2023, arXiv 2310.12036, equation 17, where beta is called tau. The margin
    is that of means over the tokens, as its authors told the makers of TRL that they computed it."""
    return (margin - 1 / (2 * beta)) ** 2


# What the metrics of a preference are sums of, beside the loss; the first two are counts.
_OF_PAIRS = ("pairs", "tokens", "policy/entropy", "dpo/accuracy", "dpo/margin", "dpo/chosen", "dpo/rejected")


@dataclass(frozen=True)
class Preference:
    """DPO and what is made like it, with all choices made."""

    form: Form
    beta: float  # for the metrics
    lengths: Callable[[Tensor], Tensor]  # tokens of answers [pairs, 2] -> what their sums are divided by [pairs, 2]
    preparations: tuple[Preparation, ...]
    terms: tuple[Term, ...]
    differentiable_entropy: bool = False

    @torch.no_grad()
    def prepare(self, policy: Scorer, batches: list[Batch]) -> None:
        """See grpo.loss.Loss: what the reference policy says to the same tokens."""
        for preparation in self.preparations:
            preparation(policy, batches)

    def prepare_step(self, policy: Scorer, batches: list[Batch]) -> None:
        """See grpo.loss.Loss."""

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See grpo.loss.Loss. The batch has whole pairs (grpo.packing.fill_whole)."""
        ratios = by_pair(logprobs - batch.reference_logprobs, batch)
        margins, chosen, rejected = self.margins(ratios, by_pair(torch.ones_like(logprobs), batch))
        shares = by_pair(batch.weights, batch).sum(dim=1)  # of the pairs in the step: 1 / pairs
        loss = (shares * self.form(margins)).sum()
        for term in self.terms:
            loss = loss + term(logprobs, batch)
        with torch.no_grad():
            mask = batch.mask.float()
            sums = {
                "policy/loss": loss.detach(),
                "pairs": torch.ones_like(margins).sum(),
                "tokens": mask.sum(),
                "policy/entropy": (entropy * mask).sum(),
                "dpo/accuracy": preferred(margins).sum(),
                "dpo/margin": self.beta * margins.sum(),
                "dpo/chosen": self.beta * chosen.sum(),
                "dpo/rejected": self.beta * rejected.sum(),
            }
        return loss, sums

    def margins(self, ratios: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of pairs, [pairs] each: the margin, and r of the chosen and of the rejected answer.

        ratios: sum of p - f over each answer; lengths: its tokens; both [pairs, 2], chosen and rejected.
        """
        chosen, rejected = (ratios / self.lengths(lengths)).unbind(dim=1)
        return chosen - rejected, chosen, rejected

    def summarize(self, sums: list[dict[str, Tensor]]) -> dict[str, float]:
        """See grpo.loss.Loss."""
        totals = {name: sum(float(one[name]) for one in sums) for name in ("policy/loss", *_OF_PAIRS)}
        pairs, tokens = totals.pop("pairs") or math.nan, totals.pop("tokens") or math.nan
        of_pairs = {name: totals[name] / pairs for name in totals if name.startswith("dpo/")}
        return totals | of_pairs | {"policy/entropy": totals["policy/entropy"] / tokens}


def by_pair(values: Tensor, batch: Batch) -> Tensor:
    """The sums of per-token values [N] over each answer, by pairs: [pairs, 2], chosen and rejected."""
    sums = torch.zeros(batch.num_sequences, dtype=values.dtype, device=values.device)
    return sums.index_add(0, batch.sequence, values * batch.mask).view(-1, 2)


def preferred(margins: Tensor) -> Tensor:
    """1 where the better answer has gained on the other, 0 where it has lost, and a half where neither has: a policy
    that has not moved prefers neither, and one that moves at random stays at a half of all pairs."""
    return (margins.sign() + 1) / 2


def summed(lengths: Tensor) -> Tensor:
    """r is a sum over the answer."""
    return torch.ones_like(lengths)


def averaged(lengths: Tensor) -> Tensor:
    """r is a mean over the answer's tokens, so that longer ones have no larger margins."""
    return lengths


def store_likelihood_weights(policy: Scorer, batches: list[Batch]) -> None:
    """What each token of a chosen answer counts in their token mean over the step; 0 on the rest."""
    chosen = [batch.mask & (batch.advantages > 0) for batch in batches]
    tokens = sum(int(mask.sum()) for mask in chosen)
    for batch, mask in zip(batches, chosen, strict=True):
        batch.likelihood_weights = mask.float() / tokens


def likelihood_of_chosen(logprobs: Tensor, batch: Batch, *, coef: float) -> Tensor:
    """coef * the mean of -p over the chosen answers' tokens, so that they do not become rarer while they win: Pang et
    al. 2024, arXiv 2404.19733, equation 1; over the step's tokens, as TRL has it ("sft")."""
    return -coef * (batch.likelihood_weights * logprobs).sum()


# ---- choosing


def build_preference(config: Config) -> Preference:
    """The preference that a configuration asks for."""
    noisy = dict(beta=config.dpo_beta, smoothing=config.label_smoothing)
    forms: dict[str, Form] = {
        "sigmoid": partial(sigmoid, **noisy),
        "sigmoid_norm": partial(sigmoid, **noisy),
        "robust": partial(robust, **noisy),
        "ipo": partial(ipo, beta=config.dpo_beta),
    }
    with_likelihood = config.sft_coef > 0
    return Preference(
        form=forms[config.dpo_loss],
        beta=config.dpo_beta,
        lengths=averaged if config.dpo_loss in ("sigmoid_norm", "ipo") else summed,
        preparations=(store_reference_logprobs, *[store_likelihood_weights] * with_likelihood),
        terms=(partial(likelihood_of_chosen, coef=config.sft_coef),) * with_likelihood,
    )


def build_of_rewards(config: Config) -> Loss:
    """Of what the policy says itself: by values where there is a head for them."""
    return build_actor_critic_loss(config) if config.has_values else build_loss(config)


OBJECTIVES: dict[str, Callable[[Config], Loss]] = {
    "grpo": build_of_rewards,
    "sft": lambda config: Likelihood(),
    "dpo": build_preference,
}
