"""All that a run writes down and shows: its events, handed on to a list of sinks.

Knows nothing of how a metric is computed; their names and meanings are in grpo/metrics.py. Steps count from 0: `step`
is the number of updates behind the policy that sampled, in an evaluation too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from grpo.metrics import HEADLINES, METHODS
from grpo.record.console import Console
from grpo.record.curves import Curves
from grpo.record.cut_off import CutOff
from grpo.record.failed import Failed
from grpo.record.files import Files, Gold, no_gold
from grpo.record.jsonl import finite
from grpo.record.sinks import Sink
from grpo.record.tensorboard import TensorBoard
from grpo.record.untrained import Untrained
from grpo.types import Group

Traced = Callable[[Sequence[Group]], list[dict[str, Any]]]  # the groups of a step -> records of their tokens


def no_tokens(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Of an update that nobody listens to."""
    return []


class Recorder:
    """Records the steps from `start_step` to `total_steps` into `run_dir`, which exists.

    position: of the files, where a run goes on (see Files). headline: the held-out score that the step line shows.
    gold: a prompt's gold answer. traced: what the update saw of the tokens of the step that it is asked for.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        start_step: int,
        task_name: str,
        reward_names: list[str],
        position: Mapping[str, int] | None = None,
        headline: str = HEADLINES[0],
        gold: Gold = no_gold,
        traced: Traced = no_tokens,
        method: str = METHODS[0],
    ):
        run_dir = Path(run_dir)
        self._files = Files(run_dir, position, gold)
        self._console = Console(total_steps, start_step, task_name, reward_names, headline, method=method)
        curves = Curves(self._files.metrics_path, run_dir / "curves.png", self.message)
        self._start_step = start_step
        self._sinks: list[Sink] = []
        # The files first: the others may be made from them.
        for sink in (self._files, TensorBoard(run_dir / "tensorboard", start_step), self._console, curves):
            self.add(sink)
        self._traced = traced
        self._untrained, self._cut_off, self._failed = Untrained(), CutOff(), Failed()
        for step, record in self._files.recorded:
            list(self._untrained.seen(step, record))
            self._failed.seen(record)
            list(self._cut_off.seen(step, {name: value for name, value in record.items() if value is not None}))

    def add(self, sink: Sink) -> None:
        """One more, before the run begins."""
        sink.resumed(self._files.recorded, self._start_step)
        self._sinks.append(sink)

    def __enter__(self) -> Self:
        self._console.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of one training step."""
        for sink in self._sinks:
            sink.step(step, metrics)
        self._failed.seen(metrics)
        for sentence in [*self._untrained.seen(step, finite(metrics)), *self._cut_off.seen(step, metrics)]:
            self.message(sentence)

    def evaluation(self, step: int, scores: Mapping[str, float], groups: Sequence[Group] = ()) -> None:
        """The held-out scores of the policy after `step` updates, under eval/ names, and what was scored."""
        for sink in self._sinks:
            sink.evaluation(step, scores, groups)

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """The scored completions of a step, after its update."""
        tokens = self._traced(groups)
        for sink in self._sinks:
            sink.completions(step, groups, tokens)

    def stage(self, name: str) -> None:
        """What the run is doing now."""
        for sink in self._sinks:
            sink.stage(name)

    def message(self, text: str) -> None:
        """A sentence for whoever watches."""
        for sink in self._sinks:
            sink.message(text)

    def position(self) -> dict[str, int]:
        """How far the files are written: for the checkpoint, which waits for `fsync`."""
        return self._files.position()

    def fsync(self) -> None:
        """When this returns, all that was written to the files is on the disk."""
        self._files.fsync()

    def close(self) -> None:
        """Close every sink, the last first, whatever goes wrong on the way."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)

    def warnings(self) -> list[str]:
        """What the end of the run should say again."""
        return [*self._untrained.warnings(), *self._failed.warnings()]
