"""Rewards: the ones that ship, and the machinery that calls any function as one.

The machinery comes with torch, which a task file has no use for, so it is imported when it is first asked for. What
tries the rewards before a run is in `grpo.rewards.preflight`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grpo.rewards.choice import choice
from grpo.rewards.coding import code, code_share
from grpo.rewards.correctness import correctness, final_answer, parse_number, same_answer
from grpo.rewards.integer import integer
from grpo.rewards.judge import judge
from grpo.rewards.length import cosine, length, overlong, short_when_right
from grpo.rewards.mathematics import math
from grpo.rewards.number import number, strict_number
from grpo.rewards.options import reward
from grpo.rewards.repetition import repetition, repetition_penalty
from grpo.rewards.tags import tags, think_answer, think_format
from grpo.rewards.text import exact_match, similarity
from grpo.rewards.xml_format import XML_FORMAT, extract_answer, soft_xml, strict_xml, xml_count

if TYPE_CHECKING:
    from grpo.rewards.names import resolve_reward
    from grpo.rewards.scoring import Reward, Scorer, build_rewards, score

_LATE = {"resolve_reward": "names"} | dict.fromkeys(("Reward", "Scorer", "build_rewards", "score"), "scoring")

__all__ = [
    "XML_FORMAT",
    "Reward",
    "Scorer",
    "build_rewards",
    "choice",
    "code",
    "code_share",
    "correctness",
    "cosine",
    "exact_match",
    "extract_answer",
    "final_answer",
    "integer",
    "judge",
    "length",
    "math",
    "number",
    "overlong",
    "parse_number",
    "repetition",
    "repetition_penalty",
    "resolve_reward",
    "reward",
    "same_answer",
    "score",
    "short_when_right",
    "similarity",
    "soft_xml",
    "strict_number",
    "strict_xml",
    "tags",
    "think_answer",
    "think_format",
    "xml_count",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"grpo.rewards.{_LATE[name]}"), name)
