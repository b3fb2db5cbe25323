"""Draws: what rewards draw at random, from generators of their own. Knows nothing of rewards.

A reward draws from Python's, numpy's and torch's global generators. While a scoring goes on these hold the state in
which the last one left them; before and after it they hold what everybody else has, whatever a reward has seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from grpo.generators import Generators
from grpo.rewards.kept import Log, kept, printed_to


class Draws:
    """The rewards' generators, which begin as the global ones are now.

    read: the global ones. A checkpoint has `state`.
    """

    def __init__(self, read: Callable[[], Generators]):
        self._read = read
        self.state = read()

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Inside, the global generators are the rewards'. What is drawn before an error does not count."""
        others = self._read()
        self.state.restore()
        try:
            yield
            self.state = self._read()
        finally:
            others.restore()


@contextmanager
def apart(draws: Draws, log: Log) -> Iterator[None]:
    """Inside runs a scoring, async rewards too: what they draw, print and change stays theirs."""
    with printed_to(log), draws.drawn(), kept():
        yield
