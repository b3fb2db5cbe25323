"""Rewards: the ones that ship, and the machinery that calls any function as one."""

from grpo.rewards.correctness import correctness, final_answer, parse_number, same_answer
from grpo.rewards.integer import integer
from grpo.rewards.preflight import Preflight, RewardCheck, preflight, preflight_table
from grpo.rewards.scoring import Reward, build_rewards, resolve_reward, score
from grpo.rewards.text import exact_match, similarity
from grpo.rewards.xml_format import extract_answer, soft_xml, strict_xml, xml_count

__all__ = [
    "Preflight",
    "Reward",
    "RewardCheck",
    "build_rewards",
    "correctness",
    "exact_match",
    "extract_answer",
    "final_answer",
    "integer",
    "parse_number",
    "preflight",
    "preflight_table",
    "resolve_reward",
    "same_answer",
    "score",
    "similarity",
    "soft_xml",
    "strict_xml",
    "xml_count",
]
