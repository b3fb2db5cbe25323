"""Data: the rows of a task, read from files, folders and the hub, or made up. Knows nothing of prompts.

read_rows(data, split, ...)     what a task file reads its rows with
Rows(task, split, data)         the rows that a task gives, each with its index
"""

from __future__ import annotations

import copy
import inspect
import json
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from grpo.errors import WHAT_USER_CODE_RAISES, UserError, in_words, nearest, user_code
from grpo.files import Indexed, JsonLines
from grpo.sources import HOLD_OUT, Source, choose_split, find_splits
from grpo.task import Row, Task

__all__ = ["Indexed", "JsonLines", "Rows", "as_bytes", "read_rows"]

# Rows beyond this many are taken for rows without an end. A list of as many short ones takes 4 GiB.
MOST_ROWS = 10_000_000
READ_AT_ONCE = 256  # rows
LOOKED_AT = 100  # rows, of those whose columns are to be renamed

_written = json.JSONEncoder(skipkeys=True, default=lambda value: type(value).__qualname__).encode


def read_rows(data: str, split: str, name: str = "", **hub_arguments: Any) -> Sequence[Row]:
    """Rows of a data set, with the columns renamed as --columns says.

    data  a file of rows (CSV, JSON, JSON lines, Parquet, Arrow, compressed or not), a folder of such files or of
          `save_to_disk`, or the name of a data set of the hub; what lies here comes first. A configuration may stand
          behind a colon: openai/gsm8k:main
    split "train" or "test", found by name; of a single file all rows are "train"
    name  of the configuration, where `data` says none and has one of that name

    Rows of JSON lines, Parquet and the hub stay on the disk until they are asked for. hub_arguments go to
    `datasets.load_dataset`.

    Raises:
        UserError: there is no such data, split or column, or a row is none.
    """
    source = data if isinstance(data, Source) else Source(data)
    reading = source.reading
    if reading.place is not None and reading.rows is not None:
        return [reading.rows[reading.place]]
    splits = find_splits(source, name, reading.notes, hub_arguments)
    chosen = choose_split(splits, split, source, reading)
    if split == "test" and chosen != "test" and "test" not in reading.splits:
        reading.notes[f"The held-out prompts are those of the split {chosen} of {source}."] = None
    rows = splits[chosen](reading.bad.append if reading.skip_bad_rows else None)
    reading.rows = _renamed(source, rows, reading.columns) if reading.columns else rows
    return reading.rows


# ---- what a row says


def as_bytes(row: Mapping[Any, Any]) -> bytes:
    """The same for rows with the same columns, in this process and in another. Of what is no text, number, list or
    dictionary its class counts."""
    pieces = []
    for name in sorted(row, key=str):
        try:
            pieces.append(f"{name}\n{_written(row[name])}\n")
        except (ValueError, RecursionError):  # it holds itself
            pieces.append(f"{name}\n{type(row[name]).__qualname__}\n")
    return "".join(pieces).encode(errors="backslashreplace")


# ---- columns


def _renamed(source: str, rows: Any, columns: Mapping[str, str]) -> Sequence[Row]:
    """The rows with some columns called as the task calls them.

    Raises:
        UserError: none of the first rows has a column that is to be renamed.
    """
    found = dict.fromkeys(name for row in islice(rows, LOOKED_AT) if isinstance(row, dict) for name in row)
    for new, old in columns.items():
        if len(rows) and not any(_has(row, old) for row in islice(rows, LOOKED_AT)):
            names = ", ".join(map(str, found))
            raise UserError(
                f"--columns says {new}={old}, but {source} has the columns {names}.{nearest(old, map(str, found))} "
                "What lies inside a column is reached by points: answer=reward_model.ground_truth."
            )
    return Renamed(rows, columns)


class Renamed(Indexed[Row]):
    """Rows whose columns have other names: {new name: old name}. The old names are gone.

    An old name may lead into a column: reward_model.ground_truth, prompt.0.content.
    """

    def __init__(self, rows: Any, columns: Mapping[str, str]):
        self.rows = rows
        self.columns = columns
        self.gone = {*columns, *columns.values()}

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: int) -> Row:
        """The row there."""
        return self._new(self.rows[index])

    def __iter__(self) -> Iterator[Row]:
        return map(self._new, self.rows)

    def _new(self, row: Row) -> Row:
        new = {name: _at(row, old) for name, old in self.columns.items() if _has(row, old)}
        return {**new, **{name: value for name, value in row.items() if name not in self.gone}}


def _has(row: Row, name: str) -> bool:
    try:
        _at(row, name)
    except (LookupError, TypeError, ValueError):
        return False
    return True


