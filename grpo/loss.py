"""The policy loss: log-probabilities and a batch -> one number to minimise, and metrics. Plain torch.

    build_loss(config)  chooses ratio, objective, correction, masks and extra terms once; the Loss it returns has
                        nothing left to decide.

Notation, per sampled token t of completion i:
    p = policy_logprobs (with gradient)      o = old_logprobs, the policy that sampled, by the trainer's own numerics
    q = sampler_logprobs, by the engine's    f = reference_logprobs, adapter off        A = advantage

    loss = sum_t weight_t * ( keep_t * correction_t * objective(p - o, A) + kl_coef * KL_t - entropy_coef * H_t )

`weight` is the normalisation (grpo/packing.py). All per-token arrays are [N] and 0 where nothing was sampled, so
that prompts and other tokens add exactly nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from grpo.config import Config
from grpo.types import Batch

# exp() of a larger log ratio would only ever be clipped or masked; the bound keeps it finite in float32.
MAX_LOG_RATIO = 20.0

# What a Loss sums over sampled tokens, beside the loss itself.
METRICS = ("tokens", "policy/loss", "policy/entropy", "policy/clip_fraction", "policy/kept", "mismatch/kl",
           "mismatch/gap", "mismatch/correction")  # fmt: skip


@dataclass
class Pass:
    """What one forward pass over a batch gave: all [N] float32, 0 where not sampled."""

    logprobs: Tensor  # p, with gradient
    entropy: Tensor  # H of the distribution at the sampling temperature
    old: Tensor  # o, no gradient


Ratio = Callable[[Tensor, Batch], Tensor]  # log ratio [N] -> log ratio [N] that the objective sees
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]  # (log ratio, A, p) [N] -> token loss [N]
Correction = Callable[[Tensor, Batch], Tensor]  # o - q [N] -> weight [N]
Mask = Callable[[Pass, Batch], Tensor]  # -> [N] of 0 and 1
Term = Callable[[Pass, Batch], Tensor]  # -> token loss [N], added


@dataclass(frozen=True)
class Loss:
    """A policy loss with all choices made. Call it with a forward pass and its batch."""

    ratio: Ratio
    objective: Objective
    correction: Correction
    masks: tuple[Mask, ...]
    terms: tuple[Term, ...]
    clip_low: float
    clip_high: float

    def __call__(self, forward: Pass, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's share of the step's loss, and sums over its sampled tokens for the metrics.

        Sums, not means: those of all batches of a step are added and divided once (`summarize`).
        """
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

    def _sums(self, forward: Pass, batch: Batch, log_ratio: Tensor, gap: Tensor, keep: Tensor) -> dict[str, Tensor]:
        mask = batch.mask.float()
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        lowered = (ratio < 1 - self.clip_low) & (batch.advantages < 0)
        raised = (ratio > 1 + self.clip_high) & (batch.advantages > 0)
        return {
            "tokens": mask.sum(),
            "policy/entropy": (forward.entropy * mask).sum(),
            "policy/clip_fraction": ((lowered | raised) * mask).sum(),
            "policy/kept": (keep * mask).sum(),
            # k3 of KL(sampler || trainer) on the sampler's own tokens: never negative, 0 when they agree.
            "mismatch/kl": ((gap.clamp(max=MAX_LOG_RATIO).expm1() - gap) * mask).sum(),
            "mismatch/gap": (gap.abs() * mask).sum(),
            "mismatch/correction": (self.correction(gap, batch) * mask).sum(),
        }


def summarize(sums: list[dict[str, Tensor]]) -> dict[str, float]:
    """The metrics of a step from the sums of its batches: token means, and the loss as it is.

    A step that trained nothing has no sums: its loss is 0, and the means, of nothing, are NaN.
    """
    totals = {name: sum(float(one[name]) for one in sums) for name in METRICS}
    tokens = totals.pop("tokens") or math.nan
    loss = totals.pop("policy/loss")
    return {"policy/loss": loss} | {name: total / tokens for name, total in totals.items()}


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


def cispo(log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, *, cap: float) -> Tensor:
    """-stop_gradient(min(r, cap)) A p: no token loses its gradient: MiniMax-M1 2025, arXiv 2506.13585, equation 4."""
    return -log_ratio.detach().clamp(max=math.log(cap)).exp() * advantages * logprobs


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
    return (forward.entropy.detach() >= batch.entropy_floor).float()


# ---- extra terms


def kl_k1(log_ratio: Tensor) -> Tensor:
    """p - f: unbiased, high variance. These three: Schulman 2020, joschu.net/blog/kl-approx.html."""
    return log_ratio


def kl_k2(log_ratio: Tensor) -> Tensor:
    """(p - f)^2 / 2: biased, low variance; its gradient is that of the true KL."""
    return log_ratio**2 / 2


def kl_k3(log_ratio: Tensor) -> Tensor:
    """exp(f - p) - (f - p) - 1: unbiased and never negative."""
    return (-log_ratio).clamp(max=MAX_LOG_RATIO).exp() + log_ratio - 1


def kl_term(forward: Pass, batch: Batch, *, estimator: Callable[[Tensor], Tensor], coef: float) -> Tensor:
    """coef * KL estimate against the reference policy."""
    return coef * estimator(forward.logprobs - batch.reference_logprobs)


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


def build_loss(config: Config) -> Loss:
    """The Loss that a configuration asks for. Terms and masks that are off are not there at all."""
    corrections: dict[str, Correction] = {
        "none": no_correction,
        "token_tis": partial(token_tis, cap=config.correction_cap),
        "sequence_tis": partial(sequence_tis, cap=config.correction_cap),
        "token_mask": partial(token_mask, floor=config.correction_floor, cap=config.correction_cap),
        "sequence_mask": partial(sequence_mask, floor=config.correction_floor, cap=config.correction_cap),
    }
    clip = partial(clipped, low=config.clip_low, high=config.clip_high, dual=config.dual_clip)
    estimator = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[config.kl_estimator]
    masks: list[Mask] = []
    if config.off_policy_mask < math.inf:
        masks.append(partial(on_policy_enough, threshold=config.off_policy_mask))
    if config.top_entropy < 1:
        masks.append(entropy_on_top)
    terms: list[Term] = []
    if config.kl_coef:
        terms.append(partial(kl_term, estimator=estimator, coef=config.kl_coef))
    if config.entropy_coef:
        terms.append(partial(entropy_term, coef=config.entropy_coef))
    return Loss(
        ratio=sequence_ratio if config.objective == "gspo" else token_ratio,
        objective=partial(cispo, cap=config.cispo_cap) if config.objective == "cispo" else clip,
        correction=corrections[config.correction],
        masks=tuple(masks),
        terms=tuple(terms),
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
