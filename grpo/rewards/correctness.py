"""The right answer: is what stands inside <answer> the gold answer, as a number or else as text?

Knows nothing of units, fractions or formulas.
"""

from __future__ import annotations

import re
from decimal import Decimal

from grpo.rewards.gold import answer_text
from grpo.rewards.xml_format import extract_answer

_DIGITS = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+"
_NUMBER = re.compile(rf"([+-]?) ?\$? ?([+-]?) ?((?:{_DIGITS})(?:\.\d*)?|\.\d+)", re.ASCII)


def correctness(completion: str, answer: object) -> float:
    r"""2.0 if the text inside <answer> equals the gold answer, else 0. Nothing outside the tags counts.

    `answer` is the gold answer, or a GSM8K solution that ends in `#### n`. Numbers are compared by value,
    whatever their commas, dollar signs and spaces; anything else as text, white space collapsed. Empty tags are
    never right, and a gold answer that is missing or no single value raises a ValueError.

    Range: 0 or 2.

    >>> correctness("<reasoning>\n60 * 18\n</reasoning>\n<answer>\n$1,080.00\n</answer>\n", "1080")
    2.0
    >>> correctness("1080", "1080")
    0.0
    """
    gold = answer_text(final_answer(answer_text(answer)))
    return 2.0 * same_answer(extract_answer(completion) or "", gold)


def final_answer(solution: str) -> str:
    """What follows the last `####` of a GSM8K solution, stripped; the whole text where there is none.

    >>> final_answer("48 / 2 = 24 clips in May. #### 72")
    '72'
    """
    return solution.rpartition("####")[2].strip()


def same_answer(predicted: str, gold: str) -> bool:
    """Equal as numbers where both are numbers, else equal as text with white space collapsed; nothing equals nothing.

    >>> same_answer("1,080", "$ 1080"), same_answer("A  B", "A B"), same_answer("3,4", "34"), same_answer("", "")
    (True, True, False, False)
    """
    numbers = parse_number(predicted), parse_number(gold)
    if None in numbers:
        return bool(predicted.split()) and predicted.split() == gold.split()
    return numbers[0] == numbers[1]


def parse_number(text: str) -> Decimal | None:
    """The number that the text consists of, exactly; None where it is anything else.

    A sign, a dollar sign, commas or spaces between groups of three digits, and a final point are allowed.

    >>> parse_number("-$1,080.50"), parse_number("72."), parse_number("1,08"), parse_number("72 clips")
    (Decimal('-1080.50'), Decimal('72'), None, None)
    """
    match = _NUMBER.fullmatch(" ".join(text.split()).replace("\N{MINUS SIGN}", "-"))
    if match is None or (match[1] and match[2]):
        return None
    return Decimal(match[1] + match[2] + match[3].replace(",", "").replace(" ", ""))
