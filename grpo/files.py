"""Files: the rows of one file, each value as it stands there. Knows nothing of splits, tasks or the hub.

read_file(path, bad)     CSV, JSON, JSON lines, Parquet or Arrow, compressed or not -> rows, each by its index

JSON and CSV are read by Python's own modules, row by row. `datasets` would make one type of each column: of a date in
text a datetime, of 72 beside 2.5 the float 72.0, of "007" beside 7 the number 7, and of one bad line in a million
nothing but an error. Rows that are none are told to `bad` and left out; without it the first of them is an error.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

from grpo.errors import UserError, in_words

Row = dict[str, Any]
Thing = TypeVar("Thing")
Bad = Callable[[str], object]  # is told of a row that is none, in a sentence

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# First bytes -> what a file is, and the ending that says so; none of them begins a text.
BINARY = {
    b"\x1f\x8b": ("compressed by gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", ".zst"),
    b"\xfd7zXZ\0": ("compressed by xz", ".xz"),
    b"PK\x03\x04": ("a ZIP archive, or a sheet of Excel, which can be saved as CSV", ".zip"),
    b"PAR1": ("Parquet", ".parquet"),
}
DELIMITERS = ",;\t|"
ROWS_OF_DATA = ("data", "rows", "examples", "items", "records", "instances", "questions", "problems")
IN_ONE_PIECE = 20_000  # rows of a CSV


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


def read_file(path: Path, bad: Bad | None = None) -> Any:
    """The rows of a file: a Sequence, or a data set of the `datasets` library, which has its methods.

    Raises:
        UserError: the file cannot be read, or holds no rows.
    """
    read = _READERS.get(format_of(path))
    if read is None:
        raise UserError(
            f"{path} is no file of rows by its name. It ends in {', '.join(FORMATS)}, and may be compressed "
            f"({', '.join(COMPRESSED)})."
        )
    try:
        _check_is_text(path)
        return read(path, bad)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: {error}. Save it in that encoding (Excel calls it CSV UTF-8), or convert it: "
            f"`iconv -f {_likely_encoding(error.object)} -t UTF-8`."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:  # of a file that is damaged or not there
        raise UserError(f"{path} cannot be read: {in_words(error)}.") from error


def _check_is_text(path: Path) -> None:
    """What is text by its name is none where it begins with these bytes: no line of it is one.

    Raises:
        UserError: it is something else.
    """
    if path.suffix.lower() in (*COMPRESSED, ".parquet", ".arrow"):
        return
    with path.open("rb") as file:
        first = file.read(8)
    for begins, (what, ending) in BINARY.items():
        if first.startswith(begins):
            name = f"{path.name}{ending}" if ending in COMPRESSED else f"{path.stem}{ending}"
            raise UserError(f"{path} is no text, as its name says: it is {what}. If so, call it {name}.")


def _likely_encoding(text: bytes) -> str:
    """Of bytes that are not UTF-8: Excel's "Unicode text" begins with a mark, else it writes the system's own."""
    return "UTF-16" if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "WINDOWS-1252"


def format_of(path: Path) -> str:
    """The ending that says what is in it, such as .csv of rows.csv.gz; empty where it says nothing."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    ending = os.path.splitext(name)[1]
    return ending if ending in FORMATS else ""


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed by what its name says."""
    if path.suffix.lower() not in COMPRESSED:
        return path.open("rb")
    import fsspec  # comes with datasets

    with fsspec.open(str(path), "rb", compression="infer") as whole:
        return BytesIO(whole.read())  # type: ignore[union-attr]


# ---- JSON


class JsonLines(Indexed[Row]):
    """The objects in a file of JSON lines, each read when it is asked for; blank lines are none."""

    def __init__(self, path: Path, bad: Bad | None = None):
        self.path = path
        self.opened = partial(path.open, "rb")
        if path.suffix.lower() in COMPRESSED:  # in which no line can be found by its place
            content = _open(path).read()
            self.opened = partial(BytesIO, content)
        self.numbers = array("Q")  # of the lines that are not blank, counted from 1
        self.starts = array("Q")  # where each of these begins, in bytes
        start = 0
        with self.opened() as lines:
            for number, line in enumerate(lines, start=1):
                if line.removeprefix(BYTE_ORDER_MARK).strip() and (bad is None or self._is_row(number, line, bad)):
                    self.numbers.append(number)
                    self.starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def at(self, index: int) -> Row:
        """The row of a line that is not blank."""
        with self.opened() as lines:
            lines.seek(self.starts[index])
            return self._parse(self.numbers[index], lines.readline())

    def __iter__(self) -> Iterator[Row]:
        wanted = iter(self.numbers)
        following = next(wanted, None)
        with self.opened() as lines:
            for number, line in enumerate(lines, start=1):
                if number == following:
                    yield self._parse(number, line)
                    following = next(wanted, None)

    def _is_row(self, number: int, line: bytes, bad: Bad) -> bool:
        try:
            self._parse(number, line)
        except UserError as error:
            bad(str(error))
            return False
        return True

    def _parse(self, number: int, line: bytes) -> Row:
        try:
            row = json.loads(line.removeprefix(BYTE_ORDER_MARK).decode())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} line {number} is not UTF-8: {error}. Save the file in that encoding."
            ) from error
        except (ValueError, RecursionError) as error:
            hint = "Each line must be a whole JSON object, such as json.dumps(row) writes."
            raise UserError(f"{self.path} line {number} is not JSON: {error}. {hint}") from error
        if not isinstance(row, dict):
            shown = line.strip()[:40].decode(errors="replace")
            raise UserError(f"{self.path} line {number} is {shown!r}; each line must be a JSON object.")
        return row


def _read_json(path: Path, bad: Bad | None) -> Sequence[Row]:
    """A list of objects; an object with such a list, or with a list for each column; or JSON lines of any name."""
    with _open(path) as lines:
        first = next((line for line in lines if line.removeprefix(BYTE_ORDER_MARK).strip()), b"")
        only = not any(line.strip() for line in lines)
    is_list = first.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"["
    one_object = format_of(path) == ".json" and (only or not _is_object(first))
    if not (is_list or one_object):
        return JsonLines(path, bad)
    with _open(path) as whole:
        text = whole.read().removeprefix(BYTE_ORDER_MARK).decode()
    if not text.strip():
        return []
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON: {error}. It must be a list of objects, or have a whole object in each line."
        ) from error
    return _objects(path, held if isinstance(held, list) else _rows_in(path, held, only), bad)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.removeprefix(BYTE_ORDER_MARK)), dict)
    except (ValueError, RecursionError):
        return False


def _rows_in(path: Path, held: Any, is_line: bool) -> list[Any]:
    """The rows in one object: a list under one of the usual names, or a list for each column; a single one that is
    written in one line, as JSON lines are, or holds nothing else."""
    if not isinstance(held, dict):
        raise UserError(f"{path} is {str(held)[:40]!r}. It must be a list of objects.")
    lists = {name: value for name, value in held.items() if isinstance(value, list)}
    named = next((name for name in ROWS_OF_DATA if name in lists and all(isinstance(r, dict) for r in lists[name])), "")
    if named:
        return lists[named]
    if lists and len(lists) == len(held) and len({len(value) for value in lists.values()}) == 1:
        return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    single = [not isinstance(value, (list, dict)) for value in held.values()]
    if held and (all(single) or (is_line and any(single))):
        return [held]
    raise UserError(
        f"{path} is one object with {', '.join(map(repr, list(held)[:6]))}, and nobody says which of it is the rows. "
        'Save the list of rows alone, or as {"data": [...]}.'
    )


def _objects(path: Path, rows: list[Any], bad: Bad | None) -> list[Row]:
    kept = []
    for place, row in enumerate(rows):
        if isinstance(row, dict):
            kept.append(row)
            continue
        told = f"{path} has {str(row)[:40]!r} ({type(row).__name__}) as row {place}; each row must be a JSON object."
        if bad is None:
            raise UserError(told)
        bad(told)
    return kept


# ---- CSV


def _read_csv(path: Path, bad: Bad | None) -> Any:
    """Every value is text as it stands there: nobody says which column holds numbers, and 007 would become 7."""
    import datasets
    import pyarrow
    from datasets.table import InMemoryTable

    with _open(path) as raw, _long_values(), TextIOWrapper(raw, encoding="utf-8-sig", newline="") as lines:
        records = _records(path, lines, bad)
        names = next(records, [])
        _check_names(path, names)
        kept = [place for place, name in enumerate(names) if name]
        pieces = []
        while some := list(islice(records, IN_ONE_PIECE)):
            columns = list(zip(*some, strict=True))
            pieces.append(pyarrow.table({names[n]: pyarrow.array(columns[n], pyarrow.string()) for n in kept}))
    return datasets.Dataset(InMemoryTable(pyarrow.concat_tables(pieces))) if pieces else []


def _records(path: Path, lines: Any, bad: Bad | None) -> Iterator[list[str]]:
    """The header and then every record with as many values."""
    first = lines.readline()
    delimiter = "\t" if format_of(path) == ".tsv" else max(DELIMITERS, key=first.count)
    spaced = f"{delimiter} " in first
    reader = csv.reader(_again(first, lines), delimiter=delimiter, skipinitialspace=spaced, strict=True)
    names: list[str] = []
    while True:
        began = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            told = f"{path} line {began} is not CSV: {error}. A quotation mark inside a quoted value is written twice."
            if bad is None or not names:
                raise UserError(told) from error
            bad(told)
            continue
        if values is None:
            return
        if not any(values):  # a blank line, or one of commas alone, as spreadsheets write below a table
            continue
        if not names:
            names = [value.strip() for value in values]
            yield names
        elif len(values) == len(names):
            yield values
        else:
            told = f"{path} line {began} has {len(values)} values, but the header names {len(names)} columns."
            if bad is None:
                raise UserError(f"{told} A value with {delimiter!r} in it stands in quotation marks.")
            bad(told)


def _again(first: str, lines: Any) -> Iterator[str]:
    yield first
    yield from lines


@contextmanager
def _long_values() -> Iterator[None]:
    """Inside, a value may be longer than Python's csv allows at first, which is 128 KiB."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_names(path: Path, names: list[str]) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise UserError(
            f"{path} has {names.count(twice[0])} columns called {twice[0]!r}, and nobody says which is meant. Rename "
            "one in its first line."
        )
    if len(names) == 1 and not names[0].isprintable():
        raise UserError(f"The first line of {path} is {names[0][:40]!r}. It must name the columns.")


# ---- Arrow


def _read_table(path: Path, bad: Bad | None) -> Any:
    import datasets

    if format_of(path) == ".arrow":
        return datasets.Dataset.from_file(str(path))
    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # pyarrow's, fsspec's and the library's own have no class in common
        raise UserError(
            f"{path} cannot be read: {in_words(error.__cause__ or error)}. (The datasets library keeps a copy of it "
            "where HF_HOME says, and must be able to write there.)"
        ) from error


_READERS: dict[str, Callable[[Path, Bad | None], Any]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_table,
    ".arrow": _read_table,
}
