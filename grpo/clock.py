"""Clock: the seconds of each stage of a step. Knows nothing of what the stages do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from grpo.types import Group, sampled_tokens


class Clock:
    """Seconds of each stage of a step."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        """tell: is told of each stage when it begins."""
        self.tell = tell
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.tell(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def metrics(self, groups: list[Group]) -> dict[str, float]:
        """time/<stage> in seconds, and sampled tokens a second of the whole step."""
        total = time.perf_counter() - self.start
        return {
            **{f"time/{stage}": seconds for stage, seconds in self.seconds.items()},
            "time/step": total,
            "speed/tokens_per_second": sampled_tokens(groups) / total,
        }
