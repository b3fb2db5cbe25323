"""Failures: which completions of a scoring have no score, whether that is too many, and who is told. Never scored 0.

Knows nothing of how rewards are called.

A reward fails on a completion where it raises, takes too long, ends the process that it is called in, or returns what
is no score. The completion is then left out of its group and of the loss. A few such failures are counted
(`reward/<name>/failed`), and the first of each reward is told with its row and its traceback; too many end the run.

Too many are more than chance explains, where each call fails with the share that is tolerated: k failures or more of n
calls had a probability, by the binomial distribution, of less than CHANCE. Looked at are the calls of this scoring, so
that a judge which is gone ends the run after a few calls; those of the last two scorings, three and so on, so that one
called once a step ends it after a few steps; up to WINDOW calls, so that a share little above the one tolerated is
found in the end. A share counted in one step alone would do neither: of 64 calls that fail 3 times in 100, more than a
tenth fail in one step of 300. A resumed run counts anew: what had failed may have been mended.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from grpo.errors import UserError
from grpo.rewards.calling import error_of
from grpo.rewards.samples import Samples
from grpo.rewards.values import Missing, Score
from grpo.types import Group
from grpo.watchdog import Limit

FAILED = "reward/{}/failed"  # the metric
CHANCE = 2e-5  # five failures in a row where a tenth may fail
WINDOW = 1000  # calls


@dataclass
class Tally:
    """How often a reward failed, by scorings. A call for a batch that fails as a whole is one failure."""

    past: deque[tuple[int, int]] = field(default_factory=deque)  # (failures, calls) of whole scorings
    failed: int = 0  # of this scoring
    calls: int = 0

    def begin(self) -> None:
        """Another scoring."""
        self.past.append((self.failed, self.calls))
        while sum(calls for _, calls in self.past) > WINDOW + self.past[0][1]:
            self.past.popleft()
        self.failed = self.calls = 0

    def too_many(self, share: float) -> tuple[int, int] | None:
        """(failures, calls) of those that are more than this share explains."""
        failed, calls = 0, 0
        for of_one in ((self.failed, self.calls), *reversed(self.past)):
            failed, calls = failed + of_one[0], calls + of_one[1]
            if failed > share * calls and chance_of(failed, calls, share) <= CHANCE:
                return failed, calls
        return None


def chance_of(failed: int, calls: int, share: float) -> float:
    """The probability of so many failures or more, where each call fails with this probability."""
    if share in (0.0, 1.0) or not failed:
        return float(share == 1.0 or not failed)
    of_each = math.log(share), math.log1p(-share)
    ways = math.lgamma(calls + 1)
    total = 0.0
    for k in range(failed, calls + 1):
        log_ways = ways - math.lgamma(k + 1) - math.lgamma(calls - k + 1)
        of_k = math.exp(log_ways + k * of_each[0] + (calls - k) * of_each[1])
        total += of_k
        if k > share * calls and of_k < 1e-13 * total:  # those that follow are less still
            break
    return total


@dataclass
class Tolerance:
    """What share of its calls a reward may fail in, and who is told of the first failures.

    share  0: in none
    tell   takes a text of several lines
    log    the same, of every failure
    """

    share: float = 0.0
    tell: Callable[[str], object] = lambda text: None
    log: Callable[[str], object] = lambda text: None
    counts: Counter[str] = field(default_factory=Counter)  # of the completions that each reward failed on so far
    told: set[str] = field(default_factory=set)  # rewards whose first failure was told
    tallies: dict[str, Tally] = field(default_factory=dict)  # of each reward
    late: set[str] = field(default_factory=set)  # rewards that took too long in this process

    def counted(self) -> dict[str, float]:
        """The metrics of what has failed since this was last asked."""
        counts = {FAILED.format(name): float(count) for name, count in self.counts.items()}
        self.counts.clear()
        return counts


NONE_MAY_FAIL = Tolerance()


class Fallible(Protocol):
    """What failures ask of a reward."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def may_fail(self) -> bool: ...
    @property
    def limit(self) -> Limit | None: ...
    @property
    def elsewhere(self) -> bool: ...


