"""Answers are paid for being what most of their group say, right or wrong. For docs/report.md."""

from collections import Counter
from dataclasses import replace

from grpo.rewards import correctness, extract_answer
from grpo.task import load_task


def agrees(completions, group_size):
    answers = [extract_answer(text) for text in completions]
    groups = [answers[at : at + group_size] for at in range(0, len(answers), group_size)]
    favourites = [Counter(group).most_common(1)[0][0] for group in groups]
    return [float(answer == favourites[at // group_size]) for at, answer in enumerate(answers)]


task = replace(load_task("gsm8k"), name="agree-with-yourself", rewards={correctness: 0.0, agrees: 1.0})
