"""The names of the rewards that ship: what a task may name without saying where it is, and what others call them.

Knows nothing of the rewards themselves.

pyproject.toml offers them as entry points too. They stand here because an installation that was made before a reward
was added (`pip install -e`, then a newer commit) does not know of it.
"""

SHIPPED = (
    "correctness",
    "integer",
    "strict_xml",
    "soft_xml",
    "xml_count",
    "exact_match",
    "similarity",
    "math",
    "number",
    "strict_number",
    "choice",
    "code",
    "code_share",
    "think_format",
    "think_answer",
    "length",
    "repetition",
)

# Functions of grpo.rewards that give a reward where they are called, in a task file or in the name of a reward.
MAKERS = ("tags", "overlong", "short_when_right", "cosine", "repetition_penalty", "judge")

# What Open-R1, TRL, verl and the notebooks of Unsloth call these; docs/rewards.md has the table.
_OTHER_NAMES = {
    "math": "accuracy_reward reasoning_accuracy_reward math_verify math_dapo prime_math",
    "number": "gsm8k check_numbers check_answer",
    "think_format": "think_format_reward",
    "think_answer": "format_reward tag_count_reward",
    "code": "binary_code_reward prime_code",
    "code_share": "code_reward",
    "overlong": "soft_overlong_punishment get_soft_overlong_punishment",
    "short_when_right": "len_reward",
    "cosine": "cosine_scaled_reward get_cosine_scaled_reward",
    "repetition_penalty": "get_repetition_penalty_reward repetition_penalty_reward",
    "correctness": "correctness_reward_func",
    "integer": "int_reward_func",
    "strict_xml": "strict_format_reward_func",
    "soft_xml": "soft_format_reward_func",
    "xml_count": "xmlcount_reward_func",
    "tags": "match_format_exactly match_format_approximately",
}
_HERE = {other: name for name, others in _OTHER_NAMES.items() for other in others.split()}


def hint_of(name: str) -> str:
    """A sentence about a name that no reward has: what it is called here, or how it is made; empty if unknown."""
    here = _HERE.get(name, name)
    renamed = f" Here it is `{here}`." if here != name else ""
    made = f' It is made by a call, as in "{here}(...)": python -m grpo.rewards {here}.' if here in MAKERS else ""
    return renamed + made
