r"""The right answer of a mathematical question, however it is written: math-verify and sympy behind a careful reading.

Knows nothing of time. math-verify's own time limits use signals, which do not work outside of the main thread and would
replace the run's own handlers, so they are off: the limit of a call is the caller's (`--reward-timeout`). What is known
to take for ever (towers of powers, factorials of large numbers) is not computed at all.

What decides, in this order: the same text; numbers by value; the letter of a choice; words; math-verify.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from decimal import Decimal
from functools import cache, lru_cache
from math import inf, log10
from typing import Any

from grpo.rewards.correctness import parse_number
from grpo.rewards.gold import answer_text
from grpo.rewards.math_text import answers, cleaned, gold_of, in_full, is_words, plain_of, without_unit, words_of

_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # 4 2 is not 42
_LONGEST = 400  # characters of a formula that is read; its parser takes seconds for more
_DEEPEST = 12  # brackets in brackets
_MOST_DIGITS = 5000.0  # of a number that is computed
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_PERCENT = re.compile(r"(.*\d)\s*\\%")
_OPTION = re.compile(r"\b(?i:option|choice|answer)\b\W*")
_LETTER = re.compile(r"\W*(?:\\\w+\{)?\W*([A-Z])(?:\s*[)}\].:,].*)?", re.S)
_UNDONE = re.compile(r"\\(?:sum|prod|i*int|oint|lim(?:sup|inf)?)(?![A-Za-z])")
_ALREADY_COMPUTED = re.compile(r"\\[dt]?binom\b.*\d{4}|\\(?:pmod|bmod|mod|gcd|lcm)\b.*\^|C\(\d{4}", re.S)


def math(completion: str, answer: object) -> float:
    r"""1.0 if the answer that the completion gives is mathematically the gold answer, else 0.

    Read is the last <answer> block, else the last \boxed{} (or all boxes of its paragraph together), else what stands
    behind `####`, "the answer is" or "**Answer:**", else the last formula or number. What stands before `</think>` does
    not count if anything stands behind it.

    Equal are 1/2, \frac12, 0.5 and 50\%; 1,080 and 1{,}080; x=3 and 3; (3, \infty) and x > 3; {1, 2} and 2, 1; \pm 3
    and 3, -3; 2\frac12 and 2.5. Units, degrees and currencies are no part of an answer. A number with a percent sign
    equals both itself and its hundredth. A decimal fraction equals a fraction if six digits agree. Words are compared
    as words. A sum, product, limit or integral that is left to be done equals only what is written as it is.

    `answer` is LaTeX or plain text, or a solution that states it: by \boxed{}, `#### n` or "Answer: n".

    Range: 0 or 1.

    >>> math(r"So the probability is $\boxed{\dfrac{1}{2}}$.", "0.5"), math("**Answer:** x = 7", "8")
    (1.0, 0.0)
    """
    gold = answer_text(gold_of(answer_text(answer)))
    return float(any(_is_right(reading, gold) for reading in answers(completion)))


def _is_right(reading: list[str], gold: str) -> bool:
    if len(reading) > 1:
        return same_mathematics(", ".join(map(cleaned, reading)), gold)
    return same_mathematics(reading[0], gold)


def same_mathematics(predicted: str, gold: str) -> bool:
    r"""Whether two answers are equal, the first one a model's.

    >>> same_mathematics(r"\frac{1}{2}", "1/2"), same_mathematics("x > 3", r"(3, \infty)"), same_mathematics("3", "4")
    (True, True, False)
    """
    if len(predicted) > 4 * _LONGEST:
        return False
    mine, right = cleaned(predicted), _cleaned_gold(gold)
    if not mine or not right:
        return False
    if _SPACE.sub("", mine) == _SPACE.sub("", right) or (plain_of(right) and plain_of(mine) == plain_of(right)):
        return True
    if (in_full(mine), in_full(right)) != (mine, right) and _as_numbers(in_full(mine), in_full(right)):
        return True  # else a million may be a unit: what was asked for may be counted in it
    for decide in (_as_numbers, _as_letters, _as_words):
        if (equal := decide(mine, right)) is not None:
            return equal
    return _as_formulas(without_unit(mine), without_unit(right)) or _beside_sign_of_near(mine, right)


_cleaned_gold = lru_cache(maxsize=4096)(cleaned)  # a group's completions have it in common


def _as_numbers(mine: str, right: str) -> bool | None:
    """By value, exactly; None where one of them is no plain number."""
    one, other = _number(mine), _number(right)
    if other is not None and one is None and is_words(mine):
        one = _number_among_words(mine)
    if one is None or other is None:
        return None
    (value, is_percent), (gold, gold_is_percent) = one, other
    if is_percent == gold_is_percent:
        return value == gold
    return value == gold or (value / 100 == gold if is_percent else value == gold / 100)


def _number(text: str) -> tuple[Decimal, bool] | None:
    """(value, whether it is percent) of a number with or without a unit."""
    percent = _PERCENT.fullmatch(text)
    value = parse_number(percent[1] if percent else without_unit(text))
    return None if value is None else (value, bool(percent))


def _number_among_words(text: str) -> tuple[Decimal, bool] | None:
    """The one number of "The answer is 42 apples"."""
    numbers = re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?![\w.]*\d)", words_of(text), re.ASCII)
    value = parse_number(numbers[0].rstrip(",")) if len(numbers) == 1 else None
    return None if value is None else (value, False)


def _as_letters(mine: str, right: str) -> bool | None:
    r"""The letter of a choice, where the gold answer is one: `B`, `(B)`, \text{(B)}; None where it is not, or may be a
    variable that the completion writes in a formula."""
    gold = re.fullmatch(r"\W*([A-Z])\W*", right)
    chosen = _LETTER.fullmatch(_OPTION.sub("", mine)) if gold else None
    return chosen[1] == gold[1] if gold and chosen else None


def _as_words(mine: str, right: str) -> bool | None:
    """Word by word, where one of them is words; None where both are formulas."""
    if not is_words(right):
        return False if is_words(mine) else None
    one, other = words_of(mine), words_of(right)
    return one == other or one.replace(" ", "") == other.replace(" ", "")


def _as_formulas(mine: str, right: str) -> bool:
    if _UNDONE.search(mine + right):
        return False
    parse, verify = _math_verify()
    one, other = _parsed(parse, _both_signs(mine)), _parsed_gold(parse, _both_signs(right))
    if not one or not other or not _is_small(one) or not _is_small(other):
        return False
    return bool(verify(list(other), list(one), allow_set_relation_comp=True, timeout_seconds=None))


def _both_signs(text: str) -> str:
    r"""A formula, or a list of some, with each \pm as the two that it stands for."""
    if not _PLUS_MINUS.search(text):
        return text
    listed = re.fullmatch(r"\\\{(.*)\\\}", text)
    written = []
    for element in _elements(listed[1] if listed else text):
        upper = element.replace(r"\pm", "+").replace(r"\mp", "-")
        lower = element.replace(r"\pm", "-").replace(r"\mp", "+")
        written += dict.fromkeys((upper, lower))
    return ", ".join(written)


def _elements(text: str) -> list[str]:
    """What stands between the commas that are in no bracket."""
    elements, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append(text[start:index])
            start = index + 1
    return [*elements, text[start:]]


def _beside_sign_of_near(mine: str, right: str) -> bool:
    r"""\sqrt2 \approx 1.414 is right if either side is."""
    sides = re.split(r"\\approx|\\simeq|≈", mine)
    return len(sides) > 1 and any(same_mathematics(side, right) for side in sides)


def _parsed(parse: Callable[..., Any], text: str) -> tuple[Any, ...]:
    """What math-verify makes of a formula: sympy's expression and the text; empty where it is none, or too long."""
    if len(text) > _LONGEST or _depth(text) > _DEEPEST or _ALREADY_COMPUTED.search(text):
        return ()
    return tuple(parse(f"${text}$", parsing_timeout=None))


