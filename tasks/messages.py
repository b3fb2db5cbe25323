"""Messages: rows that say all themselves, for `python -m grpo.sft --data FILE`.

A row has `messages`, a chat that ends with the assistant's answer, or `prompt` and `completion`, each a text or chat
messages; and `tools` and `chat_template_kwargs` where the chat template reads them.
"""

import json
import reprlib

from grpo import Config, Task, UserError
from grpo.data import read_rows


def rows(split, data):
    return read_rows(data, split)


def prompt(row):
    """All before the last message, which is what is taught."""
    row = {name: value for name, value in row.items() if value is not None}  # a column that other rows have
    if "prompt" in row and "completion" in row:
        is_chat = isinstance(row["completion"], list) and isinstance(row["prompt"], str)
        return [{"role": "user", "content": row["prompt"]}] if is_chat else row["prompt"]
    if "messages" not in row or "completion" in row:
        raise UserError(
            "Rows to learn from have `messages`, chats such as "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], or `prompt` and '
            f"`completion`; these have {', '.join(row)}. --columns prompt=NAME completion=NAME says which columns are "
            "meant."
        )
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"`messages` must be a list of chat messages, not {reprlib.repr(messages)}")
    return messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages


def tools(row):
    """Data sets that cannot hold a schema hold it as text."""
    given = row.get("tools") or []
    return json.loads(given) if isinstance(given, str) else given


task = Task(
    name="messages",
    rows=rows,
    prompt=prompt,
    rewards={},
    gold=None,
    solved=None,
    data="messages.jsonl",
    config=Config(model="Qwen/Qwen2.5-1.5B-Instruct"),
    chat_template_kwargs=lambda row: row.get("chat_template_kwargs") or {},
    tools=tools,
)
