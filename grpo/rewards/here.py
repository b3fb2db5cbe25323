"""Rewards that are called in this process, one after the other, ended by the watchdog where they take too long.

Knows nothing of signatures or of what a failure means.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from grpo.errors import UserError
from grpo.rewards.attempt import attempt
from grpo.rewards.calling import Callee, Finish, Outcome, Start
from grpo.rewards.samples import Samples
from grpo.watchdog import Limit, Watchdog, watchdog

Run = Callable[[str, Callable, dict[str, Any]], Any]  # what it is in words, a function and its arguments -> its result


@dataclass
class Pace:
    """How long calls have taken so far."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=512))  # a completion, of the last calls

    def of_a_completion(self) -> float:
        """Seconds, the median, which a first call that loads something does not move; 0 where nothing was called."""
        return median(self.seconds) if self.seconds else 0.0


def way_here(limit: Limit | None, pace: Pace, callee: Callee) -> Start:
    """limit: of one call; None for none. pace: is told how long each takes."""
    begin = (lambda: _unwatched) if limit is None else _watched(limit)
    return partial(_start, begin, pace, callee)


def _start(begin: Callable[[], Run], pace: Pace, callee: Callee, samples: Samples) -> Finish:
    return Finish(partial(_finish, begin, pace, callee, samples))


def _finish(begin: Callable[[], Run], pace: Pace, callee: Callee, samples: Samples) -> Iterator[Outcome]:
    run, function = begin(), partial(_fitted, callee)
    for call in callee.calls(samples):
        what = f"reward `{callee.name}` on {call.where}"
        arguments = {"arguments": call.arguments, "count": len(call.members)}
        began = time.monotonic()
        scores = attempt(partial(run, what, function, arguments), call.members)
        pace.seconds.append((time.monotonic() - began) / len(call.members))
        yield call.members, scores


def _fitted(callee: Callee, arguments: dict[str, Any], count: int) -> list[Any]:
    return callee.fits(callee.function(**arguments), count)  # a generator computes while it is listed


def _unwatched(what: str, function: Callable, arguments: dict[str, Any]) -> Any:
    return function(**arguments)


def _watched(limit: Limit) -> Callable[[], Run]:
    living_watchdog()  # that it cannot be had is told before the run
    return lambda: partial(living_watchdog().call, limit)


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
