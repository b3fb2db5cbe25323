"""A run's folder: its name, its lock, config.json, and which checkpoints are in it. Knows nothing of models.

runs/<task>-<time>/
    config.json                the run's id, the task file and its SHA-256, every value and where it came from
    metrics.jsonl, completions.jsonl, prompts.jsonl ...               what grpo/record writes
    checkpoints/step-000010/   what grpo/checkpoint.py writes; left-step-000010 is of a course that the run has left
    best                       the path from here of the best checkpoint, a line of text
    starts.jsonl               each start: its command, versions, device
    start_adapter/             the adapter that the run began from, if it did
    left-1/                    what was recorded before a run without a checkpoint started over
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from grpo import system
from grpo.config import Config, check_type, field_names, from_dict
from grpo.errors import UserError, in_words

CONFIG_FILE = "config.json"
STATE = "state.json"  # of a checkpoint, written last
CHECKPOINT_NAME = re.compile(r"step-([0-9]{1,18})")
CHECKPOINTS = "checkpoints"  # the folder in a run's
BEST = "best"  # the file in a run's that names its best checkpoint
LEFT = "left-"  # before the name of what belongs to a course that the run has left
START = "start_adapter"  # the folder in a run's of the adapter that it began from
Origin = Literal["default", "task", "method", "embedded", "recipe", "flag", "adapter", "data"]  # of a value of a run
REWARDS_LOG = "rewards.log"  # what rewards print
RECORDED = (
    *("metrics.jsonl", "prompts.jsonl", "completions.jsonl", "held_out.jsonl", "tokens.jsonl"),
    *("curves.png", "report.html", REWARDS_LOG, "tensorboard", "wandb", "trackio", "mlflow"),
)


# ---- the folder


def new_run_folder(task_name: str, config: Config, here: Path) -> Path:
    """The run's own folder, made now, in `here` unless the configuration names it; an existing one is never written
    into. Two runs that start in the same second have two.

    Raises:
        UserError: it exists, or cannot be made.
    """
    name = f"runs/{task_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(1):
        check_new(config)
        folder = here / (config.run_dir or (name if number == 1 else f"{name}-{number}"))
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"The run folder {folder} cannot be made: {error.strerror}. Choose another --run-dir."
            ) from error
    return folder


def check_new(config: Config) -> None:
    """The folder that a run is to be written into, where one is named, is not there yet.

    Raises:
        UserError: it is.
    """
    if config.run_dir and os.path.lexists(config.run_dir):
        raise UserError(
            f"The run folder {config.run_dir} exists already, and a run never overwrites another. Choose another "
            f"--run-dir, or go on with that run by --resume {config.run_dir}."
        )


def remove_unused(folder: Path) -> None:
    """Take away the folder of a run that could not be built: its name would be taken."""
    shutil.rmtree(folder / START, ignore_errors=True)
    with suppress(OSError):
        (folder / CONFIG_FILE).unlink()
    with suppress(OSError):
        folder.rmdir()


def set_aside(folder: Path) -> Path | None:
    """Where a run without a checkpoint starts over: what it had recorded goes to left-1, left-2 ... beside it."""
    recorded = [folder / name for name in RECORDED if (folder / name).exists()]
    if not recorded:
        return None
    left = next(left for number in count(1) if not (left := folder / f"{LEFT}{number}").exists())
    left.mkdir()
    for path in recorded:
        path.rename(left / path.name)
    return left


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process trains in the run's folder; a process that dies lets go of it.

    Raises:
        UserError: one does.
    """
    descriptor = system.open_folder(folder)
    if descriptor is None:
        yield
        return
    _locks.add(descriptor)
    try:
        if not system.lock(descriptor):
            raise UserError(
                f"Another process is training in {folder}. Wait for it or stop it; two would write over each other."
            )
        yield
    finally:
        _locks.discard(descriptor)
        system.unlock(descriptor)
        os.close(descriptor)


_locks: set[int] = set()  # descriptors that hold one


def _let_go() -> None:
    """In a forked child, of a reward's process pool say: it would hold the lock for as long as it lives."""
    while _locks:
        os.close(_locks.pop())


system.in_forked_children(_let_go)


# ---- config.json


@dataclass(frozen=True)
class Saved:
    """What a run's config.json says."""

    folder: Path
    id: str  # of the run; its checkpoints have it too
    task: str  # the task file, a whole path
    task_sha256: str  # of that file when the run was started, or last resumed with a task file
    name: str  # of the task
    config: Config
    origins: dict[str, Origin]  # field -> where its value came from
    unsaid: list[str] = field(default_factory=list)  # fields that it says nothing of, and that have their defaults

    def changes_to(self, config: Config) -> dict[str, list[str]]:
        """{field: [value so far, value from now on]} where a run goes on otherwise, as texts."""
        return {
            name: [str(before), str(now)]
            for name in field_names()
            if (before := getattr(self.config, name)) != (now := getattr(config, name))
        }


_WRITTEN = {"id", "task", "task_sha256", "name", "config", "origins"}  # in config.json


