"""Values: what a reward may return, and what it is taken for. Knows nothing of how rewards are called.

As in TRL, a batch is anything that gives S values in order, and a value is None or whatever Python makes a number of;
here it must be a finite one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, KeysView, Mapping, Set, Sized
from contextlib import suppress
from functools import singledispatch
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo.errors import WHAT_USER_CODE_RAISES, UserError
from grpo.rewards.samples import Samples, where

_ARRAYS = (np.ndarray, Tensor)
_TEXTS = (str, bytes, bytearray)


def listed(name: str, returned: Any, samples: Samples) -> list[Any]:
    """What a reward returned for a batch, as a list of S values.

    Called where the reward is, because a generator is the reward's own code; of one without end, one value too many.

    Raises:
        UserError: it is no S values in order.
    """
    num_samples = len(samples.completions)
    values = _in_order(returned, num_samples)
    if not (isinstance(values, list) and len(values) == num_samples):
        raise UserError(
            f"Reward `{name}` returned {_describe(values)} for {where(samples, slice(None))}. A function of "
            f"`completions` returns a list with one number (or None) for each, here {num_samples}.{_awaited(returned)}"
        )
    return values


def _in_order(returned: Any, num_samples: int) -> Any:
    if isinstance(returned, _ARRAYS):
        # As numbers at once: S of them, each in an axis of its own or not.
        flat = returned.ndim > 0 and len(returned) == num_samples == math.prod(returned.shape)
        return returned.reshape(-1).tolist() if flat else returned
    # A mapping would give its keys, and a set drops what is equal.
    if isinstance(returned, (*_TEXTS, Mapping, Set)) and not isinstance(returned, KeysView):
        return returned
    return list(islice(returned, num_samples + 1)) if isinstance(returned, Iterable) else returned


def checked_values(name: str, returned: list[Any], samples: Samples) -> Tensor:
    """S values that a reward returned, as [S] float32 with NaN for None.

    Raises:
        UserError: one is no number, or none that is finite in float32.
    """
    part = torch.tensor([_as_float(value) for value in returned], dtype=torch.float32)
    applies = torch.tensor([value is not None for value in returned])
    wrong = (applies & ~part.isfinite()).nonzero().flatten().tolist()
    if wrong:
        value, scored = returned[wrong[0]], slice(wrong[0], wrong[0] + 1)
        raise UserError(
            f"Reward `{name}` returned {_describe(value)} for {where(samples, scored)}. A reward is a finite number, "
            f"or None where it does not apply.{_awaited(value)}"
        )
    return part


def _as_float(value: Any) -> float:
    """A value as Python's own number, whatever it is held in; infinity for what is none."""
    with suppress(*WHAT_USER_CODE_RAISES):  # how it becomes a number is its class's own code
        return _to_float(value)
    return math.inf


_to_float = singledispatch(float)


@_to_float.register
def _(value: None) -> float:
    return math.nan


@_to_float.register(str)
@_to_float.register(bytes)
@_to_float.register(bytearray)
def _(value: Any) -> float:
    raise TypeError("float() would read the number in a text")


@_to_float.register(Tensor)
@_to_float.register(np.ndarray)
@_to_float.register(np.generic)
def _(value: Any) -> float:
    # item() takes one element in any number of axes, and what it gives is not rounded to its own type when compared.
    return float(value.item())


def _awaited(value: Any) -> str:
    """Advice about a coroutine that nobody awaits, which is closed without a warning; empty about anything else."""
    if not inspect.isawaitable(value):
        return ""
    if inspect.iscoroutine(value):
        value.close()
    return " It must be awaited: write the reward, and what is wrapped around it, as `async def`."


def _describe(returned: Any) -> str:
    has_length = isinstance(returned, Sized) and not (isinstance(returned, _ARRAYS) and returned.ndim == 0)
    with suppress(*WHAT_USER_CODE_RAISES):  # an object's length is its class's own code
        return f"{shown(returned)} ({type(returned).__name__}{f' of length {len(returned)}' if has_length else ''})"
    return f"{shown(returned)} ({type(returned).__name__})"


def shown(value: Any) -> str:
    """A value in at most 60 characters."""
    try:
        return repr(value)[:60]
    except WHAT_USER_CODE_RAISES:  # of integers with many thousand digits Python's own error
        return "something that cannot be shown"
