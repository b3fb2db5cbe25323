"""Rows of a table that lies in the host's memory, read by the GPU as it needs them. Knows nothing of tokens.

A table that is looked up once a pass, such as an embedding that is not the head too, need not be in the GPU's memory:
pinned memory has an address on the GPU, and a kernel that copies rows from there reads what the bus carries, some 8 KB
a token of an 8B: 16,384 tokens are 0.13 GB, 3 to 5 ms of PCIe 4 and 5.

A compiler has no graph with tensors of two devices. For it there is an operator that knows a table by its number:

    grpo_kernels::numbered_rows(index, number)      take_rows(index, the table that `numbered` gave this number)
"""

import itertools
import weakref

import torch
from torch import Tensor

from grpo_kernels.dispatch import Impl, Operator, cdiv, choose, isolated, tl, triton

BLOCK = 1024

_tables: dict[int, weakref.ref[Tensor]] = {}


def numbered(table: Tensor) -> int:
    """The number of a table [V, D] for as long as it lives."""
    for number, known in _tables.items():
        if known() is table:
            return number
    number = next_number()
    _tables[number] = weakref.ref(table)
    return number


def next_number() -> int:
    """The number of the next table, the lowest that none has: compiled code that is kept has it in it."""
    return next(number for number in itertools.count() if number not in _tables or _tables[number]() is None)


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


def _table_of(number: int) -> Tensor:
    table = _tables[number]() if number in _tables else None
    if table is None:
        raise ValueError(f"No table has number {number}.")
    return table


def _numbered_rows(index: Tensor, number: int) -> Tensor:
    return take_rows(index, _table_of(number))


def _fake_numbered_rows(index, number):
    table = _table_of(number)
    return index.new_empty(*index.shape, table.shape[1], dtype=table.dtype)


numbered_rows = Operator("numbered_rows", _numbered_rows, _fake_numbered_rows)


@triton.jit
def _take_rows_kernel(table, index, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wanted = tl.load(index + row).to(tl.int64)
    tl.store(out + row * width + column, tl.load(table + wanted * width + column, mask=inside), mask=inside)
