"""Page: views -> one HTML file that needs nothing else and runs nothing but its own script. Knows no files of runs.

Everything that a template shows passes two gates: what a browser would obey (tags, quotes) is escaped by jinja2, and
what would turn the direction of writing or is no letter is written out, as on a terminal. No link is made of any text.
Behind them stands a policy in the page's head: only the style and the script with these SHA-256 are taken.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from grpo.report.charts import shown
from grpo.report.reading import GROUPS, Reading
from grpo.report.views import compare, run_view
from grpo.terminal import plain

KIND_WORDS = {
    "all-right": "all right",
    "all-wrong": "all wrong",
    "mixed": "mixed",
    "cut-off": "cut off",
    "disagree": "rewards disagree with gold",
}


def write_report(readings: Sequence[Reading], out: Path) -> None:
    """Write the page about these runs; the old one stands until the new one is whole."""
    page = render(readings)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")  # a run and a command may write at the same time
    partial.unlink(missing_ok=True)  # a link would lead out of the folder
    try:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def render(readings: Sequence[Reading]) -> str:
    """The page."""
    for reading in readings:
        reading.advance()
    runs = [run_view(index, reading, 1 / len(readings)) for index, reading in enumerate(readings)]
    style, script = (_own(name) for name in ("page.css", "page.js"))
    return _template().render(
        title=", ".join(run.name for run in runs) + " – grpo run report",
        runs=runs,
        comparison=compare(runs) if len(runs) > 1 else None,
        groups_shown=GROUPS,
        kind_words=KIND_WORDS,
        show=shown,
        style=Markup(style),
        style_hash=Markup(_hash(style)),
        script=Markup(script),
        script_hash=Markup(_hash(script)),
        now=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_harmless, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["flags"] = _flags
    return environment.from_string(_own("page.html"))


def _harmless(value: Any) -> Any:
    """Texts of others as a terminal would have them, too; what is HTML of ours stays."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _flags(text: str) -> Markup:
    """A text of ours in which no line breaks inside of a flag."""
    pieces = re.split(r"(--[a-z][a-z-]*)", text)
    return Markup("").join(
        Markup('<span class="flag">{}</span>').format(piece) if place % 2 else piece
        for place, piece in enumerate(pieces)
    )


def _own(name: str) -> str:
    return files("grpo.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As the policy in the head wants it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
