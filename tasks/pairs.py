"""Pairs: rows with `chosen` and `rejected`, for `python -m grpo.dpo --data FILE`.

Each is a text or chat messages. The prompt is the column `prompt`, or what both begin with.
"""

from grpo import Config, Task, UserError
from grpo.data import read_rows
from grpo.pairs import common_prompt


def rows(split, data):
    return read_rows(data, split)


def prompt(row):
    """A question that is a text may stand beside whole chats, which say it themselves, or beside the answers alone."""
    if lacking := [name for name in ("chosen", "rejected") if row.get(name) is None]:
        raise UserError(
            f"Rows of pairs have `chosen` and `rejected`, and `prompt` or not; these have {', '.join(row)}. "
            f"--columns {lacking[0]}=NAME says which column is meant."
        )
    asked, sides = row.get("prompt"), (row["chosen"], row["rejected"])
    if not asked:
        return common_prompt(*sides)
    if isinstance(asked, str) and all(isinstance(side, list) for side in sides):
        answers_alone = all(side and side[0].get("role") == "assistant" for side in sides)
        return [{"role": "user", "content": asked}] if answers_alone else common_prompt(*sides)
    return asked


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
