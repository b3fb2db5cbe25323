"""Data: the rows of a task: a folder of JSON lines, a data set of the hub, or made up. Knows nothing of prompts.

read_rows(data, split, ...)     what a task file reads its rows with
Rows(task, split, data)         the rows that a task gives, each with its index
"""

from __future__ import annotations

import inspect
import json
import reprlib
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload

from grpo.errors import UserError, user_code
from grpo.task import Row, Task

# Rows beyond this many are taken for rows without an end. A list of as many short ones takes 4 GiB.
MOST_ROWS = 10_000_000
HOLD_OUT = "Where there is no test split, a task that says `held_out=100` keeps so many training prompts for it."
READ_AT_ONCE = 256  # rows
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
Thing = TypeVar("Thing")


def read_rows(data: str, split: str, **hub_arguments: Any) -> Iterable[Row]:
    """Rows of a data set: a folder with `{split}.jsonl`, else the hub's data set of that name.

    Both stay on the disk until a row is asked for. hub_arguments go to `datasets.load_dataset` (`name="main"`, say).

    Raises:
        UserError: neither exists, the hub cannot be reached, or a line is not a JSON object.
    """
    folder = Path(data)
    if folder.is_dir():
        return JsonLines(folder / f"{split}.jsonl")
    if folder.suffix or data.startswith((".", "/", "~")):
        raise UserError(f"There is no folder {data}. --data takes a folder with train.jsonl and test.jsonl.")
    return _read_hub(data, split, hub_arguments)


class Indexed(Sequence[Thing]):
    """Things that are read or made when they are asked for, each by its index."""

    def at(self, index: int) -> Thing:
        """The one thing there."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Thing: ...
    @overload
    def __getitem__(self, index: slice) -> list[Thing]: ...
    def __getitem__(self, index: int | slice) -> Thing | list[Thing]:
        if isinstance(index, slice):
            return [self.at(each) for each in range(*index.indices(len(self)))]
        return self.at(index)


class JsonLines(Indexed[Row]):
    """The objects in a file of JSON lines, each read when it is asked for; blank lines are none."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"There is no file {path}. A data folder holds train.jsonl and test.jsonl. {HOLD_OUT}")
        self.path = path
        self.numbers = array("Q")  # of the lines that are not blank, counted from 1
        self.starts = array("Q")  # where each of these begins, in bytes
        start = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.removeprefix(BYTE_ORDER_MARK).strip():
                    self.numbers.append(number)
                    self.starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def at(self, index: int) -> Row:
        """The row of a line that is not blank."""
        with self.path.open("rb") as lines:
            lines.seek(self.starts[index])
            return self._parse(self.numbers[index], lines.readline())

    def __iter__(self) -> Iterator[Row]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.removeprefix(BYTE_ORDER_MARK).strip():
                    yield self._parse(number, line)

    def _parse(self, number: int, line: bytes) -> Row:
        try:
            row = json.loads(line.removeprefix(BYTE_ORDER_MARK).decode())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} line {number} is not UTF-8: {error}. Save the file in that encoding."
            ) from error
        except (ValueError, RecursionError) as error:
            hint = "Each line must be a whole JSON object, such as json.dumps(row) writes; an array over lines is none."
            raise UserError(f"{self.path} line {number} is not JSON: {error}. {hint}") from error
        if not isinstance(row, dict):
            shown = line.strip()[:40].decode(errors="replace")
            raise UserError(f"{self.path} line {number} is {shown!r}; each line must be a JSON object.")
        return row


def _read_hub(data: str, split: str, arguments: dict[str, Any]) -> Iterable[Row]:
    import datasets

    try:
        return datasets.load_dataset(data, split=split, **arguments)  # pyright: ignore[reportReturnType]
    except Exception as error:  # the hub's client raises a dozen unrelated classes when it is offline
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"The data set {data} ({split}) is neither a folder here nor to be had from the hub: {reason} "
            f"Check the name and the network, or pass --data FOLDER with train.jsonl and test.jsonl. {HOLD_OUT}"
        ) from error


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
        self.source = f"{data} ({split})"
        self._rows: Any  # a Sequence, or what has its methods without being one, as the hub's data sets
        with user_code(self._told):
            try:
                given = task.rows(split, data)
                self._check_rows(given)
                some = given if _has_places(given) else islice(given, most + 1 if first is None else first)
                # Copies: what gives one row after the other may fill the same dict again and again.
                self._rows = given if some is given else [row.copy() if isinstance(row, dict) else row for row in some]
            except KeyError as missing:
                raise UserError(
                    f"The rows of {self.source} have no column {missing}, which task {task.name} reads. "
                    "Rename the column in the data or change `rows` in the task file."
                ) from missing
            self._count = len(self._rows) if first is None else min(first, len(self._rows))
        if self._count == 0:
            raise UserError(f"The {split} split of {data} is empty. Give --data a data set with rows. {HOLD_OUT}")
        if self._count > most:
            raise UserError(
                f"`rows` of task {task.name} gives more than {most:,} rows of {self.source}. Does it ever end? Let it "
                "stop: the run begins again by itself when it has asked every row."
            )

    def __len__(self) -> int:
        return self._count

    def at(self, index: int) -> Row:
        """The row there, checked."""
        with user_code(self._told):
            row = self._rows[index]
        return self._checked(index, row)

    def __iter__(self) -> Iterator[Row]:
        """One after the other, which for rows on a disk is faster than row by row."""
        with user_code(self._told):
            rows = iter(self._rows)
        for start in range(0, self._count, READ_AT_ONCE):
            with user_code(self._told):
                some = list(islice(rows, min(READ_AT_ONCE, self._count - start)))
            for index, row in enumerate(some, start):
                yield self._checked(index, row)

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