def write_config(saved: Saved) -> None:
    """Write config.json, from which the run is resumed."""
    content = {
        "id": saved.id,
        "task": saved.task,
        "task_sha256": saved.task_sha256,
        "name": saved.name,
        "config": dataclasses.asdict(saved.config),
        "origins": {name: saved.origins.get(name, "default") for name in field_names()},
    }
    # Under another name first: on a full disk the file that a resumed run began with must stay.
    draft = saved.folder / f".{CONFIG_FILE}.partial"
    draft.unlink(missing_ok=True)  # of a run that was downloaded it may be a link to some other file
    draft.write_text(json.dumps(content, indent=2))
    draft.replace(saved.folder / CONFIG_FILE)


def new_id() -> str:
    """A run's id: nothing of the run follows from it."""
    return uuid.uuid4().hex


def fingerprint_of(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_run(path: Path) -> bool:
    """Whether a folder is a run's. A model's folder has a config.json too: a run's is known by what it says."""
    folder = run_of(path)
    if (folder / "metrics.jsonl").exists() or list_checkpoints(folder):
        return True
    with suppress(UserError):
        return {"task", "config", "origins"} <= read_json(folder / CONFIG_FILE).keys()
    return False


def saved_run(path: str | None) -> Saved | None:
    """config.json of the run at `path`, or of the checkpoint there; None if it is neither.

    Raises:
        UserError: that file is gone, damaged or of another version.
    """
    if not path or not is_run(Path(path)):
        return None
    folder = run_of(Path(path))
    file = folder / CONFIG_FILE
    if not file.exists():
        raise UserError(f"{file} is missing, which says what the run is made of. Put it back, or start a new run.")
    read = read_json(file)
    if "config" in read and "id" not in read:
        raise UserError(
            f"{file} was written by an earlier version of this program, which knew neither ids of runs nor the SHA-256 "
            "of the task file. Go on with the version that wrote it, or start a new run."
        )
    try:
        for name in ("id", "task", "task_sha256", "name"):
            check_type(name, read[name], str)
        check_type("origins", read["origins"], dict)
        for name, origin in read["origins"].items():
            check_type(f"the origin of {name}", origin, Origin)
        check_type("config", read["config"], dict)
        for name in read.keys() - _WRITTEN:
            raise UserError(f"It says `{name}`, which this version does not know.")
        unsaid = [name for name in field_names() if name not in read["config"]]
        saved = Saved(**(read | {"folder": folder, "config": from_dict(read["config"]), "unsaid": unsaid}))
    except UserError as error:
        raise UserError(f"{file} is damaged: {error} Put the file back as it was, or start a new run.") from error
    except KeyError as missing:
        raise UserError(
            f"{file} is damaged: it lacks {missing}. Put it back as it was, or start a new run."
        ) from missing
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: {in_words(error)}. Put it back as it was, or start a new run.") from error
    if "\0" in saved.task:
        raise UserError(f"{file} is damaged: no file's name has a NUL character in it. Put it back as it was.")
    return saved


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, is not JSON, or is something else.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise UserError(f"{path} cannot be read: it is no file.")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error}). Put it back as it was.") from error
    if not isinstance(read, dict):
        raise UserError(f"{path} is damaged: it is not an object of JSON. Put it back as it was.")
    return read


# ---- the checkpoints in it


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first."""
    return list(_by_step(folder).values())


def leave_later(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, where the run now goes on from; returns where they are now.

    They belong to the course that is left: metrics.jsonl will not hold their steps.
    """
    left = []
    for path in [path for at, path in _by_step(folder).items() if at > step]:
        left_path = path.with_name(LEFT + path.name)
        shutil.rmtree(left_path, ignore_errors=True)
        left.append(path.rename(left_path))
    with suppress(OSError, ValueError):  # a pointer to what was left is none; the next checkpoint writes it anew
        if not (folder / (folder / BEST).read_text(encoding="utf-8").strip()).is_dir():
            (folder / BEST).unlink()
    return left


def _by_step(folder: Path) -> dict[int, Path]:
    """step -> checkpoint, in their order. What a user copied or packed beside the checkpoints is none."""
    found = (folder / CHECKPOINTS).glob("step-*")
    matches = [(match, path) for path in found if (match := CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()]
    return dict(sorted((int(match[1]), path) for match, path in matches))


def run_of(path: Path) -> Path:
    """The folder of the run at `path`, or that the checkpoints or the checkpoint there belong to."""
    if path.name == CHECKPOINTS:
        return path.parent
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


def resume_folder(path: Path) -> Path | None:
    """The checkpoint that --resume means: the one at `path`, else the last of the run; None if it has none
    yet, and starts over.

    Raises:
        UserError: it is not there, or of a course that the run has left.
    """
    if is_checkpoint(path) and path.name.startswith(LEFT):
        raise UserError(
            f"{path} was left when its run went on from an earlier checkpoint: metrics.jsonl no longer holds its "
            f"steps. --eval scores it; --resume {run_of(path)} goes on with the run."
        )
    if is_checkpoint(path):
        return path
    run = run_of(path)
    if not path.is_dir():
        raise UserError(f"There is no checkpoint {path}. --resume takes one of {run}, or {run} for the last.")
    return next(reversed(list_checkpoints(run)), None)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is meant as a checkpoint, by its file or by where it lies."""
    return (path / STATE).is_file() or (path.is_dir() and path.parent.name == CHECKPOINTS)