def _at(row: Row, name: str) -> Any:
    """The value of a column, or of what lies inside one."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        of_list = isinstance(value, Sequence) and not isinstance(value, str)
        value = value[int(part)] if of_list else dict(value)[part]
    return value


# ---- the rows that a task gives


class Rows(Indexed[Row]):
    """The rows of a split. What can be indexed, such as a data set of the hub, is left where it is; what
    gives one row after the other is read into a list.

    first: read no more than so many of them. most: with more rows than this, they are taken for endless.

    Raises:
        UserError: there are none, there is no end of them, one lacks a column that `rows` reads; when it is read: it is
            not a dict.
    """

    def __init__(self, task: Task, split: str, data: str, first: int | None = None, most: int = MOST_ROWS):
        self.task = task
        self.split = split
        self.data = data if isinstance(data, Source) else Source(data)
        self.source = f"{data} ({split})"
        self.reading = self.data.reading
        self.reading.rows = None
        self._places: Sequence[int] | None = None  # of the rows that are kept, where some are not
        self._rows: Any  # a Sequence, or what has its methods without being one, as the hub's data sets
        limit = most + 1 if first is None else first
        with user_code(self._told):
            try:
                self._rows = self._given(limit)
            except WHAT_USER_CODE_RAISES:
                if not (self.reading.skip_bad_rows and self.reading.rows is not None):
                    raise
                self._rows = self._one_by_one(limit)
            self._count = len(self._rows) if first is None else min(first, len(self._rows))
        self._check_reading()
        if self._count == 0:
            none = f" Left out was all of it: {self.reading.bad[0]}" if self.reading.bad else ""
            raise UserError(f"The {split} split of {data} is empty. Give --data a data set with rows. {HOLD_OUT}{none}")
        if self._count > most:
            raise UserError(
                f"`rows` of task {task.name} gives more than {most:,} rows of {self.source}. Does it ever end? Let it "
                "stop: the run begins again by itself when it has asked every row."
            )

    def __len__(self) -> int:
        return self._count

    def only(self, places: Sequence[int]) -> Rows:
        """The rows at these indices."""
        kept = copy.copy(self)
        kept._places, kept._count = places, len(places)
        return kept

    def at(self, index: int) -> Row:
        """The row there, checked."""
        with user_code(self._told):
            row = self._rows[index if self._places is None else self._places[index]]
        return self._checked(index, row)

    def __iter__(self) -> Iterator[Row]:
        """One after the other, which for rows on a disk is faster than row by row."""
        if self._places is not None:
            yield from map(self.at, range(self._count))
            return
        with user_code(self._told):
            rows = iter(self._rows)
        for start in range(0, self._count, READ_AT_ONCE):
            with user_code(self._told):
                some = list(islice(rows, min(READ_AT_ONCE, self._count - start)))
            for index, row in enumerate(some, start):
                yield self._checked(index, row)

    def _given(self, limit: int) -> Any:
        """What the task gives, at most so many where they come one after the other."""
        try:
            given = self.task.rows(self.split, self.data)
            self._check_rows(given)
            if _has_places(given):
                return given
            # Copies: what gives one row after the other may fill the same dict again and again.
            return [row.copy() if isinstance(row, dict) else row for row in islice(given, limit)]
        except KeyError as missing:
            raise UserError(self._no_column(str(missing))) from missing

    def _one_by_one(self, limit: int) -> list[Any]:
        """What the task makes of each row that it reads alone, without those that it fails on."""
        given: list[Any] = []
        for place in range(len(self.reading.rows)):
            if len(given) >= limit:
                break
            try:
                self.reading.place = place
                given += self.task.rows(self.split, self.data)
            except WHAT_USER_CODE_RAISES as error:
                row = reprlib.repr(self.reading.rows[place])
                self.reading.bad.append(
                    f"`rows` of task {self.task.name} raised {in_words(error)} on row {place}, {row}."
                )
            finally:
                self.reading.place = None
        return given

    def _check_reading(self) -> None:
        """What --columns, --splits and --skip-bad-rows say has an effect.

        Raises:
            UserError: the task reads its rows in some other way than by `read_rows`.
        """
        said = {"--columns": self.reading.columns, "--splits": self.reading.splits}
        given = " and ".join(flag for flag, value in said.items() if value)
        if given and self.reading.rows is None:
            raise UserError(
                f"{given} is given, but `rows` of task {self.task.name} does not read {self.data} by "
                "`grpo.data.read_rows`, so that it would be of no effect. Leave it out, or change `rows`."
            )

    def _no_column(self, missing: str) -> str:
        told = f"The rows of {self.source} have no column {missing}, which task {self.task.name} reads."
        first = next(iter(self.reading.rows), {}) if self.reading.rows is not None else {}
        there = f" They have {', '.join(map(str, first))}." if first else ""
        return (
            f"{told}{there} Say which column it is by --columns {missing.strip(chr(39))}=NAME, rename it in the data, "
            "or change `rows` in the task file."
        )

    def _check_rows(self, given: Any) -> None:
        """It can be read row by row."""
        if isinstance(given, Iterable) or _has_places(given):
            return
        if inspect.iscoroutine(given):
            given.close()  # else Python says that nobody awaited it
        raise UserError(
            f"`rows` of task {self.task.name} gave {reprlib.repr(given)} ({type(given).__name__}) for {self.source}. "
            "Write it with `def`, and let it return, or yield, a dict of columns for each row."
        )

    def _checked(self, index: int, row: Any) -> Row:
        if not isinstance(row, dict):
            raise UserError(
                f"`rows` of task {self.task.name} gave {reprlib.repr(row)} ({type(row).__name__}) as row {index} of "
                f"{self.source}. A row is a dict of columns, such as {{'question': ..., 'answer': ...}}. A table of "
                'pandas gives such rows by .to_dict("records"), a DatasetDict by its split.'
            )
        return row

    def _told(self, raised: str) -> str:
        return f"`rows` of task {self.task.name} raised {raised} on {self.source}. Mend the row, or `rows` in the task."


def _has_places(rows: Any) -> bool:
    """Whether any row can be asked for again, by its index."""
    hub = sys.modules.get("datasets")  # where it was not imported nothing comes from it
    return isinstance(rows, Sequence) or (hub is not None and isinstance(rows, hub.Dataset))
