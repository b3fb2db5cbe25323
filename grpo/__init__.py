"""grpo: turn a language model into a reasoning model with GRPO, on hardware you own."""

from grpo.config import Config
from grpo.task import Task
from grpo.types import Batch, Completion, Group, Prompt

__version__ = "0.1.0"
__all__ = ["Batch", "Completion", "Config", "Group", "Prompt", "Task"]
