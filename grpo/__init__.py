"""grpo: turn a language model into a reasoning model with GRPO, on hardware you own.

    run = grpo.train("gsm8k", steps=50)        docs/python.md has the rest
    run.evaluate(), run.sample(["What is 3 + 4?"]), grpo.load("runs/...")

What needs torch is imported when it is first asked for: a task file has no use for it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from grpo.config import Config
from grpo.errors import UserError
from grpo.task import Task

if TYPE_CHECKING:
    from grpo.api import Run, load, train
    from grpo.record.sinks import Sink
    from grpo.record.theirs import Stop
    from grpo.types import Batch, Completion, Group, Prompt

_LATE = {
    **dict.fromkeys(("Batch", "Completion", "Group", "Prompt"), "grpo.types"),
    **dict.fromkeys(("Run", "load", "train"), "grpo.api"),
    "Sink": "grpo.record.sinks",
    "Stop": "grpo.record.theirs",
}

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Completion",
    "Config",
    "Group",
    "Prompt",
    "Run",
    "Sink",
    "Stop",
    "Task",
    "UserError",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(_LATE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`grpo.train` is the function. The loop's module is called so too, and whoever imports it would put it here: it is
    found by `from grpo.train import ...`."""

    @property
    def train(self) -> Any:
        return __getattr__("train")

    @train.setter
    def train(self, module: ModuleType) -> None:
        """What an import leaves behind."""


sys.modules[__name__].__class__ = _Package
