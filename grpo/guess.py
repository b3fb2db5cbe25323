"""Guess: which columns of some rows ask and answer, and which reward fits the answers. Knows nothing of files.

guess_columns(rows)         where question, answer and options stand
guess_reward(values, ...)   the reward whose idea of a gold answer all of them meet
Path                        the way to a value inside a row, and how Python writes it
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from grpo.conversations import ROLES
from grpo.files import Row
from grpo.rewards import choice, math, number
from grpo.rewards.stated import last_box

# What data sets call them, the likeliest first; at any depth, and whatever their case.
QUESTIONS: Sequence[str] = (
    "question problem prompt query instruction input user_prompt text task description statement ctx q"
).split()
ANSWERS: Sequence[str] = (
    "answer final_answer ground_truth gold gold_answer answerkey answer_key correct_answer correct expected_answer "
    "expected target label reference reference_answer solution output response completion result answers a"
).split()
CONTEXTS: Sequence[str] = "context passage article paragraph story document".split()  # what a question is about
OPTIONS: Sequence[str] = "options choices candidates alternatives endings".split()
CHATS = ("messages", "conversations", "conversation", "prompt", "question")
LETTERS = "ABCDEFGHIJ"
SHORT = 80  # characters of an answer that a model can be asked to give word by word
AGREE = 200  # formulas that are compared with themselves, which takes milliseconds each
FEW = 10  # labels, of which each is the answer of several rows
_LATEX = re.compile(r"\\[a-zA-Z]+|[\^_]\{?\w|\$.+\$|^[-+\w\s()*/^=,.\[\]]*[*/^=][-+\w\s()*/^=,.\[\]]*$")

_NUMBER = re.compile(r"[-+\N{MINUS SIGN}]?\s?[$€£]?\s?[\d.,]*\d[\d.,]*\s?(%|[A-Za-z]{1,12})?")

Kind = Literal["number", "hash", "boxed", "math", "letter", "index", "option", "label", "text", "long", "none"]


@dataclass(frozen=True)
class Path:
    """The way to a value inside a row: ("reward_model", "ground_truth"), ("messages", -1, "content")."""

    steps: tuple[str | int, ...]

    @property
    def source(self) -> str:
        """As Python writes it: row["reward_model"]["ground_truth"]."""
        return "row" + "".join(f"[{step}]" if isinstance(step, int) else f"[{quoted(step)}]" for step in self.steps)

    @property
    def name(self) -> str:
        """As --columns writes it."""
        return ".".join(map(str, self.steps))

    def of(self, row: Row) -> Any:
        """The value there; None where nothing is."""
        value: Any = row
        for step in self.steps:
            try:
                value = value[step]
            except (LookupError, TypeError):
                return None
        return value


@dataclass(frozen=True)
class Columns:
    """Where things stand in the rows; None where nobody knows."""

    question: Path | None
    chat: bool  # the question is a list of chat messages
    answer: Path | None
    options: Path | None = None  # a list of texts, or {"text": [...]}
    lettered: tuple[str, ...] = ()  # a column for each option instead: A, B, C, D
    options_have_text: bool = False  # they are {"text": [...]}
    context: Path | None = None  # what the question is about
    chat_is_answered: bool = False  # its last message is the assistant's
    chat_says_from: bool = False  # messages are {"from": ..., "value": ...}, as ShareGPT has them


def quoted(text: str) -> str:
    """A text as Python writes it, in double quotes."""
    inside = repr(f"'{text}")[2:-1]  # with both kinds of quotes in it Python takes single ones; begun so, never
    return f'"{inside}"' if '"' not in text else repr(text)


# ---- columns


def guess_columns(rows: Sequence[Row], said: dict[str, Path]) -> Columns:
    """Where question, answer and options stand in these rows. said: what the user says of them."""
    paths = _paths(rows)
    question = said.get("question") or _named(paths, rows, QUESTIONS, _is_text) or _named(paths, rows, CHATS, _is_chat)
    chat = question if question and _is_chat(_first(rows, question)) else None
    lettered = next((names for names in _lettered(rows) if len(names) > 1), ())
    taken = {(name,) for name in lettered} | ({question.steps} if question else set())
    answer = said.get("answer") or _named([p for p in paths if p.steps not in taken], rows, ANSWERS, _is_answer)
    is_answered = chat is not None and _last_speaker(rows, chat) == "assistant"
    if answer is None and chat and is_answered:
        answer = Path((*chat.steps, -1, "value" if "value" in _first(rows, chat)[-1] else "content"))
    options = _named(paths, rows, OPTIONS, _is_options)
    has_text = options is not None and isinstance(_first(rows, options), dict)
    says_from = chat is not None and "from" in _first(rows, chat)[0]
    outer = [path for path in paths if len(path.steps) == 1 and path not in (question, answer)]
    about = _named(outer, rows, CONTEXTS, _is_text)
    if question and question.steps == ("instruction",):  # as Alpaca has it
        about = _named(outer, rows, ["input"], _is_text) or about
    return Columns(
        question=question,
        chat=chat is not None,
        answer=answer,
        options=options,
        lettered=() if options else lettered,
        options_have_text=has_text,
        context=about,
        chat_says_from=says_from,
        chat_is_answered=is_answered,
    )


def _paths(rows: Sequence[Row]) -> list[Path]:
    """Every column, and what lies inside those that are dictionaries; the outer first."""
    found: dict[tuple[str | int, ...], None] = {}
    for row in rows[:100]:
        found |= {(name,): None for name in row if isinstance(name, str)}
    for row in rows[:100]:
        for name, value in row.items():
            if isinstance(value, dict):
                found |= {(name, inner): None for inner in value if isinstance(inner, str)}
    return [Path(steps) for steps in found]


def _named(
    paths: Sequence[Path], rows: Sequence[Row], names: Sequence[str], fits: Callable[[Any], bool]
) -> Path | None:
    """The path with the likeliest name whose values fit."""
    ranked = []
    for place, path in enumerate(paths):
        outer, inner = str(path.steps[0]).lower(), str(path.steps[-1]).lower()
        if inner in names or outer in names:  # reward_model.ground_truth; and answers.text, if nothing else is there
            likely = (0, names.index(inner)) if inner in names else (1, names.index(outer))
            ranked.append((likely, len(path.steps), place, path))
    ranked.sort()
    first_of_list = [Path((*path.steps, 0)) for *_, path in ranked]  # {"answers": ["Paris", "paris"]}
    return next((path for path in [*(path for *_, path in ranked), *first_of_list] if fits(_first(rows, path))), None)


def _first(rows: Sequence[Row], path: Path) -> Any:
    """The first value there that is one."""
    return next((value for row in rows if (value := path.of(row)) not in (None, "")), None)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_answer(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _is_options(value: Any) -> bool:
    values = value.get("text") if isinstance(value, dict) else value
    return isinstance(values, list) and len(values) > 1 and all(isinstance(each, (str, int, float)) for each in values)


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys()) for m in value
        )
    )


def _last_speaker(rows: Sequence[Row], chat: Path) -> str:
    last = _first(rows, chat)[-1]
    return ROLES.get(said := str(last.get("role", last.get("from"))), said)


def _lettered(rows: Sequence[Row]) -> Iterable[tuple[str, ...]]:
    """Columns that are options by their names: A B C D, option_a option_b, option1 option2."""
    for form in ("{}", "option_{}", "option{}", "option {}", "choice_{}", "choice{}"):
        for marks in (LETTERS, LETTERS.lower(), "123456789"):
            names = [form.format(mark) for mark in marks]
            by_lower = {str(name).lower(): name for name in rows[0]} if rows else {}
            there = []
            for name in names:
                if not (found := name if rows and name in rows[0] else by_lower.get(name.lower(), "")):
                    break
                there.append(found)
            yield tuple(there)


# ---- rewards


def guess_reward(values: Sequence[Any], options: Sequence[Sequence[Any] | None]) -> Kind:
    """What the gold answers are. options: of each row, beside its answer; None where it has none."""
    if not values:
        return "none"
    texts = [str(value).strip() for value in values]
    if all(isinstance(value, bool) for value in values):
        return "label"
    if all(options) and (kind := _among(texts, [list(map(str, each or ())) for each in options])):
        return kind
    if all(map(_is_letter, texts)):
        return "letter"
    if all("####" in text for text in texts) and _agree(number, texts):
        return "hash"
    if all(map(_NUMBER.fullmatch, texts)) and _agree(number, texts):
        return "number"
    if all(map(last_box, texts)):
        return "boxed"
    if max(map(len, texts)) > 4 * SHORT or sum(map(len, texts)) > SHORT * len(texts):
        return "long"
    if any(map(_LATEX.search, texts)) and _agree(math, texts[:AGREE]):
        return "math"
    return "label" if 1 < len(set(texts)) <= min(FEW, len(texts) // 3) else "text"


def _among(texts: Sequence[str], options: Sequence[Sequence[str]]) -> Kind | None:
    """How the answers name their options, if not by letters."""
    both = list(zip(texts, options, strict=True))
    if all(text in given for text, given in both) and not all(map(_is_letter, texts)):
        return "option"
    return "index" if all(text.isdigit() and int(text) < len(given) for text, given in both) else None


def _is_letter(text: str) -> bool:
    bare = text.strip("()[]. ")
    fits = len(bare) == 1 and bare.upper() in LETTERS
    with suppress(ValueError):
        return fits and choice(f"<answer>{text}</answer>", text) == 1.0
    return False


def _agree(reward: Callable[[str, object], float], golds: Iterable[str]) -> bool:
    """The reward pays every gold answer itself."""
    with suppress(ValueError):
        return all(reward(f"<answer>\n{gold.rpartition('####')[2].strip()}\n</answer>", gold) == 1.0 for gold in golds)
    return False
