r"""The right letter of a multiple choice, wherever the completion states it. Knows nothing of the options' texts."""

from __future__ import annotations

import re
import unicodedata

from grpo.rewards.gold import answer_text
from grpo.rewards.stated import behind_words, in_answer_tags, last_box, visible

_TAIL = 1000  # characters from the end in which a letter that stands alone is looked for
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|rm|bf)\b\s*")
_NOISE = re.compile(r"[\s*_`$()\[\]{}\\<>]+")
_JOINED = r"(?:\s*(?:,|/|&|\band\b|\bor\b)+\s*(?:and\s+|or\s+)?)"
_BARE = r"[(\[*_`$\\{\s]*([A-Za-z])(?![A-Za-z'’])[)\]*_`$\\}\s]*"
_LETTERS = re.compile(rf"{_BARE}(?:{_JOINED}{_BARE})*", re.I)
_LEADING = re.compile(r"(?:the\s+)?(?:correct\s+)?(?:options?|choices?|letters?|answers?)\b[\s:]*", re.I)
_WORD = re.compile(r"\s*(?:a\s+(?!is\b|and\b|or\b)[a-z]|I(?:\s+[a-z]|['’]))")  # "a cat" is no choice of A
_SENTENCE = re.compile(r"\s*A\s+(?!is\b|and\b|or\b)[a-z]")  # nor is a text that begins with "A cat"
_ALONE = re.compile(r"(?<![\w'’])[(\[*]*([A-Z])[)\]*]*(?=[.,:;)\]*]|\s*$|\s*\n)", re.M)
_ON_ITS_LINE = re.compile(r"^[ \t>*_(\[]*([A-Z])(?:[)\].:*_]+(?:[ \t].*)?|[ \t]*)$", re.M)
_NAMED = re.compile(
    r"(?i:\b(?:option|choice))\s+(?i:is\s*:?\s*)?(?:[*]*[(\[]([A-Za-z])[)\]]|[*]*([A-Z])\b)"
    r"|(?<!\w)[(*]*([A-Z])[)*]*\s+is\s+(?:the\s+)?(?:correct|right)\b"
)


def choice(completion: str, answer: object) -> float:
    r"""1.0 if the completion chooses the letter of the gold answer, else 0.

    The choice is what the last <answer> block says, else the last \boxed{}, else what stands behind the last "the
    answer is" or "Answer:", else the last "option B" or "B is correct", else the last line that begins with a letter
    ("B. Lima", "**B**"), else the last capital letter that stands alone. Where several letters are right (gold "A, C"),
    exactly these have to be chosen. What stands before `</think>` does not count if anything stands behind it.

    `answer` is a letter from A to Z or several, as `B`, `(B)`, `b.`, `B) Lima` or `A, C`; a ValueError if it is none.

    Range: 0 or 1.

    >>> choice("Kenya's capital is not in the list, so the answer is **(B)**.", "B"), choice("A or B", "B")
    (1.0, 0.0)
    """
    gold = _letters(answer_text(answer))
    if not gold:
        raise ValueError(f"the gold answer {answer!r:.80} begins with no letter of a choice, such as B or (B)")
    return float(_chosen(visible(completion)) == gold)


def _chosen(text: str) -> frozenset[str]:
    """The letters that a text chooses; none where it chooses nothing."""
    marked = in_answer_tags(text)
    if box := last_box(marked or text):
        return _letters(box)
    if marked:
        return _letters(marked) or _alone(marked)
    stated = behind_words(text)
    if stated and (letters := _letters(stated)):
        return letters
    tail = text[-_TAIL:]
    if named := _NAMED.findall(tail):
        return frozenset("".join(named[-1]).upper())
    is_line = "\n" not in tail.strip() and not _SENTENCE.match(tail)
    return (is_line and _letters(tail)) or _alone(tail)


def _alone(text: str) -> frozenset[str]:
    """The last letter that begins a line, else the last that stands alone."""
    of_lines = [letter for letter in _ON_ITS_LINE.findall(text) if letter != "I"]
    found = [found[1] for found in _ALONE.finditer(text) if found[1] != "I"]
    letters = [found[-1] for found in (of_lines, found) if found]
    return frozenset(letters[:1])


def _letters(text: str) -> frozenset[str]:
    """The letters that a text begins with: `(B)`, `B. Lima`, `A, C and D`, `AC`; none where it begins with a word."""
    text = unicodedata.normalize("NFKC", text)  # full-width brackets and letters
    text = _LEADING.sub("", _WRAPPED.sub("", text.strip()), count=1)
    together = _NOISE.sub("", text).rstrip(".")
    if 1 < len(together) <= 10 and together.isupper() and together.isalpha() and len(set(together)) == len(together):
        return frozenset(together) if list(together) == sorted(together) else frozenset()
    found = _LETTERS.match(text)
    if not found or _WORD.match(text):
        return frozenset()
    return frozenset(re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", found[0].upper()))
