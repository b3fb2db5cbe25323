"""Silent: the recorder of a rank that writes nothing, because rank 0 writes for all. Knows no rank but its own name."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Self

from grpo.record.recorder import Recorder
from grpo.record.sinks import Sink
from grpo.terminal import plain
from grpo.types import Group


class Silent(Recorder):
    """Hears all that a Recorder hears. What only this rank knows it says on standard error."""

    def __init__(self, name: str):
        self.name = name

    def add(self, sink: Sink) -> None:
        """See Recorder.add."""

    def __enter__(self) -> Self:
        return self

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Recorder.step."""

    def evaluation(self, step: int, scores: Mapping[str, float], groups: Sequence[Group] = ()) -> None:
        """See Recorder.evaluation."""

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """See Recorder.completions."""

    def stage(self, name: str) -> None:
        """See Recorder.stage."""

    def message(self, text: str) -> None:
        """See Recorder.message."""
        print(f"{self.name}: {plain(text)}", file=sys.stderr, flush=True)

    def position(self) -> dict[str, int]:
        """See Recorder.position."""
        return {}

    def fsync(self) -> None:
        """See Recorder.fsync."""

    def close(self) -> None:
        """See Recorder.close."""

    def warnings(self) -> list[str]:
        """See Recorder.warnings."""
        return []
