"""Allocator: PyTorch's memory of a GPU in segments that grow, so that it takes little more than it has given out.

Its segments are of a fixed size otherwise. One that holds something is kept, and what is free in it may be too small
for the next tensor: batches whose lengths differ left 20 of 78 GiB unused so (LOG.md, "2026-11-28 segments of a GPU's
memory that grow: works, 61 of 79"). A segment that grows is address space, whose pages come and go.

    grow_segments()       before the first tensor; a user who has set PyTorch's options has chosen
    restore_options()     after vLLM, whose pool of its own turns growth off and on again, and loses the other options
    hold_to(size, device) no more than so many bytes: what asks for more is told that memory ran out
    let_loose()           as it was before
    allowed(device)       bytes that PyTorch may take by what the user has said
"""

from __future__ import annotations

import os
import platform
import sys

import torch

# Where PyTorch reads its options, the first that is set. vLLM 0.24 to 0.26 look at the second alone.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
GROWING = "expandable_segments:True"


def grow_segments() -> None:
    """From now on, in this process and those that it starts; nothing where the driver's virtual memory is not to be
    had (Windows, WSL, other GPUs than NVIDIA's)."""
    is_plain_linux = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if is_plain_linux and torch.version.cuda and not _options():
        os.environ[VARIABLES[1]] = GROWING
        restore_options()


def restore_options() -> None:
    """What the environment says, for it is read only once."""
    if options := _options():
        torch._C._accelerator_setAllocatorSettings(options)


# The share of a GPU that PyTorch might take before it was first held to something: the user's own, where there is one.
_before: dict[torch.device, float] = {}


def hold_to(size: int, device: torch.device) -> None:
    """From now on PyTorch takes no more bytes of a GPU than these, what it holds already included, and no larger share
    than the user allowed it."""
    share = _before.setdefault(device, torch.cuda.get_per_process_memory_fraction(device))
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(share, max(0, size) / total), device)


def let_loose() -> None:
    """As it was before: the process goes on, and its next run may have another limit."""
    while _before:
        device, share = _before.popitem()
        torch.cuda.set_per_process_memory_fraction(share, device)


def allowed(device: torch.device) -> int:
    """Bytes of a GPU that PyTorch may take: all, unless the user has set a smaller share."""
    share = _before.get(device, torch.cuda.get_per_process_memory_fraction(device))
    return int(share * torch.cuda.get_device_properties(device).total_memory)


def _options() -> str:
    return next(filter(None, map(os.environ.get, VARIABLES)), "")
