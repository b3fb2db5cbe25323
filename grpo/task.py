"""Task: what a task file defines, loaded from a Python file. Knows nothing of models, tokens or GPUs.

Task                the rows, the prompt and the rewards of one problem
load_task(path)     the `task` of a task file
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import reprlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from numbers import Real
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from grpo.config import Config, fault_of_template_kwargs, field_names
from grpo.errors import UserError, nearest, user_code
from grpo.rewards.xml_format import extract_answer

if TYPE_CHECKING:  # it comes with torch, which a task file has no use for
    from grpo.types import Message

Row = dict[str, Any]

TASK_FILE = "GRPO_TASK_FILE"  # the environment variable that tells it to the processes of rewards
LONGEST_NAME = 100  # bytes; a file's name may have 255, and a run's folder has the time beside it
_FORMATTER = Formatter()


@dataclass(frozen=True)
class Task:
    """What a task file defines as `task`.

    rows      (split, data) -> rows; split is "train" or "test", data is `Config.data` or the field below
    prompt    row -> chat messages, or row -> text for a model without a chat template
    rewards   {reward: weight}; a reward is a function, "package.module:function", or an installed plugin's name
    gold      a completion that deserves full marks, as a template over the row's columns; None where nobody knows one
    solved    (name of a reward, its value from which a completion counts as right): what pass@1 measures; None where
              there is no right and wrong: then the held-out score is the mean reward
    data      the data set when --data is not given
    config    the run's defaults
    embedded  what replaces them where there is no GPU or no hub: the tiny model that ships with the package
    answer    completion text -> the answer that it votes for in majority@k, None for none
    held_out  for data that has no test split: so many prompts of the training split are kept out of training and asked
              in its place, chosen by what they ask, so that they are the same in every run; 0: the score is of training
              prompts, and says so
    made_up   the rows are made up: `data` names what is to be made, and nothing on a disk or on the hub
    continue_final_message    where the last chat message is the assistant's, the completion goes on with it
    chat_template_kwargs      what the model's chat template reads beside the messages, such as enable_thinking, or
                              row -> that; --chat-template-kwargs goes over it
    tools                     functions, or their JSON schemas, that the chat template shows to the model, or
                              row -> these
    max_prompt_tokens         rows whose prompts have more tokens are left out, and counted; None: none are, and a
                              prompt that does not fit the context is an error that names its row
    """

    name: str
    rows: Callable[[str, str], Iterable[Row]]
    prompt: Callable[[Row], list[Message] | str]
    rewards: dict[Callable | str, float]
    gold: str | None
    solved: tuple[str, float] | None
    data: str
    config: Config = field(default_factory=Config)
    embedded: dict[str, Any] = field(default_factory=dict)
    answer: Callable[[str], str | None] = extract_answer
    held_out: int | None = None
    made_up: bool = False
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | Callable[[Row], dict[str, Any]] = field(default_factory=dict)
    tools: Sequence[Callable | dict] | Callable[[Row], Sequence[Callable | dict]] = ()
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if fault := fault_of_name(self.name):
            raise UserError(
                f"A task's `name` is {self.name!r}, {fault}. A run's folder is named after it: use letters, digits, "
                "- and _."
            )
        for broken, sentence in _faults(self):
            if broken:
                raise UserError(f"Task {self.name}: {sentence}")
        try:
            dataclasses.replace(self.config, **self.embedded)
        except UserError as error:
            raise UserError(f"Task {self.name}: `embedded` over `config` gives no configuration: {error}") from error

    def gold_text(self, row: Row) -> str:
        """The gold completion of a row, of a task that has any."""
        assert self.gold is not None
        with self._filled_in(row):
            text = self.gold.format_map(row)
        if text and (fault := fault_of_text(text)):
            raise UserError(f"The gold completion of the row {row!a:.200} is {fault}. Mend the row.")
        return text

    def gold_filled(self, text: str) -> str:
        """The gold template with this text in the place of every column: with none, what is the same for all rows."""
        parts = _FORMATTER.parse(self.gold or "")
        return "".join(literal + (text if name is not None else "") for literal, name, _, _ in parts)

    def missing_gold(self, row: Row, columns: Sequence[str] = ()) -> str:
        """What is no answer among the values that make the gold completion, or in the columns that decide it.

        In words; empty if nothing is. Python would write each as some text ("None"), which a completion could hit. An
        empty text is none in a column that decides, and where nobody knows which do.
        """
        names = (*self._places_in_gold, *columns)
        if all(isinstance(row.get(name), str) and not _is_blank(row[name]) for name in names):
            return ""  # the way of most rows; the other one takes five times as long
        with self._filled_in(row):
            values = [(name, _FORMATTER.get_field(name, (), row)[0]) for name in self._places_in_gold]
            faults = [(name, _fault_of_answer(value)) for name, value in values if not (columns and _is_blank(value))]
            faults += [(name, _fault_of_given(row.get(name))) for name in columns]
        return next((f"`{name}` is {fault}" for name, fault in faults if fault), "")

    @cached_property
    def _places_in_gold(self) -> list[str]:
        """What stands in the braces of the template, such as answer or answer[0]."""
        return [name for _, name, _, _ in _FORMATTER.parse(self.gold or "") if name is not None]

    @contextmanager
    def _filled_in(self, row: Row) -> Iterator[None]:
        """Inside the gold template meets a row, whose values may be of the user's own classes."""
        with user_code(
            lambda raised: (
                f"The gold template {self.gold!r} of task {self.name} does not go with the row {reprlib.repr(row)}: "
                f"{raised}. Change `gold` in the task file; {{column}} stands for a column of the row."
            )
        ):
            try:
                yield
            except KeyError as missing:
                raise UserError(
                    f"The gold template of task {self.name} uses {missing}, but its rows have the columns "
                    f"{', '.join(map(str, row))}.{nearest(str(missing.args[0]), map(str, row))} Change `gold` in the "
                    "task file (a brace that is meant as such is written twice) or the columns that `rows` gives."
                ) from missing

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
    texts = {"data": task.data, "gold": "" if task.gold is None else task.gold}
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
            task.solved is not None and not _is_solved(task.solved),
            f"`solved` is {task.solved!r}. It must be (name of a reward, its value from which a completion counts as "
            'right), such as ("correctness", 2.0), or None where there is no right and wrong.',
        ),
        (bool(fault := _fault_of_template(task.gold)), f"`gold` is {task.gold!r}, {fault}."),
        (not isinstance(task.config, Config), f"`config` is {task.config!r}. It must be a Config: Config(steps=100)."),
        (
            not isinstance(task.embedded, dict),
            f"`embedded` is {task.embedded!r}. It must be {{field of Config: value}}.",
        ),
        (
            task.held_out is not None and not (type(task.held_out) is int and task.held_out >= 0),
            f"`held_out` is {task.held_out!r}. It must be a number of prompts, or None where there is a test split.",
        ),
        (
            not isinstance(task.continue_final_message, bool),
            f"`continue_final_message` is {task.continue_final_message!r}. It must be True or False.",
        ),
        (
            not isinstance(task.made_up, bool),
            f"`made_up` is {task.made_up!r}. It must be True or False.",
        ),
        (
            not callable(task.chat_template_kwargs) and bool(fault := fault_of_kwargs(task.chat_template_kwargs)),
            f"`chat_template_kwargs` {fault}.",
        ),
        (not callable(task.tools) and bool(fault := fault_of_tools(task.tools)), f"`tools` {fault}."),
        (
            task.max_prompt_tokens is not None
            and not (type(task.max_prompt_tokens) is int and task.max_prompt_tokens > 0),
            f"`max_prompt_tokens` is {task.max_prompt_tokens!r}. It must be a number of tokens, 1 or more, or None.",
        ),
        (bool(unknown), f"`embedded` has {', '.join(unknown)}, and a Config has no such field (--help lists them)."),
    ]


