"""The canary: a fixed batch scored by engine and policy after every sync, to prove that they are the same model.

"The engine silently kept the base policy" is this field's most reported bug. Two numbers tell:

    gap     mean |log p of the engine - log p of the policy|: under a bound that is calibrated at the start
    moved   mean |log p of the engine now - at the last sync|: more than noise whenever the policy's own has moved

The first finds wrong weights; the second an engine that stands still while updates are too small for the first.

It is small (one or two short completions, as the engine chooses), so it costs little and runs at every sync.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.packing import lay_out
from grpo.policy import Policy
from grpo.types import Batch, Completion, Group, Prompt

Score = Callable[[list[list[int]], list[list[int]]], list[list[float]]]

# The gap may grow to this many times what it was at the first sync ...
GAP_GROWTH = 4.0
# ... and is never asked to be smaller than this share of a log-probability, by the precision of the computation.
SMALLEST_BOUND = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# A gap at the start that no difference of kernels explains: then the engine computes another model from the outset.
LARGEST_NOISE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}

# A mean movement of the policy's log-probabilities that rounding alone cannot explain, by the same precision.
STIR = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 2e-3}
# An engine that moved less than this share of what the policy moved has not taken the update up.
STANDSTILL = 0.1


class Canary:
    """A fixed batch, the engine's and the policy's log-probabilities of it at the last sync, and the bound."""

    def __init__(self, policy: Policy, score: Score, prompts: list[Prompt], completions: list[list[int]]):
        """completions: [T] tokens after each prompt."""
        self.policy, self.score, self.completions = policy, score, completions
        self.prompts = [prompt.tokens for prompt in prompts]
        self.batch = _batch(prompts, self.completions, policy.device)
        self.engine_before, self.policy_before = self._measure()
        self.noise = _distance(self.engine_before, self.policy_before)
        dtype = policy.store.compute_dtype
        self.bound = max(GAP_GROWTH * self.noise, SMALLEST_BOUND[dtype])
        self.stir = STIR[dtype]
        if not self.noise <= LARGEST_NOISE[dtype]:
            raise UserError(
                f"The rollout engine is not the policy: before any update their log-probabilities differ by "
                f"{self.noise:.2g} on average, where different kernels explain at most {LARGEST_NOISE[dtype]:.2g}. "
                "This model cannot be sampled from by this engine. Please report this with the model's name."
            )
        self.repeat_noise = _distance(self.engine_before, self._measure()[0])

    def check(self) -> dict[str, float]:
        """`sync/gap` and `sync/moved`.

        Raises:
            UserError: the gap is over the bound, or the engine stood still while the policy moved.
        """
        engine, policy = self._measure()
        gap = _distance(engine, policy)
        moved, should_move = _distance(engine, self.engine_before), _distance(policy, self.policy_before)
        self.engine_before, self.policy_before = engine, policy
        if not gap <= self.bound:
            raise UserError(
                f"The rollout engine is not the policy: after the sync to version {self.policy.version} their "
                f"log-probabilities differ by {gap:.2g} on average, where {self.bound:.2g} is allowed and "
                f"{self.noise:.2g} was measured at the start. The weights did not reach the engine as they should; "
                "nothing was trained on its completions since. Please report this."
            )
        if should_move > self.stir and moved <= self.repeat_noise + STANDSTILL * should_move:
            raise UserError(
                f"The rollout engine stood still: at version {self.policy.version} the policy's log-probabilities "
                f"moved by {should_move:.2g} on average, the engine's by {moved:.2g}, where repeating itself makes "
                f"{self.repeat_noise:.2g}. It is sampling from an older policy. Please report this."
            )
        return {"sync/gap": gap, "sync/moved": moved}

    def _measure(self) -> tuple[Tensor, Tensor]:
        """The engine's and the policy's log p of every canary token, [M] each."""
        engine = torch.tensor([p for row in self.score(self.prompts, self.completions) for p in row])
        return engine, self.policy.score(self.batch)[0][self.batch.mask].cpu()


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().mean())


def _batch(prompts: list[Prompt], completions: list[list[int]], device: torch.device) -> Batch:
    groups = [
        Group(prompt, [Completion(tokens, [0.0] * len(tokens), "", "stop", 0)], advantages=torch.zeros(1))
        for prompt, tokens in zip(prompts, completions, strict=True)
    ]
    return lay_out([(group, [0]) for group in groups], lambda length: 0.0, device)
