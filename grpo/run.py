"""The command line: `python -m grpo.run TASK.py [flags]`. Loads a task, resolves the configuration, and starts.

    python -m grpo.run tasks/gsm8k.py                     train
    python -m grpo.run tasks/gsm8k.py --check             try data and rewards, no training
    python -m grpo.run --resume runs/gsm8k-...            go on where the last checkpoint was
    python -m grpo.run --eval runs/gsm8k-...              held-out score of a run, or of any model with a task file

Bad input, and memory or a disk that runs out, end with one sentence and exit code 2; Ctrl-C finishes the step, saves,
and ends with exit code 130.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from grpo.config import Config, check_type, field_names, from_dict
from grpo.errors import OUT_OF_CPU_MEMORY, UserError, is_out_of_memory
from grpo.task import Task, load_task

CONFIG_FILE = "config.json"
HUB_TIMEOUT = 3.0  # seconds
# No room, no quota, larger than allowed, read-only by now, a disk that fails.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

# Without a terminal there is no width to keep to.
console = Console(highlight=False, width=shutil.get_terminal_size(fallback=(150, 24)).columns)


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


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(argv)
    except UserError as error:
        console.file.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("Stopped at once. What the last checkpoint holds is there: go on with --resume.")
        return 130


def _dispatch(argv: list[str]) -> int:
    arguments, resolved = resolve(argv)
    if arguments.check:
        return check(resolved)
    if arguments.eval:
        return evaluate_only(resolved, arguments.eval)
    return start(resolved, arguments.resume)


# ---- the configuration


def resolve(argv: list[str]) -> tuple[Arguments, Resolved]:
    """Task file (or saved run), then flags, then the embedded default where something is missing."""
    resumed, scored = _option(argv, "--resume"), _option(argv, "--eval")
    saved = _saved_run(resumed or scored)
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


def _saved_run(path: str) -> dict[str, Any]:
    """config.json of the run that `path` is, or is a checkpoint of; empty if it is neither.

    Raises:
        UserError: that file is gone or damaged.
    """
    if not path:
        return {}
    from grpo.checkpoint import list_checkpoints, run_of

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


def what_is_missing(config: Config, task: Task) -> list[str]:
    """What the task's own model and data need and this machine does not have."""
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
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json") if kind == "model" else None
    if isinstance(cached, str):
        return True
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=HUB_TIMEOUT)
    except Exception:  # offline, unknown and refused come as unrelated classes; all mean that it is not to be had
        return False
    return True


def banner(resolved: Resolved) -> Panel:
    """One visible notice that this is not the real thing, and how to get it."""
    task, missing = resolved.task, "\n".join(f"  - {what}" for what in resolved.missing)
    return Panel(
        f"Missing here:\n{missing}\n"
        "So this run uses what ships with the package: a tiny model and "
        f"{'its generated problems' if resolved.config.data == 'embedded' else resolved.config.data}.\n"
        f"The real thing, on a machine with a GPU and the hub (or with local copies):\n"
        f"  python -m grpo.run {resolved.task_path} --model {task.config.model} --base {task.config.base} "
        f"--data {task.data}",
        title="EMBEDDED DEFAULT",
        border_style="yellow",
    )


def describe(resolved: Resolved) -> Table:
    """The values that are not defaults, with where each came from."""
    table = Table(title="configuration", title_justify="left", box=None, pad_edge=False, header_style="dim")
    for column in ("field", "value", "from"):
        table.add_column(column)
    for name in field_names():
        origin = resolved.origins.get(name, "default")
        if origin != "default":
            table.add_row(name, str(getattr(resolved.config, name)), origin)
    defaults = sum(resolved.origins.get(name, "default") == "default" for name in field_names())
    table.caption = f"and {defaults} defaults; all are in {CONFIG_FILE}, --help explains them"
    table.caption_justify = "left"
    return table


# ---- the three things to do