class Ledger:
    """What each reward gave in one scoring: a score, or Missing, for each of the S completions."""

    def __init__(self, samples: Samples, tolerance: Tolerance):
        self.samples = samples
        self.tolerance = tolerance
        self.scores: dict[str, list[Score | Missing]] = {}  # {reward name: [S]}
        self.failed: dict[str, dict[int, str]] = {}  # {reward name: {index of a completion: why}}
        self.unscored: set[int] = set()  # completions that a reward with a weight failed on
        self.first: dict[str, tuple[UserError, str]] = {}  # {reward name: its first failure, and the traceback}

    def open(self, name: str) -> None:
        """A reward comes next."""
        self.scores[name] = [None] * len(self.samples.completions)
        self.tolerance.tallies.setdefault(name, Tally()).begin()

    def enter(self, reward: Fallible, members: Sequence[int], scores: Iterable[Score | Missing]) -> None:
        """What a reward gave to these completions.

        Raises:
            UserError: too many have failed.
        """
        column = self.scores[reward.name]
        for index, score in zip(members, scores, strict=True):
            column[index] = score
        self.tolerance.tallies[reward.name].calls += len(members)
        if any(isinstance(column[index], Missing) for index in members):
            self._fail(reward, members)

    def close(self, groups: list[Group]) -> None:
        """Write into the groups of the S completions what has failed, and what rewards said of them."""
        places = [(group, index) for group in groups for index in range(len(group.completions))]
        for group in groups:
            group.failed, group.extra = {}, {}
        for name, why in self.failed.items():
            for at, words in sorted(why.items()):
                group, index = places[at]
                group.failed.setdefault(name, {})[index] = words
        for at in self.unscored:
            group, index = places[at]
            group.rewards[index] = math.nan
        # Sorted, because async rewards log in the order in which they are answered.
        for column, values in sorted(self.samples.logged.extras.items()):
            for at, value in sorted(values.items()):
                group, index = places[at]
                group.extra.setdefault(column, {})[index] = value

    def _fail(self, reward: Fallible, members: Sequence[int]) -> None:
        name, column = reward.name, self.scores[reward.name]
        failed = [index for index in members if isinstance(column[index], Missing)]
        missing: Missing = column[failed[0]]  # pyright: ignore[reportAssignmentType]
        # Of a call that failed as a whole all completions have the same one.
        as_a_whole = all(column[index] is missing for index in members)
        error = error_of(name, self.samples, members if as_a_whole else failed[:1], missing)
        self.first.setdefault(name, (error, missing.trace))
        why = self.failed.setdefault(name, {})
        why.update({index: _why(column[index]) for index in failed})
        if not (reward.may_fail and self.tolerance.share):
            raise error
        tally = self.tolerance.tallies[name]
        tally.calls -= (len(members) - 1) * as_a_whole
        tally.failed += 1 if as_a_whole else len(failed)
        if excess := tally.too_many(self.tolerance.share):
            raise self._too_many(name, *excess)
        if not reward.elsewhere and reward.limit and str(missing.error) == reward.limit.exceeded:
            self.tolerance.late.add(name)
        if reward.weight:  # what the others say is in no sum
            self.unscored.update(failed)
        self.tolerance.counts[name] += len(failed)
        self.tolerance.log("\n".join(["", str(error), missing.trace, ""]))
        if name not in self.tolerance.told:
            self.tolerance.told.add(name)
            self.tolerance.tell(_told(name, error, missing))

    def _too_many(self, name: str, failed: int, calls: int) -> UserError:
        first, trace = self.first[name]
        error = UserError(
            f"Reward `{name}` has failed {failed:,} times in its last {calls:,} calls, more than --max-reward-failures "
            f"({self.tolerance.share:g}) allows. The first of this step:\n{trace}\n{first}"
        )
        error.__cause__ = first.__cause__
        return error


def _why(missing: Score | Missing) -> str:
    assert isinstance(missing, Missing)
    return missing.words.rpartition(" ")[0]  # without the preposition


def _told(name: str, error: UserError, missing: Missing) -> str:
    return "\n".join(
        [
            f"note: {error} What it failed on is left out of its group and of the loss. Further failures of `{name}` "
            f"are counted in {FAILED.format(name)}, and stand in completions.jsonl and rewards.log.",
            *missing.trace.splitlines(),
        ]
    )
