"""Word problems in the style of GSM8K, made up from templates: the data of the embedded default.

Knows nothing of models, prompts or rewards. A problem is a row in the columns of the hub's `openai/gsm8k`:
`question`, and `answer` = one line of working a step, then `#### n`.

The situations are in `templates.py`. A calculation `[a * b = c]` of theirs is worked out and shown as `4 * 3 = 12`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from random import Random
from zlib import crc32

from grpo.embedded.templates import BOYS, GIRLS, TEMPLATES, THINGS, Template

LARGEST_RESULT = 200  # at level 1
GROWTH = 4  # how much larger numbers get from one level to the next
TEST_SHARE = 5  # one question in this many belongs to the test split


def word_problems(split: str, count: int = 1000, seed: int = 0, level: int = 1) -> list[dict[str, str]]:
    """`count` different problems; a pure function of its arguments, and the first ones do not depend on `count`.

    Level 1 has small numbers and 2 to 4 steps; each level above has numbers four times as large, and 3 or 4
    steps. No question is in both splits, whatever the seeds and levels: its own text decides where it belongs.

    >>> word_problems("train", count=1)[0].keys()
    dict_keys(['question', 'answer'])
    """
    if split not in ("train", "test"):
        raise ValueError(f'split is {split!r}; the word problems have "train" and "test".')
    return list(islice(_different(split, Random(f"{split} {seed} {level}"), level), count))


def split_of(question: str) -> str:
    """The split that a question belongs to, from its checksum alone."""
    return "test" if crc32(question.encode()) % TEST_SHARE == 0 else "train"


def _different(split: str, random: Random, level: int) -> Iterator[dict[str, str]]:
    templates = [template for template in TEMPLATES if len(template.steps) >= min(level + 1, 3)]
    seen = set()
    while True:
        row = fill(random.choice(templates), random, level)
        if split_of(row["question"]) == split and row["question"] not in seen:
            seen.add(row["question"])
            yield row


def fill(template: Template, random: Random, level: int = 1) -> dict[str, str]:
    """One problem from a template. Numbers are drawn again until every result is a whole number of at least 2."""
    words = _draw_words(random)
    phrasing = random.choice(template.phrasings)
    working = None
    while working is None:
        values = _draw_numbers(template, random, level)
        working = _work_out(template.steps, values, LARGEST_RESULT * GROWTH ** (level - 1))
    slots = {**words, **values}
    answer = list(values.values())[-1]
    solution = [step.format(**slots) for step in working]
    return {"question": phrasing.format(**slots), "answer": "\n".join([*solution, f"#### {answer}"])}


def _draw_words(random: Random) -> dict[str, str]:
    """A word for every slot: two people, the first one's pronouns, and two different things of each kind."""
    names = [(name, "he") for name in BOYS] + [(name, "she") for name in GIRLS]
    (name, pronoun), (friend, _) = random.sample(names, 2)
    his, him = {"he": ("his", "him"), "she": ("her", "her")}[pronoun]
    words = {"name": name, "friend": friend, "he": pronoun, "He": pronoun.capitalize(), "his": his, "him": him}
    for kind, things in THINGS.items():
        words[kind], words[f"other_{kind}"] = random.sample(things, 2)
    return words


def _draw_numbers(template: Template, random: Random, level: int) -> dict[str, int]:
    growth = GROWTH ** (level - 1)
    values = {slot: random.randint(low, high * growth) for slot, (low, high) in template.numbers.items()}
    return values | {slot: random.randint(*limits) for slot, limits in template.few.items()}


CALCULATION = re.compile(r"\[(\w+) ([-+*/]) (\w+) = (\w+)\]")


def _work_out(steps: tuple[str, ...], values: dict[str, int], largest: int) -> list[str] | None:
    """The steps with their calculations shown, `values` gaining the results; None when the numbers do not suit."""
    working = []
    for step in steps:
        match = CALCULATION.search(step)
        assert match is not None, f"a step without a calculation: {step}"
        left, sign, right, result = match.groups()
        a, b = (int(operand) if operand.isdigit() else values[operand] for operand in (left, right))
        if sign == "/" and a % b != 0:
            return None
        values[result] = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        if not 2 <= values[result] <= largest:
            return None
        working.append(step.replace(match.group(), f"{a} {sign} {b} = {values[result]}"))
    return working
