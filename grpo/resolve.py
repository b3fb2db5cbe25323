"""Resolve: a command line -> the task, the configuration, and where each value came from. Loads no model.

The values of a run are, each over the ones before: the defaults of Config, the task file's, what the embedded default
sets where something is missing, the recipe's, the flags. A resumed run begins with the values it was saved with, in
the place of the first three.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.command import Options, owner_of, parse
from grpo.config import Config, field_names
from grpo.errors import UserError
from grpo.folder import CONFIG_FILE, Origin, Saved, fingerprint_of, is_run, read_json, run_of, saved_run
from grpo.recipes import METHODS, RECIPES, Method, module_of
from grpo.sources import hub_name, is_local, whole_path
from grpo.task import Task, load_task, shipped_tasks, task_file

HUB_TIMEOUT = 3.0  # seconds


@dataclass(frozen=True)
class Resolved:
    """What a command line comes to: the task, the configuration, and where each value came from."""

    task: Task
    task_path: str  # empty for a Task that was given from Python and has no file
    task_sha256: str  # of that file
    here: Path  # the folder that the command is given in; the user's own code may go to another
    config: Config
    origins: dict[str, Origin]  # of its fields; a resumed run keeps those it began with
    unsaid: list[str]  # of these, what a saved run says nothing of
    missing: list[str]  # why the embedded default runs instead of the task's own model; empty if it does not

    def as_saved(self, folder: Path, run: str) -> Saved:
        """What config.json says of it, in the folder of the run with that id."""
        path = str(Path(self.task_path).resolve()) if self.task_path else ""
        return Saved(folder, run, path, self.task_sha256, self.task.name, self.config, self.origins)


def resolve(argv: list[str], before: str = "", method: Method | None = None) -> tuple[Options, Resolved]:
    """Task file (or saved run), the embedded default where something is missing, the recipe, the flags.

    method: what teaches, where the command says it.

    before: the folder of the run that an earlier process of the same command has begun, if one has: it is gone on with.

    Raises:
        UserError: they do not go together, or something that they name is not there.
    """
    return resolve_given(*parse(argv, method), before=before, method=method)


def resolve_given(
    options: Options,
    flags: dict[str, Any],
    given: Task | None = None,
    before: str = "",
    method: Method | None = None,
) -> tuple[Options, Resolved]:
    """The same of what is given already: options, fields of Config, and a Task where there is one without a file.

    Raises:
        UserError: they do not go together, or something that they name is not there.
    """
    method = _method(method, options, flags)
    if method and not (given or options.task or options.resume) and (not options.eval or _asks_a_model(options, flags)):
        options = dataclasses.replace(options, task=OF_ROWS.get(method, ""))
    here = _here()
    options, flags = _from(here, options, flags)
    if before and is_run(Path(before)) and not (options.check or options.eval):
        options = dataclasses.replace(options, resume=before, resume_or_start=False)
        flags = {name: value for name, value in flags.items() if name != "run_dir"}
    data = whole_path(flags["data"]) if flags.get("data") else ""  # now: a task file may go to another folder
    options = _settled(options, flags)
    saved = saved_run(options.resume or options.eval)
    if options.resume and not saved:
        raise UserError(_no_run(options.resume))
    task, task_path = (given, "") if given else _task(options, saved)
    if data and not task.made_up:
        flags = flags | {"data": data}
    if options.resume and saved:
        _check_same_run(saved, task, task_path, options.resume, flags)
    if saved:
        _check_adapter(saved, flags)
        _check_method(saved, method)
        _check_model(saved, flags)
    if options.eval and not saved:  # --eval MODEL names the model as --model does: the data stay the task's own
        flags = flags | {"model": options.eval}
    flags = _over_its_base(flags, with_rows=not saved)
    config, origins = (saved.config, dict(saved.origins)) if saved else _of_task(task)
    of_method = {} if saved else METHODS[method or config.method]
    layers: Layers = {
        "method": of_method,
        "recipe": RECIPES[options.recipe] if options.recipe else {},
        "flag": flags,
    }
    missing: list[str] = []
    if not saved and task.embedded:
        missing, layers = _embedded_where_missing(task, config, layers)
    origins |= {name: origin for origin, layer in layers.items() for name in layer}
    config = Config(**_over(config, layers))
    config = dataclasses.replace(config, **_absolute(config, task))
    if options.resume and saved:
        _check_values(saved, config)
    if not saved and config.method == "dpo" and config.adapter and "reference" not in flags and not options.eval:
        config = dataclasses.replace(config, reference="start")
        origins["reference"] = "method"
    if options.eval and not saved:
        _check_has_reference(task, config)
    if saved and config.method != "grpo":
        origins |= _said_last(flags)
    unsaid = [name for name in saved.unsaid if origins.get(name, "default") == "default"] if saved else []
    sha256 = fingerprint_of(Path(task_path)) if task_path else ""
    return options, Resolved(task, task_path, sha256, here, config, origins, unsaid, missing)


def _asks_a_model(options: Options, flags: dict[str, Any]) -> bool:
    """Whether --eval names no run, which has a task, and rows are given to ask."""
    path = Path(options.eval or "\0")
    return "data" in flags and not (_is(path) and is_run(path))


def _check_has_reference(task: Task, config: Config) -> None:
    """Pairs are scored by what an adapter has changed of its base.

    Raises:
        UserError: a model by itself is to be scored on them.
    """
    answers = task.rewards and config.engine != "none"
    if config.method == "dpo" and not answers and (not config.adapter or config.reference == "start"):
        raise UserError(
            f"{config.model} {'with that adapter' if config.adapter else 'by itself'} would be compared with itself: "
            "every margin is 0, and the accuracy 50%. Score what an adapter has changed of its base: --eval BASE "
            "--adapter A, without --reference start."
        )


# The task of rows that say all themselves, where a command line names none.
OF_ROWS: dict[Method, str] = {"sft": "messages", "dpo": "pairs"}


def _method(of_command: Method | None, options: Options, flags: dict[str, Any]) -> Method | None:
    """What teaches; None where that is left to the task or the run.

    Raises:
        UserError: it is asked for by two names, or something is given that it has no use for.
    """
    method = flags.get("method", of_command)
    if of_command and method != of_command:
        raise UserError(f"--method is {method}, and the command is `python -m grpo.{of_command}`. Leave --method out.")
    if method in OF_ROWS and options.recipe:
        raise UserError(f"--recipe is of GRPO's objective, and {method} has another. Leave it out.")
    for name in flags:
        owner = owner_of(name, method or "grpo")
        if owner and not (options.resume or options.eval):
            raise UserError(
                f"--{name.replace('_', '-')} is of `python -m {module_of(owner)}`, and "
                f"{(method or 'grpo')} has no use for it. Leave it out."
            )
    return method


def _check_method(saved: Saved, method: Method | None) -> None:
    """A run goes on with what it learnt from.

    Raises:
        UserError: the command line asks for something else.
    """
    own = saved.config.method
    if method and method != own:
        raise UserError(
            f"{saved.folder} is a run of {own}, and {method} is asked for. A run keeps what it learns from: `python -m "
            f"grpo.run --resume {saved.folder}` goes on with it, and --adapter {saved.folder} begins a run of {method} "
            "from what it has learnt."
        )


def _said_last(flags: dict[str, Any]) -> dict[str, Origin]:
    """Of a run that goes on: of --steps and --epochs counts what is said now, not what it began with."""
    if ("steps" in flags) == ("epochs" in flags):
        return {}
    return {"epochs": "method"} if "steps" in flags else {"steps": "data"}


def _here() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise UserError("The folder that the command is given in is not there any more. Go to another one.") from error


def _from(here: Path, options: Options, flags: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """The same with whole paths where folders are meant: a task file, or a reward in the middle of a run, may change
    the folder that the process is in."""
    if options.task and "\0" not in options.task:
        options = dataclasses.replace(options, task=task_file(options.task))
    runs = {name: path for name in ("task", "resume", "eval") if (path := getattr(options, name)) and _is(here / path)}
    named = {name: flags[name] for name in ("model", "adapter") if flags.get(name) and _is(here / flags[name])}
    new = {"run_dir": flags["run_dir"]} if flags.get("run_dir") else {}
    options = dataclasses.replace(options, **{name: os.path.abspath(here / path) for name, path in runs.items()})
    return options, flags | {name: os.path.abspath(here / path) for name, path in (named | new).items()}


def _over_its_base(flags: dict[str, Any], with_rows: bool) -> dict[str, Any]:
    """--model that is an adapter's folder means the base that it says, with the adapter to begin from.

    Raises:
        UserError: it does not say which, or another adapter is given too.
    """
    path = Path(flags.get("model") or "\0")
    of_run = _is(path) and is_run(path)
    if not with_rows or not (of_run or (_is(path / _ADAPTER) and not _is(path / CONFIG_FILE))):
        return flags
    if "adapter" in flags:
        raise UserError(f"--model is {path}, an adapter, and --adapter gives another. Leave one of them out.")
    said = saved_run(str(path)) if of_run else None
    base = said.config.model if said else read_json(path / _ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        raise UserError(
            f"--model is {path}, an adapter that does not say which model it was trained over. Give that as --model, "
            f"and --adapter {path}."
        )
    return flags | {"model": base, "adapter": str(path)}


_ADAPTER = "adapter_config.json"  # PEFT's file beside an adapter's weights


def _is(path: Path) -> bool:
    return "\0" not in str(path) and path.exists()


Layers = dict[Origin, dict[str, Any]]  # origin -> values, the later over the earlier


def _embedded_where_missing(task: Task, config: Config, layers: Layers) -> tuple[list[str], Layers]:
    """What the task's own model and data lack here, and the layers with the embedded default where they lack something,
    or where that is asked for."""
    of_another: dict[str, Any] = {"adapter": "", "reference": "base"} if config.adapter else {}  # of the task's model
    with_embedded: Layers = {"method": layers["method"], "embedded": of_another | task.embedded, **layers}
    _check_either(config, with_embedded, layers)  # before something slow is asked
    asked = _over(config, layers)
    data = "embedded" if task.made_up else asked["data"] or task.data
    missing = [] if "model" in layers["flag"] else what_is_missing(asked["model"], data)
    return missing, with_embedded if missing or asked["model"] == "embedded" else layers


def _over(config: Config, layers: Layers) -> dict[str, Any]:
    """The values of a configuration with layers over it, the later over the earlier."""
    return {**vars(config), **{name: value for layer in layers.values() for name, value in layer.items()}}


def _check_either(config: Config, *several: Layers) -> None:
    """One of several layers makes a configuration.

    Raises:
        UserError: none does; what is wrong with the last.
    """
    errors = []
    for layers in several:
        try:
            Config(**_over(config, layers))
        except UserError as error:
            errors.append(error)
    if len(errors) == len(several):
        raise errors[-1]


def _settled(options: Options, flags: dict[str, Any]) -> Options:
    """The options with --resume-or-start decided.

    Raises:
        UserError: two of them cannot be had together, or one is empty.
    """
    given = {name: getattr(options, name) for name in ("resume", "eval") if getattr(options, name) is not None}
    for name, path in given.items():
        if not path or "\0" in path:
            raise UserError(f"--{name} is {path!r}. It takes a run's folder, such as runs/gsm8k-20260101-120000.")
    things = [f"--{name}" for name in ("check", "resume", "eval", "resume_or_start") if getattr(options, name)]
    if len(things) > 1:
        raise UserError(f"{' and '.join(things)} are different things to do. Give one of them.".replace("_", "-"))
    if not options.resume_or_start:
        return options
    if not (path := flags.get("run_dir")):
        raise UserError("--resume-or-start needs --run-dir D: it goes on with the run in D, or starts one there.")
    if is_run(Path(path)):
        del flags["run_dir"]
        return dataclasses.replace(options, resume=path)
    return options


def _task(options: Options, saved: Saved | None) -> tuple[Task, str]:
    """The task of the command line, else the saved run's.

    Raises:
        UserError: there is none, or what a saved run names is not the file that it was started with.
    """
    if options.task:
        return load_task(options.task), options.task
    if saved:
        _check_task_file(saved)
        return load_task(saved.task), saved.task
    if options.eval and not Path(options.eval).exists():
        raise UserError(
            f"There is no folder {options.eval}. --eval takes a run's folder or a checkpoint, or a model beside a task "
            "file."
        )
    if options.eval:
        raise UserError(
            f"{options.eval} is no run: neither metrics.jsonl nor a checkpoint nor a run's config.json is in it. If "
            f"it is a model, give the task file that asks it too: `python -m grpo.run TASK.py --eval {options.eval}`."
        )
    raise UserError(
        "Give a task file, such as `python -m grpo.run tasks/gsm8k.py`, or the name of one that ships: "
        f"{', '.join(shipped_tasks())}. --help lists the flags."
    )


def _check_task_file(saved: Saved) -> None:
    """A task file is a program. One that only a run's config.json names runs if it is what the run was started with
    and did not come with the run: whoever downloads a run does not run what its sender wrote.

    Raises:
        UserError: it is to be named on the command line.
    """
    path = Path(saved.task)
    if not saved.task:
        raise UserError(
            f"The run in {saved.folder} was started from Python, with a Task that no file holds. Write it into a task "
            f"file and name that: `python -m grpo.run TASK.py --resume {saved.folder}` (or --eval); in Python give the "
            "Task to grpo.load."
        )
    name_it = f"look at it and name it: `python -m grpo.run {path} --resume {saved.folder}` (or --eval)"
    if not path.is_file():
        raise UserError(
            f"The task file {path} that {saved.folder} was started with is not there. Name it where it is now: "
            f"`python -m grpo.run TASK.py --resume {saved.folder}` (or --eval)."
        )
    if path.resolve().is_relative_to(saved.folder.resolve()):
        raise UserError(
            f"The task file {path} lies in the run's own folder. Running it is running a program that came with the "
            f"run, so it is not run unasked: {name_it}."
        )
    if fingerprint_of(path) != saved.task_sha256:
        raise UserError(
            f"{path} is not the file that {saved.folder} was started with: its SHA-256 differs. If that is what you "
            f"mean, {name_it}."
        )


def _of_task(task: Task) -> tuple[Config, dict[str, Origin]]:
    """The task's own configuration, and which of its values are the task's."""
    usual = Config()
    named = [name for name in field_names() if getattr(task.config, name) != getattr(usual, name)]
    origin: Origin = "task"
    return task.config, dict.fromkeys(named, origin)


def _check_same_run(saved: Saved, task: Task, task_path: str, resumed: str, flags: dict[str, Any]) -> None:
    """A run goes on with its own task, wherever its file lies by now, and in its own folder.

    Raises:
        UserError: the command line names another.
    """
    if task.name != saved.name and str(Path(task_path).resolve()) != saved.task:
        raise UserError(
            f"{task_path} is task {task.name}, but {resumed} is a run of task {saved.name}, and a run keeps its task. "
            f"Leave the task file out, or give {saved.task}."
        )
    if "run_dir" in flags:
        raise UserError(f"--run-dir is given with --resume, but {resumed} goes on in its own folder. Leave it out.")
    for name, why in _KEPT.items():
        kept = getattr(saved.config, name)
        if flags.get(name, kept) != kept:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} is {flags[name]}, but {resumed} was started with {kept}, and keeps it: {why}. Leave {flag} "
                "out, or start a new run."
            )


# What a run cannot change on its way. All else may be, and each change is recorded (`Saved.changes_to`).
_KEPT = {"seed": "the order of the prompts follows from it, so some would come twice and others never"}


def _check_model(saved: Saved, flags: dict[str, Any]) -> None:
    """A run's model is what its adapter was trained over. It may be elsewhere by now, under the same last name, or the
    folder that it was in is gone.

    Raises:
        UserError: flags name another.
    """
    kept, given = saved.config.model, flags.get("model", saved.config.model)
    is_gone = os.path.isabs(kept) and not Path(kept).is_dir()
    if given != kept and Path(given).name.lower() != Path(kept).name.lower() and not is_gone:
        raise UserError(
            f"--model is {given}, but the adapter of {saved.folder} was trained over {kept}, and says something else "
            "over another. Leave --model out, or start a new run."
        )


def _check_adapter(saved: Saved, flags: dict[str, Any]) -> None:
    """The adapter that was trained has its rank and its scale.

    Raises:
        UserError: flags ask for others.
    """
    if flags.get("adapter", saved.config.adapter) != saved.config.adapter:
        began = f"began from {saved.config.adapter}" if saved.config.adapter else "began from no adapter"
        raise UserError(
            f"--adapter is {flags['adapter']}, but the run in {saved.folder} {began}, and goes on with what it has "
            "trained. Leave --adapter out, or start a new run."
        )
    for name in ("lora_rank", "lora_alpha"):
        kept = getattr(saved.config, name)
        if flags.get(name, kept) != kept:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} is {flags[name]}, but the adapter of {saved.folder} was trained with {kept}, and keeps it. "
                f"Leave {flag} out, or start a new run."
            )


def _check_values(saved: Saved, config: Config) -> None:
    """A value head has learnt from the first step on, or there is none.

    Raises:
        UserError: another configuration is asked for.
    """
    if config.has_values != saved.config.has_values:
        has = "has a value head, which no other advantage than gae trains" if saved.config.has_values else "has none"
        raise UserError(
            f"advantage is {config.advantage}, but the run in {saved.folder} was started with "
            f"{saved.config.advantage}: it {has}. Keep that, or begin a new run from what it has learnt: --adapter "
            f"{saved.folder}."
        )


def _no_run(path: str) -> str:
    inside = ": neither metrics.jsonl nor a checkpoint nor a run's config.json is in it" if Path(path).is_dir() else ""
    checkpoint = run_of(Path(path))
    hint = f" There is a run {checkpoint}, but no such checkpoint in it." if is_run(checkpoint) else ""
    return f"There is no run folder {path}{inside}. --resume takes one, such as runs/gsm8k-20260101-120000.{hint}"


def _absolute(config: Config, task: Task) -> dict[str, str]:
    """Folders of data, of a model and of an adapter by their whole paths, so that the run goes on from anywhere."""
    data = config.data or task.data
    named = {"model": config.model, "adapter": config.adapter}
    folders = {name: str(Path(path).resolve()) for name, path in named.items() if path and _is_folder(path)}
    return folders | ({"data": whole_path(data)} if not task.made_up and whole_path(data) != data else {})


def _is_folder(name: str) -> bool:
    return name != "embedded" and Path(name).is_dir()


def what_is_missing(model: str, data: str) -> list[str]:
    """What the task's own model and data need and this machine does not have."""
    import torch  # it takes seconds, and --help needs none

    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA GPU")
    if not (Path(model).is_dir() or _hub_has(model, "model")):
        missing.append(f"the model {model} (no network, and it is not in the local cache)")
    if not (data == "embedded" or is_local(data) or _hub_has(hub_name(data)[0], "dataset")):
        missing.append(f"the data set {data} (no network)")
    return missing


def _hub_has(name: str, kind: str) -> bool:
    """Whether the hub answers for a repository, or the local cache has it."""
    import huggingface_hub  # only where a name of the hub is asked for

    file = "config.json" if kind == "model" else "README.md"
    try:
        cached = huggingface_hub.try_to_load_from_cache(name, file, repo_type=kind)
    except ValueError:  # no name of the hub's
        return False
    if isinstance(cached, str):
        return True
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=HUB_TIMEOUT)
    except Exception:  # offline, unknown and refused come as unrelated classes; all mean that it is not to be had
        return False
    return True
