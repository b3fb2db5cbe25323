"""grpo: turn a language model into a reasoning model with GRPO, on hardware you own.

The nouns come with torch, which a task file has no use for, so they are imported when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grpo.config import Config
from grpo.task import Task

if TYPE_CHECKING:
    from grpo.types import Batch, Completion, Group, Prompt

_NOUNS = ("Batch", "Completion", "Group", "Prompt")

__version__ = "0.1.0"
__all__ = ["Batch", "Completion", "Config", "Group", "Prompt", "Task"]


def __getattr__(name: str) -> Any:
    if name not in _NOUNS:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module("grpo.types"), name)
