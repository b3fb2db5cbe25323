"""A task of one row and a configuration that makes its questions in a moment, which several tests share. No test."""

from grpo import Config, Task

SMALL_CONFIG = Config(model="embedded", base="float32", device="cpu", eval_prompts=5, max_completion_tokens=64)


def exact(completion, answer):
    return float(completion == answer)


def task_with(**fields):
    """A small task that differs from a good one in these fields."""
    good = dict(
        name="small",
        rows=lambda split, data: [{"question": "1 + 1?", "answer": "2"}],
        prompt=lambda row: [{"role": "user", "content": row["question"]}],
        rewards={exact: 1.0},
        gold="{answer}",
        solved=("exact", 1.0),
        data="embedded",
    )
    return Task(**(good | fields))
