"""The last lines of a run: what was learnt, where everything is, and what can be done next.

Knows nothing of training.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grpo.checkpoint import Progress
from grpo.errors import UserError
from grpo.evaluate import comparison
from grpo.folder import CHECKPOINTS
from grpo.report import REPORT, paired_line

PLACES = (("report", REPORT), ("completions", "completions.jsonl"), ("numbers", "metrics.jsonl"))


@dataclass(frozen=True)
class After:
    """What can be done when a run is over: (how, what for), and how one goes on that is not."""

    go_on: str
    next: tuple[tuple[str, str], ...]


_COMMANDS = (
    ("python -m grpo.chat {run}", "talk to it, and to its base beside it"),
    ("python -m grpo.run --eval {run}", "held-out scores of its best checkpoint"),
    ("python -m grpo.run --resume {run} --steps {more}", "twice as long"),
    ("python -m grpo.report {run} ANOTHER --out FILE", "beside another run"),
    ("python -m grpo.export {run} --to FOLDER", "the best adapter; --merged the whole model, --gguf for llama.cpp"),
)
IN_A_SHELL = After("python -m grpo.run --resume {run}", _COMMANDS)
IN_PYTHON = After(
    "run.resume()",
    (
        ('run.sample(["..."])', "what it says to a prompt"),
        ("run.evaluate()", "held-out scores of its best checkpoint"),
        ("run.resume(steps={more})", "twice as long"),
        _COMMANDS[0],
        _COMMANDS[-1],
    ),
)


def closing(folder: Path, progress: Progress, steps: int, after: After = IN_A_SHELL) -> Iterator[str]:
    """A line each; of a run of so many steps in that folder, as far as it is."""
    run = shlex.quote(str(folder))
    if progress.step < steps:
        yield f"Stopped after step {progress.step} of {steps}; everything is saved. Go on with"
        yield f"  {after.go_on.format(run=run)}"
        return
    yield comparison(progress.first_scores, progress.last_scores)
    yield from _tested(folder)
    adapter = folder / CHECKPOINTS / f"step-{progress.step:06d}"
    best = folder / CHECKPOINTS / f"step-{progress.best_step:06d}"
    places = [(what, folder / name) for what, name in PLACES if (folder / name).exists()]
    places += [("adapter", adapter)] * (progress.step > 0)  # --steps 0 scores the model, and saves none
    places += [("the best", best)] * (best != adapter and best.exists())
    yield ""
    for what, path in places:
        yield f"{what:<11} {path}"
    yield ""
    yield "next:"
    commands = [(form.format(run=run, more=2 * steps), what) for form, what in after.next]
    if not progress.step:
        commands = [(form.format(run=run, more="N"), "train") for form, _ in after.next if "{more}" in form]
    width = max(len(command) for command, _ in commands)
    for command, what in commands:
        yield f"  {command:<{width}}   # {what}"


def _tested(folder: Path) -> Iterator[str]:
    """The paired test over the held-out prompts; the run is over whether or not its files can be read again."""
    try:
        yield from paired_line(folder)
    except (UserError, OSError):
        return
