"""Long answers are paid beside right ones. For docs/report.md."""

from dataclasses import replace

from grpo.rewards import correctness
from grpo.task import load_task


def thorough(completion, completion_ids):
    return len(completion_ids) / 32


task = replace(load_task("gsm8k"), name="long-is-good", rewards={correctness: 0.05, thorough: 1.0})
