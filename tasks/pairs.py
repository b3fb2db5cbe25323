"""Pairs: rows with `chosen` and `rejected`, for `python -m grpo.dpo --data FILE`.

Each is a text or chat messages. The prompt is the column `prompt`, or what both begin with.
"""

from grpo import Config, Task
from grpo.data import read_rows
from grpo.pairs import common_prompt


def rows(split, data):
    return read_rows(data, split)


def prompt(row):
    """Some sets have the question as a text beside whole chats: there the chats say it."""
    is_apart = row.get("prompt") and not (isinstance(row["prompt"], str) and isinstance(row["chosen"], list))
    return row["prompt"] if is_apart else common_prompt(row["chosen"], row["rejected"])


task = Task(
    name="pairs",
    rows=rows,
    prompt=prompt,
    rewards={},
    gold=None,
    solved=None,
    data="pairs.jsonl",
    config=Config(model="Qwen/Qwen2.5-1.5B-Instruct"),
)
