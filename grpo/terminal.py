"""The terminal outside the training loop: where the commands write. Knows nothing of runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Without a terminal there is no width to keep to.
console = Console(highlight=False, width=shutil.get_terminal_size(fallback=(150, 24)).columns)


def say(text: str) -> None:
    """A line as it is: never wrapped, so that paths and commands can be copied."""
    console.print(text, soft_wrap=True, markup=False)


@contextmanager
def working(stage: str) -> Iterator[None]:
    """Inside, a line at the bottom of a terminal says what is being done and for how long; a log file shows nothing."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    # What libraries print is shown above; their progress bars, on stderr, would become a line for every change.
    line = Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stderr=False,
        disable=not console.is_interactive,
    )
    with line:
        line.add_task(stage)
        yield