def check(resolved: Resolved) -> int:
    """--check: every gold answer of both splits through every reward."""
    from grpo.questions import build_questions, preflight_rewards
    from grpo.rewards.preflight import preflight_table

    _announce(resolved)
    questions = build_questions(resolved.task, resolved.config, all_tests=True, note=say)
    report = preflight_rewards(resolved.task, questions, every_row=True)
    console.print(preflight_table(report))
    name, value = resolved.task.solved
    for warning in report.warnings:
        say(f"note: {warning}")
    solved = next(check for check in report.checks if check.name == name)
    if solved.unscored_rows:
        count = len(solved.unscored_rows)
        raise UserError(
            f"`{name}` must tell right from wrong, but it gave no score (None) to {count:,} of {report.num_rows:,} "
            f"gold answers, the first of them that of row {solved.unscored_rows[0]}: they could never count as right. "
            "Let it return a number for every row, or name another reward in `solved` in the task file."
        )
    if (lowest := solved.lowest["gold"]) < value:
        raise UserError(
            f"The gold answer of some row gets {lowest:g} from `{name}`, which must pay {value:g} for a right answer. "
            "Mend the rows named above, `gold` in the task file, or the reward."
        )
    say(f"Every gold answer gets full marks from `{name}` ({value}). The task is ready.")
    return 0


def evaluate_only(resolved: Resolved, target: str) -> int:
    """--eval: held-out scores of a run's best checkpoint, of one checkpoint, or of a model without adapter."""
    from grpo.build import build_engine, build_evaluator, build_policy
    from grpo.checkpoint import best_checkpoint
    from grpo.evaluate import score_lines
    from grpo.policy.adapter import load_adapter
    from grpo.questions import build_questions

    _announce(resolved)
    config = resolved.config
    questions = build_questions(resolved.task, config, note=say)
    with memory_in_words(config):
        policy = build_policy(config, questions.longest_sequence)
        if _saved_run(target):
            checkpoint = best_checkpoint(Path(target))
            load_adapter(policy, checkpoint)
            say(f"adapter of {checkpoint}")
        engine = build_engine(
            config, policy, questions.tokenizer, questions.canary_prompts, questions.longest_sequence, say
        )
        scores = build_evaluator(resolved.task, config, questions)(engine)
    say(f"{target}: {len(questions.test)} held-out prompts, {config.eval_samples} samples each")
    for line in score_lines(scores):
        say("  " + line)
    return 0


def start(resolved: Resolved, resume: str) -> int:
    """Train, from the start or from a checkpoint."""
    from grpo.build import build_run
    from grpo.checkpoint import resume_folder, run_of
    from grpo.evaluate import comparison
    from grpo.questions import build_questions, preflight_rewards

    _announce(resolved)
    checkpoint = resume_folder(Path(resume)) if resume else None
    if checkpoint:
        _check_steps(resolved.config, checkpoint)
    questions = build_questions(resolved.task, resolved.config, note=say)
    for warning in preflight_rewards(resolved.task, questions, every_row=False).warnings:
        say(f"note: {warning}")
    folder = run_of(checkpoint) if checkpoint else new_run_folder(resolved)
    with alone_in(folder), full_disk_in_words(folder), memory_in_words(resolved.config, folder):
        with removed_if_empty(folder):
            run = build_run(resolved.task, resolved.config, folder, questions, checkpoint, say)
        _write_config(resolved, folder)
        say(f"run folder: {folder}")
        with run.recorder, stops_gently(run):
            _train_and_keep(run)
    run.engine.close()
    for warning in run.recorder.warnings():
        say(f"warning: {warning}")
    if run.progress.step < resolved.config.steps:
        say(f"Stopped after step {run.progress.step} of {resolved.config.steps}; everything is saved. Go on with")
        say(f"  python -m grpo.run --resume {folder}")
        return 130
    say(comparison(run.progress.first_scores, run.progress.last_scores))
    files = {"curves": "curves.png", "completions": "completions.jsonl", "adapter": "checkpoints"}
    say("   ".join(f"{what}: {folder / name}" for what, name in files.items()))
    return 0


def say(text: str) -> None:
    """A line as it is: never wrapped, so that paths and commands can be copied."""
    console.print(text, soft_wrap=True, markup=False)


def _announce(resolved: Resolved) -> None:
    if resolved.missing:
        console.print(banner(resolved))
    console.print(describe(resolved))


