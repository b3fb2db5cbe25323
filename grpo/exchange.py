"""Exchange: prompts dealt out to ranks, and the groups that each has made of its own handed to all, once. Knows nothing
of engines or rewards.

    share = Share(world, prompts, cost)      share.prompts of share.rows are this rank's
    share.exchange(groups, told)             the groups of all prompts, in their order, and what each rank tells

What follows from the groups (advantages, denominators, who is trained on, metrics) is then the same on every rank, and
as it would be in a single process. Prompts do not travel: every rank has all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from grpo.types import Group, Prompt
from grpo.world import World

Told = TypeVar("Told")

NOT_SENT = Prompt(-1, "", [], {})


class Share:
    """This rank's part of some prompts.

    They are dealt out by what they are expected to cost, the costliest first, so that ranks end together. How long a
    completion will be nobody knows: all are taken to be as long as they may be.
    """

    def __init__(self, world: World, prompts: Sequence[Prompt], tokens: int):
        """tokens: of all completions of a prompt together, at most."""
        self._world, self._all = world, prompts
        self.rows = world.share([len(prompt.tokens) + tokens for prompt in prompts])
        self.prompts = [prompts[row] for row in self.rows]

    def exchange(self, groups: Sequence[Group], told: Told) -> tuple[list[Group], list[Told]]:
        """The groups of all prompts, and what every rank has told. groups: of this rank's prompts."""
        mine = [replace(group, prompt=NOT_SENT) for group in groups]
        gathered = self._world.gather((list(zip(self.rows, mine, strict=True)), told))
        found = {row: group for of_rank, _ in gathered for row, group in of_rank}
        ordered = [replace(found[row], prompt=prompt) for row, prompt in enumerate(self._all)]
        return ordered, [of_rank for _, of_rank in gathered]


def means(told: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Numbers by name from each of several, averaged by how many things each is a mean of."""
    totals: dict[str, tuple[float, int]] = {}
    for count, numbers in told:
        for name, number in numbers.items():
            total, of = totals.get(name, (0.0, 0))
            totals[name] = (total + count * number, of + count)
    return {name: total / max(1, of) for name, (total, of) in totals.items()}


def sums(told: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Numbers by name from each of several, added up."""
    total: dict[str, float] = {}
    for numbers in told:
        for name, number in numbers.items():
            total[name] = total.get(name, 0.0) + number
    return total
