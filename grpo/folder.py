"""A run's folder: its name, its lock, config.json, and which checkpoints are in it. Knows nothing of models.

runs/<task>-<time>/
    config.json                   the task file, every value and where it came from
    metrics.jsonl completions.jsonl curves.png tensorboard/        what grpo/record writes
    checkpoints/step-000010/      what grpo/checkpoint.py writes; left-step-000010 is of a course that the run has left
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from grpo.config import Config, check_type, field_names, from_dict
from grpo.errors import UserError

CONFIG_FILE = "config.json"
STATE = "state.json"  # of a checkpoint, written last
CHECKPOINT_NAME = re.compile(r"step-(\d+)")
CHECKPOINTS = "checkpoints"  # the folder in a run's
LEFT = "left-"  # before the name of a checkpoint whose course the run has left


# ---- the folder and config.json


def new_run_folder(task_name: str, config: Config) -> Path:
    """The run's own folder, made now; an existing one is never written into.

    Raises:
        UserError: it exists.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(config.run_dir or f"runs/{task_name}-{stamp}")
    try:
        folder.mkdir(parents=True, exist_ok=False)
    except FileExistsError as error:
        raise UserError(
            f"The run folder {folder} exists already, and a run never overwrites another. Choose another --run-dir, or "
            f"go on with that run by --resume {folder}."
        ) from error
    except OSError as error:
        raise UserError(
            f"The run folder {folder} cannot be made: {error.strerror}. Choose another --run-dir."
        ) from error
    return folder


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """What cannot be built leaves no empty folder behind, whose name would be taken."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process trains in the run's folder; a process that dies lets go of it.

    Raises:
        UserError: one does.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another process is training in {folder}. Wait for it or stop it; two would write over each other."
            ) from error
        except OSError:  # some network file systems have no locks for folders: then nobody is kept out
            pass
        yield
    finally:
        os.close(descriptor)


def write_config(folder: Path, task_path: str, task_name: str, config: Config, origins: dict[str, str]) -> None:
    """Write config.json, from which the run is resumed."""
    content = {
        "task": str(Path(task_path).resolve()),
        "name": task_name,
        "config": dataclasses.asdict(config),
        "origins": {name: origins.get(name, "default") for name in field_names()},
    }
    # Beside its place first: on a full disk the file that a resumed run began with must stay.
    draft = folder / f".{CONFIG_FILE}.partial"
    draft.write_text(json.dumps(content, indent=2))
    draft.replace(folder / CONFIG_FILE)


def saved_run(path: str) -> dict[str, Any]:
    """config.json of the run that `path` is, or is a checkpoint of; empty if it is neither.

    Raises:
        UserError: that file is gone or damaged.
    """
    if not path:
        return {}
    folder = run_of(Path(path))
    # A run is known by what else is there: a model's folder has a config.json too.
    if not (folder / "metrics.jsonl").exists() and not list_checkpoints(folder):
        return {}
    file = folder / CONFIG_FILE
    try:
        saved = json.loads(file.read_text())
        check_type("task", saved["task"], str)
        check_type("origins", saved["origins"], dict)
        from_dict(saved["config"])
    except FileNotFoundError as error:
        raise UserError(
            f"{file} is missing, which says what the run is made of. Put it back, or start a new run."
        ) from error
    except (UserError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}). Put it back as it was, or start a new run."
        ) from error
    return saved


# ---- the checkpoints in it


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first."""
    return list(_by_step(folder).values())


def leave_later(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, where the run now goes on from; returns their new places.

    They belong to the course that is left: metrics.jsonl will not hold their steps.
    """
    left = []
    for path in [path for at, path in _by_step(folder).items() if at > step]:
        place = path.with_name(LEFT + path.name)
        shutil.rmtree(place, ignore_errors=True)
        left.append(path.rename(place))
    return left


def _by_step(folder: Path) -> dict[int, Path]:
    """step -> checkpoint, in their order. What a user copied or packed beside the checkpoints is none."""
    found = (folder / CHECKPOINTS).glob("step-*")
    matches = [(match, path) for path in found if (match := CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()]
    return dict(sorted((int(match[1]), path) for match, path in matches))


def run_of(place: Path) -> Path:
    """The folder of the run that `place` is, or that its checkpoints, or the checkpoint at `place`, belong to."""
    if place.name == CHECKPOINTS:
        return place.parent
    return place.parent.parent if place.parent.name == CHECKPOINTS else place


def resume_folder(place: Path) -> Path:
    """The checkpoint that --resume means: `place` itself if it is one, else the last of the run.

    Raises:
        UserError: there is none, or it is of a course that the run has left.
    """
    if is_checkpoint(place) and place.name.startswith(LEFT):
        raise UserError(
            f"{place} was left when its run went on from an earlier checkpoint: metrics.jsonl no longer holds its "
            f"steps. --eval scores it; --resume {run_of(place)} goes on with the run."
        )
    if is_checkpoint(place):
        return place
    run = run_of(place)
    if not place.is_dir():
        raise UserError(f"There is no checkpoint {place}. --resume takes one of {run}, or {run} for the last.")
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise UserError(f"{run} has no checkpoint to resume from. Start the run again without --resume.")
    return checkpoints[-1]


def is_checkpoint(place: Path) -> bool:
    """Whether a folder is meant as a checkpoint, by its file or by its place."""
    return (place / STATE).is_file() or (place.is_dir() and place.parent.name == CHECKPOINTS)
