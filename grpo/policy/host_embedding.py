"""Embedding in the host's memory: a table of which a pass reads a row a token needs no memory of a GPU.

That of an 8B has 0.98 GiB, where the head is another table. vLLM, which samples with the policy's own weights, reads
its rows there too (grpo/rollout/vllm_weights.py), some microseconds a step that it decodes.

    is_hosted(model)
    to_host(model)      -> bytes of the GPU that are free now; 0 where the embedding stays
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from grpo_kernels import take_rows
from torch import nn


def to_host(model: Any, room: int) -> int:
    """Move the embedding of a FusedModel or GenericModel to pinned memory of the host, from where its GPU reads rows.
    room: bytes that may be pinned. Returns the bytes that it had on the GPU.

    It stays, and has 0, where it is the head too or a module of another kind, and where the host's memory has no room,
    cannot be pinned or not be read by the GPU.
    """
    embed, head = model.embed, model.head
    # A class of its own may do more than look up: Gemma 3's multiplies.
    if type(embed) is not nn.Embedding or embed.max_norm is not None or not embed.weight.is_cuda:
        return 0
    table = embed.weight.detach()
    if table.data_ptr() == head.data_ptr() or table.nbytes > room:
        return 0
    device = table.device
    # Each system has its own way of saying no: limits of what may be pinned, drivers without a common address space.
    with suppress(RuntimeError, ValueError):
        hosted = table.cpu().pin_memory()
        ends = torch.tensor([0, len(table) - 1], device=device)
        if torch.equal(take_rows(ends, hosted), table[ends]):
            embed.weight = nn.Parameter(hosted, requires_grad=False)
            # Who asks for the table's device brings its tokens there: Llama 4 does.
            embed.forward = lambda input: take_rows(input.to(device), embed.weight)
            return table.nbytes
    return 0


def is_hosted(model: Any) -> bool:
    """Whether the embedding is elsewhere than the head."""
    return model.embed.weight.device != model.head.device
