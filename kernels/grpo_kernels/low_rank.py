"""Low-rank factors beside a base weight: the two kernels around a LoRA projection's products. Knows no base weight.

    place_b(b, scale, out)         s B_1, s B_2 ... of the parts in the columns of one matrix, zero elsewhere
    add_low_rank(y, left, ...)     y + s [left_1 right_1 | left_2 right_2 ...] + bias, in one pass

Shapes: T rows (tokens), N = sum N_j outputs of P parts, r the rank, R = P r rounded up for aligned memory.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_kernels.dispatch import cdiv, next_power_of_2, tl, triton


@triton.jit
def _place_b_kernel(
    b_0,
    b_1,
    b_2,
    scale,
    out,
    end_0,
    end_1,
    num_rows,
    rank,
    out_stride,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_R)
    part = (n >= end_0).to(tl.int32) + (n >= end_1).to(tl.int32)
    row = n - tl.where(part == 0, 0, tl.where(part == 1, end_0, end_1))
    r = column[None, :] - part[:, None] * rank
    source = row[:, None] * rank + r
    inside = (n < num_rows)[:, None] & (r >= 0) & (r < rank)
    value = tl.load(b_0 + source, mask=inside & (part == 0)[:, None], other=0.0).to(tl.float32)
    value += tl.load(b_1 + source, mask=inside & (part == 1)[:, None], other=0.0).to(tl.float32)
    value += tl.load(b_2 + source, mask=inside & (part == 2)[:, None], other=0.0).to(tl.float32)
    target = n[:, None].to(tl.int64) * out_stride + column[None, :]
    tl.store(
        out + target,
        (value * tl.load(scale)).to(out.dtype.element_ty),
        mask=(n < num_rows)[:, None] & (column < width)[None, :],
    )


def place_b(b: Sequence[Tensor], scale: Tensor, out: Tensor) -> None:
    """out [N, R] = s B_j in the rows and the r columns of part j, zero elsewhere, for up to three parts."""
    if len(b) > 3:
        raise ValueError(f"A projection of {len(b)} parts has no fused form, at most 3 have. Use impl='torch'.")
    ends = list(itertools.accumulate(part.shape[0] for part in b))
    num_rows, width = out.shape
    block_r = next_power_of_2(width)
    block_n = max(1, min(64, 8192 // block_r))  # what does not fit in registers takes memory for every thread of a GPU
    _place_b_kernel[(cdiv(num_rows, block_n),)](
        b[0], b[min(1, len(b) - 1)], b[-1], scale, out, ends[0], ends[min(1, len(b) - 1)],
        num_rows, b[0].shape[1], out.stride(0), width,
        BLOCK_N=block_n, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _add_low_rank_kernel(
    y, left, right_0, right_1, right_2, scale, bias, out,
    num_rows, columns_0, columns_1, columns_2, rank,
    y_stride, left_stride, right_stride_rank, right_stride_column, out_stride,
    PARTS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one part: the tiles of the parts' columns lie beside each other, none spans two parts. IS_WHOLE: the
    rank fits in a block."""
    tile = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    right, num_columns = right_0, columns_0
    if PARTS > 1:
        tiles = tl.cdiv(columns_0, BLOCK_N)
        is_later = tile >= tiles
        right, num_columns = tl.where(is_later, right_1, right), tl.where(is_later, columns_1, num_columns)
        first = tl.where(is_later, columns_0, 0)
        left += tl.where(is_later, rank, 0)
        tile -= tl.where(is_later, tiles, 0)
        if PARTS > 2:
            tiles = tl.cdiv(columns_1, BLOCK_N)
            is_last = is_later & (tile >= tiles)
            right, num_columns = tl.where(is_last, right_2, right), tl.where(is_last, columns_2, num_columns)
            first += tl.where(is_last, columns_1, 0)
            left += tl.where(is_last, rank, 0)
            tile -= tl.where(is_last, tiles, 0)
        y += first
        bias += first
        out += first
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, column_inside = row < num_rows, column < num_columns
    row64 = row.to(tl.int64)
    inside = row_inside[:, None] & column_inside[None, :]
    low = left + row64[:, None] * left_stride + r[None, :]
    high = right + r[:, None] * right_stride_rank + column[None, :] * right_stride_column
    if IS_WHOLE:
        low = tl.load(low, mask=row_inside[:, None] & (r < rank)[None, :], other=0.0)
        high = tl.load(high, mask=(r < rank)[:, None] & column_inside[None, :], other=0.0)
        value = tl.dot(low, high, input_precision=PRECISION)
    else:
        value = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
        for start in tl.range(0, rank, BLOCK_R, num_stages=2):
            r_inside = r < rank - start
            some_low = tl.load(low + start, mask=row_inside[:, None] & r_inside[None, :], other=0.0)
            some_high = tl.load(
                high + start * right_stride_rank, mask=r_inside[:, None] & column_inside[None, :], other=0.0
            )
            value = tl.dot(some_low, some_high, value, input_precision=PRECISION)
    if HAS_SCALE:
        value *= tl.load(scale)
    value += tl.load(y + row64[:, None] * y_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row64[:, None] * out_stride + column[None, :], value.to(out.dtype.element_ty), mask=inside)


def add_low_rank(
    y: Tensor, left: Tensor, rights: Sequence[Tensor], scale: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    """out = y + scale * [left_1 right_1 | left_2 right_2 ...] + bias, summed in float32, rounded once.

    out and y [T, N] at any row pitch, the same memory or apart; left [T, P * r]; rights P <= 3 times [r, N_j], of one
    pitch; scale [1] float32; bias [N].
    """
    if len(rights) > 3:
        raise ValueError(f"A projection of {len(rights)} parts has no fused form, at most 3 have. Use impl='torch'.")
    if out.numel() == 0:
        return
    first, num_rows = rights[0], out.shape[0]
    rank, columns = first.shape[0], [right.shape[1] for right in rights]
    block_t, block_n, block_r = min(64, max(16, next_power_of_2(num_rows))), 64, max(16, next_power_of_2(rank))
    # Blocks of the whole rank while both are within 64 KB, what the smallest GPU has.
    is_whole = block_r * y.itemsize <= 512
    _add_low_rank_kernel[(sum(cdiv(count, block_n) for count in columns), cdiv(num_rows, block_t))](
        y, left, first, rights[min(1, len(rights) - 1)], rights[-1],
        scale if scale is not None else y, bias.contiguous() if bias is not None else y, out,
        num_rows, columns[0], columns[min(1, len(rights) - 1)], columns[-1], rank,
        y.stride(0), left.stride(0), first.stride(0), first.stride(1), out.stride(0),
        PARTS=len(rights), HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, IS_WHOLE=is_whole,
        BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_R=block_r if is_whole else 64,
        PRECISION="ieee" if y.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
