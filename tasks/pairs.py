"""Pairs: rows with `chosen` and `rejected`, for `python -m grpo.dpo --data FILE`.

Each is a text or chat messages. What they answer is the column `prompt`, a chat, a question, or what both begin with,
in the forms of grpo/conversations.py; `tools` and `chat_template_kwargs` are for the chat template.
"""

from grpo import Config, Task
from grpo.conversations import asked_of_pair, tools_in
from grpo.data import read_rows


def rows(split, data):
    return read_rows(data, split)


task = Task(
    name="pairs",
    rows=rows,
    prompt=asked_of_pair,
    rewards={},
    gold=None,
    solved=None,
    data="pairs.jsonl",
    config=Config(model="Qwen/Qwen2.5-1.5B-Instruct"),
    chat_template_kwargs=lambda row: row.get("chat_template_kwargs") or {},
    tools=tools_in,
)
