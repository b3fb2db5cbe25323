"""Pairs: what two answers were given to, where a data set does not say it apart. Knows nothing of models."""

from __future__ import annotations

from typing import Any

from grpo.errors import UserError


def common_prompt(chosen: Any, rejected: Any) -> Any:
    """What both begin with: of chat messages those that are equal, of texts all up to the last word that is.

    The same as TRL extracts, but for a text whose last common word ends in other white space than a blank.

    Raises:
        UserError: they are not of one kind, or begin differently.

    >>> common_prompt("Human: Hi\n\nAssistant: Hello!", "Human: Hi\n\nAssistant: Go away.")
    'Human: Hi\n\nAssistant:'
    """
    kinds = {type(each) for each in (chosen, rejected)}
    if kinds not in ({str}, {list}):
        raise UserError(
            f"`chosen` is a {type(chosen).__name__} and `rejected` a {type(rejected).__name__}. Both must be texts, or "
            "both chat messages."
        )
    both = list(zip(chosen, rejected, strict=False))
    same = next((place for place, (one, other) in enumerate(both) if one != other), len(both))
    if isinstance(chosen, list):
        same = min(same, len(chosen) - 1, len(rejected) - 1)
    elif same and chosen[same - 1] == " ":
        same -= 1
    if same < 1:
        raise UserError(
            "`chosen` and `rejected` begin differently, and there is no `prompt`: what were they answers to? Give the "
            "rows a column `prompt`."
        )
    return chosen[:same]
