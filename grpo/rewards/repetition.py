"""A penalty of repeated phrases. Knows nothing of what they say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from grpo.errors import UserError

# Words; where a script has none between spaces (Chinese, Japanese, Thai), its characters.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]"
)


def repetition_penalty(words: int = 3) -> RepetitionPenalty:
    """A reward of minus the share of repeated phrases of so many words, to be given to a Task.

    Open-R1's `get_repetition_penalty_reward(ngram_size, max_penalty)`; where the maximal penalty is not -1, it is the
    weight in the task.

    Range: -1 to 0.

    >>> twos = repetition_penalty(words=2)
    >>> twos("one two one two"), twos("one two three")
    (-0.3333333333333333, 0.0)
    """
    if words < 1:
        raise UserError(f"repetition_penalty() was given phrases of {words} words. It takes 1 or more.")

    return RepetitionPenalty(words)


@dataclass(eq=False)
class RepetitionPenalty:
    """Minus the share of phrases of so many words that have occurred before.

    Range: -1 to 0.
    """

    words: int

    def __post_init__(self) -> None:
        self.__name__ = "repetition_penalty"

    def __call__(self, completion: str) -> float:
        return 0.0 - _share_repeated(completion, self.words)


def repetition(completion: str) -> float:
    """Minus the share of phrases of three words that have occurred before, whatever their case; 0 below three words.

    Signs are words too, and so is each character of a script without spaces.

    Range: -1 to 0.

    >>> repetition("so it is so it is so it is so"), repetition("so it is")
    (-0.625, 0.0)
    """
    return 0.0 - _share_repeated(completion, 3)


def _share_repeated(text: str, words: int) -> float:
    found = _WORD.findall(text.lower())
    phrases = list(zip(*(found[start:] for start in range(words)), strict=False))
    return (len(phrases) - len(set(phrases))) / len(phrases) if phrases else 0.0
