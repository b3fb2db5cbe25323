"""The terminal outside the training loop: where the commands write. Knows nothing of runs."""

from __future__ import annotations

import shutil

from rich.console import Console

# Without a terminal there is no width to keep to.
console = Console(highlight=False, width=shutil.get_terminal_size(fallback=(150, 24)).columns)


def say(text: str) -> None:
    """A line as it is: never wrapped, so that paths and commands can be copied."""
    console.print(text, soft_wrap=True, markup=False)
