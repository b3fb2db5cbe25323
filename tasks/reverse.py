"""Reverse: write a few letters from the last to the first. The smallest task there is; learns in a minute."""

from random import Random
from zlib import crc32

from grpo import Config, Task
from grpo.rewards import XML_FORMAT, extract_answer, soft_xml

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def rows(split, data, count=2000):
    """Made up, whatever `data` says; the letters themselves decide which split they belong to."""
    random, seen = Random(f"reverse {split}"), set()
    while len(seen) < count:
        letters = " ".join(random.choices(ALPHABET, k=random.randint(3, 7)))
        is_test = crc32(letters.encode()) % 5 == 0
        if is_test == (split == "test") and letters not in seen:
            seen.add(letters)
            yield {"letters": letters, "answer": letters[::-1]}


def prompt(row):
    question = f"Write these letters from the last to the first: {row['letters']}"
    return [{"role": "system", "content": XML_FORMAT}, {"role": "user", "content": question}]


def reversed_letters(completion: str, answer: str) -> float:
    """1 for the right letters in the right order."""
    return float(_letters(completion) == answer.split())


def right_start(completion: str, answer: str) -> float:
    """The share of the letters that is right before the first mistake, in halves of a point."""
    given, expected = _letters(completion), answer.split()
    right = 0
    while right < min(len(given), len(expected)) and given[right] == expected[right]:
        right += 1
    return 0.5 * right / max(len(given), len(expected))


def _letters(completion):
    return (extract_answer(completion) or "").split()


task = Task(
    name="reverse",
    rows=rows,
    prompt=prompt,
    rewards={reversed_letters: 1.0, right_start: 1.0, soft_xml: 1.0},
    gold="<reasoning>\nFrom the last to the first.\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
    solved=("reversed_letters", 1.0),
    data="embedded",
    config=Config(model="Qwen/Qwen2.5-1.5B-Instruct", base="nf4", steps=60, max_completion_tokens=128),
    embedded={
        "model": "embedded",
        "data": "embedded",
        "base": "float32",
        "steps": 25,
        "learning_rate": 1e-3,
        "max_completion_tokens": 64,
    },
)
