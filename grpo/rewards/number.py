r"""The right number, wherever the completion states it. Knows nothing of fractions or formulas: those are `math`'s.

The two ways of verl's gsm8k score: strict, where only a marked answer counts, and flexible, where the last number does
as well. Numbers are compared by value, where verl compares them as text.
"""

from __future__ import annotations

import re
from decimal import Decimal

from grpo.rewards.correctness import parse_number
from grpo.rewards.gold import answer_text
from grpo.rewards.math_text import gold_of
from grpo.rewards.stated import behind_hashes, behind_words, in_answer_tags, last_box, visible

_TAIL = 2000  # characters from the end in which the last number is looked for
_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|\\[,!]|,\\!)(?=\d{3})", re.ASCII)  # 1{,}080 and 1\,080 in LaTeX
_CURRENCY = "$€£¥₹"
_NOT_OF_A_NUMBER = re.compile(rf"[\\{_CURRENCY}]")
_SIGNS = "-+\N{MINUS SIGN}"
_NUMBER = re.compile(
    rf"(?<![\w.])[{_SIGNS}]?(?:\\?[{_CURRENCY}][ ]?[{_SIGNS}]?)?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))",
    re.ASCII,
)


def number(completion: str, answer: object) -> float:
    r"""1.0 if the number that the completion gives is the gold answer's, else 0.

    It is, in this order: the one number in the last <answer> block, in the last \boxed{}, behind the last `####`; the
    first behind the last "the answer is"; the last one of the text. What stands before `</think>` does not count if
    anything stands behind it. Dollar and percent signs, units and commas between thousands are no part of it.

    `answer` is a number, or a solution that states it (`#### n`, \boxed{}, "A: n"); a ValueError if it is neither.

    Range: 0 or 1.

    >>> number("That makes 24 + 48 = 72 clips.", "72"), number("I counted 72 of 80.", "72")
    (1.0, 0.0)
    """
    gold, text = _gold(answer), visible(completion)
    found = _marked(text)
    if found is None and (line := behind_words(text)):
        found = next(iter(_numbers(line)), None)
    if found is None:
        found = next(reversed(_numbers(text[-_TAIL:])), None)
    return float(found == gold)


def strict_number(completion: str, answer: object) -> float:
    r"""1.0 if the completion marks its answer, and the number there is the gold answer's; else 0.

    A mark is an <answer> block, \boxed{}, or `####`; the last one counts, and has exactly one number in it.

    Range: 0 or 1.

    >>> strict_number("24 + 48 = 72\n#### 72", "72"), strict_number("24 + 48 = 72", "72")
    (1.0, 0.0)
    """
    return float(_marked(visible(completion)) == _gold(answer))


def _gold(answer: object) -> Decimal:
    text = gold_of(answer_text(answer))
    values = _numbers(text)
    value = parse_number(text)
    if value is None and len(values) != 1:
        raise ValueError(f"the gold answer {text!r:.80} is no number, which this reward compares with")
    return values[0] if value is None else value


def _marked(text: str) -> Decimal | None:
    """The number of a marked answer; None where nothing is marked, or what is marked is no single number."""
    marked = in_answer_tags(text)
    inside = last_box(marked or text)
    marked = inside or marked or behind_hashes(text)
    values = _numbers(behind_hashes(marked) or marked) if marked else []
    return values[0] if len(values) == 1 else None


def _numbers(text: str) -> list[Decimal]:
    """The numbers of a text, in order; a sign belongs to one where no number stands before it (3 - 2 has 3 and 2)."""
    text = _SEPARATOR.sub("", text)
    found = []
    for match in _NUMBER.finditer(text):
        written = match[0]
        before = text[: match.start()].rstrip()[-1:]
        if before.isdigit() or before == ")":
            written = written.lstrip(f"{_SIGNS} ")
        value = parse_number(_NOT_OF_A_NUMBER.sub("", written))
        if value is not None:
            found.append(value)
    return found
