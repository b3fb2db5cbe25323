"""Values: what a reward may return, and what it is taken for. Knows nothing of how rewards are called.

    fit(value)             one value -> a score: a number, None (does not apply), numbers by name, or Missing
    fit_one(value, 1)      what a function of one completion returned -> one, in a list
    fit_list(value, S)     what a function of the batch returned -> S of them

As in TRL, a batch is anything that gives S values in order, and a value is None or whatever Python makes a number of;
here it must be a finite one in float32. Of numbers by name the one called "score" counts, else their sum:
{"score": 1.0, "seconds": 0.2} pays 1, {"right": 1.0, "brief": 0.5} pays 1.5.

How a value becomes a number is its class's own code, so this runs where the reward does, in its time: also in a worker
process, which comes without torch.
"""

from __future__ import annotations

import inspect
import math
import struct
from collections.abc import Iterable, KeysView, Mapping, Set, Sized
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, singledispatch
from itertools import islice
from typing import Any

from grpo.errors import WHAT_USER_CODE_RAISES

Number = float | None
Score = Number | dict[str, Number]

THE_SCORE = "score"  # of numbers by name
_TAKEN = ("failed",)  # reward/<name>/failed is a metric of ours
_TEXTS = (str, bytes, bytearray)
_FLOAT32 = struct.Struct("f")


@dataclass(frozen=True)
class Missing:
    """In place of a score: why there is none.

    words   "raised ValueError (bad) on", "returned nan (float) for": what is scored follows
    advice  what is allowed and what to do, a sentence
    trace   the traceback of the reward's own code, as text
    error   what was raised, in this process; None in another
    """

    words: str
    advice: str
    trace: str = ""
    error: BaseException | None = None


class Unfit(Exception):
    """What a reward returned is no score: in words, and what is allowed."""

    def missing(self) -> Missing:
        """It, where a score is expected."""
        return Missing(*self.args)


def fit(value: Any) -> Score | Missing:
    """One value that a reward returned."""
    try:
        return _fit(value)
    except Unfit as unfit:
        return unfit.missing()


def fit_one(returned: Any, count: int) -> list[Score | Missing]:
    """What a function of one completion returned; count: 1."""
    return [fit(returned)]


def fit_list(returned: Any, count: int) -> list[Score | Missing]:
    """What a reward returned for a batch, as `count` scores; of a generator without end, one value too many is asked.

    Raises:
        Unfit: it is no `count` values in order.
    """
    if isinstance(returned, Mapping) and (columns := _columns(returned, count)):
        return [fit(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    values = _in_order(returned, count)
    if not (isinstance(values, list) and len(values) == count):
        raise Unfit(
            f"returned {_describe(values)} for",
            "A function of `completions` returns a list with one number (or None) for each, here "
            f"{count}.{_awaited(returned)}",
        )
    return [fit(value) for value in values]


def _columns(returned: Mapping[Any, Any], count: int) -> dict[str, list[Any]]:
    """Lists by name, each with a number for every completion; empty if it is something else."""
    columns = {key: _in_order(value, count) for key, value in returned.items() if isinstance(value, Iterable)}
    are_lists = all(isinstance(value, list) and len(value) == count for value in columns.values())
    return columns if are_lists and len(columns) == len(returned) else {}


def _in_order(returned: Any, count: int) -> Any:
    if _is_array(returned):
        # As numbers at once: `count` of them, each in an axis of its own or not.
        flat = returned.ndim > 0 and len(returned) == count == math.prod(returned.shape)
        return returned.reshape(-1).tolist() if flat else returned
    # A mapping would give its keys, and a set drops what is equal.
    if isinstance(returned, (*_TEXTS, Mapping, Set)) and not isinstance(returned, KeysView):
        return returned
    return list(islice(returned, count + 1)) if isinstance(returned, Iterable) else returned


def _is_array(value: Any) -> bool:
    """Of numpy or of torch, or like those, none of which is imported for this."""
    return all(hasattr(type(value), name) for name in ("ndim", "shape", "reshape", "item", "tolist"))


def _fit_number(value: Any) -> float:
    # float32 is what scores are kept in: what it cannot hold is infinite there.
    number = math.inf
    with suppress(*WHAT_USER_CODE_RAISES):
        number = _FLOAT32.unpack(_FLOAT32.pack(_number(value)))[0]
    if not math.isfinite(number):
        raise Unfit(
            f"returned {_describe(value)} for",
            f"A reward is a finite number, or None where it does not apply.{_awaited(value)}",
        )
    return number


@singledispatch
def _fit(value: Any) -> Score:
    return _fit_number(value)


@_fit.register
def _(value: None) -> Score:
    return None


@_fit.register(dict)
def _(value: dict[Any, Any]) -> Score:
    if not value or not all(isinstance(key, str) and key.strip() and key.isprintable() for key in value):
        raise Unfit(
            f"returned {_describe(value)} for",
            "A reward is a finite number, or None where it does not apply, or a dictionary of such numbers by name.",
        )
    if taken := [key for key in _TAKEN if key in value]:
        raise Unfit(f"returned a part called `{taken[0]}` for", "That is the name of a metric of ours: rename it.")
    return {key: None if part is None else _fit_number(part) for key, part in value.items()}


@singledispatch
def _number(value: Any) -> float:
    """A value as Python's own number, whatever it is held in."""
    # item() takes one element in any number of axes, and what it gives is not rounded to its own type when compared.
    return float(getattr(value, "item", partial(_same, value))())


@_number.register(str)
@_number.register(bytes)
@_number.register(bytearray)
def _(value: Any) -> float:
    raise TypeError("float() would read the number in a text")


def _same(value: Any) -> Any:
    return value


@singledispatch
def paid(score: Any) -> float:
    """What a score pays; NaN where there is none, or where it does not apply."""
    return math.nan


@paid.register
def _(score: float) -> float:
    return score


@paid.register(dict)
def _(score: dict[str, Number]) -> float:
    if THE_SCORE in score:
        return paid(score[THE_SCORE])
    known = [number for number in score.values() if number is not None]
    return sum(known) if known else math.nan


@singledispatch
def parts_of(score: Any) -> dict[str, Number]:
    """The numbers by name that a score is made of; none of a plain one."""
    return {}


@parts_of.register(dict)
def _(score: dict[str, Number]) -> dict[str, Number]:
    return score


def _awaited(value: Any) -> str:
    """Advice about a coroutine that nobody awaits, which is closed without a warning; empty about anything else."""
    if not inspect.isawaitable(value):
        return ""
    if inspect.iscoroutine(value):
        value.close()
    return " It must be awaited: write the reward, and what is wrapped around it, as `async def`."


def _describe(returned: Any) -> str:
    has_length = isinstance(returned, Sized) and getattr(returned, "ndim", 1) != 0
    with suppress(*WHAT_USER_CODE_RAISES):  # an object's length is its class's own code
        return f"{shown(returned)} ({type(returned).__name__}{f' of length {len(returned)}' if has_length else ''})"
    return f"{shown(returned)} ({type(returned).__name__})"


def shown(value: Any) -> str:
    """A value in at most 60 characters."""
    try:
        return repr(value)[:60]
    except WHAT_USER_CODE_RAISES:  # of integers with many thousand digits Python's own error
        return "something that cannot be shown"
