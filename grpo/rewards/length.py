"""Penalties of length: in proportion to the tokens, DAPO's near the limit, Kimi's and the cosine beside what is right.

Knows nothing of what a token says. A length is in sampled tokens, the stop token included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.errors import UserError

_TOKENS = 1000  # of `length`


def length(completion: str, completion_ids: Sequence[int]) -> float:
    """Minus the thousands of tokens of the completion, down to -1: 250 tokens pay -0.25.

    Its weight in the task says what a thousand tokens cost.

    Range: -1 to 0.

    >>> length("...", [0] * 250), length("...", [0] * 5000)
    (-0.25, -1.0)
    """
    return max(-1.0, -len(completion_ids) / _TOKENS)


def overlong(max_completion_tokens: int = 0, buffer: int = 0) -> Overlong:
    """DAPO's soft overlong punishment (Yu et al. 2025, arXiv 2503.14476, eq. 13), a reward to be given to a Task.

    With L = max_completion_tokens, the longest that a completion may get, and B = buffer: 0 up to L - B tokens, from
    there falling in a line to -1 at L, and -1 beyond. The paper has L = 20,480 and B = 4,096. TRL's
    `get_soft_overlong_punishment(max_completion_len, soft_punish_cache)`. Without L it is the run's own
    --max-completion-tokens, and without B a fifth of L, as in the paper.

    Range: -1 to 0.

    >>> penalty = overlong(100, 20)
    >>> [penalty("", [0] * tokens) for tokens in (80, 90, 100, 101)]
    [0.0, -0.5, -1.0, -1.0]
    """
    if not (max_completion_tokens == 0 <= buffer or 0 <= buffer <= max_completion_tokens):
        raise UserError(
            f"overlong() was given a buffer of {buffer} tokens and {max_completion_tokens} tokens at most. The buffer "
            "is a part of them: overlong(512, 128)."
        )

    return Overlong(max_completion_tokens, buffer)


@dataclass(eq=False)
class Overlong:
    """DAPO's soft overlong punishment.

    Range: -1 to 0.
    """

    # These are objects and no functions in functions, so that worker processes can be given them.
    max_completion_tokens: int
    buffer: int

    def __post_init__(self) -> None:
        self.__name__ = "overlong"

    def __call__(self, completion: str, completion_ids: Sequence[int], trainer_state: Any = None) -> float:
        longest = self.max_completion_tokens or getattr(trainer_state, "max_completion_tokens", 0)
        if not longest:  # nobody knows: a text that is scored without a run
            return 0.0
        buffer = min(self.buffer, longest) or max(1, longest // 5)
        over = len(completion_ids) - (longest - buffer)
        return -min(over / buffer, 1.0) if over > 0 else 0.0


def short_when_right(right: Callable[[str, Any], float], threshold: float = 1.0) -> ShortWhenRight:
    """Kimi k1.5's length reward (arXiv 2501.12599, section 2.3.3): of a group, short right ones are paid more.

    right(completion, answer) -> what a completion earns; right from `threshold` on: `short_when_right(math)`. With
    lambda = 0.5 - (tokens - shortest) / (longest - shortest) of its group, a right completion gets lambda, a wrong one
    min(0, lambda); a group of equal lengths gets 0. Open-R1's `len_reward`.

    Range: -0.5 to 0.5.

    >>> from grpo.rewards import exact_match
    >>> brief = short_when_right(exact_match)
    >>> brief(["a"] * 3, ["1", "1", "2"], [[0] * 10, [0] * 20, [0] * 10], ["1"] * 3)
    [0.5, -0.5, 0.0]
    """

    return ShortWhenRight(right, threshold)


@dataclass(eq=False)
class ShortWhenRight:
    """Of a group, short right completions are paid more.

    Range: -0.5 to 0.5.
    """

    right: Callable[[str, Any], float]
    threshold: float

    def __post_init__(self) -> None:
        self.__name__ = "short_when_right"

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[Any], answer: list[Any]
    ) -> list[float]:
        paid: list[float] = []
        for start, end in _groups(prompts):
            tokens = [len(ids) for ids in completion_ids[start:end]]
            shortest, spread = min(tokens), max(tokens) - min(tokens)
            for index in range(start, end):
                value = 0.5 - (tokens[index - start] - shortest) / spread if spread else 0.0
                is_right = self.right(_text(completions[index]), answer[index]) >= self.threshold
                paid.append(value if is_right else min(0.0, value))
        return paid


def cosine(right: Callable[[str, Any], float], max_completion_tokens: int, threshold: float = 1.0) -> Cosine:
    """The cosine length reward (Yeo et al. 2025, arXiv 2502.03373): right and short pays most, wrong and short least.

    right(completion, answer) -> what a completion earns; right from `threshold` on. With t = tokens /
    max_completion_tokens (at most 1), a right completion gets from 1.0 (t = 0) to 0.5 (t = 1), a wrong one from -1.0 to
    -0.5, along half a cosine. Open-R1's `get_cosine_scaled_reward` with its default values.

    Range: -1 to 1.

    >>> from grpo.rewards import exact_match
    >>> scaled = cosine(exact_match, 100)
    >>> scaled("1", [], "1"), scaled("1", [0] * 50, "1"), scaled("2", [0] * 100, "1")
    (1.0, 0.75, -0.5)
    """
    if max_completion_tokens <= 0:
        raise UserError(f"cosine() was given {max_completion_tokens} tokens at most. It takes 1 or more.")

    return Cosine(right, max_completion_tokens, threshold)


@dataclass(eq=False)
class Cosine:
    """Right and short pays most, wrong and short least.

    Range: -1 to 1.
    """

    right: Callable[[str, Any], float]
    max_completion_tokens: int
    threshold: float

    def __post_init__(self) -> None:
        self.__name__ = "cosine"

    def __call__(self, completion: str, completion_ids: Sequence[int], answer: Any) -> float:
        share = min(1.0, len(completion_ids) / self.max_completion_tokens)
        fallen = 0.25 * (1.0 - math.cos(math.pi * share))  # 0 to 0.5
        is_right = self.right(completion, answer) >= self.threshold
        return round(1.0 - fallen if is_right else fallen - 1.0, 12)


def _groups(prompts: list[Any]) -> list[tuple[int, int]]:
    """Where each group begins and ends: completions of one prompt follow each other."""
    starts = [index for index in range(len(prompts)) if index == 0 or prompts[index] != prompts[index - 1]]
    return list(zip(starts, [*starts[1:], len(prompts)], strict=True))


def _text(completion: Any) -> str:
    """A completion of a batch, text or TRL's list of messages, as text."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