def _check_steps(config: Config, checkpoint: Path) -> None:
    """A run does not go on to fewer steps than it has done.

    Raises:
        UserError: --steps asks for that.
    """
    from grpo.checkpoint import read_state

    done = read_state(checkpoint)[0].step
    if config.steps < done:
        raise UserError(
            f"{checkpoint} has done {done} steps, more than --steps {config.steps} asks for. Give a larger number, or "
            f"--resume an earlier checkpoint of {checkpoint.parent}."
        )


def _train_and_keep(run: Any) -> None:
    """Train; when that ends early, for an error or on request, save what is done so far."""
    from grpo.train import is_unsaved, save, train

    try:
        train(run)
    finally:
        # After an error in the middle of an update the policy is not that of the last whole step: nothing to save.
        if run.policy.version == run.progress.version and is_unsaved(run):
            save(run)


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


@contextmanager
def stops_gently(run: Any) -> Iterator[None]:
    """The first Ctrl-C lets the step finish, the second one does not."""

    def request(signal_number: int, frame: object) -> None:
        run.stop_requested = True
        run.recorder.message("Stopping after this step. Ctrl-C again to stop at once (the last checkpoint stays).")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def memory_in_words(config: Config, folder: Path | None = None) -> Iterator[None]:
    """Inside, memory that runs out is told with what to lower, and how the run in `folder` goes on.

    Raises:
        UserError: it ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, and not the only one
        if not is_out_of_memory(error):
            raise
        raise UserError(_out_of_memory(error, config, folder)) from error


def _out_of_memory(error: Exception, config: Config, folder: Path | None) -> str:
    whose = "this machine" if isinstance(error, MemoryError) or OUT_OF_CPU_MEMORY in str(error) else "the GPU"
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    told = f" (the last request was for {asked[1]})" if asked else ""
    in_4_bits = "" if config.base == "nf4" else ", or keep the base weights in 4 bits with --base nf4"
    return (
        f"The memory of {whose} ran out{told}. Lower --tokens-per-batch ({config.tokens_per_batch}) for the "
        f"update, or for the rollout --max-completion-tokens ({config.max_completion_tokens}), --prompts-per-step "
        f"({config.prompts_per_step}), --group-size ({config.group_size}) or --eval-prompts ({config.eval_prompts})"
        f"{in_4_bits}. {_how_to_go_on(folder, 'lower values')}"
    )


@contextmanager
def full_disk_in_words(folder: Path) -> Iterator[None]:
    """Inside, a file that cannot be written is told in a sentence, with how the run in `folder` goes on.

    Raises:
        UserError: there is no room, or the disk takes nothing more.
    """
    hook = threading.excepthook
    # TensorBoard writes in a thread of its own: what fails there is raised here too, and told once.
    threading.excepthook = lambda failed: None if _is_full_disk(failed.exc_value) else hook(failed)
    try:
        yield
    except OSError as error:
        if not _is_full_disk(error):
            raise
        raise UserError(
            f"What the run in {folder} records could not be written: {error.strerror}. "
            f"{_how_to_go_on(folder, 'more room')}"
        ) from error
    finally:
        threading.excepthook = hook


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def _how_to_go_on(folder: Path | None, needed: str) -> str:
    from grpo.checkpoint import list_checkpoints

    checkpoints = list_checkpoints(folder) if folder else []
    if not checkpoints:
        return f"There is no checkpoint to go on from: start again with {needed}."
    return f"The last checkpoint is {checkpoints[-1]}: go on with `python -m grpo.run --resume {folder}` and {needed}."


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """What cannot be built leaves no empty folder behind, whose name would be taken."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def new_run_folder(resolved: Resolved) -> Path:
    """The run's own folder, made now; an existing one is never written into.

    Raises:
        UserError: it exists.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(resolved.config.run_dir or f"runs/{resolved.task.name}-{stamp}")
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


def _write_config(resolved: Resolved, folder: Path) -> None:
    origins = {name: resolved.origins.get(name, "default") for name in field_names()}
    content = {
        "task": str(Path(resolved.task_path).resolve()),
        "name": resolved.task.name,
        "config": dataclasses.asdict(resolved.config),
        "origins": origins,
    }
    # Beside its place first: on a full disk the file that a resumed run began with must stay.
    draft = folder / f".{CONFIG_FILE}.partial"
    draft.write_text(json.dumps(content, indent=2))
    draft.replace(folder / CONFIG_FILE)


if __name__ == "__main__":
    sys.exit(main())
