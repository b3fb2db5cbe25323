"""Rewards tried out before anything is sampled: on gold answers, on nothing, on cut and on shuffled text.

Knows nothing of the model or the engine. What a reward may return is checked by `score`, which this calls.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from grpo.errors import UserError
from grpo.rewards.scoring import Reward, score, unsampled
from grpo.types import Group, Prompt

PROBES = ("gold", "empty", "truncated", "shuffled")
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class RewardCheck:
    """What one reward paid, unweighted, over all rows; `lowest` and `highest` for each of PROBES."""

    name: str
    weight: float
    lowest: dict[str, float]  # inf where it never applied
    highest: dict[str, float]  # -inf where it never applied
    best: float  # the highest value seen, or the lowest if the weight is negative
    short_rows: list[int]  # Prompt.index of the rows whose gold answer gets less than the best
    unscored_rows: list[int]  # and of those to whose gold answer it does not apply

    @property
    def is_constant(self) -> bool:
        """It paid the same for everything, right or wrong, and so teaches nothing here."""
        return min(self.lowest.values()) == max(self.highest.values())


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

    @property
    def warnings(self) -> list[str]:
        """What deserves a look, one sentence each; empty when every gold answer gets full marks."""
        sentences = []
        for check in self.checks:
            if check.is_constant:
                sentences.append(f"`{check.name}` pays {check.best:g} for everything tried: it tells nothing apart.")
            if check.short_rows:
                listed = ", ".join(map(str, check.short_rows[:5])) + ", ..." * (len(check.short_rows) > 5)
                sentences.append(
                    f"`{check.name}` pays its best, {check.best:g}, for all but {len(check.short_rows)} "
                    f"of {self.num_rows} gold answers (rows {listed})."
                )
        if self.attained < self.attainable - 1e-6:
            sentences.append(
                f"The rewards add up to {self.attainable:g}, but no gold answer gets more than "
                f"{self.attained:g}: some rewards never pay for the same completion."
            )
        return sentences


def preflight(rewards: list[Reward], gold_rows: Iterable[tuple[Prompt, str]], seed: int = 0) -> Preflight:
    """Score, for each (prompt, gold completion): the gold text, "", its first half, and its words shuffled.

    Raises UserError as `score` does, and for an empty data set or a gold answer to which no reward applies.
    """
    shuffle = random.Random(seed)
    rows: list[int] = []  # Prompt.index
    parts: dict[str, list[Tensor]] = {reward.name: [] for reward in rewards}  # each a list of R tensors [4]
    attained = -math.inf
    for some_rows in _batched(gold_rows, _ROWS_AT_ONCE):
        groups = [_probe(prompt, gold, shuffle) for prompt, gold in some_rows]
        score(groups, rewards)
        rows += [group.prompt.index for group in groups]
        for name, part in parts.items():
            part += [group.parts[name] for group in groups]
        attained = max(attained, *(group.rewards[0].item() for group in groups))
    if not rows:
        raise UserError("There is no row to check the rewards on: the data set is empty.")
    stacked = {name: torch.stack(part) for name, part in parts.items()}  # [R, 4]
    _check_that_something_applies(rows, stacked)
    checks = [_check(reward, stacked[reward.name], rows) for reward in rewards]
    attainable = sum(check.weight * check.best for check in checks)
    return Preflight(len(rows), checks, attained, attainable)


def preflight_table(report: Preflight) -> Table:
    """The report for `rich` to print: a row for each reward, its range on each kind of text."""
    title = f"Rewards on {report.num_rows:,} gold answers"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("reward")
    table.add_column("weight", justify="right")
    for probe in PROBES:
        table.add_column(probe, justify="right")
    table.add_column("gold with full marks", justify="right")
    for check in report.checks:
        ranges = [_range(check.lowest[probe], check.highest[probe]) for probe in PROBES]
        full = f"{report.num_rows - len(check.short_rows + check.unscored_rows):,} of {report.num_rows:,}"
        table.add_row(check.name, f"{check.weight:g}", *ranges, full)
    table.caption = f"Highest sum of one gold answer: {report.attained:g}, of {report.attainable:g}."
    table.caption_justify = "left"
    return table


def _probe(prompt: Prompt, gold: str, shuffle: random.Random) -> Group:
    words = re.split(r"(\s+)", gold)  # words at even places, the white space between them at odd ones
    shuffled = words[::2]
    shuffle.shuffle(shuffled)
    words[::2] = shuffled
    texts = gold, "", gold[: len(gold) // 2], "".join(words)
    return Group(prompt, [unsampled(text) for text in texts])


def _batched(rows: Iterable[tuple[Prompt, str]], size: int) -> Iterator[list[tuple[Prompt, str]]]:
    rows = iter(rows)
    return iter(lambda: list(itertools.islice(rows, size)), [])


def _check_that_something_applies(rows: list[int], parts: dict[str, Tensor]) -> None:
    applies = torch.stack([~part[:, 0].isnan() for part in parts.values()]).any(dim=0)  # [R]
    if not applies.all():
        row = rows[int(applies.int().argmin())]
        raise UserError(
            f"No reward applies to the gold answer of row {row}: each returned None. A completion that "
            "nothing scores would count as reward 0; let one reward return a number for every row."
        )


def _check(reward: Reward, part: Tensor, rows: list[int]) -> RewardCheck:
    """part: [R, 4], what the reward returned for each row and probe."""
    applies = ~part.isnan()
    lowest = part.where(applies, torch.inf).amin(dim=0)
    highest = part.where(applies, -torch.inf).amax(dim=0)
    # A penalty has a negative weight: its best value is its lowest.
    extreme = highest.max() if reward.weight >= 0 else lowest.min()
    best = extreme.item() if applies.any() else 0.0
    short = applies[:, 0] & (reward.weight * part[:, 0] < reward.weight * best)
    return RewardCheck(
        name=reward.name,
        weight=reward.weight,
        lowest=dict(zip(PROBES, lowest.tolist(), strict=True)),
        highest=dict(zip(PROBES, highest.tolist(), strict=True)),
        best=best,
        short_rows=[rows[index] for index in short.nonzero().flatten().tolist()],
        unscored_rows=[rows[index] for index in (~applies[:, 0]).nonzero().flatten().tolist()],
    )


def _range(low: float, high: float) -> str:
    if low > high:
        return "does not apply"
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
