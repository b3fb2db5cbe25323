"""Plain text against plain text, for tasks whose whole completion is the answer. Knows nothing of tags."""

from __future__ import annotations

from difflib import SequenceMatcher

from grpo.rewards.gold import answer_text


def exact_match(completion: str, answer: object) -> float:
    """1.0 if the completion is the answer, white space at both ends aside; else 0.

    Range: 0 or 1.

    >>> exact_match("olleh\\n", "olleh"), exact_match("Olleh", "olleh")
    (1.0, 0.0)
    """
    return float(completion.strip() == answer_text(answer).strip())


def similarity(completion: str, answer: object) -> float:
    """0 to 1: twice the matching characters over the characters of both texts (Ratcliff and Obershelp).

    Pays for getting closer, where `exact_match` is too rare to learn from.

    Range: 0 to 1.

    >>> similarity("olleh", "olleh"), similarity("oll", "olleh"), similarity("", "olleh")
    (1.0, 0.75, 0.0)
    """
    return SequenceMatcher(None, completion.strip(), answer_text(answer).strip(), autojunk=False).ratio()
