"""Names of rewards and tasks, short enough for a header or a legend. Knows nothing of what they name.

A name is cut at its words before a word is cut, and a word is marked with a point where it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations, pairwise

from rich.cells import cell_len, set_cell_size

from grpo.terminal import plain

_BETWEEN_WORDS = re.compile(r"[_\s-]+|(?<=[a-z])(?=[A-Z])|(?<=\w)[.:/]+(?=[^\W\d])")
_LEFT_OUT = ".."
_MOST_WORDS = 8


def in_lines(name: str, widest: int, comfortable: int, fewest: int, most: int) -> tuple[str, ...]:
    """A name on `fewest` to `most` lines of at most `widest` cells, few lines if `comfortable` cells are enough for
    them: words whole where they fit, the middle left out where they are too many."""
    words = [shortened(word, widest) for word in _BETWEEN_WORDS.split(plain(name)) if word] or ["?"]
    for kept in range(min(len(words), _MOST_WORDS), 1, -1):
        left = [] if kept == len(words) else [_LEFT_OUT]
        laid = _laid([*words[: -(-kept // 2)], *left, *words[len(words) - kept // 2 :]], comfortable, fewest, most)
        if _width(laid) <= widest:
            return laid
    return (words[0],)


def told_apart(headers: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The same, with its number instead of the last line where a header stands for several names."""
    return [
        (*header[: max(1, len(header) - 1)], f"#{number}") if headers.count(header) > 1 else header
        for number, header in enumerate(headers, 1)
    ]


def shortened(text: str, widest: int) -> str:
    """Text of at most `widest` cells, with a point where it is cut."""
    return text if cell_len(text) <= widest else set_cell_size(text, widest - 1).rstrip() + "."


def _laid(words: list[str], comfortable: int, fewest: int, most: int) -> tuple[str, ...]:
    """Words on the fewest lines that are comfortably narrow, else the narrowest."""
    tries = [_balanced(words, min(lines, len(words))) for lines in range(fewest, most + 1)]
    return next((laid for laid in tries if _width(laid) <= comfortable), min(tries, key=_width))


def _balanced(words: list[str], lines: int) -> tuple[str, ...]:
    """The narrowest way to put the words, in their order, on so many lines."""
    ends = ([0, *cuts, len(words)] for cuts in combinations(range(1, len(words)), lines - 1))
    return min((tuple(" ".join(words[a:b]) for a, b in pairwise(e)) for e in ends), key=_width)


def _width(lines: tuple[str, ...]) -> int:
    return max(map(cell_len, lines))
