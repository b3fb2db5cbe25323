"""Async rewards, all in one event loop on a thread of its own: they wait for their services while others compute.

Knows nothing of signatures or of what a failure means. One loop for all async rewards and steps, so that a client which
a reward keeps stays usable; on its own thread, so that they run inside a notebook's running loop too.

A call that blocks the loop (`requests.get` in an `async def`) cannot be interrupted, and keeps all others from going
on. When it is late it has failed, and is left to itself with its loop; the others are made anew in the next one. What
holds the interpreter too lets nobody look, and is ended by the watchdog, with the process.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from grpo.errors import UserError
from grpo.rewards.attempt import missing_for
from grpo.rewards.calling import Call, Callee, Finish, Outcome, Start
from grpo.rewards.here import living_watchdog
from grpo.rewards.samples import Samples
from grpo.rewards.values import Missing, Score
from grpo.watchdog import Limit, TimeIsUp

AsyncLimit = Callable[["Job"], AbstractAsyncContextManager[Any]]  # the time that one call may take

_LOOK = 0.5  # seconds between two looks at whether the loop still runs
_LEAST = 10.0  # seconds that the interpreter may be held by anybody, the rollout too, while async rewards are called
_PATIENCE = 2.0  # seconds that the loop gets to stop a late call by itself, which tells its row
_MOST_BLOCKED = 16  # loops that are left to a call which blocks them; each is a thread that never ends
_BLOCKS = "Let it `await` what it waits for, or write it with `def`: it blocks the event loop of all async rewards."
_STAYS = "It goes on when it is cancelled: let CancelledError through."


@dataclass(eq=False)
class Job:
    """A call that is to be made."""

    caller: Caller
    call: Call
    future: Future[list[Score | Missing]] = field(default_factory=Future)
    deadline: float = math.inf  # by when it must be over, once it has begun
    task: asyncio.Task[Any] | None = None
    loop: Loop | None = None  # where it is made

    def settle(self, scores: list[Score | Missing]) -> None:
        """It is over; what comes later does not count."""
        with suppress(InvalidStateError):
            self.future.set_result(scores)

    def end(self, task: asyncio.Task[Any] | None, scores: list[Score | Missing]) -> None:
        """The same, by the task which makes it; one in a loop that was left has no say any more."""
        if task is self.task:
            self.settle(scores)

    def fail(self, advice: str) -> None:
        """It is late, and nothing ends it."""
        words = f"raised TimeoutError ({self.exceeded}) on"
        self.settle([Missing(words, f"A time-out is never scored 0. {advice}")] * len(self.call.members))

    def is_overdue(self, since: float) -> bool:
        """It should have been ended by itself, also if nobody had looked before `since`."""
        limit = self.caller.limit
        return bool(limit) and time.monotonic() > max(since, self.deadline) + min(_PATIENCE, limit.seconds)

    @property
    def exceeded(self) -> str:
        """What it gave, in words."""
        return self.caller.limit.exceeded if self.caller.limit else "no result"


@dataclass(frozen=True, eq=False)
class Caller:
    """How an async reward is called. limit: of one call, None for none. concurrency: calls at the same time."""

    callee: Callee
    limit: Limit | None
    concurrency: int
    within: AsyncLimit


class Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop, runs = asyncio.new_event_loop(), threading.Event()
        self.jobs: set[Job] = set()  # that are not over
        self.places: dict[Caller, asyncio.Semaphore] = {}
        self.lock = threading.Lock()
        self.guard: threading.Thread | None = None
        self.loop.call_soon(runs.set)
        self.thread = threading.Thread(target=self._run, name="grpo-async-rewards", daemon=True)
        self.thread.start()
        runs.wait()

    def send(self, jobs: list[Job]) -> None:
        """Have calls made, which begin in this order."""
        for job in jobs:
            job.loop, job.task, job.deadline = self, None, math.inf
        with self.lock:
            self.jobs.update(jobs)
            limited = [job.caller for job in jobs if job.caller.limit]
            if limited and self.guard is None:
                self.guard = threading.Thread(target=self._keep_watch, args=(limited[0],), daemon=True)
                self.guard.start()
        with suppress(RuntimeError):  # the loop is closed, which is told where the result is waited for
            self.loop.call_soon_threadsafe(self._begin, jobs)

    def runs(self) -> bool:
        """Whether it can make calls."""
        return self.loop.is_running()

    def answers(self) -> bool:
        """Whether nothing blocks it now."""
        answered = threading.Event()
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(answered.set)
        return answered.wait(_LOOK)

    def leave(self) -> list[Job]:
        """Something blocks it: that call has failed. Returns the other calls that are not over."""
        blocking = asyncio.current_task(self.loop)
        late = [job for job in list(self.jobs) if job.deadline < time.monotonic()]
        for job in [job for job in late if job.task is blocking] or late:
            job.fail(_BLOCKS)
        left = [job for job in list(self.jobs) if not job.future.done()]
        _unfinished.extend(asyncio.all_tasks(self.loop))
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._end)
        # A loop of Python ends by this; what waits in C ends when it ends.
        thread = ctypes.c_ulong(self.thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeIsUp))
        self._forget()
        return left

    def _begin(self, jobs: list[Job]) -> None:
        for job in jobs:
            places = self.places.setdefault(job.caller, asyncio.Semaphore(job.caller.concurrency))
            job.task = self.loop.create_task(_make(job, places))
            job.task.add_done_callback(partial(self._over, job))

    def _over(self, job: Job, task: asyncio.Task[Any]) -> None:
        if task.cancelled():  # a reward may cancel the tasks of all
            job.end(task, [missing_for(asyncio.CancelledError())] * len(job.call.members))
        with self.lock:
            self.jobs.discard(job)

    def _run(self) -> None:
        with suppress(TimeIsUp):
            self.loop.run_forever()

    def _end(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.stop()

    def _forget(self) -> None:
        with self.lock:
            self.jobs.clear()

    def _keep_watch(self, caller: Caller) -> None:
        """While calls are under way the watchdog hears that other threads than the loop's can run. That is all that it
        can be told: late calls are seen to where their results are waited for."""
        assert caller.limit
        dog, limit = living_watchdog(), caller.limit
        watch = dog.show(None, replace(limit, seconds=max(_LEAST, limit.seconds)), f"reward `{caller.callee.name}`")
        while self._has_jobs():
            dog.beat(watch)
            time.sleep(_LOOK)
        dog.hide(watch)

    def _has_jobs(self) -> bool:
        with self.lock:
            self.guard = self.guard if self.jobs else None
            return bool(self.jobs)


def way_async(limit: Limit | None, concurrency: int, callee: Callee) -> Start:
    """limit: of one call; None for none. concurrency: calls at the same time."""
    if limit is None:
        return partial(_start, Caller(callee, None, concurrency, lambda job: nullcontext()))
    living_watchdog()
    return partial(_start, Caller(callee, limit, concurrency, partial(_deadline, limit)))


def _start(caller: Caller, samples: Samples) -> Finish:
    jobs = [Job(caller, call) for call in caller.callee.calls(samples)]
    _living_loop().send(jobs)
    return Finish(partial(_finish, jobs), partial(_cancel, jobs))


def _finish(jobs: list[Job]) -> Iterator[Outcome]:
    for job in jobs:
        began = time.monotonic()
        while not wait([job.future], _LOOK if job.caller.limit is None else min(_LOOK, job.caller.limit.seconds)).done:
            _look_after(job, began)
        yield job.call.members, job.future.result()


def _cancel(jobs: list[Job]) -> None:
    for job in [job for job in jobs if not job.future.done()]:
        job.settle([])
        if job.loop and job.task:
            with suppress(RuntimeError):
                job.loop.loop.call_soon_threadsafe(job.task.cancel)


async def _make(job: Job, places: asyncio.Semaphore) -> None:
    async with places:
        if not job.future.done():  # it was cancelled while it waited
            job.end(asyncio.current_task(), await _attempt(job))


async def _attempt(job: Job) -> list[Score | Missing]:
    """As attempt.py has it. A KeyboardInterrupt in this thread is no Ctrl-C, and would end the loop."""
    callee, call = job.caller.callee, job.call
    try:
        async with job.caller.within(job):
            return callee.fits(await callee.function(**call.arguments), len(call.members))
    except BaseException as error:
        return [missing_for(error)] * len(call.members)


@asynccontextmanager
async def _deadline(limit: Limit, job: Job) -> AsyncIterator[None]:
    """A time limit that also a call keeps which blocks the loop."""
    deadline = job.deadline = time.monotonic() + limit.seconds
    try:
        async with asyncio.timeout(limit.seconds) as timer:
            yield
    except TimeoutError as error:
        raise TimeoutError(limit.exceeded if timer.expired() else str(error)) from error
    if time.monotonic() > deadline:  # it never gave the loop a chance to stop it
        raise TimeoutError(limit.exceeded)


def _look_after(job: Job, began: float) -> None:
    """Whether a call that has not come back can still do so. began: when its result was first waited for."""
    loop = job.loop
    assert loop
    if not loop.runs() and not job.future.done():
        _unfinished.extend(asyncio.all_tasks(loop.loop))
        raise UserError(
            f"Reward `{job.caller.callee.name}` never came back: the event loop that all async rewards share was "
            "stopped or closed. It belongs to all of them: a reward must not stop it."
        )
    overdue = [each for each in list(loop.jobs) if each.is_overdue(began)]
    if not overdue:
        return
    if loop.answers():
        if job in overdue:
            job.fail(_STAYS)
        return
    if len(_loops) > _MOST_BLOCKED:
        raise UserError(
            f"Reward `{overdue[0].caller.callee.name}` gave {overdue[0].exceeded}, and the event loop of all async "
            "rewards is blocked, not for the first time. A time-out is never scored 0: let them `await` what they wait "
            "for, or write them with `def`."
        )
    left = loop.leave()
    _loops.append(Loop())
    _loops[-1].send(left)


_loops: list[Loop] = []  # the last one runs
_unfinished: list[asyncio.Task[Any]] = []  # in loops that were stopped; kept, because thrown away they would complain


def _living_loop() -> Loop:
    if not (_loops and _loops[-1].runs()):
        _loops.append(Loop())
    return _loops[-1]
