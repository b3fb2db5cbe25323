"""The task of benchmarks/learning.py: tasks/gsm8k.py, asked with the word problems of the generator's harder levels.

Knows nothing of the model. Prompt, rewards and gold answer are gsm8k's own.
"""

from dataclasses import replace
from pathlib import Path

from grpo import Config
from grpo.embedded import word_problems
from grpo.task import load_task

gsm8k = load_task(Path(__file__).parents[1] / "tasks" / "gsm8k.py")
LEVELS = (2, 3)


def rows(split, data, count=4000):
    """The levels in turn, whatever `data` says, so that the first rows are as hard as all of them."""
    by_level = [problems(split, count // len(LEVELS), seed=0, level=level) for level in LEVELS]
    return [row for turn in zip(*by_level, strict=True) for row in turn]


def problems(split, count, seed, level):
    """`count` rows with the columns of the gsm8k task."""
    for problem in word_problems(split, count, seed, level):
        solution, answer = problem["answer"].rsplit("\n#### ", 1)
        yield {"question": problem["question"], "solution": solution, "answer": answer}


task = replace(
    gsm8k,
    name="learning",
    rows=rows,
    data="embedded",
    config=Config(
        base="nf4",
        steps=80,
        prompts_per_step=16,
        group_size=16,
        max_completion_tokens=160,
        learning_rate=5e-4,
        warmup_steps=4,
        eval_prompts=256,
        eval_every=10,
    ),
    embedded={},
)
