"""Engine: the protocol of whoever samples completions, and what all of them do alike.
Knows nothing of prompts' rows, groups, rewards or gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from grpo.types import Completion, Request

Finished = Callable[[int, Completion], object]  # is told of a completion, and which of the requests it answers


def nobody(index: int, completion: Completion) -> None:
    """Waits for no completion before all are there."""


class Watch(Protocol):
    """What a run has of an engine's canary (grpo/rollout/canary.py)."""

    @property
    def noise(self) -> float: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> bool: ...


class Engine(Protocol):
    """Samples from the policy, and says so with the policy's version on every completion."""

    @property
    def canary(self) -> Watch: ...

    def sample(self, requests: list[Request], finished: Finished = nobody) -> list[Completion]:
        """A completion for each request, at the engine's temperature. What is drawn for a request follows from its
        seed, whoever else is asked for in the same call.

        finished: is told of each completion of those that are returned, in any order, where the engine can as soon as
        it is written. It returns at once.
        """
        ...

    def logprobs(self, contexts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """log p of given completions [T] after given contexts [P], computed the way the engine samples."""
        ...

    def take_up(self) -> None:
        """Sample from the policy's present weights from now on, and forget what is cached from older ones."""
        ...

    def sync(self) -> dict[str, float]:
        """`take_up`, and the proof of it (grpo/rollout/canary.py). Returns `sync/...` metrics.

        Raises:
            UserError: engine and policy are not the same model.
        """
        ...

    def release(self) -> None:
        """Let go of memory that the update can use; the next call takes it again."""
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
