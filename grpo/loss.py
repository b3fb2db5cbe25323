"""The policy loss: log-probabilities and a batch -> one number to minimise, and metrics. Plain torch.

    Loss                what the update asks of any loss
    build_loss(config)  chooses ratio, objective, correction, masks, extra terms and the passes that they need once; the
                        PolicyLoss it returns has nothing left to decide.

Notation, per sampled token t of completion i:
    p = policy_logprobs (with gradient)      o = old_logprobs, the policy that sampled, by the trainer's own numerics
    q = sampler_logprobs, by the engine's    f = reference_logprobs, of --reference     A = advantage

    loss = sum_t weight_t * ( keep_t * correction_t * objective(p - o, A) + kl_coef * KL_t - entropy_coef * H_t )

`weight` is the normalisation (grpo/packing.py). All per-token arrays are [N] and 0 where nothing was sampled, so
that prompts and other tokens add exactly nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from grpo.config import Config
from grpo.types import Batch

# exp() of a larger log ratio would only ever be clipped or masked; the bound keeps it finite in float32.
MAX_LOG_RATIO = 20.0

# What a PolicyLoss sums over sampled tokens, beside the loss itself.
METRICS = ("tokens", "policy/loss", "policy/entropy", "policy/clip_fraction", "policy/kept", "mismatch/kl",
           "mismatch/gap", "mismatch/correction")  # fmt: skip


class Scorer(Protocol):
    """What a loss's preparations need of a policy."""

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """log p and entropy of the sampled tokens, [N] each, without gradient."""
        ...

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """log p under the reference policy, [N]."""
        ...

    def of_all_ranks(self, values: list[Tensor]) -> Tensor:
        """The values, [n] each, of every rank, one behind the other."""
        ...


