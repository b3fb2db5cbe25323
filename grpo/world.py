"""World: the processes of a run, one a GPU, as everything else sees them. Knows nothing of what they exchange.

    rank, size                which of how many this is
    gather(value)             what every rank has, in the order of ranks
    broadcast(value)          what rank 0 has
    sum_gradients(masters)    the gradient of each over all ranks, in place
    share(costs)              which of some things, each of a cost, are this rank's
    first(function, ...)      called by rank 0 alone
    collect(part, whole)      the parts of all ranks, one behind the other: of a base that is kept in parts

A process by itself is a world of one, in which each of these is the identity, so nobody asks how many ranks there are.
The form of several processes is in grpo/ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn  # it takes a second to import, and --help needs none

Value = TypeVar("Value")

FOLDER = "folder"  # of the run, as `remember` and `recall` have it


class World:
    """One process by itself."""

    rank, size = 0, 1

    def gather(self, value: Value) -> list[Value]:
        """What every rank has given, in the order of ranks. Each must call it."""
        return [value]

    def broadcast(self, value: Value) -> Value:
        """What rank 0 has given. Each must call it."""
        return self.gather(value)[0]

    def prepare(self, masters: Sequence[nn.Parameter]) -> None:
        """Meet once as the sums of these masters' gradients will. What that takes of a GPU's memory is there before it
        is planned."""

    def sum_gradients(self, masters: Sequence[nn.Parameter]) -> None:
        """Add up each master's gradient over all ranks, the same bits on each. One without a gradient on any rank keeps
        none."""

    def share(self, costs: Sequence[float]) -> list[int]:
        """The indices, ascending, of the things of these costs that are this rank's. Where there are fewer of them than
        ranks, some do what another does as well: nobody needs to know what to do with nothing."""
        return deal(costs, self.size)[self.rank]

    def first(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call it where this is rank 0: files are written by that one alone."""
        if self.rank == 0:
            function(*arguments)

    def require_same(self, value: Callable[[], object], told: Callable[[list[int]], str]) -> None:
        """What `value` gives is the same on all ranks. told: ranks where it is not that of rank 0 -> a sentence.

        Raises:
            UserError: it is not.
        """

    def remember(self, name: str, value: str) -> None:
        """For the processes that a launcher starts in the place of these."""

    def recall(self, name: str) -> str:
        """What processes before these have remembered; empty if nothing."""
        return ""

    def collect(self, part: Tensor, whole: Tensor) -> Callable[[], None]:
        """Begin to bring together the parts [n] of all ranks in `whole` [size n], in their order; what is given back
        waits for them, on a GPU without the CPU. Each must call it."""
        whole.copy_(part)
        return lambda: None

    def largest(self, number: int) -> int:
        """Of the numbers that ranks give. No meeting in the sense of `before_meeting`. Each must call it."""
        return number

    def before_meeting(self, ready: Callable[[], None]) -> None:
        """Call this whenever this rank is about to gather, and so to wait for what all others do before that."""

    def does(self, what: str) -> None:
        """What this process does from now on, as in "reading rows": others are told who wait for it long."""

    def hurry(self, number: int) -> None:
        """This process was asked to stop by the signal of this number, and will not be waited for without end."""


ALONE = World()


def deal(costs: Sequence[float], count: int) -> list[list[int]]:
    """The indices of things of these costs in `count` shares of about equal cost, each ascending: the costliest first,
    each to the share that has cost least so far (Graham 1969: at most 4/3 of the best)."""
    shares: list[list[int]] = [[] for _ in range(count)]
    spent = [0.0] * count
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        least = min(range(count), key=lambda share: (spent[share], share))
        shares[least].append(index)
        spent[least] += costs[index]
    return [sorted(share) for share in shares]
