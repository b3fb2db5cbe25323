"""Pairs: what two answers were given to, where a data set does not say it apart. Knows nothing of models."""

from __future__ import annotations

from typing import Any

from grpo.errors import UserError

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def common_prompt(chosen: Any, rejected: Any) -> Any:
    """What both begin with: of chat messages those that are equal, of texts all up to the last word that is.

    The same as TRL extracts, but for a text whose last common word ends in other white space than a blank, and for
    transcripts as hh-rlhf has them: there an answer begins where the assistant does, though both begin alike.

    Raises:
        UserError: they are not of one kind, or begin differently.

    >>> common_prompt("\\n\\nHuman: Hi\\n\\nAssistant: I am.", "\\n\\nHuman: Hi\\n\\nAssistant: I was.")
    '\\n\\nHuman: Hi\\n\\nAssistant:'
    """
    kinds = {type(each) for each in (chosen, rejected)}
    if kinds not in ({str}, {list}):
        raise UserError(
            f"`chosen` is of the type {type(chosen).__name__} and `rejected` of {type(rejected).__name__}. Both must "
            "be texts, or both chat messages."
        )
    both = list(zip(chosen, rejected, strict=False))
    same = next((place for place, (one, other) in enumerate(both) if one != other), len(both))
    if isinstance(chosen, list):
        same = min(same, len(chosen) - 1, len(rejected) - 1)
    elif chosen.startswith(_HUMAN) and _ASSISTANT in chosen:
        same = _beginning_of_answer(chosen[:same])
    elif same and chosen[same - 1] == " ":
        same -= 1
    if same < 1:
        raise UserError(
            "`chosen` and `rejected` begin differently, and there is no `prompt`: what were they answers to? Give the "
            "rows a column `prompt`."
        )
    return chosen[:same]


def _beginning_of_answer(common: str) -> int:
    """Where what the assistant says begins that two transcripts end differently in; 0 if it is the user who does."""
    begins = common.rfind(_ASSISTANT)
    return begins + len(_ASSISTANT) if begins > common.rfind(_HUMAN) else 0
