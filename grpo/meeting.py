"""Meeting: the processes of a launch find each other, and miss who does not come or has gone again. Knows nothing of
what they do together.

    meet(place)               a connection to the launcher's store, and a name for these very processes
    connect(place, ...)       one more connection

From the moment that a process has found the store it is missed as later by the pulse (grpo/pulse.py): while it waits it
counts aloud, and one that was killed or stopped counts no more. One that fails says why. Before that nobody can know of
it, so it is a matter of time how long it is waited for:

    those of this host    NEIGHBOUR seconds: they were started together and read the same files
    other hosts           ARRIVAL seconds: one may have its image or its files to load first
"""

from __future__ import annotations

import hashlib
import socket
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from grpo.errors import UserError, in_words
from grpo.launcher import Place
from grpo.pulse import BEAT, HOST, SILENCE, SILENT, Store, sentence_of

distributed: Any = torch.distributed  # its stores are classes of C, without types

NEIGHBOUR, ARRIVAL = 45.0, 600.0  # seconds
TO_CONNECT = 10.0  # seconds to a store that was there a moment ago; torch tries twice
PAUSE = 0.05  # seconds between two looks at who is there

NAME, LIST, SEEN, COUNT, GONE = "name/{}", "list/{}", "seen/{}/{}", "count/{}", "gone/{}"


def meet(place: Place) -> tuple[Store, str]:
    """Find all others: a connection to the store, and what these very processes are called there.

    Raises:
        UserError: not all came, or one has gone again.
    """
    try:
        store = connect(place, is_host=place.rank == 0 and not place.by_agent)
        store.set_timeout(timedelta(seconds=NEIGHBOUR))
        meeting = Meeting(store, place)
        try:
            members = meeting.agree()
        except BaseException as error:
            meeting.leave(sentence_of(error))
            raise
        store.set_timeout(timedelta(seconds=ARRIVAL))
        return store, members
    except (RuntimeError, OSError) as error:  # RuntimeError: torch's own for a store that has gone, among others
        raise UserError(
            f"Rank {place.rank} did not find the others at {place.host}:{place.port}: {in_words(error)}. Start all of "
            "them with the same --rdzv-endpoint, and see that the hosts reach each other."
        ) from error


def connect(place: Place, is_host: bool) -> Store:
    """A connection to the store. is_host: it is made here.

    Raises:
        OSError, RuntimeError: nobody has it.
    """
    if not is_host:
        # An agent is there before its processes, and so is this host. torch waits in C, where no signal comes through.
        is_near = place.by_agent or place.local_size == place.size
        _wait_for_a_listener(place, NEIGHBOUR if is_near else ARRIVAL)
    wait = timedelta(seconds=TO_CONNECT)
    return distributed.TCPStore(place.host, place.port, None, is_host, wait, wait_for_workers=False, multi_tenant=True)


def _wait_for_a_listener(place: Place, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=BEAT * 10).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(PAUSE)


class Meeting:
    """One process among those that wait for each other.

    Each names itself at random; rank 0 lists the names as it sees them, until each has found its own in the list and
    said so of the same list. The store may know of earlier processes, that these were started in the place of, and how
    often that was is not the same on all hosts: so one has come where its count has moved.
    """

    def __init__(self, store: Store, place: Place):
        self.store, self.place = store, place
        self.mine, self.host = uuid.uuid4().hex, socket.gethostname()
        self.began = self.looked = time.monotonic()
        self.counts: dict[str, int] = {}  # by name
        self.moved: dict[str, float] = {self.mine: self.began}  # when the count of one who has come was last another
        store.set(HOST.format(self.mine), self.host)
        store.set(COUNT.format(self.mine), "0")
        store.set(NAME.format(place.rank), self.mine)

    def agree(self) -> str:
        """A name for these very processes, once all are there.

        Raises:
            UserError: one is not there in time, or has gone.
        """
        while True:
            self.store.add(COUNT.format(self.mine), 1)
            if members := self._members():
                return members
            if time.monotonic() > self.looked + BEAT:
                self._look()
            time.sleep(PAUSE)

    def leave(self, sentence: str) -> None:
        """Tell those who wait that this one has gone, and why."""
        with suppress(RuntimeError):  # the store has gone as well
            self.store.set(GONE.format(self.mine), sentence)

    def _members(self) -> str:
        """Their name; empty as long as not all have said that they are in the list."""
        store, size = self.store, self.place.size
        names = [NAME.format(rank) for rank in range(size)]
        if self.place.rank == 0 and store.check(names):
            store.set(LIST.format(self.mine), b" ".join(store.multi_get(names)))
        listed = self._listed()
        if len(listed) != size or listed[self.place.rank] != self.mine:
            return ""
        digest = hashlib.sha256(" ".join(listed).encode()).hexdigest()[:16]
        distributed.PrefixStore(digest, store).set(HOST.format(self.place.rank), self.host)  # of who has been seen
        store.set(SEEN.format(digest, self.place.rank), "")
        return digest if store.check([SEEN.format(digest, rank) for rank in range(size)]) else ""

    def _listed(self) -> list[str]:
        """The names in the list of the present rank 0, as far as it has one."""
        if not self.store.check([NAME.format(0)]):
            return []
        key = LIST.format(self.store.get(NAME.format(0)).decode())
        return self.store.get(key).decode().split(" ") if self.store.check([key]) else []

    def _look(self) -> None:
        """Whether somebody is missing."""
        now = time.monotonic()
        was_away, self.looked = now - self.looked > 10 * BEAT, now  # late or stopped ourselves
        named = [rank for rank in range(self.place.size) if self.store.check([NAME.format(rank)])]
        names = {rank: self.store.get(NAME.format(rank)).decode() for rank in named}
        for rank, name in names.items():
            self._count(name, now, was_away)
            if name in self.moved:
                self._miss(rank, name, now)
        self._wait_no_longer({rank for rank, name in names.items() if name in self.moved}, now)

    def _count(self, name: str, now: float, was_away: bool) -> None:
        count = int(self.store.get(COUNT.format(name)))
        before = self.counts.setdefault(name, count if self.place.by_agent else -1)  # of a store of ours nobody is old
        if count != before or (was_away and name in self.moved):
            self.moved[name] = now
        self.counts[name] = count

    def _miss(self, rank: int, name: str, now: float) -> None:
        key = GONE.format(name)
        told = self.store.get(key).decode() if self.store.check([key]) else ""
        told = told or (SILENT if now - self.moved[name] > SILENCE else "")
        if told:
            host = self.store.get(HOST.format(name)).decode()
            raise UserError(f"Rank {rank} ({host}) was gone before all ranks had met: {told}")

    def _wait_no_longer(self, came: set[int], now: float) -> None:
        place, waited = self.place, now - self.began
        hosts = [self.store.get(HOST.format(name)).decode() for name in self.moved]
        near = hosts.count(self.host)
        if waited > NEIGHBOUR and near < place.local_size:
            raise UserError(
                f"Of the {place.local_size} processes of this host ({self.host}) {near} came within {NEIGHBOUR:g} s. "
                "The others have ended or hang: look at what they wrote. Of all ranks there were "
                f"{', '.join(map(str, sorted(came)))}."
            )
        if waited > ARRIVAL:
            raise UserError(
                f"Of {place.size} processes only ranks {', '.join(map(str, sorted(came)))} came within {ARRIVAL:g} s. "
                "Start as many as --nproc-per-node and --nnodes say."
            )
