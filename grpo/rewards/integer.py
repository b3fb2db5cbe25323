"""A whole number inside <answer>, right or wrong. Knows nothing of the gold answer."""

from __future__ import annotations

from grpo.rewards.correctness import parse_number
from grpo.rewards.xml_format import extract_answer


def integer(completion: str) -> float:
    """0.5 if the text inside <answer> is a whole number, else 0.

    A sign, commas between thousands, a dollar sign and a zero fraction are allowed: `-5`, `1,080`, `$72.00`.

    Range: 0 or 0.5.

    >>> integer("<answer>-5</answer>"), integer("<answer>2.5</answer>"), integer("5")
    (0.5, 0.0, 0.0)
    """
    number = parse_number(extract_answer(completion) or "")
    return 0.5 * (number is not None and number == number.to_integral_value())
