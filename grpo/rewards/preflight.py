"""Rewards tried out before anything is sampled: on gold answers, on nothing, on cut and on shuffled text.

Knows nothing of the model or the engine. What a reward may return is checked by `score`, which this calls.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from grpo.errors import UserError
from grpo.rewards.samples import ARGUMENT_NAMES, cannot_be_copied
from grpo.rewards.scoring import Reward, cut_off, score, unsampled, weighted_sum
from grpo.rewards.values import shown
from grpo.types import Completion, Group, Prompt

PROBES = ("gold", "empty", "truncated", "shuffled")
BETWEEN_NOTES = 10.0  # seconds


@dataclass(frozen=True)
class Calls:
    """How the rewards are called: as in a step, so that nothing is tried that a run would not do."""

    tokenizer: Any = None  # of the model; without one a token is a byte
    group_size: int = 4  # completions of a prompt
    prompts: int = 8  # in a call, at most
    seconds: float = math.inf  # after so many a reward is tried on no further row
    note: Callable[[str], object] = lambda told: None

    def completion(self, text: str) -> Completion:
        """A text as the model would give it."""
        return unsampled(text, self.tokenizer)

    def groups(self, prompt: Prompt, completions: list[Completion]) -> list[Group]:
        """These completions and as many of them again as whole groups need."""
        count = math.ceil(len(completions) / self.group_size)
        again = itertools.cycle(completions)
        return [Group(prompt, list(itertools.islice(again, self.group_size))) for _ in range(count)]


@dataclass
class Trial:
    """What a reward paid so far."""

    reward: Reward
    parts: list[Tensor] = field(default_factory=list)  # a row each: [completions]
    seconds: float = 0.0


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
    num_rows: int  # that it was tried on

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
    notes: list[str] = field(default_factory=list)  # about the calls themselves

    @property
    def warnings(self) -> list[str]:
        """What deserves a look, one sentence each; empty when every gold answer gets full marks."""
        sentences = list(self.notes)
        for check in self.checks:
            if check.is_constant:
                sentences.append(f"`{check.name}` pays {check.best:g} for everything tried: it tells nothing apart.")
            if check.short_rows:
                listed = ", ".join(map(str, check.short_rows[:5])) + ", ..." * (len(check.short_rows) > 5)
                sentences.append(
                    f"`{check.name}` pays {len(check.short_rows)} of {check.num_rows} gold answers less than its best, "
                    f"{check.best:g} (rows {listed})."
                )
        if self.attained < self.attainable - 1e-6:
            sentences.append(
                f"The rewards add up to {self.attainable:g}, but no gold answer gets more than "
                f"{self.attained:g}: some rewards never pay for the same completion."
            )
        return sentences


def preflight(
    rewards: list[Reward], gold_rows: Iterable[tuple[Prompt, str]], calls: Calls | None = None, seed: int = 0
) -> Preflight:
    """Score, for each (prompt, gold completion): the gold text, "", its first half, and its words shuffled.

    Raises UserError as `score` does, and for an empty data set or a gold answer to which no reward applies.
    """
    calls = calls or Calls()
    shuffle = random.Random(seed)
    probes = ((prompt, _probes(calls, gold, shuffle)) for prompt, gold in gold_rows)
    rows, trials, notes = try_rewards(rewards, probes, calls)
    if not rows:
        raise UserError("There is no row to check the rewards on: the data set is empty.")
    parts = {trial.reward.name: torch.stack(trial.parts) for trial in trials}  # [R, 4], R rows that it was tried on
    scored_by_all = min(map(len, parts.values()))
    gold = {name: part[:scored_by_all, 0] for name, part in parts.items()}  # [R]
    _check_that_something_applies(rows, gold)
    checks = [_check(reward, parts[reward.name], rows) for reward in rewards]
    attainable = sum(check.weight * check.best for check in checks)
    return Preflight(len(rows), checks, weighted_sum(gold, rewards).max().item(), attainable, notes)


def preflight_without_gold(
    rewards: list[Reward], rows: Iterable[tuple[Prompt, list[str]]], calls: Calls | None = None
) -> Preflight:
    """Score, for each (prompt, texts): these texts. What they are paid says nothing; that they are is enough.

    Raises UserError as `score` does, and where no reward applies to any of them.
    """
    calls = calls or Calls()
    probes = ((prompt, list(map(calls.completion, texts))) for prompt, texts in rows)
    tried, trials, notes = try_rewards(rewards, probes, calls)
    silent = [trial.reward.name for trial in trials if all(paid.isnan().all() for paid in trial.parts)]
    if len(silent) == len(trials):
        raise UserError(
            f"No reward applies to anything that was tried ({', '.join(silent)} returned None for {len(tried)} "
            "rows, empty texts among others). A completion that nothing scores would count as reward 0; let one "
            "reward return a number for every text."
        )
    notes += [f"`{name}` gave no score (None) to anything tried." for name in silent]
    return Preflight(len(tried), [], 0.0, 0.0, notes)


def try_rewards(
    rewards: list[Reward], rows: Iterable[tuple[Prompt, list[Completion]]], calls: Calls
) -> tuple[list[int], list[Trial], list[str]]:
    """Score the completions of each prompt with each reward, one reward after the other, until its time is over.

    The first calls have one row, then two, and so on: a reward that takes long, or money, is called a few times.

    Returns:
        (Prompt.index of the rows, what each reward paid for the first of them, what the user should know of it).
    """
    names = ", ".join(reward.name for reward in rewards)
    calls.note(f"The rewards are tried on groups of {calls.group_size} completions: {names}.")
    tried: list[int] = []
    trials = [Trial(reward) for reward in rewards]
    odd_columns: dict[str, str] = {}
    began = noted = time.monotonic()
    for some in _growing(rows, calls.prompts):
        for prompt, _ in some:
            odd_columns |= _odd_columns(prompt)
        for trial in trials:
            if trial.seconds <= calls.seconds:
                _try(trial, some, calls)
        tried += [prompt.index for prompt, _ in some]
        if time.monotonic() > noted + BETWEEN_NOTES:
            noted = time.monotonic()
            calls.note(f"  {len(tried):,} rows in {noted - began:.0f} s{_slowest(trials)}")
    return tried, trials, [*odd_columns.values(), *_cut_short(trials, len(tried))]


def _try(trial: Trial, rows: list[tuple[Prompt, list[Completion]]], calls: Calls) -> None:
    """One more call of a reward, on whole groups as in a step."""
    began = time.monotonic()
    groups = [calls.groups(prompt, completions) for prompt, completions in rows]
    score(list(itertools.chain(*groups)), [trial.reward])
    for (_, completions), of_row in zip(rows, groups, strict=True):
        paid = torch.cat([group.parts[trial.reward.name] for group in of_row])
        trial.parts.append(paid[: len(completions)])
    trial.seconds += time.monotonic() - began


def _growing(rows: Iterable[Any], most: int) -> Iterator[list[Any]]:
    """The rows, one at first and at most so many at once."""
    rows, size = iter(rows), 1
    while some := list(itertools.islice(rows, size)):
        yield some
        size = min(2 * size, most)


def _odd_columns(prompt: Prompt) -> dict[str, str]:
    """column -> what is odd about it, in a sentence."""
    shadowed = {
        column: f"The column `{column}` of the data set is never passed to a reward, which gets another argument of "
        "that name. Call it something else in `rows` if a reward needs it."
        for column in ARGUMENT_NAMES & prompt.fields.keys()
    }
    held = {
        column: f"The column `{column}` holds what cannot be copied (row {prompt.index}: {shown(value)}): all rewards "
        "get the same one, and see what another has done to it."
        for column, value in prompt.fields.items()
        if cannot_be_copied(value)
    }
    return held | shadowed


def _cut_short(trials: list[Trial], num_rows: int) -> list[str]:
    return [
        f"`{trial.reward.name}` was tried on {len(trial.parts):,} of {num_rows:,} rows, because they took "
        f"{trial.seconds:.0f} s. --check tries every row."
        for trial in trials
        if len(trial.parts) < num_rows
    ]


def _slowest(trials: list[Trial]) -> str:
    slowest = max(trials, key=lambda trial: trial.seconds)
    return f", {slowest.seconds:.0f} of them for `{slowest.reward.name}`"


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
        full = f"{check.num_rows - len(check.short_rows + check.unscored_rows):,} of {check.num_rows:,}"
        table.add_row(check.name, f"{check.weight:g}", *ranges, full)
    table.caption = f"Highest sum of one gold answer: {report.attained:g}, of {report.attainable:g}."
    table.caption_justify = "left"
    return table


def _probes(calls: Calls, gold: str, shuffle: random.Random) -> list[Completion]:
    words = re.split(r"(\s+)", gold)  # words at even indices, the white space between them at odd ones
    shuffled = words[::2]
    shuffle.shuffle(shuffled)
    words[::2] = shuffled
    whole = calls.completion(gold)
    return [whole, calls.completion(""), cut_off(whole, calls.tokenizer), calls.completion("".join(words))]


def _check_that_something_applies(rows: list[int], gold: dict[str, Tensor]) -> None:
    applies = torch.stack([~part.isnan() for part in gold.values()]).any(dim=0)  # [R]
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
        num_rows=len(part),
    )


def _range(low: float, high: float) -> str:
    if low > high:
        return "does not apply"
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
