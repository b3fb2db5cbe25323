"""Pool: completions by several servers, whatever happens to some of them. Knows nothing of the policy, nor of what a
task asks.

    waiting    groups of tasks that nobody works at; each goes whole to the server with the fewest tokens to write
    at work    tasks on their way; one that fails waits again, and goes to whichever server is next
    away       a server that failed is asked nothing, and asked after its return: soon, then less and less often
    back       it is what it must be, has the present adapter, and computes with it what the policy computes

All of this is decided in one thread, which waits for what happens in the others: these only ask and wait for an answer.
A task has one result. Its seed says what is drawn, so one that is asked again is the same task, not another draw.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from grpo import system
from grpo.errors import UserError
from grpo.rollout import server_protocol as vllm
from grpo.rollout.server_http import Call, Fault
from grpo.rollout.server_station import Station

AT_ONCE = 256  # completions that a server is given; more would wait there, and could not go to another one
OTHER_FILES = 256  # that the process has open
TRIES = 6  # of a task that servers answer, but not with what is asked for
LOSSES = 10  # of a task at work: whatever cuts it off will do so again
RELAPSES = 10  # of a server that is well when it is looked at, and answers nothing when it is at work
CUT_OFF = (408, 502, 504)  # of a proxy that has waited for long enough, or lost the server
HEALTHY = range(400, 500)  # a proxy may know no /health


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    patience: float = 600.0  # without any server before the run ends
    first_wait: float = 0.5  # before a server is asked after, and twice as many each time after that
    longest_wait: float = 30.0
    asked_after: float = 10.0  # a server at work without a sign of life
    to_answer: float = 20.0  # its health; after the second time in vain it is away
    steady: float = 30.0  # at work without a fault: then it is well again
    tick: float = 0.25


@dataclass
class Task:
    """What one server is to answer."""

    group: int  # tasks of a group that follow each other go to one server
    tokens: int  # that it may take, prompt and completion
    ask: Callable[[Station, Call], Any]  # in a thread; raises Fault
    tries: int = 0  # that were answered wrongly
    losses: int = 0  # that were not answered, though a server was at work at it


Done = Callable[[int, Any], object]  # is told of the answer to the task of that index


def nobody(index: int, answer: Any) -> None:
    """Waits for no answer before all are there."""


class Pool:
    """The servers."""

    def __init__(
        self,
        stations: list[Station],
        timing: Timing,
        revive: Callable[[Station, Call], None],
        note: Callable[[str], object],
    ):
        """revive: makes sure that a server that was away can be used again, or raises Fault; in a thread."""
        self.stations, self.timing, self.revive, self.note = stations, timing, revive, note
        self.at_once = at_once(len(stations), system.most_open_files())
        self.events: SimpleQueue[tuple[Station, Call, Callable[[Any], None], Future[Any]]] = SimpleQueue()
        self.tasks: list[Task] = []
        self.results: dict[int, Any] = {}  # by the index of the task
        self.waiting: deque[list[int]] = deque()  # indices of tasks, those of a group together
        self.done = nobody
        self.is_broken_off = False
        self.threads: ThreadPoolExecutor | None = None

    @property
    def ready(self) -> list[Station]:
        return [station for station in self.stations if station.is_ready]

    def run(self, tasks: list[Task], done: Done = nobody) -> list[Any]:
        """The answer to each task; `done` is told of each when it comes.

        Raises:
            UserError: no server is there for longer than the patience, or none answers one of the tasks.
        """
        self.tasks, self.results, self.waiting = tasks, {}, deque(units(tasks, self.at_once))
        self.done = done
        self._turn(lambda: len(self.results) == len(tasks))
        return [self.results[index] for index in range(len(tasks))]

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Look after the servers until something is so, of `ready` say.

        Raises:
            UserError: no server is there for longer than the patience.
        """
        self.tasks, self.results, self.waiting, self.done = [], {}, deque(), nobody
        self._turn(is_so)

    def break_off(self) -> None:
        """No server is asked for anything any more. From any thread: who waits for answers gets a UserError soon."""
        self.is_broken_off = True

    def fail(self, station: Station, fault: Fault) -> None:
        """It is asked nothing from now on, but after its return."""
        now = time.monotonic()
        if station.failing_since is None:
            station.failing_since = now
        if station.is_ready:
            self.note(f"note: the server at {station} {fault}. It is left out until it is back.")
            station.is_ready = False
            station.relapses += 1
            self._later(station, now)
        station.told = str(fault)

    def still_away(self, station: Station, fault: Fault) -> None:
        """It was asked after in vain."""
        self.fail(station, fault)
        self._later(station, time.monotonic())

    def take_in(self, station: Station) -> None:
        """It was away, and can be used again."""
        station.is_ready, station.failing_since, station.missed = True, None, 0
        self.note(f"note: the server at {station} is taken in again.")

    def _turn(self, is_done: Callable[[], bool]) -> None:
        """Hand out, wait for something to happen, look after the servers, until it is done."""
        self.events = SimpleQueue()
        for station in self.stations:
            station.running = station.outstanding = station.missed = 0
            station.seen = station.since = time.monotonic()
            station.is_asked_after = False
        most = len(self.stations) * (2 * self.at_once + 1)
        self.threads = ThreadPoolExecutor(min(most, len(self.tasks) + len(self.stations)), thread_name_prefix="server")
        try:
            while not is_done():
                if self.is_broken_off:
                    raise UserError("The rollout was broken off: its run has ended.")
                self._hand_out()
                self._look_after()
                with suppress(Empty):
                    station, call, then, future = self.events.get(timeout=self.timing.tick)
                    station.calls.discard(call)
                    then(future)
                self._check_hope()
        finally:
            for call in [call for station in self.stations for call in station.calls]:
                call.abort()
            # Not waited for: one that asks after a host that is gone would be waited for until it gives up.
            self.threads.shutdown(wait=False, cancel_futures=True)
            for station in self.stations:
                station.calls.clear()

    def _spawn(self, station: Station, ask: Callable[[Call], Any], then: Callable[[Any], None]) -> None:
        """Ask in a thread; `then` is called in this one."""
        call, events = Call(), self.events
        station.calls.add(call)
        assert self.threads
        future = self.threads.submit(ask, call)
        future.add_done_callback(lambda done: events.put((station, call, then, done)))

    # ---- tasks

    def _hand_out(self) -> None:
        while self.waiting and (free := [station for station in self.ready if station.running < self.at_once]):
            station = min(free, key=lambda each: each.outstanding)
            for index in self.waiting.popleft():
                task = self.tasks[index]
                station.running += 1
                station.outstanding += task.tokens
                self._spawn(station, partial(task.ask, station), partial(self._answered, station, index))

    def _answered(self, station: Station, index: int, future: Future[Any]) -> None:
        station.running -= 1
        station.outstanding -= self.tasks[index].tokens
        try:
            self.results[index] = future.result()
        except Fault as fault:
            self._failed(station, index, fault)
        else:
            station.is_well()
            station.seen = time.monotonic()
            self.done(index, self.results[index])

    def _failed(self, station: Station, index: int, fault: Fault) -> None:
        """The task waits again, with those of its group that do."""
        task = self.tasks[index]
        if fault.is_answer and fault.status not in (401, 403, 404, 408, 429, 502, 503, 504):
            task.tries += 1
        if task.tries == TRIES:
            raise UserError(
                f"The server at {station} {fault}. That was the answer to one completion, {TRIES} times over, though "
                "servers were there. Look into the server's log."
            )
        task.losses += not fault.is_answer or fault.status in CUT_OFF
        if task.losses == LOSSES:
            raise UserError(
                f"One completion was lost {LOSSES} times over while servers wrote it, the last time at {station}, "
                f"which {fault}. A proxy that gives up on long answers does that: let it wait for longer than a "
                "completion takes, or name the servers themselves. So does a completion that ends a server: look into "
                "its log."
            )
        self.fail(station, fault)
        if self.waiting and self.tasks[self.waiting[0][0]].group == task.group:
            self.waiting[0].append(index)
        else:
            self.waiting.appendleft([index])

    # ---- servers

    def _look_after(self) -> None:
        now = time.monotonic()
        for station in self.stations:
            if station.is_asked_after:
                continue
            if not station.is_ready and now >= station.next_try:
                station.is_asked_after = True
                self._spawn(station, partial(self.revive, station), partial(self._revived, station))
            elif station.is_ready and station.running and now - station.seen > self.timing.asked_after:
                station.is_asked_after = True
                ask = partial(station.line.get, vllm.HEALTH, self.timing.to_answer)
                self._spawn(station, ask, partial(self._looked, station))

    def _revived(self, station: Station, future: Future[Any]) -> None:
        station.is_asked_after = False
        try:
            future.result()
        except Fault as fault:
            self.still_away(station, fault)
            return
        now = time.monotonic()
        station.since = station.seen = now
        self.take_in(station)

    def _looked(self, station: Station, future: Future[Any]) -> None:
        station.is_asked_after = False
        now = time.monotonic()
        try:
            future.result()
        except Fault as fault:
            if fault.status not in HEALTHY:
                self._missed(station, fault)
                return
        station.seen, station.missed = now, 0
        if now - station.since > self.timing.steady:
            station.is_well()

    def _missed(self, station: Station, fault: Fault) -> None:
        station.missed += 1
        station.seen = time.monotonic()
        if station.missed >= 2 and station.is_ready:
            self.fail(station, fault)
            for call in list(station.calls):
                call.abort()

    def _later(self, station: Station, now: float) -> None:
        station.faults += 1
        wait = self.timing.first_wait * 2 ** min(station.faults - 1, 30)
        station.next_try = now + min(self.timing.longest_wait, wait)

    def _check_hope(self) -> None:
        now = time.monotonic()
        lost = [
            station.relapses > RELAPSES
            or (station.failing_since is not None and now - station.failing_since > self.timing.patience)
            for station in self.stations
        ]
        if all(lost):
            told = "; ".join(f"the one at {station} {station.told}" for station in self.stations)
            raise UserError(
                f"No rollout server has answered for {self.timing.patience:g} seconds (--servers-patience), or any "
                f"completion since it was back {RELAPSES} times: {told}. Start one again, or name others by --servers."
            )


def at_once(servers: int, open_files: int | None) -> int:
    """Completions that each server is given. A group goes whole, so there may be as many again; each is a file."""
    return AT_ONCE if open_files is None else max(1, min(AT_ONCE, (open_files - OTHER_FILES) // (2 * servers)))


def units(tasks: list[Task], most: int) -> list[list[int]]:
    """The indices of tasks of a group that follow each other, no more of them together than `most`."""
    found: list[list[int]] = []
    last: int | None = None
    for index, task in enumerate(tasks):
        if task.group != last or len(found[-1]) == most:
            found.append([])
        found[-1].append(index)
        last = task.group
    return found
