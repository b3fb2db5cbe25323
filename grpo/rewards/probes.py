r"""Probes: a gold answer as it is, in other clothes, damaged, and what somebody would say who wants pay without work.

Knows nothing of rewards. A probe is a name and a completion.

    probes_of(material, ...)     of one row: gold, empty, truncated, shuffled, and the others that are asked for
    tricks(golds, ...)           texts that are the same for every row
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.rewards.scoring import cut_off, unsampled
from grpo.types import Completion

GOLD = "gold"
BASE = (GOLD, "empty", "truncated", "shuffled")
SAME = (
    "with a new line",
    "with spaces",
    "with a period",
    "twice",
    r"in \boxed{}",
    "in full-width digits",
    "in Arabic digits",
)
WRONG = ("empty", "truncated", "shuffled", "another row's gold", "the prompt")
TRICK = "trick: "  # how the names of tricks begin
_FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")
_ARABIC = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
_PLAIN_TRICKS = (
    "0",
    "1",
    "A",
    "yes",
    r"\boxed{0}",
    "The answer is 0.",
    "I don't know.",
    " ".join(map(str, range(101))),
)

Probe = tuple[str, Completion]


@dataclass(frozen=True)
class Material:
    """What the probes of a row are made of."""

    asked: str  # the prompt's text
    gold: str
    answer: str | None  # what the gold completion answers, where that is known
    other: str | None  # a gold completion with another answer, where one is known


def probes_of(material: Material, tokenizer: Any, shuffle: random.Random, others: Iterable[str]) -> list[Probe]:
    """The four of BASE, and those of `others` that can be made of this row."""
    whole = unsampled(material.gold, tokenizer)
    made = [
        (GOLD, whole),
        ("empty", unsampled("", tokenizer)),
        ("truncated", cut_off(whole, tokenizer)),
        ("shuffled", unsampled(_shuffled(material.gold, shuffle), tokenizer)),
    ]
    texts = ((name, _text(material, name)) for name in others)
    return made + [(name, unsampled(text, tokenizer)) for name, text in texts if text is not None]


def _shuffled(gold: str, shuffle: random.Random) -> str:
    words = re.split(r"(\s+)", gold)  # words at even indices, the white space between them at odd ones
    shuffled = words[::2]
    shuffle.shuffle(shuffled)
    words[::2] = shuffled
    return "".join(words)


def _text(material: Material, name: str) -> str | None:
    """The text of a probe; None where this row has none."""
    if name.startswith(TRICK):
        return name.removeprefix(TRICK)
    gold, answer = material.gold, material.answer
    has_digits = bool(re.search(r"[0-9]", gold))
    texts: dict[str, str | None] = {
        "with a new line": f"{gold}\n",
        "with spaces": f"  {gold}  ",
        "with a period": f"{gold.rstrip()}.",
        "twice": f"{gold}\n{gold}",
        r"in \boxed{}": None if answer is None else f"The answer is $\\boxed{{{answer.strip()}}}$.",
        "in full-width digits": gold.translate(_FULL_WIDTH) if has_digits else None,
        "in Arabic digits": gold.translate(_ARABIC) if has_digits else None,
        "another row's gold": material.other,
        "the prompt": material.asked,
    }
    return texts[name]


def tricks(golds: Sequence[tuple[str, str | None]], filled: Callable[[str], str] | None) -> list[str]:
    """Names of probes that are the same text for every row. golds: completions, and what each answers.

    filled  a text -> the gold completion with it in the place of every column, as "" gives the empty tags
    """
    answers = [answer.strip() for _, answer in golds if answer and answer.strip()]
    usual = [answer for answer, _ in Counter(answers).most_common(1)]
    texts = [*usual, *_PLAIN_TRICKS]
    if filled:
        empty = filled("")
        texts += [empty, re.sub(r"\s+", "", empty), *(filled(text) for text in ("0", *usual))]
    return [TRICK + text for text in dict.fromkeys(texts) if text.strip()]


def in_turn(names: Sequence[str]) -> Callable[[int], list[str]]:
    """How many -> the next so many of the names, from the first again after the last."""
    position = 0

    def following(count: int) -> list[str]:
        nonlocal position
        taken = [names[(position + number) % len(names)] for number in range(min(count, len(names)))]
        position += count
        return taken

    return following


def materials(
    rows: Iterable[tuple[Any, str]], answer_of: Callable[[str], str | None]
) -> Iterator[tuple[Any, Material]]:
    """(prompt, gold) -> the same with what its probes are made of; another row's gold is of one of the rows before."""
    seen: dict[str | None, str] = {}  # answer -> a gold completion; the last few
    for prompt, gold in rows:
        answer = answer_of(gold)
        key = gold if answer is None else answer
        yield prompt, Material(prompt.text, gold, answer, next((g for k, g in seen.items() if k != key), None))
        seen.pop(key, None)
        seen[key] = gold
        if len(seen) > 4:
            del seen[next(iter(seen))]
