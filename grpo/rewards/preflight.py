"""Rewards tried out before anything is sampled: on gold answers, in other clothes, damaged, and on cheap tricks.

Knows nothing of the model or the engine. What a reward may return is checked by `score`, which this calls; what is made
of a gold answer is in probes.py, and what it says about the rewards in verdict.py.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grpo.errors import WHAT_USER_CODE_RAISES, UserError
from grpo.rewards.calling import Call
from grpo.rewards.event_loop import way_async
from grpo.rewards.here import way_here
from grpo.rewards.probes import BASE, GOLD, SAME, TRICK, WRONG, Probe, in_turn, materials, probes_of, tricks
from grpo.rewards.samples import ARGUMENT_NAMES, Samples, cannot_be_copied, samples_of
from grpo.rewards.scoring import Reward, score, unsampled, weighted_sum
from grpo.rewards.values import fit_one, shown
from grpo.rewards.verdict import Preflight, RewardCheck, Trick, never_together
from grpo.types import Completion, Group, Prompt

BETWEEN_NOTES = 10.0  # seconds
ALL_PROBES = 8  # rows that every probe is made of, where it is thorough
PROBED = 64  # rows that the probes of BASE are made of there; of the others gold alone is tried
ENOUGH_ROWS = 6  # that a trick is tried on, before anything is said of it
LOOKED_AHEAD = 256  # gold answers that the most usual one is found among
LENGTHS = (1_000, 10_000, 100_000, 1_000_000)  # characters
LONG_SECONDS = 1.0  # for a long text, that nobody minds


@dataclass(frozen=True)
class Calls:
    """How the rewards are called: as in a step, so that nothing is tried that a run would not do."""

    tokenizer: Any = None  # of the model; without one a token is a byte
    group_size: int = 4  # completions of a prompt
    prompts: int = 8  # in a call, at most
    seconds: float = math.inf  # after so many a reward is tried on no further row
    note: Callable[[str], object] = lambda told: None
    thorough: bool = False  # every probe, and what is noticed by calling twice; else what fits into a row's group
    answer_of: Callable[[str], str | None] = lambda text: None  # what a completion answers
    filled: Callable[[str], str] | None = None  # a text -> the gold completion with it in place of every column
    solved: str = ""  # the reward that tells right from wrong
    apart: Callable[[], AbstractContextManager[Any]] = nullcontext  # inside, what rewards print is kept from the screen

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
    parts: list[list[float]] = field(default_factory=list)  # a row each, of its completions; NaN for no score
    seconds: float = 0.0
    calls: int = 0  # completions scored

    @property
    def is_one_by_one(self) -> bool:
        """It is called with one completion at a time, and so sees no group."""
        return self.reward.callee.fits is fit_one


def preflight(
    rewards: list[Reward], gold_rows: Iterable[tuple[Prompt, str]], calls: Calls | None = None, seed: int = 0
) -> Preflight:
    """Score, for each (prompt, gold completion): the gold text, "", its first half, its words shuffled, and more.

    Raises UserError as `score` does, and for an empty data set or a gold answer to which no reward applies.
    """
    calls = calls or Calls()
    rows = iter(gold_rows)
    first = list(itertools.islice(rows, LOOKED_AHEAD))
    kinds: list[tuple[str, ...]] = []  # of the completions of each row
    probes = _probes(calls, first, itertools.chain(first, rows), random.Random(seed), kinds)
    tried, trials, notes = try_rewards(rewards, probes, calls)
    if not tried:
        raise UserError("There is no row to check the rewards on: the data set is empty.")
    scored_by_all = min(len(trial.parts) for trial in trials)
    gold = {trial.reward.name: _gold(trial.parts[:scored_by_all]) for trial in trials}  # [R]
    _check_that_something_applies(tried, gold)
    checks = [_check(trial, kinds, tried) for trial in trials]
    attainable = sum(check.weight * check.best for check in checks)
    totals = _totals(trials, kinds[:scored_by_all])
    if calls.thorough:
        notes += _noticed(rewards, first, calls)
    return Preflight(
        num_rows=len(tried),
        checks=checks,
        attained=weighted_sum(gold, rewards).max().item(),
        attainable=attainable,
        notes=notes,
        sums={kind: sum(values) / len(values) for kind, values in totals.items()},
        apart=never_together(checks, _at_best(trials[: len(checks)], checks, scored_by_all)),
        trick=_best_trick(totals, calls),
        solved=calls.solved,
    )


def _probes(
    calls: Calls,
    first: Sequence[tuple[Prompt, str]],
    rows: Iterable[tuple[Prompt, str]],
    shuffle: random.Random,
    kinds: list[tuple[str, ...]],
) -> Iterator[tuple[Prompt, list[Completion]]]:
    """The completions of each row, whose kinds are written down as they are made.

    Where it is thorough the first rows have every probe, some more those of BASE, and the others gold alone. Else what
    BASE leaves free in a group is filled with the other probes in turn, which costs nothing.
    """
    cheap = tricks([(gold, calls.answer_of(gold)) for _, gold in first], calls.filled)
    others = [name for name in (*SAME, *WRONG) if name not in BASE]
    following = in_turn([name for pair in itertools.zip_longest(others, cheap) for name in pair if name])
    free = -len(BASE) % calls.group_size
    for number, (prompt, material) in enumerate(materials(rows, calls.answer_of)):
        if calls.thorough and number >= PROBED:
            made: list[Probe] = [(GOLD, calls.completion(material.gold))]
        elif calls.thorough and number < ALL_PROBES:
            made = probes_of(material, calls.tokenizer, shuffle, [*others, *cheap])
        else:
            made = probes_of(material, calls.tokenizer, shuffle, following(free))
        kinds.append(tuple(name for name, _ in made) if len(made) > 1 else _GOLD_ALONE)
        yield prompt, [completion for _, completion in made]


_GOLD_ALONE = (GOLD,)


def preflight_without_gold(
    rewards: list[Reward], rows: Iterable[tuple[Prompt, list[str]]], calls: Calls | None = None
) -> Preflight:
    """Score, for each (prompt, texts): these texts. What they are paid says nothing; that they are is enough.

    Raises UserError as `score` does, and where no reward applies to any of them.
    """
    calls = calls or Calls()
    probes = ((prompt, list(map(calls.completion, texts))) for prompt, texts in rows)
    tried, trials, notes = try_rewards(rewards, probes, calls)
    silent = [trial.reward.name for trial in trials if all(all(map(math.isnan, paid)) for paid in trial.parts)]
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
    """One more call of a reward, on whole groups as in a step; one that sees no group gets no more than there are."""
    began = time.monotonic()
    as_groups = _as_they_are if trial.is_one_by_one else calls.groups
    groups = [as_groups(prompt, completions) for prompt, completions in rows]
    with calls.apart():
        score(list(itertools.chain(*groups)), [trial.reward])
    for (_, completions), of_row in zip(rows, groups, strict=True):
        paid = [value for group in of_row for value in group.parts[trial.reward.name].tolist()]
        trial.parts.append(paid[: len(completions)])
    trial.seconds += time.monotonic() - began
    trial.calls += sum(len(group.completions) for of_row in groups for group in of_row)


def _as_they_are(prompt: Prompt, completions: list[Completion]) -> list[Group]:
    return [Group(prompt, completions)]


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


def _check_that_something_applies(rows: list[int], gold: dict[str, Tensor]) -> None:
    applies = torch.stack([~part.isnan() for part in gold.values()]).any(dim=0)  # [R]
    if not applies.all():
        row = rows[int(applies.int().argmin())]
        raise UserError(
            f"No reward applies to the gold answer of row {row}: each returned None. A completion that "
            "nothing scores would count as reward 0; let one reward return a number for every row."
        )


# ---- what was paid


def _gold(parts: list[list[float]]) -> Tensor:
    return torch.tensor([part[0] for part in parts])


def _check(trial: Trial, kinds: list[tuple[str, ...]], rows: list[int]) -> RewardCheck:
    """What a reward paid for each kind of text, and which gold answers got less than its best."""
    reward, paid = trial.reward, {}
    for of_row, part in zip(kinds, trial.parts, strict=False):  # of a slow one there are fewer
        for kind, value in zip(of_row, part, strict=True):
            paid.setdefault(kind, []).append(value)
    applied = {kind: [value for value in values if not math.isnan(value)] for kind, values in paid.items()}
    lowest = {kind: min(values, default=math.inf) for kind, values in applied.items()}
    highest = {kind: max(values, default=-math.inf) for kind, values in applied.items()}
    # A penalty has a negative weight: its best value is its lowest. What tricks get is not asked of a gold answer.
    best = max(highest[kind] for kind in BASE) if reward.weight >= 0 else min(lowest[kind] for kind in BASE)
    best = best if math.isfinite(best) else 0.0
    short = [n for n, value in enumerate(paid[GOLD]) if reward.weight * value < reward.weight * best]
    unscored = [n for n, value in enumerate(paid[GOLD]) if math.isnan(value)]
    return RewardCheck(
        name=reward.name,
        weight=reward.weight,
        lowest=lowest,
        highest=highest,
        mean={kind: sum(values) / len(values) if values else math.nan for kind, values in applied.items()},
        best=best,
        short_rows=[rows[index] for index in short],
        unscored_rows=[rows[index] for index in unscored],
        num_rows=len(trial.parts),
        failing=sorted({*short, *unscored}),
        seconds=trial.seconds / max(1, trial.calls),
    )


def _totals(trials: list[Trial], kinds: list[tuple[str, ...]]) -> dict[str, list[float]]:
    """Kind of text -> what the rewards pay for it together, for each row that it was tried on."""
    totals: dict[str, list[float]] = {}
    for row, of_row in enumerate(kinds):
        for place, kind in enumerate(of_row):
            paid = [trial.reward.weight * trial.parts[row][place] for trial in trials]
            totals.setdefault(kind, []).append(sum(value for value in paid if not math.isnan(value)))
    return totals


def _at_best(trials: list[Trial], checks: list[RewardCheck], num_rows: int) -> dict[str, set[int]]:
    """Name of a reward -> which completions of the first rows got its best."""
    found = {}
    for trial, check in zip(trials, checks, strict=True):
        paid = itertools.chain.from_iterable(trial.parts[: min(num_rows, PROBED)])
        found[check.name] = {place for place, value in enumerate(paid) if value == check.best}
    return found


def _best_trick(totals: dict[str, list[float]], calls: Calls) -> Trick | None:
    """The text that earns the most whatever is asked, and of several the shortest."""
    tried = {kind.removeprefix(TRICK): values for kind, values in totals.items() if kind.startswith(TRICK)}
    enough = min(ENOUGH_ROWS, len(totals[GOLD]))  # on fewer it may be the answer by chance
    earned = {text: sum(values) / len(values) for text, values in tried.items() if len(values) >= enough}
    if not earned:
        return None
    text = max(earned, key=lambda text: (round(earned[text], 6), -len(text)))
    return Trick(text, len(calls.completion(text).tokens), earned[text]) if earned[text] > 0 else None


# ---- what is noticed by calling again


def _noticed(rewards: list[Reward], first: Sequence[tuple[Prompt, str]], calls: Calls) -> list[str]:
    """Sentences about rewards that are random, change what they are given, or cannot take a long text."""
    prompt, gold = first[0]
    told = []
    for reward in rewards:
        groups = calls.groups(prompt, [calls.completion(gold), calls.completion("")])
        told += [*_random(reward, groups), *_changes(reward, samples_of(groups)), *_long(reward, prompt, gold, calls)]
    return told


def _random(reward: Reward, groups: list[Group]) -> Iterator[str]:
    paid = []
    for _ in range(2):
        score(groups, [reward])
        paid.append(torch.cat([group.parts[reward.name] for group in groups]))
    if not torch.equal(paid[0].nan_to_num(math.inf), paid[1].nan_to_num(math.inf)):
        place = int((paid[0].nan_to_num(math.inf) != paid[1].nan_to_num(math.inf)).int().argmax())
        yield (
            f"`{reward.name}` paid {paid[0][place]:g} and then {paid[1][place]:g} for the same completion: what it "
            "pays is a matter of chance, or of what it was called with before."
        )


def _changes(reward: Reward, samples: Samples) -> Iterator[str]:
    """Whether it changes its arguments. They are copies: nobody else sees it."""
    lent: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def remembered(samples: Samples) -> Iterator[Call]:
        for call in reward.callee.calls(samples):
            lent.append((call.arguments, {name: _kept(value) for name, value in call.arguments.items()}))
            yield call

    callee = replace(reward.callee, calls=remembered)
    if reward.is_async:
        start = way_async(reward.limit, reward.options.concurrency, callee)
    else:
        start = way_here(reward.limit, reward.pace, callee)
    for _ in start(samples)():
        pass
    changed = {name for given, kept in lent for name in given if not _equal(given[name], kept[name])}
    if changed:
        listed = ", ".join(f"`{name}`" for name in sorted(changed))
        yield f"`{reward.name}` changes what it is given ({listed}). It gets copies, so that nothing else sees it."


def _kept(value: Any) -> Any:
    """A copy to compare with; what cannot be copied is compared with itself."""
    try:
        return copy.deepcopy(value)
    except WHAT_USER_CODE_RAISES:
        return value


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other) or repr(one) == repr(other)
    except WHAT_USER_CODE_RAISES:  # arrays, and classes whose comparison is the user's code
        return repr(one) == repr(other)


def _long(reward: Reward, prompt: Prompt, gold: str, calls: Calls) -> Iterator[str]:
    """What it does with a text of a million characters. It gets there by shorter ones: one whose time grows with the
    square of the length would hold the interpreter for so long that the watchdog ends the process."""
    for length in LENGTHS:
        text = (f"{gold}\n" * (length // (len(gold) + 1) + 1))[:length]
        completion = Completion([0], [0.0], text, finish="length", policy_version=0)
        groups = [Group(prompt, [completion] * (1 if reward.callee.fits is fit_one else calls.group_size))]
        began = time.monotonic()
        try:
            score(groups, [reward])
        except UserError as error:
            yield f"On a text of {length:,} characters `{reward.name}` fails, and would on such a completion: {error}"
            return
        seconds = (time.monotonic() - began) / len(groups[0].completions)
        if seconds > LONG_SECONDS:
            yield f"`{reward.name}` takes {seconds:.1f} s for a text of {length:,} characters."
            return
