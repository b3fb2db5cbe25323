"""Resolve: a command line -> the task, the configuration, and where each value came from. Loads no model.

The values of a run are, each over the ones before: the defaults of Config, the task file's, what the embedded default
sets where something is missing, the flags. A resumed run begins with the values it was saved with.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from grpo.config import Config, field_names, from_dict
from grpo.errors import UserError
from grpo.folder import saved_run
from grpo.task import Task, load_task

HUB_TIMEOUT = 3.0  # seconds


@dataclass(frozen=True)
class Arguments:
    """Train a language model with GRPO on the task of a Python file."""

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK.py")] = ""
    """The task file, such as tasks/gsm8k.py; it comes first. With --resume or --eval RUN it may be left out."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Try the data and the rewards on every gold answer, then stop. Loads no model."""
    resume: str = ""
    """A run's folder, or one checkpoint in it: go on with that run."""
    eval: str = ""
    """A run's folder, a checkpoint, or a model: print its held-out scores, then stop."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)


@dataclass(frozen=True)
class Resolved:
    """What a command line comes to: the task, the configuration, and where each value came from."""

    task: Task
    task_path: str
    config: Config
    origins: dict[str, str]  # field -> "default", "task", "embedded" or "flag"; a resumed run keeps those it began with
    missing: list[str]  # why the embedded default runs instead of the task's own model; empty if it does not


def resolve(argv: list[str]) -> tuple[Arguments, Resolved]:
    """Task file (or saved run), then flags, then the embedded default where something is missing."""
    resumed, scored = _option(argv, "--resume"), _option(argv, "--eval")
    saved = saved_run(resumed or scored)
    if resumed and not saved:
        why = ": neither metrics.jsonl nor a checkpoint is in it" if Path(resumed).is_dir() else ""
        raise UserError(
            f"There is no run folder {resumed}{why}. --resume takes one, such as runs/gsm8k-20260101-120000."
        )
    task_path = argv[0] if argv and not argv[0].startswith("-") else saved.get("task", "")
    task = load_task(task_path) if task_path else None
    base, origins = _before_flags(task, saved)
    arguments = tyro.cli(Arguments, args=argv, prog="python -m grpo.run", default=Arguments(config=base))
    if task is None and scored and not Path(scored).exists():
        raise UserError(
            f"There is no folder {scored}. --eval takes a run's folder or a checkpoint, or a model after a task file."
        )
    if task is None:
        raise UserError("Give a task file first, such as `python -m grpo.run tasks/gsm8k.py`. --help lists the flags.")
    config, flags = arguments.config, _flags(argv)
    if resumed:
        _check_same_run(saved, task, task_path, resumed, flags)
    if scored and not saved:  # --eval MODEL names the model as --model does: the data stay the task's own
        config, flags = dataclasses.replace(config, model=scored), [*flags, "model"]
    origins |= dict.fromkeys(flags, "flag")
    missing: list[str] = []
    if task.embedded and not saved:
        missing = [] if "model" in flags else what_is_missing(config, task)
        if missing or config.model == "embedded":
            overrides = {name: value for name, value in task.embedded.items() if name not in flags}
            config = dataclasses.replace(config, **overrides)
            origins |= dict.fromkeys(overrides, "embedded")
    return arguments, Resolved(task, task_path, config, origins, missing)


def _before_flags(task: Task | None, saved: dict[str, Any]) -> tuple[Config, dict[str, str]]:
    """The configuration that flags change, and where its values are from: the saved run's, else the task's."""
    if saved:
        return from_dict(saved["config"]), saved["origins"]
    if task is None:
        return Config(), {}
    named = [name for name in field_names() if getattr(task.config, name) != getattr(Config(), name)]
    return task.config, dict.fromkeys(named, "task")


def _check_same_run(saved: dict[str, Any], task: Task, task_path: str, resumed: str, flags: list[str]) -> None:
    """A run goes on with its own task, wherever its file lies by now, and in its own folder.

    Raises:
        UserError: the command line names another.
    """
    begun_with = saved.get("name", task.name)
    if task.name != begun_with and str(Path(task_path).resolve()) != saved["task"]:
        raise UserError(
            f"{task_path} is task {task.name}, but {resumed} is a run of task {begun_with}, and a run keeps its task. "
            f"Leave the task file out, or give {saved['task']}."
        )
    if "run_dir" in flags:
        raise UserError(f"--run-dir is given with --resume, but {resumed} goes on in its own folder. Leave it out.")


def _option(argv: list[str], name: str) -> str:
    """The value of an option before the real parsing, which needs to know its defaults first."""
    for place, word in enumerate(argv):
        if word == name and place + 1 < len(argv):
            return argv[place + 1]
        if word.startswith(name + "="):
            return word.partition("=")[2]
    return ""


def _flags(argv: list[str]) -> list[str]:
    """The fields of Config that the command line names."""
    options = [word.partition("=")[0] for word in argv if word.startswith("--")]
    given = {option.removeprefix("--").removeprefix("no-").replace("-", "_") for option in options}
    return [name for name in field_names() if name in given]


def what_is_missing(config: Config, task: Task) -> list[str]:
    """What the task's own model and data need and this machine does not have."""
    import torch  # it takes seconds, and --help needs none

    data = config.data or task.data
    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA GPU")
    if not (Path(config.model).is_dir() or _hub_has(config.model, "model")):
        missing.append(f"the model {config.model} (no network, and it is not in the local cache)")
    if not (Path(data).is_dir() or data == "embedded" or _hub_has(data, "dataset")):
        missing.append(f"the data set {data} (no network)")
    return missing


def _hub_has(name: str, kind: str) -> bool:
    """Whether the hub answers for a repository, or the local cache has a model."""
    import huggingface_hub  # only where a name of the hub is asked for

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json") if kind == "model" else None
    if isinstance(cached, str):
        return True
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=HUB_TIMEOUT)
    except Exception:  # offline, unknown and refused come as unrelated classes; all mean that it is not to be had
        return False
    return True
