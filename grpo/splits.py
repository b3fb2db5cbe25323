"""Splits: the rows to train on and those held out, looked at once each before anything is made of them.

Knows nothing of tokens, nor of how a reward is called.

read_splits(asker, config, ...)    both, with what their rows ask; held-out prompts are no training prompts
Answers                            gold answers that are missing
"""

from __future__ import annotations

import hashlib
import heapq
import inspect
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from grpo.config import Config, named
from grpo.data import Rows, as_bytes
from grpo.errors import WHAT_USER_CODE_RAISES, UserError, user_code
from grpo.prompts import Asker, Survey
from grpo.rewards.names import name_of, reward_of
from grpo.sources import Reading, Source
from grpo.task import Row, Task

ROWS_BETWEEN_NOTES = 250_000
NAMED = 4  # rows that are left out, on the screen
SPARE_BYTES = 512  # that a chat template may write beside what a row asks

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

Note = Callable[[str], object]


@dataclass
class Split:
    """The rows of a split and what they ask. `indices` are of the rows that are asked; `sha256` is of all rows."""

    rows: Rows
    survey: Survey
    columns: list[str]
    indices: Sequence[int]
    sha256: str


def read_splits(asker: Asker, config: Config, num_tests: int | None, note: Note) -> tuple[Split, Split]:
    """The rows to train on, and those held out; of these at most `num_tests`.

    Raises:
        UserError: the rows, what they ask or their gold answers are not as they must be, or nothing is held out.
    """
    task = asker.task
    held_out = task.held_out if config.held_out is None else config.held_out
    train = read_split(asker, _rows(task, "train", config), note)
    if held_out is None:
        test = read_split(asker, _rows(task, "test", config, first=num_tests), note)
        check_held_out(task, train, test, note)
        return train, test
    if held_out == 0:
        note(f"note: task {task.name} holds nothing out: its held-out score is that of training prompts.")
        return train, replace(train, indices=train.indices[:num_tests])
    return hold_out(train, held_out, num_tests)


def _rows(task: Task, split: str, config: Config, first: int | None = None) -> Rows:
    """The rows of a split, read as the configuration says."""
    reading = Reading(named(config.columns), named(config.splits), config.skip_bad_rows)
    return Rows(task, split, Source(config.data or task.data, reading), first=first)


def read_split(asker: Asker, rows: Rows, note: Note) -> Split:
    """All rows of a split, looked at once."""
    reading = rows.reading
    if reading.skip_bad_rows:
        rows = usable(asker, rows)
    for told in reading.notes:
        note(f"note: {told}")
    if reading.bad:
        shown = "\n".join(f"  {told}" for told in reading.bad[:NAMED])
        more = "\n  ..." * (len(reading.bad) > NAMED)
        count = "1 row" if len(reading.bad) == 1 else f"{len(reading.bad):,} rows"
        note(f"note: {count} of {rows.source} left out, {len(rows):,} used:\n{shown}{more}")
    survey, answers, digest = Survey(asker), Answers(asker.task), hashlib.sha256()
    for index, row in enumerate(rows):
        survey.add(index, row)
        answers.add(index, row)
        digest.update(as_bytes(row))
        if (index + 1) % ROWS_BETWEEN_NOTES == 0:
            note(f"{index + 1:,} of {len(rows):,} rows of {rows.source} read")
    answers.check(rows.source)
    return Split(rows, survey, list(answers.columns), range(len(rows)), digest.hexdigest())


def usable(asker: Asker, rows: Rows) -> Rows:
    """The rows that can be asked, and have an answer that the deciding reward can compare with; the others are named in
    `rows.reading.bad`.

    Raises:
        UserError: none can.
    """
    answers, kept, measure = Answers(asker.task), array("Q"), _measure_of_gold(asker.task)
    for index in range(len(rows)):
        try:
            row = rows.at(index)
            content = asker.content(index, row)
            answers.columns.update(dict.fromkeys(row))
            if missing := answers.missing(row):
                raise UserError(f"row {index}: {missing}")
            if asker.task.gold is not None:
                measure(index, asker.task.gold_text(row), row)
            if len(str(content).encode()) > asker.longest_prompt - SPARE_BYTES:  # a token has a byte at least
                asker.prompts([(index, row, content)], asker.longest_prompt)
        except UserError as error:
            rows.reading.bad.append(str(error))
        else:
            kept.append(index)
    if not kept:
        raise UserError(f"No row of {rows.source} can be used. The first: {rows.reading.bad[0]}")
    return rows if len(kept) == len(rows) else rows.only(kept)


