"""Engines for a run that does not learn from what is sampled. Knows nothing of what it learns from.

Idle        nobody samples: the held-out score is of answers that are given
OnCall      an engine that is asked for held-out scores alone, and follows the policy when it is asked
"""

from __future__ import annotations

from typing import Any

from grpo.rollout.engine import Engine, Finished, nobody
from grpo.types import Completion, Request


class NoCanary:
    """Nothing is proved of nobody."""

    noise = 0.0

    def state(self) -> dict[str, Any]:
        """See grpo.rollout.canary.Canary."""
        return {}

    def restore(self, state: dict[str, Any]) -> bool:
        """See grpo.rollout.canary.Canary."""
        return False


class Idle:
    """An Engine that is never asked."""

    canary: Any = NoCanary()

    def sample(self, requests: list[Request], finished: Finished = nobody) -> list[Completion]:
        """See grpo.rollout.Engine."""
        raise AssertionError("nobody samples in this run")

    def logprobs(self, contexts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """See grpo.rollout.Engine."""
        raise AssertionError("nobody samples in this run")

    def take_up(self) -> None:
        """See grpo.rollout.Engine."""

    def sync(self) -> dict[str, float]:
        """See grpo.rollout.Engine."""
        return {}

    def release(self) -> None:
        """See grpo.rollout.Engine."""

    def close(self) -> None:
        """See grpo.rollout.Engine."""


class OnCall:
    """An Engine over another one, which hears of the updates when it is next asked: then it takes up the weights and
    proves it, once for all of them."""

    def __init__(self, engine: Engine):
        self.engine, self.canary, self._is_behind = engine, engine.canary, False

    def sample(self, requests: list[Request], finished: Finished = nobody) -> list[Completion]:
        """See grpo.rollout.Engine."""
        self._catch_up()
        return self.engine.sample(requests, finished)

    def logprobs(self, contexts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """See grpo.rollout.Engine."""
        self._catch_up()
        return self.engine.logprobs(contexts, completions)

    def take_up(self) -> None:
        """See grpo.rollout.Engine."""
        self.engine.take_up()

    def sync(self) -> dict[str, float]:
        """See grpo.rollout.Engine."""
        self._is_behind = True
        return {}

    def release(self) -> None:
        """See grpo.rollout.Engine."""
        self.engine.release()

    def close(self) -> None:
        """See grpo.rollout.Engine."""
        self.engine.close()

    def _catch_up(self) -> None:
        if self._is_behind:
            self.engine.sync()
        self._is_behind = False
