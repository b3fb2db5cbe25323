"""What a run says while it goes: an aligned line a step above a progress bar, and a sample now and then.

Knows nothing of files. Without a terminal it prints the same lines, with neither bar nor control codes.
"""

from __future__ import annotations

import math
import sys
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import IO

from rich.cells import cell_len
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

from grpo.metrics import HEADLINES, METHODS, METRICS, Column, is_share
from grpo.record.names import in_lines, shortened, told_apart
from grpo.record.sinks import Numbers, Recorded, Sink, TokenRecords
from grpo.terminal import Terminal, between_words, columns, plain, unbroken
from grpo.types import Group

LINES_BETWEEN_HEADERS = 20
STEPS_OF_SPEED = 30  # whose time says how long a step takes
STEPS_BETWEEN_SAMPLES = 10
_WIDEST = 160
_SPEED_OVER_SECONDS = 1800.0  # the time left is judged by the steps of the last half hour
_WIDEST_TITLE, _COMFORTABLE_TITLE = 12, 9  # cells of a title's line
_FIRST_REWARDS = 5  # that stay longer than the other numbers when the terminal is narrow; further ones go first
_WIDEST_NAME, _STAGE_WIDTH = 24, 10  # cells of the task's name and of the stage beside the progress bar
_WIDEST_PART = 40  # cells of a reward in a sample
_WIDEST_SAMPLE = 100
_PROMPT_TAIL = 400  # characters of the prompt, and of the completion, in a sample's frame
_COMPLETION_HEAD = 1600
_SAMPLE_LINES = 40  # of each of them


@dataclass(frozen=True)
class Shown:
    """A column of the step line: a metric under its title."""

    title: tuple[str, ...]  # one word or more a line
    metric: str
    how: Column

    @property
    def width(self) -> int:
        """Cells."""
        return max(self.how.width, *map(cell_len, self.title))

    def cell(self, metrics: Mapping[str, float]) -> str:
        """The number. One that is missing, or is none, shows as a dash; one too large for its column, by its power."""
        value = metrics.get(self.metric, math.nan)
        texts = [format(value, spec).replace("nan%", "-").replace("nan", "-") for spec in (self.how.spec, ".1e", ".0e")]
        return next(filter(self._fits, texts), texts[-1]).rjust(self.width)

    def _fits(self, text: str) -> bool:
        return len(text) <= self.width


@dataclass(frozen=True)
class TimeLeft(Shown):
    """The time that the steps to come will take."""

    def cell(self, metrics: Mapping[str, float]) -> str:
        """ "2h05m", "7m", "48s"."""
        seconds = metrics.get(self.metric, 0.0)
        minutes = round(seconds / 60)
        texts = (f"{seconds:.0f}s", f"{minutes}m", f"{minutes // 60}h{minutes % 60:02}m")
        return texts[bisect_right((100, 6000), seconds)].rjust(self.width)


TIME_LEFT = TimeLeft(("time", "left"), "time/left", Column("time left", "", 6, 19))


def columns_for(reward_names: Sequence[str], headline: str = HEADLINES[0], method: str = METHODS[0]) -> list[Shown]:
    """All columns of a step line, in the order in which they are printed: that of the table of metrics.

    headline: the held-out score that has a column. method: of teaching.
    """
    columns = []
    for metric in METRICS:
        if (metric.name in HEADLINES and metric.name != headline) or (metric.column and method not in metric.column.of):
            continue
        if metric.column and metric.column.title:
            columns.append(Shown(tuple(metric.column.title.split(" ", 1)), metric.name, metric.column))
        elif metric.column:
            columns += _reward_columns(reward_names, metric.column)
    return columns


def _reward_columns(names: Sequence[str], column: Column) -> list[Shown]:
    titles = told_apart([in_lines(name, _WIDEST_TITLE, _COMFORTABLE_TITLE, fewest=2, most=3) for name in names])
    return [
        Shown(
            title,
            f"reward/{name}",
            replace(column, rank=column.rank + index + (100 if index >= _FIRST_REWARDS else 0)),
        )
        for index, (name, title) in enumerate(zip(names, titles, strict=True))
    ]


def columns_that_fit(columns: list[Shown], step_width: int, width: int) -> list[Shown]:
    """The columns, in their order, less those of the highest rank until a line fits in `width` cells."""
    by_rank = sorted(columns, key=lambda column: column.how.rank)
    widths = list(accumulate(2 + column.width for column in by_rank))
    return sorted(by_rank[: bisect_right(widths, width - step_width)], key=columns.index)


