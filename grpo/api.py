"""The Python API: train, load, and the Run that both give. The command line is made of the same.

    run = grpo.train("gsm8k", steps=50)              a Task, a task file, or the name of a task that ships
    run.evaluate()                                   its held-out scores, of the best checkpoint
    run.sample(["What is 3 + 4?"])                   completions: text, tokens, log-probabilities
    run = run.resume(steps=100, learning_rate=1e-5)  goes on
    run = grpo.load("runs/gsm8k-20260101-120000")    one that was trained before

A run's policy stays in memory for what is asked of it next, and only one does: that of the run that was trained, scored
or sampled from last. Knows nothing of how any of it is done.
"""

from __future__ import annotations

import sys
import threading
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo.chat.answers import Asked, Sampled, answer, several
from grpo.chat.dialogue import checked_temperature
from grpo.chat.trained import Asked as Wanted
from grpo.chat.trained import Trained, open_trained, system_of
from grpo.checkpoint import read_state
from grpo.command import Options, known_field
from grpo.config import Config, field_names
from grpo.errors import UserError, exits_in_words
from grpo.export.source import choose
from grpo.folder import list_checkpoints, saved_run
from grpo.policy.load import context_length
from grpo.recipes import RECIPES
from grpo.record.jsonl import read_metrics
from grpo.record.sinks import Sink
from grpo.record.theirs import check_sinks
from grpo.resolve import Resolved, resolve_given
from grpo.task import Task
from grpo.terminal import say, working
from grpo.verbs import evaluate as evaluation
from grpo.verbs import train as training
from grpo.verbs.closing import IN_A_SHELL, IN_PYTHON, After
from grpo.verbs.live import Live, free_memory
from grpo.world import ALONE, World


def train(
    task: Task | str | Path,
    config: Config | Mapping[str, Any] | None = None,
    *,
    recipe: str | None = None,
    sinks: Sink | Sequence[Sink] = (),
    **fields: Any,
) -> Run:
    """Train a task, as `python -m grpo.run TASK` does. The first interrupt lets the step finish and saves it; `resume`
    of what is returned goes on.

    task      a Task, the path of a task file, or the name of a task that ships
    config    what differs from the task's own configuration: the fields of a Config that are not at their defaults, or
              {field: value}; the keywords after it go over it: train("gsm8k", steps=50, learning_rate=1e-5)
    recipe    "grpo", "dapo", "dr_grpo", "gspo" or "cispo": what a paper means, over the task's values
    sinks     told what happens in the run: instances of classes of grpo.Sink

    Raises:
        UserError: what is given cannot be done, in sentences.
    """
    flags = _given(config, fields)
    if recipe is not None and recipe not in RECIPES:
        raise UserError(f"recipe is {recipe!r}. It is one of {', '.join(RECIPES)}.")
    heard = check_sinks(sinks)
    path, given = _task(task)
    with exits_in_words():
        options, resolved = resolve_given(Options(task=path, recipe=recipe), flags, given)  # pyright: ignore
    return begin(
        options, resolved, _call("grpo.train", [path or f"Task {resolved.task.name}"], flags), heard, IN_PYTHON
    )


def load(run: str | Path, task: Task | str | Path | None = None, checkpoint: str | int = "best") -> Run:
    """The run in a folder, or of the checkpoint there. Nothing is computed yet.

    task          where the file is not there any more that the run was started with, or there was none
    checkpoint    of the run: "best" by its held-out score, "last", or a step

    Raises:
        UserError: there is no run, or no such checkpoint.
    """
    path = Path(run).absolute()
    if not (saved := saved_run(str(path))):
        raise UserError(f"There is no run in {path}. Give a run's folder, such as runs/gsm8k-20260101-120000.")
    found = Run(saved.folder, path, task, str(checkpoint))
    if list_checkpoints(found.folder):
        _ = found.checkpoint  # which is there
    return found