class Loss(Protocol):
    """What the policy is taught by."""

    @property
    def differentiable_entropy(self) -> bool:
        """Whether the entropy that it is called with needs a gradient."""
        ...

    def prepare(self, policy: Scorer, batches: list[Batch]) -> None:
        """Passes without gradient over the batches of an optimizer step, before the first step is taken on any."""
        ...

    def prepare_step(self, policy: Scorer, batches: list[Batch]) -> None:
        """The same right before each optimizer step on them."""
        ...

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch's share of the loss of its optimizer step, and sums over its sampled tokens for the metrics.

        logprobs: [N] with gradient. Sums, not means: those of all batches are added and divided once (`summarize`).
        """
        ...

    def summarize(self, sums: list[dict[str, Tensor]]) -> dict[str, float]:
        """The metrics of an update from the sums of its batches, of which there may be none."""
        ...


@dataclass
class Pass:
    """What one forward pass over a batch gave: all [N] float32, 0 where not sampled."""

    logprobs: Tensor  # p, with gradient
    entropy: Tensor  # H of the distribution at the sampling temperature
    old: Tensor  # o, no gradient


Old = Callable[[Tensor, Batch], Tensor]  # p -> o, [N]
Preparation = Callable[[Scorer, list[Batch]], None]
Ratio = Callable[[Tensor, Batch], Tensor]  # log ratio [N] -> log ratio [N] that the objective sees
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]  # (log ratio, A, p) [N] -> token loss [N]
Correction = Callable[[Tensor, Batch], Tensor]  # o - q [N] -> weight [N]
Mask = Callable[[Pass, Batch], Tensor]  # -> [N] of 0 and 1
Term = Callable[[Pass, Batch], Tensor]  # -> token loss [N], added
Clips = Callable[[Tensor, Tensor], Tensor]  # (log ratio, A) [N] -> bool [N], where the objective is cut off


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss with all choices made."""

    preparations: tuple[Preparation, ...]  # once a rollout
    step_preparations: tuple[Preparation, ...]  # before each optimizer step
    old: Old
    ratio: Ratio
    objective: Objective
    clips: Clips
    correction: Correction
    masks: tuple[Mask, ...]
    terms: tuple[Term, ...]
    differentiable_entropy: bool

    @torch.no_grad()
    def prepare(self, policy: Scorer, batches: list[Batch]) -> None:
        """See Loss.prepare."""
        for preparation in self.preparations:
            preparation(policy, batches)

    @torch.no_grad()
    def prepare_step(self, policy: Scorer, batches: list[Batch]) -> None:
        """See Loss.prepare_step."""
        for preparation in self.step_preparations:
            preparation(policy, batches)

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See Loss.__call__."""
        forward = Pass(logprobs, entropy, self.old(logprobs, batch))
        log_ratio = self.ratio(forward.logprobs - forward.old, batch)
        gap = forward.old - batch.sampler_logprobs
        keep = math.prod((mask(forward, batch) for mask in self.masks), start=batch.mask.float())
        token_loss = keep * self.correction(gap, batch) * self.objective(log_ratio, batch.advantages, forward.logprobs)
        for term in self.terms:
            token_loss = token_loss + term(forward, batch)
        loss = (batch.weights * token_loss).sum()
        with torch.no_grad():
            sums = self._sums(forward, batch, log_ratio, gap, keep)
        return loss, sums | {"policy/loss": loss.detach()}

    def summarize(self, sums: list[dict[str, Tensor]]) -> dict[str, float]:
        """See Loss.summarize: token means, and the loss as it is.

        A step that trained nothing has no sums: its loss is 0, and the means, of nothing, are NaN.
        """
        totals = {name: sum(float(one[name]) for one in sums) for name in METRICS}
        tokens = totals.pop("tokens") or math.nan
        loss = totals.pop("policy/loss")
        return {"policy/loss": loss} | {name: total / tokens for name, total in totals.items()}

    def _sums(self, forward: Pass, batch: Batch, log_ratio: Tensor, gap: Tensor, keep: Tensor) -> dict[str, Tensor]:
        mask = batch.mask.float()
        return {
            "tokens": mask.sum(),
            "policy/entropy": (forward.entropy * mask).sum(),
            "policy/clip_fraction": (self.clips(log_ratio, batch.advantages) * mask).sum(),
            "policy/kept": (keep * mask).sum(),
            # k3 of KL(sampler || trainer) on the sampler's own tokens: never negative, 0 when they agree.
            "mismatch/kl": ((gap.clamp(max=MAX_LOG_RATIO).expm1() - gap) * mask).sum(),
            "mismatch/gap": (gap.abs() * mask).sum(),
            "mismatch/correction": (self.correction(gap, batch) * mask).sum(),
        }


# ---- preparations: passes without gradient, before the update


def store_old_logprobs(policy: Scorer, batches: list[Batch]) -> None:
    """o, where several optimizer steps are taken on a rollout."""
    for batch in batches:
        batch.old_logprobs = policy.read(batch)[0]


def store_reference_logprobs(policy: Scorer, batches: list[Batch]) -> None:
    """f."""
    for batch in batches:
        batch.reference_logprobs = policy.reference_logprobs(batch)


def store_top_entropy(policy: Scorer, batches: list[Batch], *, share: float) -> None:
    """Which of the optimizer step's sampled tokens are the `share` of highest entropy, by the policy as it is.

    Told token by token: the one that the share ends at is in it however the entropies of the update are rounded.
    """
    entropies = [policy.read(batch)[1] for batch in batches]
    of_sampled = [entropy[batch.mask] for entropy, batch in zip(entropies, batches, strict=True)]
    descending = policy.of_all_ranks(of_sampled).sort(descending=True).values
    lowest = descending[max(0, round(len(descending) * share) - 1)]
    for entropy, batch in zip(entropies, batches, strict=True):
        batch.in_top = entropy >= lowest


# ---- old: the policy that sampled


def same_pass(logprobs: Tensor, batch: Batch) -> Tensor:
    """With one optimizer step a rollout the policy that sampled is the policy that is updated: no pass of its own."""
    return logprobs.detach()


def stored(logprobs: Tensor, batch: Batch) -> Tensor:
    """As `store_old_logprobs` found it."""
    return batch.old_logprobs


# ---- ratio: what is compared with the clip range


def token_ratio(log_ratio: Tensor, batch: Batch) -> Tensor:
    """Each token's own: Shao et al. 2024 (GRPO), arXiv 2402.03300, equation 3."""
    return log_ratio


