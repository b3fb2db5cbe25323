"""Rotary embeddings whose frequencies follow from how long a sequence is. Knows nothing of layers.

Hugging Face chooses them by the longest sequence of a batch, keys in a cache keep those that they were written with,
and vLLM has its own way: beyond the length up to which they are fixed, no two of these are the same model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grpo.errors import UserError

BY_LENGTH = ("longrope", "dynamic")


def check_rope(settings: Any, longest: int, name: str) -> None:
    """settings: a Hugging Face config. longest: prompt and completion together, in tokens, that will be run at most.

    Raises:
        UserError: sequences may get so long that the model's frequencies change.
    """
    text = settings.get_text_config()
    for parameters in _rope_parameters(text):
        if parameters.get("rope_type") not in BY_LENGTH:
            continue
        limit = parameters.get("original_max_position_embeddings") or text.max_position_embeddings
        if longest > limit:
            raise UserError(
                f"The positions of {name} are scaled by how long a sequence is ({parameters['rope_type']} beyond "
                f"{limit} tokens), so that the same text has other probabilities beside a longer one. A run may have "
                f"up to {longest} tokens: lower --max-completion-tokens, or leave out prompts that are too long with "
                f"--max-context {limit}."
            )


def _rope_parameters(text: Any) -> Iterator[dict[str, Any]]:
    """One set for the model, or one for each kind of layer."""
    found = getattr(text, "rope_parameters", None) or {}
    yield from [found] if "rope_type" in found else [each for each in found.values() if isinstance(each, dict)]