def fault_of_kwargs(kwargs: Any) -> str:
    """What is wrong with variables for a chat template, in words; empty if nothing is."""
    if not isinstance(kwargs, dict):
        return f"is {reprlib.repr(kwargs)}. It must be {{variable of the chat template: value}}, or row -> that"
    return f"has {fault}" if (fault := fault_of_template_kwargs(kwargs)) else ""


def fault_of_tools(tools: Any) -> str:
    """What is wrong with the tools that a chat template is to show, in words; empty if nothing is."""
    if isinstance(tools, str):
        return f"is the text {tools[:60]!r}. It must be a list of functions or JSON schemas: json.loads makes it one"
    if not isinstance(tools, Sequence):
        return f"is {reprlib.repr(tools)}. It must be a list of functions or JSON schemas, or row -> that"
    wrong = next((tool for tool in tools if not (callable(tool) or isinstance(tool, dict))), None)
    return "" if wrong is None else f"has {reprlib.repr(wrong)}, which is neither a function nor a JSON schema (a dict)"


def fault_of_name(name: Any) -> str:
    """Why a name makes no folder of a run, in words; empty if it does."""
    if not isinstance(name, str):
        return "which is no text"
    if not name.strip():
        return "which is empty"
    if len(name.encode(errors="replace")) > LONGEST_NAME:
        return f"which is longer than {LONGEST_NAME} bytes"
    if name.startswith(".") or name != name.strip():
        return "which begins with a point or has white space at an end"
    wrong = next((character for character in name if character in "/\\" or not character.isprintable()), None)
    return "" if wrong is None else f"which has {wrong!a} in it"


def _fault_of_answer(value: Any) -> str:
    """Why a value is no answer that can be written into a gold completion, in words; empty if it is one."""
    several = isinstance(value, (Mapping, Set, Sequence)) and not isinstance(value, str)
    if several or getattr(value, "ndim", 0):
        return f"{reprlib.repr(value)} ({type(value).__name__}), no single answer"
    return _fault_of_given(value)


def _is_blank(value: Any) -> bool:
    """A text with nothing in it but white space."""
    return isinstance(value, str) and not value.strip()