@dataclass
class Answers:
    """The gold answers of a split: those that are none. As text ("None") they would be an answer that pays."""

    task: Task
    columns: dict[str, None] = field(default_factory=dict)  # that any row has, in their order
    num_missing: int = 0
    shown: list[str] = field(default_factory=list)  # the first of them

    def __post_init__(self) -> None:
        self.wanted = _columns_of_solved(self.task)

    def add(self, index: int, row: Row) -> None:
        """The next row."""
        self.columns.update(dict.fromkeys(row))
        if missing := self.missing(row):
            self.num_missing += 1
            self.shown += [f"row {index}: {missing}"][: 4 - len(self.shown)]

    def missing(self, row: Row) -> str:
        """What is no answer of a row, in words; empty if nothing is."""
        return self.task.missing_gold(row, [name for name in self.wanted if name in self.columns])

    def check(self, source: str) -> None:
        """Raises UserError if an answer is missing, or a column has no name that a reward could ask for it by."""
        for wrong in (name for name in self.columns if not isinstance(name, str)):
            of_csv = " csv.DictReader calls None what a line has beyond the header's columns." if wrong is None else ""
            raise UserError(
                f"A column of {source} is called {wrong!r} ({type(wrong).__name__}). Rewards ask for columns by name: "
                f"let `rows` of task {self.task.name} give it a name that is text.{of_csv}"
            )
        if self.num_missing:
            rows = "1 row" if self.num_missing == 1 else f"{self.num_missing:,} rows"
            more = "; ..." * (self.num_missing > len(self.shown))
            raise UserError(
                f"The gold answer is missing in {rows} of {source} ({'; '.join(self.shown)}{more}). Leave such rows "
                f"out (--skip-bad-rows, or `rows` of task {self.task.name}), or mend the data. A column may be empty "
                "if the reward that decides has a default for it."
            )


def _functions_of_solved(task: Task) -> list[Callable]:
    """The reward which tells right from wrong; none where nothing does."""
    named = [key for key in task.rewards if task.solved and name_of(key) == task.solved[0]]
    return [reward_of(key) for key in named]


def _measure_of_gold(task: Task) -> Callable[[int, str, Row], object]:
    """Calls the deciding reward on a gold answer, because some cannot compare with any (`number` with "none of them").
    Those that wait for something, or score several completions at once, are left to the preflight.

    Raises, where it is called:
        UserError: the reward has failed.
    """
    functions = _functions_of_solved(task)
    if "completion" not in _columns_of_solved(task) or any(map(inspect.iscoroutinefunction, functions)):
        return lambda index, gold, row: None
    [function] = functions
    names = list(inspect.signature(function).parameters)

    def measure(index: int, gold: str, row: Row) -> None:
        with user_code(lambda raised: f"row {index}: `{name_of(function)}` raised {raised} on its gold answer."):
            function(**{name: value for name, value in {**row, "completion": gold}.items() if name in names})

    return measure


def _columns_of_solved(task: Task) -> list[str]:
    """The columns that the reward which tells right from wrong cannot do without."""
    functions = _functions_of_solved(task)
    with suppress(*WHAT_USER_CODE_RAISES):  # what has no signature is refused where the rewards are built
        parameters = [each for function in functions for each in inspect.signature(function).parameters.values()]
        return [each.name for each in parameters if each.default is each.empty and each.kind in _NAMED]
    return []


def check_held_out(task: Task, train: Split, test: Split, note: Note) -> None:
    """Held-out prompts must be of the kind of the training prompts, and none of these.

    Raises:
        UserError: one is chat messages and the other a text, or all of them are training prompts.
    """
    if isinstance(train.survey.contents[0], str) != isinstance(test.survey.contents[0], str):
        raise UserError(
            f"`prompt` of task {task.name} gives chat messages for one split and a text for the other. Return the same "
            "kind for every row."
        )
    trained = set(train.survey.keys)
    shared = [index for index in test.indices if test.survey.keys[index] in trained]
    if len(shared) == len(test.indices):
        raise UserError(
            f"Every held-out prompt of {test.rows.source} is a training prompt too: the held-out score would say "
            f"nothing. Give --data two different splits, and let `rows` of task {task.name} look at its `split`. Where "
            "there is no test split, say --held-out 100, or `held_out=100` in the Task: so many prompts are then kept "
            "out of training (0: none, to try things out)."
        )
    if shared:
        rows = ", ".join(map(str, shared[:4])) + ", ..." * (len(shared) > 4)
        note(
            f"note: {len(shared):,} of {len(test.indices):,} held-out prompts of {test.rows.source} are training "
            f"prompts too (rows {rows}), and their score is not one of held-out prompts."
        )


def hold_out(split: Split, count: int, num_tests: int | None) -> tuple[Split, Split]:
    """One split as two: `count` prompts are held out, with every row that asks the same.

    Which ones, their own text decides, as if by lot: they are the same in every run, whatever its seed and the order of
    the rows, and few change when rows are added.

    Raises:
        UserError: there are no more prompts than that.
    """
    keys = split.survey.keys
    chosen = heapq.nsmallest(count + 1, set(keys))
    if len(chosen) <= count:
        raise UserError(
            f"{count} prompts of task {split.survey.asker.task.name} are to be held out, but {split.rows.source} asks "
            f"only {len(chosen):,} different prompts. Hold out fewer."
        )
    first = {key: index for index, key in reversed(list(enumerate(keys))) if key <= chosen[-2]}
    kept = array("Q", (index for index, key in enumerate(keys) if key > chosen[-2]))
    test = [first[key] for key in chosen[:-1]]
    return replace(split, indices=kept), replace(split, indices=test[:num_tests])
