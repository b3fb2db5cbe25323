"""Options: what a reward says about its own calls, by a decorator that leaves it the function that it is.

    @reward(time_limit=10, retries=3)
    async def judge(completion, answer): ...

Knows nothing of how they are carried out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, TypeVar, overload

from grpo.errors import UserError

Function = TypeVar("Function", bound=Callable)

_OPTIONS = "__grpo_reward__"  # the attribute of the function


@dataclass(frozen=True)
class Options:
    """What `reward` was given.

    time_limit   seconds that one call may take before it has failed; 0: no limit; None: --reward-timeout
    workers      so many worker processes may call it at the same time; 0: it is always called in the run's own process;
                 None: as --reward-workers says
    retries      so many times what failed is called again, after a wait
    backoff      seconds of the first wait; each one is twice as long as the one before, up to a minute
    concurrency  calls of an `async def` at the same time
    on_failure   "missing": the completion is left out, and --max-reward-failures counts; "stop": the first one ends the
                 run
    batch        of a function of the batch: called with all completions of a "step", or with one "group" at a time
    """

    time_limit: float | None = None
    workers: int | None = None
    retries: int = 0
    backoff: float = 1.0
    concurrency: int = 64
    on_failure: Literal["missing", "stop"] = "missing"
    batch: Literal["step", "group"] = "step"

    def __post_init__(self) -> None:
        for name, is_right, allowed in (
            ("time_limit", self.time_limit is None or _is_seconds(self.time_limit), "seconds, 0 for no limit, or None"),
            ("workers", self.workers is None or _is_count(self.workers, 0), "a number of processes, or None"),
            ("retries", _is_count(self.retries, 0), "how many times, 0 or more"),
            ("backoff", _is_seconds(self.backoff), "seconds"),
            ("concurrency", _is_count(self.concurrency, 1), "how many calls, 1 or more"),
            ("on_failure", self.on_failure in ("missing", "stop"), '"missing" or "stop"'),
            ("batch", self.batch in ("step", "group"), '"step" or "group"'),
        ):
            if not is_right:
                raise UserError(f"@reward was given {name}={getattr(self, name)!r:.60}. It must be {allowed}.")


@overload
def reward(function: Function, /) -> Function: ...
@overload
def reward(
    *,
    time_limit: float | None = ...,
    workers: int | None = ...,
    retries: int = ...,
    backoff: float = ...,
    concurrency: int = ...,
    on_failure: Literal["missing", "stop"] = ...,
    batch: Literal["step", "group"] = ...,
) -> Callable[[Function], Function]: ...
def reward(function: Any = None, /, **options: Any) -> Any:
    """Say how a reward is called; see Options. The function stays what it is.

    Raises:
        UserError: an option is unknown, or not what it may be.
    """
    names = [field.name for field in fields(Options)]
    if unknown := [name for name in options if name not in names]:
        raise UserError(f"@reward was given {unknown[0]}=..., which it does not know. It knows {', '.join(names)}.")
    if function is None:
        return partial(_marked, Options(**options))
    return _marked(Options(**options), function)


def options_of(function: Callable) -> Options:
    """What a reward, what it wraps or its class says of it."""
    of_class = getattr(type(function), "__call__", None)  # noqa: B004
    for each in (function, getattr(function, "func", None), of_class):
        options = getattr(each, _OPTIONS, None)
        if isinstance(options, Options):
            return options
    return Options()


def _marked(options: Options, function: Any) -> Any:
    if not callable(function):
        raise UserError(
            f"@reward stands above {function!r:.60}, which is no function. Its options are given by name: "
            "@reward(time_limit=10)."
        )
    try:
        setattr(function, _OPTIONS, options)
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"@reward cannot mark {function!r:.60}, which takes no attributes. Wrap it in a function of your own."
        ) from error
    return function


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
