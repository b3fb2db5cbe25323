"""The memory of vLLM's KV cache: let go of for an update, taken back for a rollout. Knows nothing of the policy.

The names were read in vLLM 0.26 and 0.32, and run with 0.26 on a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


class KvMemory:
    """The KV cache's memory, which can be let go of and taken back; what was in it is lost. This one stays."""

    def release(self) -> None:
        """Let it go."""

    def restore(self) -> None:
        """Take it back."""


@dataclass
class SleepingKvMemory(KvMemory):
    """vLLM's own calls. The memory does not come from PyTorch, which holds what an update does not use any more: it
    would not give it up for vLLM."""

    let_go: Callable[[], object]
    take_back: Callable[[], object]

    def release(self) -> None:
        """See KvMemory.release. Its pages go at once, whatever a kernel that still runs has to do with them."""
        torch.cuda.synchronize()
        self.let_go()

    def restore(self) -> None:
        """See KvMemory.restore."""
        torch.cuda.empty_cache()
        self.take_back()


def find_kv_memory(llm: Any, can_sleep: bool) -> KvMemory:
    """The way that this version has.

    0.31 and later release the cache alone. Before, sleep level 1 also moves vLLM's weights to the CPU: norms
    and biases where the base is shared, all of its copy where it is not. Without sleep mode nothing is released.
    """
    if not can_sleep:
        return KvMemory()
    if hasattr(llm, "release_kv_cache_memory"):
        take_back = partial(llm.wake_up, tags=["kv_cache"])
        return SleepingKvMemory(partial(_heap_frozen, _release, llm), take_back)
    return SleepingKvMemory(partial(_heap_frozen, llm.sleep, 1), llm.wake_up)


def _release(llm: Any) -> None:
    llm.sleep(level=0)
    llm.release_kv_cache_memory()


def _heap_frozen(call: Callable[..., None], *arguments: Any) -> None:
    """Sleeping collects garbage, twice; over the heap of a trainer that is most of its time."""
    gc.freeze()
    try:
        call(*arguments)
    finally:
        gc.unfreeze()
