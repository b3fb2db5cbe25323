"""One text, one reward: what a reward pays for a completion that somebody typed, called as a run calls it.

Knows nothing of runs or of terminals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpo.rewards.scoring import build_rewards, probe_samples, score
from grpo.types import Group, Prompt


def score_text(
    key: Callable | str, completion: str, columns: dict[str, Any], prompt: str = "", seconds: float | None = 60.0
) -> dict[str, float]:
    """name -> number: what the reward pays, NaN where it does not apply; and its parts, if it has any.

    A token is a byte of the text, because no model is asked. seconds: the limit of the call, None for none.

    Raises:
        UserError: the reward fails, or asks for a column that is not given.
    """
    asked = Prompt(0, prompt, list(prompt.encode(errors="replace")), columns, [{"role": "user", "content": prompt}])
    probe = (asked, completion)
    rewards = build_rewards({key: 1.0}, columns, True, probe=probe, group_size=1, timeout=seconds)
    group = Group(asked, probe_samples(asked, completion, None, 1).completions)
    score([group], rewards)
    return {name: float(part[0]) for name, part in group.parts.items()}