_parsed_gold = lru_cache(maxsize=4096)(_parsed)


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


@cache
def _math_verify() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(parse, verify). Imported at the first call: sympy takes a second, and many tasks have no use for it."""
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader"):  # they warn that their time limits are off
        logging.getLogger(name).setLevel(logging.ERROR)
    return parse, verify


# ---- what would take for ever


def _is_small(parsed: tuple[Any, ...]) -> bool:
    return all(_digits(each) <= _MOST_DIGITS for each in parsed if not isinstance(each, str))


def _digits(expression: Any) -> float:
    """No less than the digits that the largest number in an expression has if it is computed; inf for what has parts
    that cannot be bounded. A power of several variables counts as what it is when it is multiplied out."""
    parts = [_digits(part) for part in getattr(expression, "args", ())]
    kind = type(expression).__name__
    if not parts:
        return _digits_of_number(expression)
    if kind in ("factorial", "factorial2", "binomial", "subfactorial", "gamma"):
        return 10.0 ** min(parts[0], 20.0) * max(parts[0], 1.0)
    if kind == "Pow":
        base, exponent = expression.args
        if not exponent.is_number:
            return max(parts)
        size = 10.0 ** min(parts[1], 20.0)
        return max(1.0, parts[0]) * size ** max(1, len(base.free_symbols) if base.args else 1)
    if kind == "Mul":
        return sum(parts)
    return max(parts) + 1.0


def _digits_of_number(expression: Any) -> float:
    if not getattr(expression, "is_number", False) or expression.is_infinite:
        return 0.0
    if getattr(expression, "is_Rational", False):
        size = max(abs(int(expression.p)), int(expression.q))
        return size.bit_length() * 0.30103
    try:
        return max(0.0, log10(abs(float(expression)) or 1.0))
    except (OverflowError, TypeError, ValueError):
        return inf
