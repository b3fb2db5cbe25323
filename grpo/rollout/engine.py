"""Engine: the protocol of whoever samples completions, and what all of them do alike.
Knows nothing of rewards or gradients.
"""

from __future__ import annotations

from typing import Any, Protocol

from grpo.types import Completion, Group, Prompt


class Engine(Protocol):
    """Samples from the policy, and says so with the policy's version on every completion."""

    def rollout(self, prompts: list[Prompt], group_size: int, seed: int) -> list[Group]:
        """A group of completions for each prompt, at the engine's temperature; the same ones for the same seed."""
        ...

    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """log p of given completions [T] after given prompts [P], computed the way the engine samples."""
        ...

    def sync(self) -> dict[str, float]:
        """Take up the policy's present weights and prove it (grpo/rollout/canary.py). Returns `sync/...` metrics.

        Raises:
            UserError: engine and policy are not the same model.
        """
        ...

    def release(self) -> None:
        """Let go of memory that the update can use; the next rollout or score takes it again."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def completion_of(tokens: list[int], logprobs: list[float], stopped: bool, tokenizer: Any, version: int) -> Completion:
    """What was sampled, as a Completion: a stop token is among its tokens and not in its text."""
    return Completion(
        tokens=tokens,
        sampler_logprobs=logprobs,
        text=tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=True),
        finish="stop" if stopped else "length",
        policy_version=version,
    )


def in_groups(prompts: list[Prompt], group_size: int, completions: list[Completion]) -> list[Group]:
    """Completions that lie prompt after prompt, `group_size` for each."""
    return [
        Group(prompt, completions[index * group_size : (index + 1) * group_size])
        for index, prompt in enumerate(prompts)
    ]