class Run:
    """A run: its folder, and what can be asked of what it has learned."""

    def __init__(self, folder: Path, path: Path, task: Task | str | Path | None = None, checkpoint: str = "best"):
        """path: that was asked for, which may be one checkpoint."""
        self.folder = folder
        self.exit_code = 0  # that the command line ends with
        self._path, self._task, self._which = path, task, checkpoint
        self._in_memory: Live | Trained | None = None

    # ---- what is known of it

    @property
    def config(self) -> Config:
        """As the run was started, or last gone on with."""
        saved = saved_run(str(self.folder))
        assert saved
        return saved.config

    @property
    def step(self) -> int:
        """Steps that are done and saved."""
        there = list_checkpoints(self.folder)
        return read_state(there[-1])[0].step if there else 0

    @property
    def is_done(self) -> bool:
        """Every step of its configuration is done."""
        return self.step >= self.config.steps

    @property
    def checkpoint(self) -> Path:
        """The one that is scored and sampled from: an adapter in PEFT's format.

        Raises:
            UserError: there is none.
        """
        return choose(self._path, self._which)

    @property
    def metrics(self) -> list[dict[str, float | None]]:
        """What metrics.jsonl has: the numbers of each step, and the held-out scores after so many."""
        path = self.folder / "metrics.jsonl"
        return [{"step": step, **numbers} for step, numbers in (read_metrics(path, None) if path.exists() else ())]

    @property
    def report(self) -> Path:
        """The page about it."""
        return self.folder / "report.html"

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, step {self.step} of {self.config.steps})"

    # ---- what is asked of it

    def evaluate(self) -> dict[str, float]:
        """The held-out scores of its checkpoint, as `python -m grpo.run --eval` prints them, under eval/ names.

        Raises:
            UserError: there is no checkpoint, or the task cannot be had.
        """
        checkpoint = self.checkpoint
        with _alone(), exits_in_words():
            live, resolved = self._in_memory, self._resolved("eval", {})
            if not isinstance(live, Live):
                let_go()
                live = _hold(self, evaluation.opened(resolved, checkpoint))
            live.take(checkpoint)
            scores = live.score(resolved.task)
        evaluation.tell(str(checkpoint), live, scores)
        return scores

    def sample(
        self,
        prompts: str | Sequence[Asked],
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
        system: str | None = None,
        seed: int = 0,
    ) -> list[Sampled]:
        """A completion of each prompt, by the policy's own model in PyTorch.

        prompts        texts, or conversations: lists of {"role": ..., "content": ...}, which are asked as they are. A
                       text is asked with the system prompt in front
        temperature    the run's own; 0 takes the likeliest token
        max_tokens     of a completion; the run's own
        system         the task's own system prompt, where one is known; "" for none
        seed           what is drawn follows from it and from the place in the list

        Raises:
            UserError: there is no checkpoint, or a prompt is none or too long.
        """
        asked, config = several(prompts), self.config
        heat = checked_temperature(config.temperature if temperature is None else temperature)
        most = config.max_completion_tokens if max_tokens is None else max_tokens
        if not (isinstance(most, int) and most > 0):
            raise UserError(f"max_tokens is {max_tokens!r}. Use a whole number, 1 or more.")
        with _alone():
            trained = self._trained()
            return answer(trained, asked, trained.system if system is None else system, heat, most, seed)

    def resume(
        self,
        config: Config | Mapping[str, Any] | None = None,
        *,
        sinks: Sink | Sequence[Sink] = (),
        **fields: Any,
    ) -> Run:
        """Go on where its last checkpoint is, with what is given changed, as `python -m grpo.run --resume` does.

        Raises:
            UserError: it cannot go on, or not with that.
        """
        flags, heard = _given(config, fields), check_sinks(sinks)
        let_go()
        with exits_in_words():
            resolved = self._resolved("resume", flags)
        options = Options(resume=str(self._resumed()))
        command = _call("grpo.load", [str(self.folder)], {}) + _call(".resume", [], flags)
        return begin(options, resolved, command, heard, IN_PYTHON)

    def close(self) -> None:
        """Free the memory that the policy takes. It is loaded again when something is asked of it."""
        if self._in_memory:
            let_go()

    # ---- how

    def _resumed(self) -> Path:
        return self.folder if self._which == "best" and self._path == self.folder else self.checkpoint

    def _resolved(self, verb: str, flags: dict[str, Any]) -> Resolved:
        """As the command line would be."""
        path, given = _task(self._task) if self._task is not None else ("", None)
        options = Options(task=path)
        if verb == "resume":
            options = replace(options, resume=str(self._resumed()))
        else:
            options = replace(options, eval=str(self.folder))
        return resolve_given(options, dict(flags), given)[1]

    def _trained(self) -> Trained:
        """The policy with its checkpoint's adapter, to be talked to."""
        checkpoint = self.checkpoint
        if isinstance(live := self._in_memory, Live):
            live.take(checkpoint)
            context = context_length(live.config.model, live.config)
            system = system_of(self.folder)
            return Trained(live.policy, live.questions.tokenizer, live.config, str(checkpoint), True, system, context)
        if live:
            return live
        let_go()
        with working("model") as progressed:
            return _hold(self, open_trained(Wanted(str(checkpoint), device=self.config.device), say, progressed))


