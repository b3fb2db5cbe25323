"""Rewards that are called in this process, one after the other, ended by the watchdog where they take too long.

Knows nothing of signatures or of what a failure means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from grpo.errors import UserError
from grpo.rewards.attempt import attempt
from grpo.rewards.calling import Calls, Finish, Fit, Outcome, Start
from grpo.rewards.samples import Samples
from grpo.watchdog import Limit, Watchdog, watchdog

Run = Callable[[str, Callable, dict[str, Any]], Any]  # what it is in words, a function and its arguments -> its result


def way_here(timeout: float | None, name: str, function: Callable, fits: Fit, calls: Calls) -> Start:
    """timeout: seconds that one call may take; None for no limit."""
    begin = (lambda: _unwatched) if timeout is None else _watched(timeout)
    return partial(_start, begin, name, partial(_fitted, function, fits), calls)


def _start(begin: Callable[[], Run], name: str, function: Callable, calls: Calls, samples: Samples) -> Finish:
    return partial(_finish, begin, name, function, calls, samples)


def _finish(
    begin: Callable[[], Run], name: str, function: Callable, calls: Calls, samples: Samples
) -> Iterator[Outcome]:
    run = begin()
    for call in calls(samples):
        what = f"reward `{name}` on {call.where}"
        arguments = {"arguments": call.arguments, "count": len(call.members)}
        yield call.members, attempt(partial(run, what, function, arguments), call.members)


def _fitted(function: Callable, fits: Fit, arguments: dict[str, Any], count: int) -> list[Any]:
    return fits(function(**arguments), count)  # a generator computes while it is listed


def _unwatched(what: str, function: Callable, arguments: dict[str, Any]) -> Any:
    return function(**arguments)


def _watched(timeout: float) -> Callable[[], Run]:
    living_watchdog()  # that it cannot be had is told before the run
    limit = time_limit(timeout)
    return lambda: partial(living_watchdog().call, limit)


def time_limit(seconds: float) -> Limit:
    """What a call of a reward gets."""
    return Limit(
        seconds, "the --reward-timeout", "A time-out is never scored 0: mend the reward, or give it more time."
    )


def living_watchdog() -> Watchdog:
    """The watchdog.

    Raises:
        UserError: it cannot be had.
    """
    try:
        return watchdog()
    except OSError as error:
        raise UserError(
            f"The process that watches how long rewards take cannot be started: {error}. Leave it room, or set no "
            "limit with --reward-timeout 0."
        ) from error
