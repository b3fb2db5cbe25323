"""Task: what a task file defines, loaded from a Python file. Knows nothing of models, tokens or GPUs.

Task                the rows, the prompt and the rewards of one problem
load_task(path)     the `task` of a task file
"""

from __future__ import annotations

import dataclasses
import importlib.util
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from grpo.config import Config, field_names
from grpo.errors import UserError, user_code
from grpo.rewards.xml_format import extract_answer

if TYPE_CHECKING:  # it comes with torch, which a task file has no use for
    from grpo.types import Message

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a task file defines as `task`.

    rows      (split, data) -> rows; split is "train" or "test", data is `Config.data` or the field below
    prompt    row -> chat messages, or row -> text for a model without a chat template
    rewards   {reward: weight}; a reward is a function, "package.module:function", or an installed plugin's name
    gold      a completion that deserves full marks, as a template over the row's columns
    solved    (name of a reward, its value from which a completion counts as right): what pass@1 measures
    data      the data set when --data is not given
    config    the run's defaults
    embedded  what replaces them where there is no GPU or no hub: the tiny model that ships with the package
    answer    completion text -> the answer that it votes for in majority@k, None for none
    """

    name: str
    rows: Callable[[str, str], Iterable[Row]]
    prompt: Callable[[Row], list[Message] | str]
    rewards: dict[Callable | str, float]
    gold: str
    solved: tuple[str, float]
    data: str
    config: Config = field(default_factory=Config)
    embedded: dict[str, Any] = field(default_factory=dict)
    answer: Callable[[str], str | None] = extract_answer

    def __post_init__(self) -> None:
        for broken, sentence in _faults(self):
            if broken:
                raise UserError(f"Task {self.name}: {sentence}")
        try:
            dataclasses.replace(self.config, **self.embedded)
        except UserError as error:
            raise UserError(f"Task {self.name}: `embedded` over `config` gives no configuration: {error}") from error

    def gold_text(self, row: Row) -> str:
        """The gold completion of a row."""
        try:
            text = self.gold.format(**row)
        except KeyError as missing:
            raise UserError(
                f"The gold template of task {self.name} uses {missing}, but its rows have the columns "
                f"{', '.join(row)}. Change `gold` in the task file (a brace that is meant as such is written twice) or "
                "the columns that `rows` gives."
            ) from missing
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"The gold template {self.gold!r} of task {self.name} does not go with the row {reprlib.repr(row)}: "
                f"{error}. Change `gold` in the task file; {{column}} stands for a column of the row."
            ) from error
        if text and (fault := fault_of_text(text)):
            raise UserError(f"The gold completion of the row {row!a:.200} is {fault}. Mend the row.")
        return text

    def vote(self, text: str) -> str | None:
        """What a completion votes for in majority@k.

        Raises:
            UserError: `answer` failed, or gave something else than text or None.
        """
        with user_code(
            lambda raised: (
                f"`answer` of task {self.name} raised {raised} on the completion {text[:80]!r}. It must take any text "
                "and return None where there is no answer."
            )
        ):
            vote = self.answer(text)
        if not isinstance(vote, str | None):
            raise UserError(
                f"`answer` of task {self.name} gave {reprlib.repr(vote)} ({type(vote).__name__}) for the completion "
                f"{text[:80]!r}. It must return text, or None where there is no answer."
            )
        return vote


def _faults(task: Task) -> list[tuple[bool, str]]:
    """(is it so, what to say) for everything that is wrong with the fields alone."""
    texts = {"name": task.name, "data": task.data, "gold": task.gold}
    functions = {"rows": task.rows, "prompt": task.prompt, "answer": task.answer}
    unknown = sorted(map(str, set(task.embedded) - set(field_names()))) if isinstance(task.embedded, dict) else []
    return [
        *((not isinstance(v, str), f"`{name}` is {v!r}. It must be text.") for name, v in texts.items()),
        *((not callable(v), f"`{name}` is {v!r}. It must be a function.") for name, v in functions.items()),
        (
            not isinstance(task.rewards, Mapping),
            f"`rewards` is {task.rewards!r}. It must be {{reward: weight}}, such as {{correctness: 1.0}}.",
        ),
        (
            not _is_solved(task.solved),
            f"`solved` is {task.solved!r}. It must be (name of a reward, its value from which a completion counts as "
            'right), such as ("correctness", 2.0).',
        ),
        (bool(fault := _fault_of_template(task.gold)), f"`gold` is {task.gold!r}, {fault}."),
        (not isinstance(task.config, Config), f"`config` is {task.config!r}. It must be a Config: Config(steps=100)."),
        (
            not isinstance(task.embedded, dict),
            f"`embedded` is {task.embedded!r}. It must be {{field of Config: value}}.",
        ),
        (bool(unknown), f"`embedded` has {', '.join(unknown)}, and a Config has no such field (--help lists them)."),
    ]


def _is_solved(solved: Any) -> bool:
    pair = isinstance(solved, (tuple, list)) and len(solved) == 2
    return pair and isinstance(solved[0], str) and isinstance(solved[1], Real) and not isinstance(solved[1], bool)


def _fault_of_template(gold: Any) -> str:
    """Why a gold template cannot be filled in from any row, in words; empty if it can."""
    if not isinstance(gold, str):
        return ""
    hint = "{column} stands for a column of the row, and a brace that is meant as such is written twice"
    try:
        names = [name for _, name, _, _ in Formatter().parse(gold) if name is not None]
    except ValueError as error:
        return f"which is no template ({error}): {hint}"
    unnamed = any(not name or name[0].isdigit() for name in names)
    return f"where a place has no name: {hint}" if unnamed else ""


def load_task(path: str | Path) -> Task:
    """The object called `task` in the Python file at `path`.

    Raises:
        UserError: no such file, the file does not run, or it defines no Task.
    """
    path = Path(path)
    if not path.is_file():
        shipped = sorted(str(p) for p in Path("tasks").glob("*.py"))
        hint = f" Here are: {', '.join(shipped)}." if shipped else ""
        raise UserError(f"There is no task file {path}.{hint}")
    spec = importlib.util.spec_from_file_location(f"grpo_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file. A task file's name ends in .py, such as tasks/gsm8k.py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with user_code(
        lambda raised: f"{path} raised {raised} in {_raising_line()}. A task file must be importable; mend that line."
    ):
        try:
            spec.loader.exec_module(module)
        except SyntaxError as error:
            raise UserError(f"{error.filename or path} line {error.lineno} is not Python: {error.msg}.") from error
    task = getattr(module, "task", None)
    if not isinstance(task, Task):
        found = "nothing of that name" if task is None else f"a {type(task).__name__}"
        raise UserError(
            f"{path} must define `task = Task(...)` (from grpo import Task), but it defines {found}. "
            "tasks/gsm8k.py shows how."
        )
    return task


def _raising_line() -> str:
    """Where the exception that is being handled was raised: "tasks.py line 7"."""
    error = sys.exception()
    line = traceback.extract_tb(error.__traceback__ if error else None)[-1]
    return f"{Path(line.filename).name} line {line.lineno}"


def fault_of_text(text: str) -> str:
    """What is wrong with a text that is to be asked, in words; empty if nothing is."""
    if not text:
        return "an empty text"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"a text that is not Unicode (half a surrogate pair, {text[error.start]!r}, at place {error.start})"
    return ""
