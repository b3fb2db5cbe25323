"""TensorBoard's events: the numbers of metrics.jsonl under the same names. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from grpo.record.sinks import Numbers, Recorded, Sink
from grpo.types import Group


class TensorBoard(Sink):
    """Writes events into `folder`; what an earlier process wrote from `start_step` on is hidden."""

    def __init__(self, folder: Path, start_step: int):
        self._events = SummaryWriter(str(folder), purge_step=start_step, flush_secs=10)

    def resumed(self, recorded: Sequence[Recorded], start_step: int) -> None:
        """A held-out score of the step that the run goes on from was hidden too."""
        for step, record in recorded:
            if step >= start_step and any(name.startswith("eval/") for name in record):
                self._add(step, {name: value for name, value in record.items() if value is not None})

    def step(self, step: int, metrics: Numbers) -> None:
        self._add(step, metrics)

    def evaluation(self, step: int, scores: Numbers, groups: Sequence[Group] = ()) -> None:
        self._add(step, scores)

    def close(self) -> None:
        self._events.close()

    def _add(self, step: int, metrics: Numbers) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
