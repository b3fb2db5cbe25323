"""Gold answers: what a reward may compare a completion with. Knows nothing of how they are compared."""

from __future__ import annotations

import math
import reprlib
from decimal import Decimal
from numbers import Real
from typing import Any


def answer_text(answer: Any) -> str:
    """A gold answer as text.

    Raises:
        ValueError: it is missing, blank, or neither text nor a finite number: as text it would be "None" or "[72]",
            and a completion that says so would be right.

    >>> answer_text("72"), answer_text(72.0)
    ('72', '72.0')
    """
    if why := _why_not_comparable(answer):
        raise ValueError(f"the gold answer is {why}; it must be text that is not blank, or a finite number")
    return str(answer)


def _why_not_comparable(answer: Any) -> str:
    """Why a value cannot be a gold answer, in words; empty if it can."""
    if isinstance(answer, str):
        return "" if answer.strip() else f"{answer!r:.80}, which is blank"
    if not isinstance(answer, (Real, Decimal)):
        return f"{reprlib.repr(answer)} ({type(answer).__name__})"
    # A comparison, because isfinite() of a large integer raises; NaN compares false.
    size: Any = abs(answer)
    return "" if size < math.inf else str(answer)
