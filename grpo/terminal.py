"""The terminal outside the training loop: where the commands write. Knows nothing of runs."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

IN_A_NOTEBOOK = 110  # columns that a cell shows without breaking them


def _of_a_terminal(most: int) -> int:
    return min(most, shutil.get_terminal_size(fallback=(most, 24)).columns)


def _of_cells(most: int) -> int:
    return min(most, IN_A_NOTEBOOK)


def _is_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"


# Cells of a line: the terminal's, at most so many; `most` itself where there is no terminal to keep to.
IS_NOTEBOOK = _is_notebook()
columns: Callable[[int], int] = _of_cells if IS_NOTEBOOK else _of_a_terminal


class Terminal(Console):
    """Standard output, in a notebook too: as lines of text, not a picture of a terminal for each.

    Where its reader is gone (`| head -1` has read its line) what happens is what happens where a
    terminal is gone: SIGHUP, which lets a run finish its step and save. What is said then goes to standard error."""

    def __init__(self, **given: Any):
        # A notebook's output says that it is a terminal, and keeps every state of a bar.
        is_none = {"force_terminal": False} if IS_NOTEBOOK else {}
        super().__init__(highlight=False, markup=False, emoji=False, force_jupyter=False, **is_none, **given)

    def on_broken_pipe(self) -> None:
        leave_a_broken_pipe()
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup is None or signal.getsignal(hangup) == signal.SIG_DFL:  # nobody asked for the signal: it would kill
            raise BrokenPipeError
        signal.raise_signal(hangup)


def leave_a_broken_pipe() -> None:
    """Let standard output go where errors go; nowhere, if that is the same pipe or none."""
    with suppress(OSError, ValueError):
        one, two = os.fstat(1), os.fstat(2)
        elsewhere = (
            os.dup(2) if (one.st_dev, one.st_ino) != (two.st_dev, two.st_ino) else os.open(os.devnull, os.O_WRONLY)
        )
        os.dup2(elsewhere, sys.stdout.fileno())
        os.close(elsewhere)


WIDEST_LOG = 160
# Without a terminal there is no width to keep to. Brackets are brackets and :bug: is a word: names may have them.
console = Terminal(width=columns(WIDEST_LOG))


# Control codes but for tabs and new lines, marks that turn the direction of writing, halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """Text from wherever (a path, a name, an error about a run that was downloaded) for a terminal: what it would obey
    instead of show is written as Python writes it. An escape code reads \\x1b[31m and turns nothing red."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


# They repeat what a downloaded model's files say. (A reward's own log may have its colours.)
_LOGS_OF_LIBRARIES = ("transformers", "huggingface_hub", "datasets", "torch", "vllm")


def plain_logs() -> None:
    """From now on what these libraries log is for a terminal too."""
    make = logging.getLogRecordFactory()

    def plain_record(*given: Any, **fields: Any) -> logging.LogRecord:
        record = make(*given, **fields)
        if record.name.partition(".")[0] in _LOGS_OF_LIBRARIES:
            with suppress(TypeError, ValueError):  # a message that does not go with its arguments stays as it is
                record.msg, record.args = plain(record.getMessage()), None
        return record

    logging.setLogRecordFactory(plain_record)


def say(text: str) -> None:
    """A line, on a terminal between words on the next one where it is too long."""
    shown = plain(text)
    console.print(between_words(shown, console.width) if console.is_terminal else shown, soft_wrap=True)


def between_words(text: str, width: int) -> str:
    """Plain text with its long lines broken where a terminal would break them, but between words.

    So that they can be copied, neither a path nor what stands in `backticks` is broken, nor a line that begins with a
    space and is no item of a list: a command that stands by itself.
    """
    lines = []
    for line in text.split("\n"):
        whole = _TO_BE_COPIED.sub(lambda found: found[0].replace(" ", "\0"), line)  # which plain text does not have
        item = _ITEM.match(line)
        indent = " " * len(item[0]) if item else ""
        broken = textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)
        lines += broken if len(line) > width and (item or not line.startswith(" ")) else [line]
    return "\n".join(lines).replace("\0", " ")


_TO_BE_COPIED = re.compile("`[^`]*`")
_ITEM = re.compile(" *- ")  # of a list


def unbroken(text: str, width: int) -> str:
    """The same for a log file, whose reader has a width of their own."""
    return text


class _Bar(ProgressColumn):
    """A bar while a part of the whole is done."""

    def render(self, task: Task) -> RenderableType:
        part = task.fields["part"]
        return ProgressBar(total=1, completed=part, width=40) if 0 < part < 1 else Text()


@contextmanager
def working(stage: str) -> Iterator[Callable[[int, int], None]]:
    """Inside, a line at the bottom of a terminal says what is being done and for how long; a log file shows nothing.

    What is given is told how much of how much is done, which the line shows as a bar until all is.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), _Bar(), TimeElapsedColumn())
    # What libraries print is shown above; their progress bars, on stderr, would become a line for every change.
    line = Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stderr=False,
        disable=not console.is_interactive,
    )
    with line:
        task = line.add_task(stage, part=0.0)
        yield lambda done, total: line.update(task, part=done / total)
