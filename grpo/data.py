"""Data: the rows of a task: a folder of JSON lines, a data set of the hub, or made up. Knows nothing of prompts.

read_rows(data, split, ...)     what a task file reads its rows with
load_rows(task, split, data)    all rows that a task gives
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grpo.errors import UserError, user_code
from grpo.task import Row, Task


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
    with user_code(
        lambda raised: (
            f"`rows` of task {task.name} raised {raised} on {data} ({split}). Mend the row or `rows` in the task file."
        )
    ):
        try:
            rows = list(task.rows(split, data))
        except KeyError as missing:
            raise UserError(
                f"The rows of {data} ({split}) have no column {missing}, which task {task.name} reads. "
                "Rename the column in the data or change `rows` in the task file."
            ) from missing
    if not rows:
        raise UserError(f"The {split} split of {data} is empty. Give --data a data set with rows.")
    wrong = next((index for index, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise UserError(
            f"`rows` of task {task.name} gave {reprlib.repr(rows[wrong])} ({type(rows[wrong]).__name__}) as row "
            f"{wrong} of {data} ({split}). A row is a dict of columns, such as {{'question': ..., 'answer': ...}}."
        )
    return rows