def sequence_ratio(log_ratio: Tensor, batch: Batch) -> Tensor:
    """The mean over the sequence, for each of its tokens: Zheng et al. 2025 (GSPO), arXiv 2507.18071, equation 7."""
    return sequence_mean(log_ratio, batch)


# ---- objective: what the ratio and the advantage are worth


def clipped(log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, *, low: float, high: float, dual: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), the two bounds apart as in DAPO (arXiv 2503.14476, equation 10).

    With A < 0 the value is at least dual * A: dual clip, Ye et al. 2020, arXiv 1912.09729, equation 5.
    """
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    floor = torch.where(advantages < 0, dual * advantages, -math.inf)
    return -torch.maximum(surrogate, floor)


def outside(log_ratio: Tensor, advantages: Tensor, *, low: float, high: float, dual: float) -> Tensor:
    """Where `clipped` is flat: the ratio has left the range on the side that the advantage pushes it to."""
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    lowered = (ratio < 1 - low) | (ratio > dual)
    return torch.where(advantages < 0, lowered, (ratio > 1 + high) & (advantages > 0))


def cispo(log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, *, cap: float) -> Tensor:
    """-stop_gradient(min(r, cap)) A p: no token loses its gradient: MiniMax-M1 2025, arXiv 2506.13585, equation 4."""
    return -log_ratio.detach().clamp(max=math.log(cap)).exp() * advantages * logprobs


def capped(log_ratio: Tensor, advantages: Tensor, *, cap: float) -> Tensor:
    """Where `cispo` uses the cap in place of the importance weight."""
    return log_ratio > math.log(cap)


# ---- correction of the sampler's numerics, from gap = o - q


def no_correction(gap: Tensor, batch: Batch) -> Tensor:
    """1 everywhere."""
    return torch.ones_like(gap)


def token_tis(gap: Tensor, batch: Batch, *, cap: float) -> Tensor:
    """min(exp(o - q), cap) a token: truncated importance sampling, Yao et al. 2025 ("Your efficient RL framework
    secretly brings you off-policy RL training"); Ionides 2008 for the truncation."""
    return gap.clamp(max=math.log(cap)).exp()


def sequence_tis(gap: Tensor, batch: Batch, *, cap: float) -> Tensor:
    """The same with the product over the sequence: unbiased up to the cap, harsher with length."""
    return token_tis(sequence_sum(gap, batch), batch, cap=cap)


def token_mask(gap: Tensor, batch: Batch, *, floor: float, cap: float) -> Tensor:
    """exp(o - q) where it lies in [floor, cap], else 0: IcePop, Ling team 2025, arXiv 2510.18855."""
    weight = gap.clamp(max=MAX_LOG_RATIO).exp()
    return weight * ((weight >= floor) & (weight <= cap))


def sequence_mask(gap: Tensor, batch: Batch, *, floor: float, cap: float) -> Tensor:
    """The same with the product over the sequence: whole sequences are kept or dropped."""
    return token_mask(sequence_sum(gap, batch), batch, floor=floor, cap=cap)


# ---- masks


def on_policy_enough(forward: Pass, batch: Batch, *, threshold: float) -> Tensor:
    """0 on sequences with A < 0 whose mean of q - p exceeds the threshold: DeepSeek-V3.2 2025, arXiv 2512.02556,
    section 3.1 ("off-policy sequence masking")."""
    drift = sequence_mean(batch.sampler_logprobs - forward.logprobs.detach(), batch)
    return 1 - ((drift > threshold) & (batch.advantages < 0)).float()


def entropy_on_top(forward: Pass, batch: Batch) -> Tensor:
    """1 where the token's entropy is among the step's highest: Wang et al. 2025, arXiv 2506.01939, equation 5."""
    return batch.in_top.float()


# ---- extra terms


def kl_k1(log_ratio: Tensor, drift: Tensor) -> Tensor:
    """p - f: unbiased, high variance; as a loss its expected gradient is 0. k1 to k3: Schulman 2020,
    joschu.net/blog/kl-approx.html, of which the gradients are worked out in docs/algorithm.md."""
    return log_ratio


def kl_k2(log_ratio: Tensor, drift: Tensor) -> Tensor:
    """(p - f)^2 / 2: biased, low variance; its gradient is that of KL(policy || reference)."""
    return log_ratio**2 / 2


def kl_k3(log_ratio: Tensor, drift: Tensor) -> Tensor:
    """exp(f - p) - (f - p) - 1: unbiased and never negative; its gradient is that of KL(reference || policy)."""
    return (-log_ratio).clamp(max=MAX_LOG_RATIO).exp() + log_ratio - 1


def kl_weighted(log_ratio: Tensor, drift: Tensor) -> Tensor:
    """exp(p - o) times k3: value and gradient are those of KL(policy || reference), also when the policy has moved
    since it sampled: DeepSeek-V3.2 2025, arXiv 2512.02556, section 3.1 ("unbiased KL estimate")."""
    return drift.clamp(max=MAX_LOG_RATIO).exp() * kl_k3(log_ratio, drift)


KL_ESTIMATORS = {"weighted": kl_weighted, "k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def kl_term(forward: Pass, batch: Batch, *, estimator: Callable[[Tensor, Tensor], Tensor], coef: float) -> Tensor:
    """coef * KL estimate against the reference policy."""
    return coef * estimator(forward.logprobs - batch.reference_logprobs, forward.logprobs - forward.old)


def entropy_term(forward: Pass, batch: Batch, *, coef: float) -> Tensor:
    """-coef * entropy, the bonus for staying undecided."""
    return -coef * forward.entropy


# ---- sums over a sequence


def sequence_sum(values: Tensor, batch: Batch) -> Tensor:
    """For each sampled token the sum of `values` over its sequence, [N]; 0 on the rest."""
    sums = torch.zeros(batch.num_sequences, dtype=values.dtype, device=values.device)
    sums = sums.index_add(0, batch.sequence, values * batch.mask)
    return sums[batch.sequence] * batch.mask


def sequence_mean(values: Tensor, batch: Batch) -> Tensor:
    """For each sampled token the mean of `values` over its sequence, [N]; 0 on the rest."""
    length = sequence_sum(torch.ones_like(values), batch).clamp(min=1)
    return sequence_sum(values, batch) / length


# ---- choosing


def build_loss(config: Config) -> PolicyLoss:
    """The loss that a configuration asks for. Terms, masks and passes that are off are not there at all."""
    several_steps = config.mini_batches * config.epochs > 1
    corrections: dict[str, Correction] = {
        "none": no_correction,
        "token_tis": partial(token_tis, cap=config.correction_cap),
        "sequence_tis": partial(sequence_tis, cap=config.correction_cap),
        "token_mask": partial(token_mask, floor=config.correction_floor, cap=config.correction_cap),
        "sequence_mask": partial(sequence_mask, floor=config.correction_floor, cap=config.correction_cap),
    }
    bounds = dict(low=config.clip_low, high=config.clip_high, dual=config.dual_clip)
    cap = dict(cap=config.cispo_cap)
    preparations: list[Preparation] = []
    step_preparations: list[Preparation] = []
    masks: list[Mask] = []
    terms: list[Term] = []
    if several_steps:
        preparations.append(store_old_logprobs)
    if config.off_policy_mask < math.inf:
        masks.append(partial(on_policy_enough, threshold=config.off_policy_mask))
    if config.top_entropy < 1:
        step_preparations.append(partial(store_top_entropy, share=config.top_entropy))
        masks.append(entropy_on_top)
    if config.kl_coef:
        preparations.append(store_reference_logprobs)
        terms.append(partial(kl_term, estimator=KL_ESTIMATORS[config.kl_estimator], coef=config.kl_coef))
    if config.entropy_coef:
        terms.append(partial(entropy_term, coef=config.entropy_coef))
    is_cispo = config.objective == "cispo"
    return PolicyLoss(
        preparations=tuple(preparations),
        step_preparations=tuple(step_preparations),
        old=stored if several_steps else same_pass,
        ratio=sequence_ratio if config.objective == "gspo" else token_ratio,
        objective=partial(cispo, **cap) if is_cispo else partial(clipped, **bounds),
        clips=partial(capped, **cap) if is_cispo else partial(outside, **bounds),
        correction=corrections[config.correction],
        masks=tuple(masks),
        terms=tuple(terms),
        differentiable_entropy=config.entropy_coef > 0,
    )