def _fault_of_given(value: Any) -> str:
    """Whether a value is missing, in words; empty if it is there."""
    if isinstance(value, str):
        return f"{value!r}, an empty text" if _is_blank(value) else ""
    # Missing values of numpy and pandas do not equal themselves, and pandas' own compares to nothing at all.
    several = getattr(value, "ndim", 0) or isinstance(value, (Mapping, Set, Sequence))
    is_missing = value is None or (not several and (type(value).__name__ == "NAType" or bool(value != value)))
    return f"{value!r}" if is_missing else ""


def _is_solved(solved: Any) -> bool:
    pair = isinstance(solved, (tuple, list)) and len(solved) == 2
    return pair and isinstance(solved[0], str) and isinstance(solved[1], Real) and not isinstance(solved[1], bool)


def _fault_of_template(gold: Any) -> str:
    """Why a gold template cannot be filled in from any row, in words; empty if it can."""
    if not isinstance(gold, str):
        return ""
    hint = "{column} stands for a column of the row, and a brace that is meant as such is written twice"
    try:
        fields = [(name, form or "") for _, name, form, _ in _FORMATTER.parse(gold) if name is not None]
    except ValueError as error:
        return f"which is no template ({error}): {hint}"
    if wide := next((form for _, form in fields if re.search(r"\d{5}", form)), ""):
        return f"which writes a column over {wide!r} characters: a completion is not as long as that"
    names = [name for name, _ in fields]
    unnamed = any(not name or name[0].isdigit() for name in names)
    return f"where a field has no name: {hint}" if unnamed else ""


def shipped_tasks() -> dict[str, Path]:
    """Name -> file of the tasks that ship: in an installed package, or in the repository that it is run from."""
    package = Path(__file__).parent
    folder = package / "tasks" if (package / "tasks").is_dir() else package.parent / "tasks"
    return {path.stem: path for path in sorted(folder.glob("*.py"))} if (folder / "gsm8k.py").is_file() else {}


def task_file(said: str) -> str:
    """The file that a command line means: one at that path, else the task of that name that ships.

    A folder is no task file, so gsm8k is the task also beside a folder of that name.
    """
    return said if Path(said).is_file() else str(shipped_tasks().get(said, said))


def load_task(path: str | Path) -> Task:
    """The object called `task` in the Python file at `path`, or of the task of that name that ships.

    Raises:
        UserError: no such file, the file does not run, or it defines no Task.
    """
    path = Path(task_file(str(path)))
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, and a task is a Python file, such as tasks/gsm8k.py. A run goes on with "
            f"--resume {path}, and --eval {path} scores it."
        )
    if not path.is_file():
        raise UserError(
            f"There is no task file {path}.{nearest(path.stem, shipped_tasks())} It may lie anywhere; these ship, and "
            f"go by their names: {', '.join(shipped_tasks()) or 'none'}."
        )
    spec = importlib.util.spec_from_file_location(_module_name(path), path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file. A task file's name ends in .py, such as tasks/gsm8k.py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    _make_importable(path.resolve())
    with user_code(
        lambda raised: f"{path} raised {raised} in {_raising_line()}. A task file must be importable; mend that line."
    ):
        try:
            spec.loader.exec_module(module)
        except SyntaxError as error:
            line = f" line {error.lineno}" if error.lineno else ""
            raise UserError(f"{error.filename or path}{line} is not Python: {error.msg}.") from error
    task = getattr(module, "task", None)
    if not isinstance(task, Task):
        found = "nothing of that name" if task is None else f"a {type(task).__name__}"
        raise UserError(
            f"{path} must define `task = Task(...)` (from grpo import Task), but it defines {found}. "
            "tasks/gsm8k.py shows how."
        )
    return task


def _module_name(path: Path) -> str:
    return f"grpo_task_{path.stem}"  # never the name of another module, whatever the file is called


def _make_importable(path: Path) -> None:
    """What lies beside a task file is imported from wherever the command is given, as beside a script, but never in
    place of Python's own: what this process has imported long ago, a worker would take from a `copy.py` there. And a
    process that a reward starts anew (multiprocessing's "spawn", macOS's default) finds the task file's functions."""
    shipped = path in {file.resolve() for file in shipped_tasks().values()}
    if not shipped and str(path.parent) not in sys.path:
        own = sysconfig.get_path("stdlib")
        places = [i for i, place in enumerate(sys.path) if place in (own, os.path.join(own, "lib-dynload"))]
        sys.path.insert(max(places, default=-1) + 1, str(path.parent))
    os.environ[TASK_FILE] = str(path)


class _TaskFinder(MetaPathFinder):
    """Finds the task file of the process that started this one by its module's name."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        file = os.environ.get(TASK_FILE, "")
        is_it = file and fullname == _module_name(Path(file))
        return importlib.util.spec_from_file_location(fullname, file) if is_it else None


sys.meta_path.append(_TaskFinder())


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
        return f"a text that is not Unicode (half a surrogate pair, {text[error.start]!r}, at character {error.start})"
    return ""
