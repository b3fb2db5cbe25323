"""Async rewards, all in one event loop on a thread of its own: they wait for their services while others compute.

Knows nothing of signatures or of what a failure means. One loop for all async rewards and steps, so that a client which
a reward keeps stays usable; on its own thread, so that they run inside a notebook's running loop too.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from typing import Any

from grpo.errors import UserError
from grpo.rewards.attempt import missing_for
from grpo.rewards.calling import Call, Callee, Finish, Outcome, Start
from grpo.rewards.here import living_watchdog
from grpo.rewards.samples import Samples, where
from grpo.rewards.values import Missing, Score
from grpo.watchdog import Limit

AsyncLimit = Callable[[], AbstractAsyncContextManager[Any]]  # the time that one call may take

_LOOK = 0.5  # seconds between two looks at whether the loop still runs
_PATIENCE = 2.0  # seconds that the loop gets to stop a late call by itself, which tells its row


def way_async(limit: Limit | None, concurrency: int, callee: Callee) -> Start:
    """limit: of one call; None for none. concurrency: calls at the same time."""
    if limit is None:
        return partial(_start, partial(_call_all, nullcontext, concurrency, callee), _result, callee)
    living_watchdog()
    deadlines: dict[object, float] = {}
    call_all = partial(_call_all, partial(_deadline, limit, deadlines), concurrency, callee)
    return partial(_start, call_all, partial(_result_in_time, limit, deadlines), callee)


def _start(call_all: Callable, result: Callable, callee: Callee, samples: Samples) -> Finish:
    future = asyncio.run_coroutine_threadsafe(call_all(samples), _living_loop())
    return partial(_finish, result, callee.name, samples, future)


def _finish(result: Callable, name: str, samples: Samples, future: Future[list[Outcome]]) -> Iterator[Outcome]:
    members = range(len(samples.completions))
    try:
        outcomes = result(name, where(samples, members), future)
    except CancelledError as error:  # a reward may cancel the tasks of all
        outcomes = [(members, [missing_for(error)] * len(members))]
    yield from outcomes


async def _call_all(limit: AsyncLimit, concurrency: int, callee: Callee, samples: Samples) -> list[Outcome]:
    places = asyncio.Semaphore(concurrency)

    async def call_one(call: Call) -> Outcome:
        async with places:
            return call.members, await _attempt(limit, callee, call)

    return await asyncio.gather(*map(call_one, callee.calls(samples)))


async def _attempt(limit: AsyncLimit, callee: Callee, call: Call) -> list[Score | Missing]:
    """As attempt.py has it. A KeyboardInterrupt in this thread is no Ctrl-C, and would end the loop."""
    try:
        async with limit():
            return callee.fits(await callee.function(**call.arguments), len(call.members))
    except BaseException as error:
        return [missing_for(error)] * len(call.members)


@asynccontextmanager
async def _deadline(limit: Limit, deadlines: dict[object, float]) -> AsyncIterator[None]:
    """A time limit that also a call keeps which blocks the loop; `deadlines` has those of the calls under way."""
    call = object()
    deadlines[call] = time.monotonic() + limit.seconds
    try:
        async with asyncio.timeout(limit.seconds) as timer:
            yield
    except TimeoutError as error:
        raise TimeoutError(limit.exceeded if timer.expired() else str(error)) from error
    finally:
        deadline = deadlines.pop(call)
    if time.monotonic() > deadline:  # it never gave the loop a chance to stop it
        raise TimeoutError(limit.exceeded)


def _result(name: str, what: str, future: Future[list[Outcome]]) -> list[Outcome]:
    """The result; an error if a reward has stopped the loop."""
    while not wait([future], _LOOK).done:
        _check_loop_runs(name)
    return future.result()


def _result_in_time(
    limit: Limit, deadlines: dict[object, float], name: str, where: str, future: Future[list[Outcome]]
) -> list[Outcome]:
    """The result; an error if a call has blocked the loop, which nobody can interrupt, for more than its time.

    What holds the interpreter too does not let us look, and is ended by the watchdog.
    """
    dog, patience = living_watchdog(), min(_PATIENCE, limit.seconds)
    watch = dog.show(None, limit, f"reward `{name}` on {where}")
    began = time.monotonic()
    try:
        while not wait([future], min(_LOOK, limit.seconds)).done:
            _check_loop_runs(name)
            dog.beat(watch)
            if any(time.monotonic() > max(began, deadline) + patience for deadline in list(deadlines.values())):
                raise UserError(
                    f"Reward `{name}` gave {limit.exceeded}, and the event loop of all async rewards is blocked. "
                    "A time-out is never scored 0: let them `await` what they wait for, or write them with `def`."
                )
    finally:
        dog.hide(watch)
    return _result(name, where, future)


_loops: list[asyncio.AbstractEventLoop] = []  # the last one runs
_unfinished: list[asyncio.Task[Any]] = []  # in loops that were stopped; kept, because thrown away they would complain


def _living_loop() -> asyncio.AbstractEventLoop:
    if not _loop_runs():
        loop, runs = asyncio.new_event_loop(), threading.Event()
        loop.call_soon(runs.set)
        threading.Thread(target=loop.run_forever, name="grpo-async-rewards", daemon=True).start()
        runs.wait()
        _loops.append(loop)
    return _loops[-1]


def _loop_runs() -> bool:
    return bool(_loops) and _loops[-1].is_running()


def _check_loop_runs(name: str) -> None:
    if not _loop_runs():
        _unfinished.extend(asyncio.all_tasks(_loops[-1]))
        raise UserError(
            f"Reward `{name}` never came back: the event loop that all async rewards share was stopped or closed. It "
            "belongs to all of them: a reward must not stop it."
        )
