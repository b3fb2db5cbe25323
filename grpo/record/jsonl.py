"""A file of one JSON object a line, which can be cut back to where it was when a checkpoint was saved.

Knows nothing of metrics.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo.errors import UserError


def check_position(path: Path, position: int | None) -> None:
    """Whether a file may be opened as a JsonLines at this position: it must be new (None), or at least so long. To be
    asked for all files of a run before the first of them is cut.

    Raises:
        UserError: it exists, or is shorter, or is somewhere else.
    """
    if path.is_symlink():  # whoever packed a run would choose which of the user's files it is cut and written into
        raise UserError(
            f"{path} is a symbolic link, and a run writes only into files of its own. Put the file itself there, or "
            "start a new run."
        )
    if position is None and path.exists():
        raise UserError(
            f"{path} exists already, and a run never overwrites another. Choose a new run folder, or go on "
            "with that run by --resume."
        )
    size = path.stat().st_size if path.exists() else 0
    if position is not None and size < position:
        raise UserError(
            f"{path} has {size} bytes, but the checkpoint was saved when it had {position}: something has "
            "cut it or taken it away since. Restore the file, or start a new run."
        )
    if position and _byte(path, position - 1) != b"\n":
        raise UserError(
            f"{path} is damaged: no line ends at byte {position}, where one ended when the checkpoint was saved. "
            "Restore the file, or start a new run."
        )


class JsonLines:
    """Appends to `path`. Opened at `position` bytes, it drops what was written after them.

    `position` is None for a file that must be new.
    """

    def __init__(self, path: Path, position: int | None):
        self.path = path
        check_position(path, position)
        # Opened at 0 only to make the file where nothing had been written: cutting at 0 is then right too.
        self._file = path.open("xb" if position is None else "ab", buffering=1 << 20)
        self._file.truncate(position or 0)
        self._file.seek(0, os.SEEK_END)  # `position` is asked for before the first line is written, too

    def write(self, records: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        self._file.write(lines.encode(errors="backslashreplace"))  # a lone surrogate becomes JSON's escape
        self._file.flush()

    def position(self) -> int:
        """Bytes written."""
        return self._file.tell()

    def fsync(self) -> None:
        """When this returns, they are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path, end: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a file, or of its first `end` bytes. A last line without its newline is still being written: it is
    left out.

    Raises:
        UserError: another line is not an object.
    """
    with path.open("rb") as file:
        left = math.inf if end is None else end
        for number, line in enumerate(file, 1):
            left -= len(line)
            if left < 0:
                break
            if line.endswith(b"\n"):
                yield _object(path, number, line)


def read_metrics(path: Path, end: int | None = None) -> Iterator[tuple[int, dict[str, float | None]]]:
    """(step, its numbers) of each line of metrics.jsonl, or of its first `end` bytes.

    Raises:
        UserError: a line is something else.
    """
    for number, record in enumerate(read_lines(path, end), 1):
        step = record.pop("step", None)
        if not isinstance(step, int) or not all(map(_is_number, record.values())):
            raise UserError(
                f"{path} is damaged: line {number} is not a step and its numbers. Put the file back, or start anew."
            )
        yield step, record


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """The same with None (JSON's null) for NaN and infinities, which JSON cannot say."""
    return dict.fromkeys(values) | {name: value for name, value in values.items() if math.isfinite(value)}


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        read = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged: line {number} is not JSON. Put the file back, or start a new run."
        ) from error
    if not isinstance(read, dict):
        raise UserError(f"{path} is damaged: line {number} is not an object. Put the file back, or start a new run.")
    return read


def _byte(path: Path, at: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(1)
