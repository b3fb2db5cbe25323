"""The work that ours and the peers do in a benchmark of steps, and what is told of it in the same way.

Imports no torch before it is asked: a peer may want to be imported before anything else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

PROMPTS, GROUP, PROMPT_TOKENS, COMPLETION_TOKENS = 8, 8, 256, 512
RANK = 32
WARM = 2  # steps that are not timed: kernels are compiled, memory is taken

Step = TypeVar("Step")


def random_rewards(completions: Sequence[Any]) -> list[float]:
    """They teach nothing, and give every group something to learn from."""
    return [random.random() for _ in completions]


def timed(steps: list[Step]) -> list[Step]:
    """The steps that count; the last one where there are too few."""
    return steps[WARM:] or steps[-1:]


def torch_peaks(on_gpu: bool) -> dict[str, float]:
    """The most memory of the GPU that torch had given out and held since the process began, in GiB."""
    if not on_gpu:
        return {}
    import torch

    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {f"{name}_peak_gib": round(value / 2**30, 2) for name, value in peaks.items()}