class Console(Sink):
    """Prints a run of `total_steps`, the first of which is `start_step`."""

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        task_name: str,
        reward_names: Sequence[str],
        headline: str = HEADLINES[0],
        file: IO[str] | None = None,
        method: str = METHODS[0],
    ):
        self._terminal = Terminal(file=file or sys.stdout)
        self._method = method
        self._broken = between_words if self._terminal.is_terminal else unbroken
        # With a terminal the bar says how long it will take.
        self._columns = columns_for(reward_names, headline, method) + [TIME_LEFT] * (not self._terminal.is_interactive)
        self._times = deque([time.monotonic()], maxlen=STEPS_OF_SPEED)
        self._shown: list[Shown] = []
        self._step_width = max(len("step"), 2 * len(str(total_steps)) + 1)
        self._total_steps = total_steps
        self._lines = 0
        self._held_out: dict[str, float] = {}  # the last scores, for every step line until the next
        # `disable` makes the bar a thing that shows nothing: the same calls serve a terminal and a log file.
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[stage]}", markup=False, style="dim"),
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
        name = shortened(plain(task_name).replace("\n", " "), _WIDEST_NAME)
        self._bar = self._progress.add_task(name, total=total_steps, completed=start_step, stage=" " * _STAGE_WIDTH)

    def start(self) -> None:
        """Show the bar from now on."""
        self._progress.start()

    def resumed(self, recorded: Sequence[Recorded], start_step: int) -> None:
        """The held-out score that the run had stays in its lines."""
        for _, record in recorded:
            if any(name.startswith("eval/") for name in record):
                self._held_out = {name: value for name, value in record.items() if value is not None}

    def step(self, step: int, metrics: Numbers) -> None:
        """One line, under a header where it is time for one."""
        if self._lines % LINES_BETWEEN_HEADERS == 0:
            self._header()
        self._lines += 1
        self._times.append(time.monotonic())
        a_step = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        shown = {**self._held_out, **metrics, TIME_LEFT.metric: a_step * (self._total_steps - step - 1)}
        label = f"{step + 1}/{self._total_steps}".rjust(self._step_width)
        self._line(label, [column.cell(shown) for column in self._shown])
        self._progress.update(self._bar, completed=step + 1)

    def stage(self, name: str) -> None:
        """What the run is doing now, beside the progress bar."""
        self._progress.update(self._bar, stage=name.ljust(_STAGE_WIDTH))

    def completions(self, step: int, groups: Sequence[Group], tokens: TokenRecords) -> None:
        """Now and then one of them."""
        if step % STEPS_BETWEEN_SAMPLES == 0:
            self.sample(step, groups[step // STEPS_BETWEEN_SAMPLES % len(groups)])

    def evaluation(self, step: int, scores: Numbers, groups: Sequence[Group] = ()) -> None:
        """The held-out scores in one line, each with its 95% interval in brackets where `scores` has one."""
        self._held_out = dict(scores)
        names = [name for name in scores if "@" in name and not name.endswith(("/low", "/high"))]
        names = names or [next(name for name in HEADLINES if name in scores)]
        told = [_score_in_words(name, scores) for name in names]
        line = f"held-out after {step} steps:  {'   '.join(told)}"
        fits = cell_len(line) <= _width()
        self.message(line if fits else "\n  ".join([f"held-out after {step} steps:", *told]), style="bold")

    def message(self, text: str, style: str = "") -> None:
        """A line, without what a terminal would take as an order."""
        shown = _encodable(self._broken(plain(text), _width()), self._terminal.encoding)
        self._terminal.print(Text(shown, style=style), soft_wrap=True)

    def sample(self, step: int, group: Group, index: int = 0) -> None:
        """One completion of a group in a frame, with what it earned."""
        frame = show_sample(step, group, index, self._terminal.encoding, self._method)
        self._terminal.print(frame, width=min(_width(), _WIDEST_SAMPLE))
        self._lines = 0  # so that the header follows

    def close(self) -> None:
        self._progress.stop()

    def _header(self) -> None:
        self._shown = columns_that_fit(self._columns, self._step_width, _width())
        lines = max((len(column.title) for column in self._shown), default=1)
        titles = [(*[""] * (lines - len(column.title)), *column.title) for column in self._shown]
        for line, label in enumerate([*[""] * (lines - 1), "step"]):
            cells = [_right(title[line], column.width) for title, column in zip(titles, self._shown, strict=True)]
            self._line(label.rjust(self._step_width), cells, style="bold")

    def _line(self, label: str, cells: list[str], style: str = "") -> None:
        line = _encodable("  ".join([label, *cells]), self._terminal.encoding)
        self._terminal.print(Text(line, style=style, no_wrap=True), soft_wrap=True)


def show_sample(step: int, group: Group, index: int, encoding: str = "utf-8", method: str = METHODS[0]) -> Panel:
    """A frame with the end of the prompt, the completion, and what each reward said of it; of a given answer, how much
    of it is taught."""
    prompt, completion, sample = group.prompt, group.completions[index], SAMPLES[method]
    asked = prompt.messages[-1]["content"] if prompt.messages else prompt.text

    def shown(lines: list[str], style: str = "") -> Text:
        return Text(_encodable("\n".join(lines), encoding), style=style)

    said = shown(plain(completion.text[:_COMPLETION_HEAD])[:_COMPLETION_HEAD].split("\n")[:_SAMPLE_LINES])
    count, taught, finish = len(completion.tokens), completion.num_sampled, _FINISHES[completion.finish]
    said.append(f"  [{sample.size.format(count=count, taught=taught, finish=finish)}]", style="dim")
    lines = zip(sample.earned(group, index), ("", "cyan", "bold"), strict=False)
    return Panel(
        Stack(
            shown(plain(asked[-_PROMPT_TAIL:])[-_PROMPT_TAIL:].split("\n")[-_SAMPLE_LINES:], style="dim"),
            "",
            said,
            *[shown([line], style) for line, style in lines],
        ),
        title=Text(f"{sample.what} of step {step + 1}, row {prompt.index}"),
        title_align="left",
        border_style="dim",
    )


def _earned(group: Group, index: int, *, total: dict[bool, str]) -> list[str]:
    """Lines of what each reward paid, and all together. total: by whether a reward failed on it."""
    parts = [(shortened(plain(name), _WIDEST_PART), values[index].item()) for name, values in group.parts.items()]
    reward, advantage = group.rewards[index].item(), group.advantages[index].item()
    earned = "   ".join(f"{name} {value:g}" for name, value in parts)
    return ["", earned, total[math.isnan(reward)].format(reward, advantage)]


def _nothing(group: Group, index: int) -> list[str]:
    """A given answer earns nothing."""
    return []


@dataclass(frozen=True)
class Sample:
    """How one completion is shown: what it is called, its size in words, and the lines of what it earned."""

    what: str
    size: str
    earned: Callable[[Group, int], list[str]]


_AT_ONCE = {False: "reward {0:.3f}   advantage {1:+.3f}", True: "not scored   advantage {1:+.3f}"}
_BY_TOKEN = {False: "reward {0:.3f}", True: "not scored"}  # with a value head each has an advantage of its own
_SAID, _GIVEN = "{count} tokens, {finish}", "{taught} of {count} tokens taught"
SAMPLES = {
    "grpo": Sample("a completion", _SAID, partial(_earned, total=_AT_ONCE)),
    "ppo": Sample("a completion", _SAID, partial(_earned, total=_BY_TOKEN)),
    "sft": Sample("an answer", _GIVEN, _nothing),
    "dpo": Sample("an answer", _GIVEN, _nothing),
}
_FINISHES = {"stop": "stopped by itself", "length": "cut off"}


def _encodable(text: str, encoding: str) -> str:
    # A log file may be of an encoding that cannot hold every letter.
    return text.encode(encoding, errors="replace").decode(encoding)


def _right(text: str, width: int) -> str:
    return " " * (width - cell_len(text)) + text


def _score_in_words(name: str, scores: Mapping[str, float]) -> str:
    low, high = scores.get(f"{name}/low"), scores.get(f"{name}/high")
    form, unit = ("{:.1f}", 100) if is_share(name) else ("{:.3f}", 1)
    score, *ends = (math.nan if value is None else unit * value for value in (scores[name], low, high))
    interval = "" if math.isnan(ends[0]) else f" (95%: {form.format(ends[0])} to {form.format(ends[1])})"
    return f"{name.removeprefix('eval/')} {form.format(score)}{'%' * is_share(name)}{interval}"


def _width() -> int:
    return columns(_WIDEST)
