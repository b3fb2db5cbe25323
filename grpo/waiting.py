"""Waiting: says which ranks the others have waited for long, and what those do meanwhile. Knows nothing of what ranks
exchange.

A rank that lives is waited for without end, for to read rows from a network, or to load a model there, takes as long as
it takes. So that nobody takes a drive that hangs for a run that is at work, the lowest of the ranks that wait tells it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from grpo.pulse import HOST, Pulse, Store

LONG = 60.0  # seconds after which it is said
MOST_NAMED = 8  # ranks

Note = Callable[[str], object]


class Waiting:
    """What one rank waits for."""

    def __init__(self, rank: int, size: int, store: Store, pulse: Pulse, note: Note):
        self.rank, self.size, self.store, self.pulse, self.note = rank, size, store, pulse, note
        self.told: set[str] = set()
        self.since, self.next = 0.0, LONG

    def begin(self) -> None:
        """From now on."""
        self.pulse.waits(True)
        self.since, self.next = time.monotonic(), LONG

    def look(self) -> None:
        """It waits still."""
        waited = time.monotonic() - self.since
        if waited > self.next:
            self.next += LONG
            self._tell(waited)

    def end(self) -> None:
        """It waits no longer."""
        self.pulse.waits(False)

    def _tell(self, waited: float) -> None:
        """Each of these sentences once: who is late in every step is so in each of them."""
        doing = self.pulse.others_do(self.store)
        if any(not doing.get(rank, "") for rank in range(self.rank)):
            return  # that one waits too, and speaks
        late = {rank: what for rank, what in doing.items() if what}
        named = "; ".join(f"rank {rank} ({self._host(rank)}) is {late[rank]}" for rank in sorted(late)[:MOST_NAMED])
        if not named or named in self.told:
            return
        self.told.add(named)
        more = f", and {len(late) - MOST_NAMED} more are not there" if len(late) > MOST_NAMED else ""
        self.note(
            f"note: rank {self.rank} has waited for others for {waited:.0f} s: {named}{more}. They live, so it waits "
            "on; Ctrl-C ends all of them."
        )

    def _host(self, rank: int) -> str:
        return self.store.get(HOST.format(rank)).decode()
