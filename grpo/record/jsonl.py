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


class JsonLines:
    """Appends to `path`. Opened at `position` bytes, it drops what was written after them.

    `position` is None for a file that must be new.
    """

    def __init__(self, path: Path, position: int | None):
        self.path = path
        self._file = _open_new(path) if position is None else _open_cut(path, position)

    def write(self, records: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        self._file.write(lines.encode(errors="backslashreplace"))  # a lone surrogate becomes JSON's escape
        self._file.flush()

    def position(self) -> int:
        """Bytes written."""
        return self._file.tell()

    def sync(self) -> None:
        """When this returns, they are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file. A last line without its newline is still being written, and is left out.

    Raises:
        UserError: another line is not an object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _object(path, number, line)


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """The same with None (JSON's null) for NaN and infinities, which JSON cannot say."""
    return dict.fromkeys(values) | {name: value for name, value in values.items() if math.isfinite(value)}


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        read = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: line {number} is not JSON. Put the file back, or start a new run."
        ) from error
    if not isinstance(read, dict):
        raise UserError(f"{path} is damaged: line {number} is not an object. Put the file back, or start a new run.")
    return read


def _open_new(path: Path):
    try:
        return path.open("xb", buffering=1 << 20)
    except FileExistsError as error:
        raise UserError(
            f"{path} exists already, and a run never overwrites another. Choose a new run folder, or go on "
            "with that run by --resume."
        ) from error


def _open_cut(path: Path, position: int):
    size = path.stat().st_size if path.exists() else 0
    if size < position:
        raise UserError(
            f"{path} has {size} bytes, but the checkpoint was saved when it had {position}: something has "
            "cut it or taken it away since. Restore the file, or start a new run."
        )
    # Opened at 0 only to make the file where nothing had been written: cutting at 0 is then right too.
    file = path.open("ab", buffering=1 << 20)
    file.truncate(position)
    return file
