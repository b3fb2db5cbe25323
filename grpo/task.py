"""Task: rows, prompt and rewards of one problem, loaded from a Python file. Knows nothing of models or GPUs.

load_task(path)                        the `task` of a task file
read_rows(data, split, ...)            rows from a folder of JSON lines or from the hub
build_prompts(task, rows, tokenizer)   rows -> list[Prompt], tokenised, none longer than the context allows
PromptStream                           prompts in a seeded order, an epoch after the other, with a cursor
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from string import Formatter
from typing import Any

import torch

from grpo.config import Config, field_names
from grpo.errors import UserError
from grpo.rewards.xml_format import extract_answer
from grpo.seeds import mix_seed
from grpo.types import Message, Prompt

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
        if text and (fault := _fault_of_text(text)):
            raise UserError(f"The gold completion of the row {row!a:.200} is {fault}. Mend the row.")
        return text

    def vote(self, text: str) -> str | None:
        """What a completion votes for in majority@k.

        Raises:
            UserError: `answer` failed, or gave something else than text or None.
        """
        try:
            vote = self.answer(text)
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            raise UserError(
                f"`answer` of task {self.name} raised {type(error).__name__} ({error}) on the completion "
                f"{text[:80]!r}. It must take any text and return None where there is no answer."
            ) from error
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
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename or path} line {error.lineno} is not Python: {error.msg}.") from error
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{path} raised {type(error).__name__}: {error} ({Path(line.filename).name} line {line.lineno}). "
            "A task file must be importable; mend that line."
        ) from error
    task = getattr(module, "task", None)
    if not isinstance(task, Task):
        found = "nothing of that name" if task is None else f"a {type(task).__name__}"
        raise UserError(
            f"{path} must define `task = Task(...)` (from grpo import Task), but it defines {found}. "
            "tasks/gsm8k.py shows how."
        )
    return task


def read_rows(data: str, split: str, **hub_arguments: Any) -> Iterable[Row]:
    """Rows of a data set: a folder with `{split}.jsonl`, else the hub's data set of that name.

    hub_arguments go to `datasets.load_dataset` (`name="main"`, say).

    Raises:
        UserError: neither exists, the hub cannot be reached, or a line is not a JSON object.
    """
    folder = Path(data)
    if folder.is_dir():
        return _read_jsonl(folder / f"{split}.jsonl")
    if folder.suffix or data.startswith((".", "/", "~")):
        raise UserError(f"There is no folder {data}. --data takes a folder with train.jsonl and test.jsonl.")
    return _read_hub(data, split, hub_arguments)


def _read_jsonl(path: Path) -> list[Row]:
    if not path.is_file():
        raise UserError(f"There is no file {path}. A data folder holds train.jsonl and test.jsonl.")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path} line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number} is {line.strip()[:40]!r}; each line must be a JSON object.")
            rows.append(row)
    return rows


def _read_hub(data: str, split: str, arguments: dict[str, Any]) -> Iterable[Row]:
    import datasets

    try:
        return datasets.load_dataset(data, split=split, **arguments)  # pyright: ignore[reportReturnType]
    except Exception as error:  # the hub's client raises a dozen unrelated classes when it is offline
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"The data set {data} ({split}) is neither a folder here nor to be had from the hub: {reason} "
            "Check the name and the network, or pass --data FOLDER with train.jsonl and test.jsonl."
        ) from error


def load_rows(task: Task, split: str, data: str) -> list[Row]:
    """All rows of a split.

    Raises:
        UserError: there are none, or a row lacks a column that `rows` reads.
    """
    try:
        rows = list(task.rows(split, data))
    except UserError:
        raise
    except KeyError as missing:
        raise UserError(
            f"The rows of {data} ({split}) have no column {missing}, which task {task.name} reads. "
            "Rename the column in the data or change `rows` in the task file."
        ) from missing
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(
            f"`rows` of task {task.name} raised {type(error).__name__} on {data} ({split}): {error}. "
            "Mend the row or `rows` in the task file."
        ) from error
    if not rows:
        raise UserError(f"The {split} split of {data} is empty. Give --data a data set with rows.")
    wrong = next((index for index, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise UserError(
            f"`rows` of task {task.name} gave {reprlib.repr(rows[wrong])} ({type(rows[wrong]).__name__}) as row "
            f"{wrong} of {data} ({split}). A row is a dict of columns, such as {{'question': ..., 'answer': ...}}."
        )
    return rows


def build_prompts(task: Task, rows: list[Row], tokenizer: Any, room: int) -> list[Prompt]:
    """Rows as prompts: messages through the chat template, then tokens.

    room: the longest prompt allowed, i.e. the context less the completion, in tokens.

    Raises:
        UserError: `prompt` gave no text, a prompt is longer than that, or the model has no chat template that takes the
            messages.
    """
    contents = [_content(task, index, row) for index, row in enumerate(rows)]
    chat = isinstance(contents[0], list)
    other = next((index for index, content in enumerate(contents) if isinstance(content, list) != chat), None)
    if other is not None:
        raise UserError(
            f"`prompt` of task {task.name} gave chat messages for some rows and a text for others (rows 0 and {other} "
            "differ). Return the same kind for every row."
        )
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"Task {task.name} asks with chat messages, but the model's tokenizer has no chat template. "
            "Use an instruct model, or let `prompt` return text."
        )
    texts = [_render(tokenizer, index, content) for index, content in enumerate(contents)]
    encoded = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    prompts = [
        Prompt(index, text, tokens, row, content if isinstance(content, list) else None)
        for index, (text, tokens, row, content) in enumerate(zip(texts, encoded, rows, contents, strict=True))
    ]
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    empty = next((prompt.index for prompt in prompts if not prompt.tokens), None)
    if empty is not None:
        raise UserError(
            f"The tokenizer makes no token of the prompt of row {empty}, {texts[empty]!r}. Leave the row out."
        )
    if len(longest.tokens) > room:
        raise UserError(
            f"The prompt of row {longest.index} has {len(longest.tokens)} tokens, but only {room} fit beside a "
            "completion in the context. Lower --max-completion-tokens, raise --max-context, or leave the row out."
        )
    return prompts


def _content(task: Task, index: int, row: Row) -> list[Message] | str:
    try:
        content = task.prompt(row)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(
            f"`prompt` of task {task.name} raised {type(error).__name__} on row {index}: {error}. The row has the "
            f"columns {', '.join(row)}."
        ) from error
    fault = _fault_of_text(content) if isinstance(content, str) else _fault_of_messages(content)
    if fault:
        raise UserError(
            f"`prompt` of task {task.name} gave {fault} for row {index}. It must return chat messages, a list such as "
            '[{"role": "user", "content": "..."}], or a text. Mend the row or `prompt` in the task file.'
        )
    return content


def _fault_of_text(text: str) -> str:
    """What is wrong with a text that is to be asked, in words; empty if nothing is."""
    if not text:
        return "an empty text"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"a text that is not Unicode (half a surrogate pair, {text[error.start]!r}, at place {error.start})"
    return ""


def _fault_of_messages(messages: Any) -> str:
    """What is wrong with chat messages, in words; empty if nothing is. A message may be empty, but not all of them."""
    if not isinstance(messages, list) or not messages:
        return f"{reprlib.repr(messages)} ({type(messages).__name__})"
    for message in messages:
        if not isinstance(message, dict):
            return f"the message {reprlib.repr(message)} ({type(message).__name__})"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                return f"a message whose {key} is {reprlib.repr(message.get(key))}"
    return _fault_of_text("".join(message["content"] for message in messages))


def _render(tokenizer: Any, index: int, content: list[Message] | str) -> str:
    """The text of one prompt.

    Where the chat template refuses a system message, as Gemma's does, the system text comes in front of the first
    message of the user, which is what such models are asked with.

    Raises:
        UserError: the template refuses the messages anyway.
    """
    if isinstance(content, str):
        return content
    render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    try:
        return render(content)
    except Exception as error:  # a template is the model's own code and may raise anything
        with suppress(Exception):
            return render(_without_system(content))
        raise UserError(
            f"The model's chat template refuses the messages of row {index}: {error}. Their roles are "
            f"{', '.join(message['role'] for message in content)}. Change `prompt` in the task file, or the model."
        ) from error


def _without_system(messages: list[Message]) -> list[Message]:
    """The same messages with a leading system text put in front of the user's."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]


class PromptStream:
    """Prompts without end: each epoch is a permutation that depends on (seed, epoch) alone.

    `cursor` counts the prompts handed out; a stream built with the same seed and cursor goes on the same.
    """

    def __init__(self, prompts: list[Prompt], seed: int, cursor: int = 0):
        self.prompts = prompts
        self.seed = seed
        self.cursor = cursor
        self._order: tuple[int, list[int]] = (-1, [])  # (epoch, its permutation)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        chosen = [self.prompts[self._at(self.cursor + i)] for i in range(count)]
        self.cursor += count
        return chosen

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.prompts))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.prompts), generator=generator).tolist())
        return self._order[1][place]
