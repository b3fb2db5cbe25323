"""Messages: rows that say all themselves, for `python -m grpo.sft --data FILE`.

A row has a chat that ends with the assistant's answer, `prompt` and `completion`, or `instruction` and `output`, in the
forms of grpo/conversations.py; and `tools` and `chat_template_kwargs` where the chat template reads them.
"""

from grpo import Config, Task
from grpo.conversations import asked_in, tools_in
from grpo.data import read_rows
from grpo.trees import joined


def rows(split, data):
    return joined(read_rows(data, split))


task = Task(
    name="messages",
    rows=rows,
    prompt=asked_in,
    rewards={},
    gold=None,
    solved=None,
    data="messages.jsonl",
    config=Config(model="Qwen/Qwen2.5-1.5B-Instruct"),
    chat_template_kwargs=lambda row: row.get("chat_template_kwargs") or {},
    tools=tools_in,
)