# ---- what the command line calls


def begin(
    options: Options,
    resolved: Resolved,
    command: str,
    sinks: Sequence[Sink] = (),
    after: After = IN_A_SHELL,
    world: World = ALONE,
) -> Run:
    """Train what was resolved, from the start or from a checkpoint. command: as it was given, for the records. after:
    what the last lines say can be done then. world: of the processes that train together.

    Raises:
        UserError: something cannot be had, or failed; what was saved stays.
    """
    with _alone(), exits_in_words():
        let_go()
        done = training.start(options, resolved, command, sinks, after, world)
        run = Run(done.folder, done.folder, None if resolved.task_path else resolved.task)
        run.exit_code = done.exit_code
        _hold(run, done.live)
        return run


def score(resolved: Resolved, target: str, world: World = ALONE) -> int:
    """Print the held-out scores of a run, a checkpoint or a model. Returns the exit code."""
    return evaluation.evaluate(resolved, target, world)


# ---- one at a time

_holder: weakref.ref[Run] | None = None  # the run whose policy is in memory, as long as anybody refers to it
_at_work = threading.Lock()


def _hold(run: Run, what: Any) -> Any:
    global _holder
    run._in_memory, _holder = what, weakref.ref(run)
    return what


def let_go() -> None:
    """Free the memory that the last run's policy takes."""
    global _holder
    if _holder is None:
        return
    if holder := _holder():
        held, holder._in_memory = holder._in_memory, None
        if isinstance(held, Live):
            held.close()
        del held
    _holder = None
    free_memory()


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, no other thread of this process trains or samples: they would share generators, threads and memory.

    What ends it early leaves nothing in memory, neither here nor in the frames that a notebook keeps of the last error.
    """
    if not _at_work.acquire(blocking=False):
        raise UserError("Another run is at work in this process. Wait for it, or start this one in another process.")
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        _forget_frames(error)
        let_go()
        free_memory()  # what was being built
        raise
    finally:
        _at_work.release()


def _forget_frames(error: BaseException | None) -> None:
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


# ---- what is given


def _task(task: Any) -> tuple[str, Task | None]:
    """(path or name, None), or ("", a Task), or the file of the module that a Task is the `task` of."""
    if isinstance(task, Task):
        module = sys.modules.get(getattr(task.rows, "__module__", ""))
        file = getattr(module, "__file__", None)
        is_of_file = getattr(module, "task", None) is task and getattr(module, "__name__", "") != "__main__"
        return (file, None) if file and is_of_file else ("", task)
    if not isinstance(task, str | Path) or not str(task).strip():
        raise UserError(
            f"task is {task!r:.200}. It must be a Task, the path of a task file, or the name of a task that ships."
        )
    return str(task), None


def _given(config: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Config that are given, each with its value.

    Raises:
        UserError: a name that no field has.
    """
    if isinstance(config, Config):
        plain = Config()
        over = {name: getattr(config, name) for name in field_names() if getattr(config, name) != getattr(plain, name)}
    elif config is None or isinstance(config, Mapping):
        over = dict(config or {})
    else:
        raise UserError(f"config is {config!r:.200}. It must be a grpo.Config or {{field: value}}.")
    given = over | dict(fields)
    for name in given:
        known_field(name)
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def _call(name: str, values: list[str], fields: Mapping[str, Any]) -> str:
    words = [repr(value) for value in values] + [f"{name}={value!r}" for name, value in fields.items()]
    return f"{name}({', '.join(words)})"
