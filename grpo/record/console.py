"""What a run says while it goes: an aligned line a step above a progress bar, and a sample now and then.

Knows nothing of files. Without a terminal it prints the same lines, with neither bar nor control codes.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO

from rich.console import Console as Terminal
from rich.console import Group as Stack
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from grpo.types import Group

LINES_BETWEEN_HEADERS = 20
_WIDEST = 150
_SPEED_OVER_SECONDS = 1800.0  # the time left is judged by the steps of the last half hour
_LONGEST_WORD = 7  # of a reward's name
_WIDEST_SAMPLE = 100
_PROMPT_TAIL = 400  # characters of the prompt, and of the completion, in a sample's frame
_COMPLETION_HEAD = 1600


@dataclass(frozen=True)
class Column:
    """A number of the step line. `rank` says what goes first when the terminal is narrow: the highest."""

    title: str  # up to two words, one above the other
    metric: str
    spec: str  # of format(), without a width
    width: int  # that the numbers need
    rank: int

    @property
    def words(self) -> tuple[str, str]:
        first, _, second = self.title.partition(" ")
        return first, second

    @property
    def full_width(self) -> int:
        return max(self.width, *map(len, self.words))

    def cell(self, metrics: Mapping[str, float]) -> str:
        # A metric that is missing or not a number shows as a dash.
        text = format(metrics.get(self.metric, math.nan), self.spec)
        return text.replace("nan%", "-").replace("nan", "-").rjust(self.full_width)


def columns_for(reward_names: Iterable[str]) -> list[Column]:
    """All columns of a step line, in the order in which they are printed."""
    parts = [Column(_two_words(name), f"reward/{name}", ".2f", 6, 3 + place) for place, name in enumerate(reward_names)]
    return [
        Column("mean reward", "reward/mean", ".3f", 7, 0),
        *parts,
        Column("held-out pass@1", "eval/pass@1", ".1%", 6, 1),
        Column("mean length", "completion/length", ".0f", 5, 2),
        Column("cut off", "completion/truncated", ".0%", 4, 100),
        Column("zero var.", "groups/zero_variance", ".0%", 4, 101),
        Column("entropy nats", "policy/entropy", ".3f", 6, 103),
        Column("mismatch KL", "mismatch/kl", ".1e", 7, 104),
        Column("gradient norm", "optim/grad_norm", ".3f", 7, 105),
        Column("learning rate", "optim/learning_rate", ".1e", 7, 106),
        Column("tokens /s", "speed/tokens_per_second", ",.0f", 7, 102),
        Column("memory GiB", "memory/peak_gib", ".1f", 6, 107),
    ]


def columns_that_fit(columns: list[Column], step_width: int, width: int) -> list[Column]:
    """The columns, in their order, less those of the highest rank until a line fits in `width` characters."""
    kept = sorted(columns, key=lambda column: column.rank)
    while kept and step_width + sum(2 + column.full_width for column in kept) > width:
        kept.pop()
    return [column for column in columns if column in kept]


class Console:
    """Prints a run of `total_steps`, the first of which is `start_step`."""

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        task_name: str,
        reward_names: list[str],
        file: IO[str] | None = None,
    ):
        self._terminal = Terminal(file=file or sys.stdout, highlight=False, markup=False, emoji=False)
        self._columns = columns_for(reward_names)
        self._shown: list[Column] = []
        self._step_width = max(len("step"), 2 * len(str(total_steps)) + 1)
        self._total_steps = total_steps
        self._lines = 0
        # `disable` makes the bar a thing that shows nothing: the same calls serve a terminal and a log file.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self._terminal,
            refresh_per_second=2,
            speed_estimate_period=_SPEED_OVER_SECONDS,
            disable=not self._terminal.is_interactive,
        )
        self._bar = self._progress.add_task(task_name, total=total_steps, completed=start_step)
        self._progress.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, under a header where it is time for one."""
        if self._lines % LINES_BETWEEN_HEADERS == 0:
            self._header()
        self._lines += 1
        label = f"{step + 1}/{self._total_steps}".rjust(self._step_width)
        self._line(label, [column.cell(metrics) for column in self._shown])
        self._progress.update(self._bar, completed=step + 1)

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """The held-out scores in one line, each with its 95% interval in brackets where `scores` has one."""
        names = [name for name in scores if "@" in name and not name.endswith(("/low", "/high"))]
        told = "   ".join(_score_in_words(name, scores) for name in names)
        self.message(f"held-out after {step} steps:  {told}", style="bold")

    def message(self, text: str, style: str = "") -> None:
        self._terminal.print(Text(text, style=style), soft_wrap=True)

    def sample(self, step: int, group: Group, index: int = 0) -> None:
        """One completion of a group in a frame, with what it earned."""
        frame = show_sample(step, group, index, self._terminal.encoding)
        self._terminal.print(frame, width=min(_width(), _WIDEST_SAMPLE))
        self._lines = 0  # so that the header follows

    def close(self) -> None:
        self._progress.stop()

    def _header(self) -> None:
        self._shown = columns_that_fit(self._columns, self._step_width, _width())
        for line, step_title in enumerate(("", "step")):
            cells = [column.words[line].rjust(column.full_width) for column in self._shown]
            self._line(step_title.rjust(self._step_width), cells, style="bold")

    def _line(self, label: str, cells: list[str], style: str = "") -> None:
        text = Text("  ".join([label, *cells]), style=style, no_wrap=True)
        self._terminal.print(text, soft_wrap=True)


def show_sample(step: int, group: Group, index: int, encoding: str = "utf-8") -> Panel:
    """A frame with the end of the prompt, the completion, and what each reward said of it."""
    prompt, completion = group.prompt, group.completions[index]
    asked = prompt.messages[-1]["content"] if prompt.messages else prompt.text
    earned = [f"{name} {values[index].item():g}" for name, values in group.parts.items()]
    total = f"reward {group.rewards[index].item():.3f}   advantage {group.advantages[index].item():+.3f}"
    said = Text(_printable(completion.text[:_COMPLETION_HEAD], encoding))
    said.append(f"  [{len(completion.tokens)} tokens, {_FINISHES[completion.finish]}]", style="dim")
    return Panel(
        Stack(
            Text(_printable(asked[-_PROMPT_TAIL:], encoding), style="dim"),
            "",
            said,
            "",
            Text("   ".join(earned), style="cyan"),
            Text(total, style="bold"),
        ),
        title=f"a completion of step {step + 1}, row {prompt.index}",
        title_align="left",
        border_style="dim",
    )


_FINISHES = {"stop": "stopped by itself", "length": "cut off"}


def _printable(text: str, encoding: str) -> str:
    # A model may sample anything: escape codes for the terminal, letters that a log file cannot hold.
    shown = "".join(character for character in text if character.isprintable() or character == "\n")
    return shown.encode(encoding, errors="replace").decode(encoding)


def _two_words(name: str) -> str:
    first, _, rest = name.partition("_")
    return f"{first[:_LONGEST_WORD]} {rest[:_LONGEST_WORD]}".rstrip()


def _score_in_words(name: str, scores: Mapping[str, float]) -> str:
    low, high = scores.get(f"{name}/low"), scores.get(f"{name}/high")
    interval = "" if low is None or high is None else f" (95%: {100 * low:.1f} to {100 * high:.1f})"
    return f"{name.removeprefix('eval/')} {scores[name]:.1%}{interval}"


def _width() -> int:
    return min(_WIDEST, shutil.get_terminal_size(fallback=(_WIDEST, 24)).columns)
