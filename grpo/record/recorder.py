"""All that a run writes down: the step line, metrics.jsonl, completions.jsonl, TensorBoard, curves.png.

Knows nothing of how a metric is computed; their names and meanings are in grpo/metrics.py. Steps count from 0: `step`
is the number of updates behind the policy that sampled, in an evaluation too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from grpo.errors import UserError
from grpo.metrics import HEADLINES
from grpo.record.console import Console
from grpo.record.curves import draw_curves
from grpo.record.jsonl import JsonLines, check_position, finite, read_metrics
from grpo.record.untrained import Untrained
from grpo.types import Group

STEPS_BETWEEN_SAMPLES = 10


class Recorder:
    """Records the steps from `start_step` to `total_steps` into `run_dir`, which exists.

    `position` is what `position()` returned when the checkpoint was saved that the run goes on from: what was
    written later is dropped, so that a resumed run leaves the files of an uninterrupted one. None: new files.
    `headline` is the held-out score that the step line shows.
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
    ):
        self._run_dir = Path(run_dir)
        at = position or {}
        paths = [self._run_dir / name for name in ("metrics.jsonl", "completions.jsonl")]
        for path in paths:
            check_position(path, at.get(path.name))
        # Read before anything is cut: a damaged file stays as it is.
        recorded = list(read_metrics(paths[0], at.get(paths[0].name))) if paths[0].exists() else []
        self._metrics, self._completions = (JsonLines(path, at.get(path.name)) for path in paths)
        self._events = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=start_step, flush_secs=10)
        self._held_out: dict[str, float] = {}
        self._untrained = Untrained()
        self._restore(recorded, start_step)
        self._console = Console(total_steps, start_step, task_name, reward_names, headline)

    def __enter__(self) -> Self:
        self._console.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of one training step, everywhere."""
        self._write(step, metrics)
        self._console.step(step, self._held_out | dict(metrics))
        for sentence in self._untrained.seen(step, metrics):
            self._console.message(sentence)

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """The held-out scores of the policy after `step` updates, under eval/ names; draws the curves."""
        self._write(step, scores)
        self._held_out = dict(scores)
        self._console.evaluation(step, scores)
        self._draw()

    def completions(self, step: int, groups: list[Group]) -> None:
        """One line a completion in completions.jsonl; now and then one of them on the screen."""
        self._completions.write([record for group in groups for record in _records(step, group)])
        if step % STEPS_BETWEEN_SAMPLES == 0:
            self._console.sample(step, groups[step // STEPS_BETWEEN_SAMPLES % len(groups)])

    def stage(self, name: str) -> None:
        """What the run is doing now: shown beside the progress bar."""
        self._console.stage(name)

    def message(self, text: str) -> None:
        """A line on the screen, above the progress bar."""
        self._console.message(text)

    def position(self) -> dict[str, int]:
        """How far the files are written, in bytes: for the checkpoint, which waits for `fsync`."""
        return {file.path.name: file.position() for file in (self._metrics, self._completions)}

    def fsync(self) -> None:
        """When this returns, all that was written to these files is on the disk."""
        self._metrics.fsync()
        self._completions.fsync()

    def close(self) -> None:
        """Draw the curves a last time and close every file, whatever goes wrong on the way."""
        with ExitStack() as stack:
            for sink in (self._metrics, self._completions, self._events, self._console):
                stack.callback(sink.close)
            self._draw()

    def warnings(self) -> list[str]:
        """What the end of the run should say again."""
        return list(self._untrained.warnings())

    def _draw(self) -> None:
        # A picture is no reason to stop: it can be drawn again at any time.
        try:
            draw_curves(self._metrics.path, self._run_dir / "curves.png")
        except (UserError, FileNotFoundError, PermissionError) as error:
            self._console.message(f"note: curves.png is not drawn. {error}")

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics.write([{"step": step, **finite(metrics)}])
        self._add_events(step, metrics)

    def _add_events(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def _restore(self, recorded: list[tuple[int, dict[str, float | None]]], start_step: int) -> None:
        """After a resume: the held-out score to show, its events where the purge hides them, what trained nothing."""
        for step, record in recorded:
            if any(name.startswith("eval/") for name in record):
                self._held_out = {name: value for name, value in record.items() if value is not None}
                if step >= start_step:
                    self._add_events(step, self._held_out)
            else:
                list(self._untrained.seen(step, record))


def _records(step: int, group: Group) -> list[dict[str, Any]]:
    parts = {name: values.tolist() for name, values in group.parts.items()}
    rewards, advantages = group.rewards.tolist(), group.advantages.tolist()
    return [
        {
            "step": step,
            "prompt": group.prompt.index,
            "text": completion.text,
            "finish": completion.finish,
            "tokens": len(completion.tokens),
            "parts": finite({name: values[index] for name, values in parts.items()}),
            **finite({"reward": rewards[index], "advantage": advantages[index]}),
            "policy_version": completion.policy_version,
        }
        for index, completion in enumerate(group.completions)
    ]
