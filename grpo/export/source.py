"""Source: what is exported: a run's checkpoint, one checkpoint, or an adapter that PEFT wrote. Writes nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from grpo.checkpoint import best_checkpoint, check_files, check_run
from grpo.config import Config
from grpo.errors import UserError
from grpo.folder import is_checkpoint, list_checkpoints, run_of, saved_run
from grpo.policy.adapter import SETTINGS, describe
from grpo.policy.load import model_source


@dataclass(frozen=True)
class Source:
    """An adapter, and what it was trained over."""

    folder: Path  # with the adapter's files
    title: str  # of what is exported, for people
    base: str  # the model's name or folder, as Hugging Face takes it
    rank: int  # the largest of its linears'
    config: Config | None  # of its run, its base as it was trained over; None for an adapter that came without one
    dense: tuple[str, ...] = ()  # projections that --quantization dynamic kept in 16 bits


def find(run: str, checkpoint: str, model: str | None) -> Source:
    """What the command line names. checkpoint: "best", "last" or a step, of a run's folder; model: the base, where it
    is elsewhere than the adapter says.

    Raises:
        UserError: there is no such thing, it is damaged, or nobody says what it was trained over.
    """
    path = Path(run)
    if not path.is_dir():
        raise UserError(
            f"There is no folder {run}. Give a run's folder, one of its checkpoints, or an adapter's folder."
        )
    if saved := saved_run(run):
        folder = choose(path, checkpoint)
        progress = check_files(folder)
        check_run(folder, saved.id)
        base = model_source(model or saved.config.model)
        title = f"{saved.name}, step {progress.step}"
        config = replace(saved.config, double_quant="on" if progress.double_quant else "off")
        return Source(folder, title, _there(base, run), describe(folder).rank, config, tuple(progress.dense))
    if checkpoint != "best":
        raise UserError(
            f"--checkpoint chooses among the checkpoints of a run, and {run} is no run's folder. Leave it out."
        )
    if not (path / SETTINGS).is_file():
        raise UserError(f"{run} is neither a run's folder nor an adapter's: it holds no {SETTINGS}. Give one that is.")
    if is_checkpoint(path):  # that was copied out of its run
        check_files(path)
    described = describe(path)
    base = model or described.base
    if not base:
        raise UserError(f"The adapter in {run} does not say which model it was trained over. Give it as --model.")
    return Source(path, path.resolve().name, _there(model_source(base), run), described.rank, None)


def choose(path: Path, which: str) -> Path:
    """A checkpoint of the run at `path`: "best", "last" or a step; or the one that lies there.

    Raises:
        UserError: there is none.
    """
    if is_checkpoint(path):
        if which != "best":
            raise UserError(f"{path} is one checkpoint already. Leave --checkpoint out, or give {run_of(path)}.")
        return path
    there = list_checkpoints(run_of(path))
    if which == "best" or not there:
        return _best(path, bool(there))
    if which == "last":
        return there[-1]
    steps = {str(read_step(each)): each for each in there}
    step = which.removeprefix("step-").lstrip("0")
    if step not in steps:
        raise UserError(
            f"--checkpoint is {which}, and {run_of(path)} has those of steps {', '.join(steps)}. Give one of them, "
            "best or last."
        )
    return steps[step]


def _best(path: Path, has_any: bool) -> Path:
    if not has_any:
        raise UserError(f"{path} has no checkpoint yet. Go on with it: python -m grpo.run --resume {run_of(path)}.")
    return best_checkpoint(path)


def read_step(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def _there(base: str, run: str) -> str:
    """A base that looks like a folder's path is one."""
    looks_so = base.startswith((".", "/", "~")) or base.count("/") > 1 or re.search(r"\\", base)
    if looks_so and not Path(base).is_dir():
        raise UserError(f"The base of {run} is the folder {base}, which is not there. Give the model as --model.")
    return base
