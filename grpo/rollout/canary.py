"""The canary: fixed completions whose log-probabilities engine and policy are compared on after every sync, to prove
that they are the same model. Knows nothing of how an engine samples.

"The engine silently kept the base policy" is this field's most reported bug. Two questions are asked after a sync:

    gap      do they agree? The root mean square of log p of the engine - log p of the policy is at most GAP_GROWTH
             times what it was before any update: the noise of two ways to compute the same.
    follows  did the engine move with the policy, or stand still? Movement is counted from the last version at which
             this was proved, so that small steps add up until they can be told from noise; until then nothing is said.

With x the policy's movement over M tokens and d the engine's, both noisy by sqrt(2) noise a token, the slope <x, d> /
|x|^2 is 0 on average for an engine that stood still, with deviation sqrt(2) noise / |x|. For one that followed it is
at least s = 1 - 2 M noise^2 / |x|^2, since noise may be all that part of x. The two are told apart by whether the
slope is above s / 2, once s / 2 is DEVIATIONS deviations; before that, neither is said.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.packing import lay_out_to_read
from grpo.policy import Policy
from grpo.rollout.routers import Chosen, build_routers, nothing_to_choose, tells_nothing
from grpo.seeds import Purpose, mix_seed
from grpo.types import Completion, Group, Prompt, Request

LogProbs = Callable[[list[list[int]], list[list[int]]], list[list[float]]]  # (contexts, completions) -> log p

# For each completion that is kept so many are written, and the most uncertain chosen: a token that is certain tells
# nothing.
CANDIDATES = 2
# Noise is measured on this many repetitions: some kernels give other sums for other neighbours.
REPETITIONS = 3
# The gap may grow to this many times the noise.
GAP_GROWTH = 4.0
# Noise is never taken to be less than this, by the precision of the computation.
SMALLEST_NOISE = {torch.float32: 2.5e-5, torch.float16: 2.5e-3, torch.bfloat16: 1.25e-2}
# Noise that no difference of kernels explains: then the engine computes another model from the outset.
LARGEST_NOISE = {torch.float32: 1e-3, torch.float16: 0.15, torch.bfloat16: 0.5}
# How far both hypotheses are from the line between them.
DEVIATIONS = 7.0


class Samples(Protocol):
    """What a canary needs of an engine."""

    def sample(self, requests: list[Request]) -> list[Completion]: ...

    def logprobs(self, contexts: list[list[int]], completions: list[list[int]]) -> list[list[float]]: ...

    def take_up(self) -> None: ...


class Measured(NamedTuple):
    """log p of every canary token, [M] float32 each, at a version of the policy."""

    version: int
    engine: Tensor
    policy: Tensor


def build_canary(
    engine: Samples,
    policy: Policy,
    contexts: list[list[int]],
    kept: int,
    max_tokens: int,
    choices: Chosen = tells_nothing,
) -> Canary:
    """A canary on `kept` completions of at most `max_tokens` after each of these contexts. choices: the engine's, of
    experts.

    They are written by the base model, so that a resumed run has the canary of the uninterrupted one.
    """
    count = CANDIDATES * kept
    limit = min(max_tokens, policy.config.max_completion_tokens)
    requests = [
        Request(context, mix_seed(Purpose.CANARY, row, member), limit)
        for row, context in enumerate(contexts)
        for member in range(count)
    ]
    with policy.store.reference():
        engine.take_up()
        written = engine.sample(requests)
    engine.take_up()
    groups = [written[start : start + count] for start in range(0, len(written), count)]
    chosen = [sorted(group, key=_surprise, reverse=True)[:kept] for group in groups]
    return Canary(policy, engine.logprobs, contexts, chosen, build_routers(policy, choices, contexts, chosen))


def _surprise(completion: Completion) -> float:
    return -sum(completion.sampler_logprobs) / len(completion.sampler_logprobs)


class Canary:
    """Fixed completions, the noise between engine and policy on them, and the last version at which both moved
    together."""

    def __init__(
        self,
        policy: Policy,
        logprobs: LogProbs,
        contexts: list[list[int]],
        completions: list[list[Completion]],
        routers: Callable[[], dict[str, float]] = nothing_to_choose,
    ):
        """completions: some after each context. routers: metrics of what is chosen among experts.

        Raises:
            UserError: engine and policy are not the same model to begin with.
        """
        self.policy, self.logprobs, self.routers = policy, logprobs, routers
        groups = [
            Group(Prompt(row, "", context, {}), some)
            for row, (context, some) in enumerate(zip(contexts, completions, strict=True))
        ]
        self.batch = lay_out_to_read(groups, policy.device)
        self.contexts = [group.prompt.tokens for group in groups for _ in group.completions]
        self.completions = [completion.tokens for group in groups for completion in group.completions]
        measured = [self._measure() for _ in range(REPETITIONS)]
        dtype = policy.store.compute_dtype
        gap = _rms(torch.cat([each.engine - each.policy for each in measured]))
        self.noise = max(gap, SMALLEST_NOISE[dtype])
        self.key = _key(logprobs, dtype, policy.device, self.completions)
        self.last = self.proved = measured[0]
        if not gap <= LARGEST_NOISE[dtype]:
            raise UserError(
                f"The rollout engine is not the policy: before any update their log-probabilities differ by "
                f"{gap:.2g} (root mean square), where different kernels explain at most {LARGEST_NOISE[dtype]:.2g}. "
                "This model cannot be sampled from by this engine. Please report this with the model's name."
            )

    @property
    def bound(self) -> float:
        """The largest gap that is allowed."""
        return GAP_GROWTH * self.noise

    def check(self) -> dict[str, float]:
        """Metrics: sync/gap and sync/moved (since the last sync), means of absolute differences in nats;
        sync/unproved, the number of updates since the engine was last proved to move with the policy, 0 where it was
        just now; and those of its routers (grpo/rollout/routers.py).

        Raises:
            UserError: the policy is not finite any more, the gap is over the bound, or the engine stood still while the
                policy moved.
        """
        now, before = self._measure(), self.last
        self._check_finite(now)
        self._check_gap(now)
        noise = max(self.noise, _rms(self.proved.engine - self.proved.policy))
        moved, engine_moved = now.policy - self.proved.policy, now.engine - self.proved.engine
        verdict = follows(moved, engine_moved, noise)
        if verdict is False:
            raise UserError(
                f"The rollout engine stood still: from version {self.proved.version} to {now.version} the policy's "
                f"log-probabilities moved by {_rms(moved):.2g} (root mean square), and of that the engine's show "
                f"{slope(moved, engine_moved):.0%}, where noise is {noise:.2g}. It is sampling from an older policy. "
                "Please report this."
            )
        self.last = now
        self.proved = now if verdict else self.proved
        return {
            "sync/gap": _mean(now.engine - now.policy),
            "sync/moved": _mean(now.engine - before.engine),
            "sync/unproved": now.version - self.proved.version,
            **self.routers(),
        }

    def state(self) -> dict[str, Any]:
        """What a resumed run must know to go on as the uninterrupted one."""
        return {
            "key": self.key,
            "noise": self.noise,
            "version": self.proved.version,
            "engine": self.proved.engine.tolist(),
            "policy": self.proved.policy.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """The inverse of `state`, and whether it was taken: not that of another model, engine or machine, whose noise
        is another."""
        fits = state.get("key") == self.key
        if fits:
            self.noise = state["noise"]
            self.proved = Measured(state["version"], torch.tensor(state["engine"]), torch.tensor(state["policy"]))
        return fits

    def _check_finite(self, now: Measured) -> None:
        if not now.policy.isfinite().all():
            raise UserError(
                f"After the update to version {now.version} the policy's log-probabilities are no numbers any more: "
                "the training has diverged. Go on from the last checkpoint with a lower --learning-rate."
            )

    def _check_gap(self, now: Measured) -> None:
        gap = _rms(now.engine - now.policy)
        if not gap <= self.bound:
            raise UserError(
                f"The rollout engine is not the policy: after the sync to version {now.version} their "
                f"log-probabilities differ by {gap:.2g} (root mean square), where {self.bound:.2g} is allowed and the "
                f"noise measured at the start is {self.noise:.2g}. The weights did not reach the engine as they "
                "should; nothing was trained on its completions since. Please report this."
            )

    @torch.no_grad()
    def _measure(self) -> Measured:
        engine = torch.tensor([p for row in self.logprobs(self.contexts, self.completions) for p in row])
        policy = self.policy.read(self.batch)[0][self.batch.mask].cpu()
        return Measured(self.policy.version, engine, policy)


def _key(logprobs: LogProbs, dtype: torch.dtype, device: torch.device, completions: list[list[int]]) -> str:
    """What noise depends on, in a word that two runs can compare."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    parts = [getattr(logprobs, "__qualname__", ""), str(dtype), hardware, torch.__version__, completions]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def follows(policy: Tensor, engine: Tensor, noise: float) -> bool | None:
    """Whether movements [M] of the engine follow the policy's; None where noise, the root mean square of the gap
    between the two at equal weights, does not let it be told (see above)."""
    length = float(policy.norm())
    certain = length**2 - 2 * len(policy) * noise**2
    if certain < 2 * DEVIATIONS * 2**0.5 * noise * length:
        return None
    return slope(policy, engine) > certain / length**2 / 2


def slope(policy: Tensor, engine: Tensor) -> float:
    """The share of the policy's movement [M] that the engine's shows."""
    return float(policy @ engine / (policy @ policy))


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _mean(values: Tensor) -> float:
    return float(values.abs().mean())
