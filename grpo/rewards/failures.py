"""Failures: which completions of a scoring have no score, whether that is too many, and who is told. Never scored 0.

Knows nothing of how rewards are called.

A reward fails on a completion where it raises, takes too long, ends the process that it is called in, or returns what
is no score. The completion is then left out of its group and of the loss. A few such failures are counted
(`reward/<name>/failed`), and the first of each reward is told with its row and its traceback; too many end the run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from grpo.errors import UserError
from grpo.rewards.calling import error_of
from grpo.rewards.samples import Samples
from grpo.rewards.values import Missing, Score
from grpo.types import Group

FAILED = "reward/{}/failed"  # the metric


@dataclass
class Tolerance:
    """What share of the completions that are scored together may fail, and who is told of the first failures.

    share  0: none may. A single one never ends a run where any may.
    tell   takes a text of several lines
    log    the same, of every failure
    """

    share: float = 0.0
    tell: Callable[[str], object] = lambda text: None
    log: Callable[[str], object] = lambda text: None
    counts: Counter[str] = field(default_factory=Counter)  # of the completions that each reward failed on so far
    told: set[str] = field(default_factory=set)  # rewards whose first failure was told

    def most(self, num_samples: int) -> int:
        """So many completions may fail."""
        return max(1, math.floor(self.share * num_samples + 1e-9)) if self.share else 0

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


class Ledger:
    """What each reward gave in one scoring: a score, or Missing, for each of the S completions."""

    def __init__(self, samples: Samples, tolerance: Tolerance):
        self.samples = samples
        self.tolerance = tolerance
        self.scores: dict[str, list[Score | Missing]] = {}  # {reward name: [S]}
        self.failed: dict[str, dict[int, str]] = {}  # {reward name: {index of a completion: why}}
        self.unscored: set[int] = set()  # completions that a reward with a weight failed on
        self.first, self.trace = UserError(), ""  # failure, and its traceback

    def open(self, name: str) -> None:
        """A reward comes next."""
        self.scores[name] = [None] * len(self.samples.completions)

    def enter(self, reward: Fallible, members: Sequence[int], scores: Iterable[Score | Missing]) -> None:
        """What a reward gave to these completions.

        Raises:
            UserError: too many have failed.
        """
        column = self.scores[reward.name]
        for index, score in zip(members, scores, strict=True):
            column[index] = score
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
        for column, values in self.samples.logged.extras.items():
            for at, value in values.items():
                group, index = places[at]
                group.extra.setdefault(column, {})[index] = value

    def _fail(self, reward: Fallible, members: Sequence[int]) -> None:
        name, column = reward.name, self.scores[reward.name]
        failed = [index for index in members if isinstance(column[index], Missing)]
        missing: Missing = column[failed[0]]  # pyright: ignore[reportAssignmentType]
        # Of a call that failed as a whole all completions have the same one.
        of_call = members if all(column[index] is missing for index in members) else failed[:1]
        error = error_of(name, self.samples, of_call, missing)
        self.first, self.trace = (self.first, self.trace) if self.failed else (error, missing.trace)
        why = self.failed.setdefault(name, {})
        why.update({index: _why(column[index]) for index in failed})
        num_failed = len({index for indices in self.failed.values() for index in indices})
        most = self.tolerance.most(len(column)) if reward.may_fail else 0
        if num_failed > most:
            raise error if not most else self._too_many(num_failed)
        if reward.weight:  # what the others say is in no sum
            self.unscored.update(failed)
        self.tolerance.counts[name] += len(failed)
        self.tolerance.log("\n".join(["", str(error), missing.trace, ""]))
        if name not in self.tolerance.told:
            self.tolerance.told.add(name)
            self.tolerance.tell(_told(name, error, missing))

    def _too_many(self, num_failed: int) -> UserError:
        error = UserError(
            f"Rewards have failed on {num_failed} of {len(self.samples.completions)} completions that were scored "
            f"together, more than --max-reward-failures ({self.tolerance.share:g}) allows. The first:\n{self.trace}\n"
            f"{self.first}"
        )
        error.__cause__ = self.first.__cause__
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
