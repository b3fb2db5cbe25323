"""The command `python -m grpo.new NAME --data FILE`: writes a task file for such data. Knows nothing of models.

    python -m grpo.new sums --data sums.csv
    python -m grpo.new sums --data sums.csv --columns question=exercise answer=key

It looks at the rows, guesses which columns ask and answer and which reward fits the answers, and writes NAME.py, which
`--check` then tries. What it cannot know it says, and marks with TODO. A file that exists is never written over.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path as FilePath
from typing import Any

from grpo.data import read_rows
from grpo.errors import UserError
from grpo.files import Row
from grpo.guess import Columns, Path, guess_columns, guess_reward, quoted
from grpo.scaffold import REWARDS, Found, source_of
from grpo.sources import Reading, Source, local_path, whole_path
from grpo.task import fault_of_name
from grpo.terminal import plain, say

LOOKED_AT = 20_000  # rows
MOST_HELD_OUT = 100  # prompts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = command_line().parse_args(argv)
    try:
        say(new(given.name, given.data, given.columns, given.splits))
    except UserError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        return 2
    return 0


def command_line() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(prog="python -m grpo.new", description="Write a task file for some data.")
    parser.add_argument("name", metavar="NAME", help="of the task; it is written to NAME.py")
    parser.add_argument("--data", required=True, help="a file, a folder or a data set of the hub, as grpo.run takes it")
    parser.add_argument("--columns", nargs="*", default=[], metavar="question=COLUMN", help="what is not guessed right")
    parser.add_argument("--splits", nargs="*", default=[], metavar="train=NAME", help="what their names do not say")
    return parser


def new(name: str, data: str, columns: Sequence[str] = (), splits: Sequence[str] = ()) -> str:
    """Write a task file for these data. Returns what was guessed, and what to do next.

    Raises:
        UserError: the data cannot be read, or the file exists.
    """
    file = FilePath(name if name.endswith(".py") else f"{name}.py")
    _check_name(file)
    found, rows = _look(file, data, columns, splits)
    try:
        with file.open("x", encoding="utf-8") as written:
            written.write(source_of(found))
    except FileExistsError as error:
        raise UserError(f"{file} exists, and is not written over. Choose another name.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}.") from error
    return "\n".join([f"{file} is written, from {rows:,} rows of {data}.", *_told(found, file)])


def _check_name(file: FilePath) -> None:
    if fault := fault_of_name(file.stem):
        raise UserError(f"A task cannot be called {file.stem!r}, {fault}: use letters, digits, - and _.")
    if file.stem in sys.stdlib_module_names:
        raise UserError(f"{file.stem} is the name of a module of Python's own, which a file beside it would hide.")
    if file.exists() or file.is_symlink():
        raise UserError(f"{file} exists, and is not written over. Choose another name.")
    if not file.parent.is_dir():
        raise UserError(f"There is no folder {file.parent}. Make it, or choose another name.")


def _look(file: FilePath, data: str, columns: Sequence[str], splits: Sequence[str]) -> tuple[Found, int]:
    """What the data are like, and how many rows they have."""
    said = {name: _path(column) for name, column in _pairs("--columns", columns).items()}
    if unknown := set(said) - {"question", "answer"}:
        raise UserError(f"--columns has {unknown.pop()!r}. Here it says which column is `question` and which `answer`.")
    reading = Reading(splits=_pairs("--splits", splits), skip_bad_rows=True)
    given = read_rows(Source(data, reading), "train")
    rows = [dict(row) for row in islice(given, LOOKED_AT)]
    if not rows:
        raise UserError(f"{data} has no rows.")
    for path in said.values():
        if all(path.of(row) is None for row in rows):
            raise UserError(f"{data} has no column {path.name}, but {', '.join(map(str, rows[0]))}.")
    found = guess_columns(rows, said)
    answers, options = _answers(rows, found)
    kind = guess_reward(answers, options)
    try:
        read_rows(Source(data, reading), "test")
        held_out = None
    except UserError:
        held_out = max(1, min(MOST_HELD_OUT, len(given) // 10))
    labels = tuple(sorted({str(answer).strip() for answer in answers})) if kind == "label" else ()
    asked = sum(found.question.of(row) not in (None, "") for row in rows) if found.question else len(rows)
    is_bad = bool(reading.bad) or asked < len(rows) or 0 < len(answers) < len(rows)
    source = _data_source(file, data)
    return Found(file.stem, source, found, kind, held_out, tuple(splits), labels, is_bad), len(given)


def _pairs(flag: str, words: Sequence[str]) -> dict[str, str]:
    if wrong := next((word for word in words if not all(word.partition("=")[::2])), ""):
        raise UserError(f"{flag} has {wrong!r}. It takes NAME=COLUMN.")
    return {word.partition("=")[0]: word.partition("=")[2] for word in words}


def _path(column: str) -> Path:
    return Path(tuple(int(step) if step.lstrip("-").isdigit() else step for step in column.split(".")))


def _answers(rows: Sequence[Row], columns: Columns) -> tuple[list[Any], list[list[Any] | None]]:
    """The answers that are there, and beside each the options of its row."""
    if columns.answer is None:
        return [], []
    answered = [(value, row) for row in rows if (value := columns.answer.of(row)) not in (None, "")]
    return [value for value, _ in answered], [_options(row, columns) for _, row in answered]


def _options(row: Row, columns: Columns) -> list[Any] | None:
    if columns.lettered:
        return [row.get(name) for name in columns.lettered]
    held = columns.options.of(row) if columns.options else None
    return held.get("text") if isinstance(held, dict) else held


def _data_source(file: FilePath, data: str) -> str:
    """Where the data are, as the task file says it: beside the file by their names, so that both may be moved."""
    found = local_path(data)
    if found and not found[1]:
        folder, path = file.parent.resolve(), found[0].resolve()
        if path.is_relative_to(folder) and path != folder:
            return f"str(Path(__file__).parent / {quoted(str(path.relative_to(folder)))})"
    return quoted(whole_path(data))


# ---- what is told


def _told(found: Found, file: FilePath) -> list[str]:
    columns = found.columns
    reward, words = REWARDS[found.kind]
    told = []
    if columns.question is None:
        told.append("Fill in: no column looks like a question. Write which one it is where TODO stands in `rows`.")
    else:
        told.append(f"The question is `{columns.question.name}`{' (chat messages)' if columns.chat else ''}.")
    if columns.answer is None:
        told.append("Fill in: no column looks like an answer. Write a reward where TODO stands.")
    elif found.kind == "none":
        told.append(f"Fill in: `{columns.answer.name}` is empty in every row. Write a reward where TODO stands.")
    else:
        told.append(f"The answer is `{columns.answer.name}`, {words}; the reward is `{reward}`.")
    if found.kind == "long":
        told.append("Fill in: `similarity` to a long text is a stand-in for a reward that knows what is good.")
    if found.has_bad_rows:
        told.append("Some rows cannot be read, or have no question or no answer: they are left out (skip_bad_rows).")
    if found.held_out:
        prompts = "1 prompt is" if found.held_out == 1 else f"{found.held_out} prompts are"
        told.append(f"There is no test split: {prompts} held out.")
    return [*told, f"Next: python -m grpo.run {shlex.quote(str(file))} --check"]


if __name__ == "__main__":
    sys.exit(main())
