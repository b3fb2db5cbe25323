"""Verdict: what rewards paid for what they were tried on, in sentences and in a table.

Knows nothing of how rewards are called.

RewardCheck       of one reward
Preflight         of all, with what deserves a look
preflight_tables  for a terminal of 80 columns
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.table import Table

from grpo.rewards.probes import GOLD, SAME, TRICK, WRONG

FULL_MARKS = "rows with full marks"
WIDTH = 80  # columns of a terminal
NARROWEST = 5  # columns of a number
WORTH_TELLING = 0.5  # of what gold earns
SLOW = 1.0  # seconds a completion


@dataclass(frozen=True)
class RewardCheck:
    """What one reward paid, unweighted, over all rows; `lowest`, `mean` and `highest` for each kind of text."""

    name: str
    weight: float
    lowest: dict[str, float]  # inf where it never applied
    highest: dict[str, float]  # -inf where it never applied
    mean: dict[str, float]  # NaN where it never applied
    best: float  # the highest value for gold, empty, cut or shuffled text, or the lowest if the weight is negative
    short_rows: list[int]  # Prompt.index of the rows whose gold answer gets less than the best
    unscored_rows: list[int]  # and of those to whose gold answer it does not apply
    num_rows: int  # that it was tried on
    failing: list[int] = field(default_factory=list)  # these rows as they came, counted from 0
    seconds: float = 0.0  # of one completion

    @property
    def is_constant(self) -> bool:
        """It paid the same for everything, right or wrong, and so teaches nothing here."""
        return min(self.lowest.values()) == max(self.highest.values())

    def pays(self, probe: str) -> bool:
        """Whether it paid as much as ever for some text of this kind."""
        if self.weight < 0:
            return self.lowest.get(probe, math.inf) <= self.best
        return self.highest.get(probe, -math.inf) >= self.best


@dataclass(frozen=True)
class Trick:
    """A text that earns something whatever is asked, and how much on average."""

    text: str
    tokens: int
    earns: float


@dataclass(frozen=True)
class Preflight:
    """What the rewards make of the data set.

    `attained` is the highest weighted sum that one gold answer gets, `attainable` the sum of the best values
    of each reward. When the first is lower, no gold answer earns everything at once.
    """

    num_rows: int
    checks: list[RewardCheck]
    attained: float
    attainable: float
    notes: list[str] = field(default_factory=list)  # about the calls themselves
    sums: dict[str, float] = field(default_factory=dict)  # kind of text -> weighted sum on average
    apart: list[tuple[str, str]] = field(default_factory=list)  # rewards that never paid their best together
    trick: Trick | None = None  # the cheapest text that earns the most
    solved: str = ""  # the reward that tells right from wrong

    @property
    def heading(self) -> str:
        """What stands over the tables."""
        return f"Rewards on {self.num_rows:,} gold answers, and on what else could be said; what they pay on average:"

    @property
    def summary(self) -> str:
        """What stands under them."""
        return f"Highest sum of one gold answer: {self.attained:g}, of {self.attainable:g}."

    @property
    def failing(self) -> dict[int, list[str]]:
        """Rows as they came, counted from 0 -> the rewards that pay their gold answer less than that of other rows."""
        found: dict[int, list[str]] = {}
        for check in self.checks:
            for place in check.failing if len(check.failing) < check.num_rows else ():
                found.setdefault(place, []).append(check.name)
        return dict(sorted(found.items()))

    @property
    def warnings(self) -> list[str]:
        """What deserves a look, one sentence each; empty when gold answers get full marks and little else does."""
        gold = self.sums.get(GOLD, 0.0)
        hacked = [self._hacked()] if self.trick and self.trick.earns > WORTH_TELLING * gold > 0 else []
        return [*self.notes, *self._of_rewards(), *self._together(), *self._called_right(), *hacked]

    @property
    def remarks(self) -> list[str]:
        """What is good to know, one sentence each."""
        refused = [kind for check in self._measure for kind in SAME if kind in check.highest and not check.pays(kind)]
        told = [f"`{self.solved}` does not take the gold answer {', '.join(refused)}."] if refused else []
        hacked = self._hacked() if self.trick else ""
        return [*told, *([hacked] if hacked and hacked not in self.warnings else [])]

    @property
    def _measure(self) -> list[RewardCheck]:
        """The reward that tells right from wrong, if there is one and it does."""
        return [check for check in self.checks if check.name == self.solved and not check.is_constant]

    def _of_rewards(self) -> Iterator[str]:
        for check in self.checks:
            if check.is_constant:
                yield f"`{check.name}` pays {check.best:g} for everything tried: it tells nothing apart."
            if check.short_rows:
                listed = ", ".join(map(str, check.short_rows[:5])) + ", ..." * (len(check.short_rows) > 5)
                yield (
                    f"`{check.name}` pays {len(check.short_rows):,} of {check.num_rows:,} gold answers less than its "
                    f"best, {check.best:g} (rows {listed})."
                )
            if check.seconds > SLOW:
                yield f"`{check.name}` takes {check.seconds:.1f} s for a completion."

    def _together(self) -> Iterator[str]:
        if self.attained < self.attainable - 1e-6:
            pairs = "; ".join(f"`{one}` and `{other}`" for one, other in self.apart[:3])
            yield (
                f"The rewards add up to {self.attainable:g}, but no gold answer gets more than "
                f"{self.attained:g}: some rewards never pay for the same completion{f' ({pairs})' if pairs else ''}."
            )

    def _called_right(self) -> Iterator[str]:
        for check in self._measure:
            if wrong := [kind for kind in ("empty", "another row's gold", "the prompt") if check.pays(kind)]:
                yield f"`{check.name}` tells right from wrong, and calls this right: {', '.join(wrong)}."

    def _hacked(self) -> str:
        assert self.trick
        shown = repr(self.trick.text if len(self.trick.text) <= 60 else f"{self.trick.text[:57]}...")
        return (
            f"A hacker's best: {shown} ({self.trick.tokens} tokens) earns {self.trick.earns:.3g} on average, whatever "
            f"is asked; gold answers earn {self.sums.get(GOLD, 0.0):.3g}."
        )


def preflight_tables(report: Preflight) -> list[Table]:
    """The report for `rich` to print: a column for each reward, a row for each kind of text. Where the rewards do not
    fit into one, several."""
    first = max(map(len, _rows_of(report))) + 2
    columns: list[list[RewardCheck]] = [[]]
    left = WIDTH - first - NARROWEST - 2
    for check in report.checks:
        needed = max(NARROWEST, *(len(part) for part in _heading(check.name).split("\n"))) + 2
        if needed > left and columns[-1]:
            columns.append([])
            left = WIDTH - first - NARROWEST - 2
        columns[-1].append(check)
        left -= needed
    return [_table(report, checks) for checks in columns]


def _table(report: Preflight, checks: Sequence[RewardCheck]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for check in checks:
        table.add_column(_heading(check.name), justify="right")
    table.add_column("sum", justify="right")
    sections = [[GOLD], [*SAME], [*WRONG]]
    for section in sections:
        for probe in [probe for probe in section if any(probe in check.mean for check in report.checks)]:
            paid = [_number(check.mean.get(probe)) for check in checks]
            table.add_row(probe, *paid, _number(report.sums.get(probe)), end_section=probe == GOLD)
        table.add_section()
    full = [f"{check.num_rows - len(check.short_rows + check.unscored_rows):,}" for check in checks]
    table.add_row(FULL_MARKS, *full, "")
    table.add_row("weight", *(f"{check.weight:g}" for check in checks), "")
    table.add_row("ms a completion", *(f"{1000 * check.seconds:.2g}" for check in checks), "")
    return table


def _rows_of(report: Preflight) -> list[str]:
    return [
        *(probe for check in report.checks for probe in check.mean if not probe.startswith(TRICK)),
        FULL_MARKS,
    ]


def _heading(name: str) -> str:
    """A name over several lines, so that its column is narrow."""
    parts = name.split("_")
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) < NARROWEST + 3:
            lines[-1] += f"_{part}"
        else:
            lines[-1] += "_"
            lines.append(part)
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else "-" if value != value else f"{value:.3g}"


def never_together(checks: Sequence[RewardCheck], at_best: dict[str, set[int]]) -> list[tuple[str, str]]:
    """Pairs of rewards of which each paid its best for some completion, and none got it from both.

    at_best: name of a reward -> which of the completions got its best.
    """
    names = [check.name for check in checks if not check.is_constant and at_best[check.name]]
    return [(one, other) for one, other in itertools.combinations(names, 2) if not at_best[one] & at_best[other]]
