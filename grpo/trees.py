"""Trees: rows that are single messages, each a reply to another, as chats. Knows nothing of what becomes of a chat.

joined(rows)     of each tree the path of the replies that are ranked best, as a row of conversations.py's forms

OpenAssistant's (oasst1, oasst2; arXiv 2304.07327): `message_id`, `parent_id`, `role`, `text`; `rank`, 0 the best, and
`deleted` where there are such.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from grpo.task import Row

NAMED = {"message_id", "parent_id", "role", "text"}


def joined(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows as chats, up to the last answer of each, as those of openassistant-guanaco were chosen; rows that are no
    messages of trees as they are."""
    first = next(iter(rows), None)
    if not (isinstance(first, dict) and first.keys() >= NAMED):
        return rows
    replies: dict[Any, list[Row]] = {}
    for row in rows:
        if not _is_deleted(row):
            replies.setdefault(row.get("parent_id") or None, []).append(row)
    paths = [_best_path(root, replies) for root in replies.pop(None, [])]
    return [{"messages": [_said(row) for row in path]} for path in paths if path]


def _best_path(root: Row, replies: dict[Any, list[Row]]) -> list[Row]:
    """From the first message of a tree on the reply of the lowest rank, or where none has one the first; up to the last
    that is the assistant's. Takes the replies away, so that a circle ends."""
    path = [root]
    while following := replies.pop(path[-1].get("message_id"), []):
        path.append(min(following, key=_rank))
    while path and path[-1].get("role") != "assistant":
        path.pop()
    return path


def _said(row: Row) -> dict[str, Any]:
    return {"from": row.get("role"), "value": row.get("text")}


def _is_deleted(row: Row) -> bool:
    return str(row.get("deleted")).lower() in ("true", "1", "1.0")  # as CSV and tables of numbers have it


def _rank(row: Row) -> float:
    """Infinity where there is none."""
    try:
        rank = float(row.get("rank"))  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return math.inf
    return math.inf if math.isnan(rank) else rank
