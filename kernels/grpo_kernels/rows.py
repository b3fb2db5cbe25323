"""Rows of a table that lies in the host's memory, read by the GPU as it needs them. Knows nothing of tokens.

A table that is looked up once a pass, such as an embedding that is not the head too, need not be in the GPU's memory:
pinned memory has an address on the GPU, and a kernel that copies rows from there reads what the bus carries, some 8 KB
a token of an 8B: 16,384 tokens are 0.13 GB, 3 to 5 ms of PCIe 4 and 5.
"""

import torch
from torch import Tensor

from grpo_kernels.dispatch import Impl, cdiv, choose, isolated, tl, triton

BLOCK = 1024


@isolated
@torch.no_grad()
def take_rows(index: Tensor, table: Tensor, impl: Impl = "auto") -> Tensor:
    """table[index], [..., D] on the device of `index`, of table [V, D] in pinned memory or on that device, index [...]
    of integers from 0 to V - 1. No gradient.

    Raises:
        ValueError: the table's rows do not lie one behind the other.
    """
    if not table.is_contiguous():
        raise ValueError(f"The rows of a table lie one behind the other; this one is {table.stride()} apart.")
    out = torch.empty(*index.shape, table.shape[1], dtype=table.dtype, device=index.device)
    if choose("take_rows", impl, out) == "torch":
        return out.copy_(table[index.to(table.device)])
    if out.numel():
        grid = (index.numel(), cdiv(table.shape[1], BLOCK))
        _take_rows_kernel[grid](table, index.contiguous(), out, table.shape[1], BLOCK=BLOCK, num_warps=4)
    return out


@triton.jit
def _take_rows_kernel(table, index, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wanted = tl.load(index + row).to(tl.int64)
    tl.store(out + row * width + column, tl.load(table + wanted * width + column, mask=inside), mask=inside)
