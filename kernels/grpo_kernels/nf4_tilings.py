"""How a product with an NF4 weight is cut up, and whether the weight stays in 4 bits for it, as measured on an H100.
Knows nothing of kernels.

Shapes: N rows of the weight (outputs), K columns (inputs), M rows of x.
"""

import functools
from dataclasses import dataclass

import torch

from grpo_kernels.dispatch import Impl, cdiv, has_descriptors, next_power_of_2, num_multiprocessors, shared_memory
from grpo_kernels.nf4 import BLOCK, NF4

WIDE = 3 * 2**23  # values of a weight from which on large tiles leave no multiprocessor idle
LARGE = 160 * 1024  # bytes of shared memory that the largest tiles need (A100, H100 and later)


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up: output tiles [block_n, block_m], K in `splits` stretches, block_k columns a step."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int
    registers: int | None = None  # the most of a thread; None leaves it to the compiler
    together: bool = False  # a step's products are issued together and waited for once (_PASS)


@functools.cache
def described_tiling(num_x_rows: int, num_rows: int, num_columns: int, nested: bool, device: torch.device) -> Tiling:
    """Tiles that descriptors fetch, and the split of K, from measurements on an H100.

    LOG.md, "2026-11-21 nf4_linear fed by tensor descriptors: works, 0.49x to 0.94x".

    With few rows of x, reading weights and turning them into numbers takes the time, and three or four programs share a
    multiprocessor. With more, reading x does, which wide tiles read less often.
    """
    together = True
    is_wide = num_rows * num_columns >= WIDE
    block_m = max(16, next_power_of_2(num_x_rows))
    block_m = min(block_m, 256 if is_wide else 128)
    if block_m <= 32:
        # Nested scales are looked up in three steps, of which each takes a stage.
        block_n, block_k, warps, stages, programs = 64, 256, 4, 5 if nested else 3, 4 if block_m == 16 else 3
    elif block_m == 64 and nested:
        block_n, block_k, warps, stages, programs = 64, 256, 4, 3, 3
    elif block_m == 64:
        block_n, block_k, warps, stages, programs = 128 if is_wide else 64, 256, 8 if is_wide else 4, 3, 1
        together = False
    elif block_m <= 128:
        block_n, block_k, warps, stages, programs = 64, 128, 4, 3, 2
    else:
        block_n, block_k, warps, stages, programs = 128, 128, 8, 3, 1
        together = False
    tiles = cdiv(num_rows, block_n) * cdiv(num_x_rows, block_m)
    shortest = 512 if block_m <= 32 else 1024
    splits = _power_of_2(programs * num_multiprocessors(device) // tiles, num_columns // shortest)
    registers = 128 if block_m == 16 else None
    return Tiling(block_m, block_n, block_k, warps, stages, splits, registers, together)


@functools.cache
def addressed_tiling(
    num_x_rows: int, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device
) -> Tiling:
    """Tiles that are fetched by their addresses, and the split of K, from measurements on an H100.

    LOG.md, "2026-11-21 nf4_linear, weights in registers: works, 0.57x to 1.03x".

    Few rows of x need many programs on a multiprocessor, which hide each other's waiting. Many rows need large tiles,
    so that a weight is dequantised once and x is read by few programs.
    """
    is_large = shared_memory(device) >= LARGE and dtype.itemsize == 2
    is_wide = num_rows * num_columns >= WIDE
    block_m = min(256 if is_large else 64, max(16, next_power_of_2(num_x_rows)))
    if block_m == 256 or (block_m == 128 and is_wide):
        block_m = block_m if is_wide else 128
        block_n, warps, stages, programs = 128, 8, 4 if block_m == 128 else 3, 1
    else:
        block_n, warps, stages, programs = 64, 4, 3 if is_large else 2, {16: 8, 32: 8, 64: 3, 128: 1}[block_m]
    tiles = cdiv(num_rows, block_n) * cdiv(num_x_rows, block_m)
    shortest = 256 if block_m == 16 else 1024
    splits = _power_of_2(programs * num_multiprocessors(device) // tiles, num_columns // shortest)
    return Tiling(block_m, block_n, 128, warps, stages, splits, together=warps == 4)


def _power_of_2(*limits: int) -> int:
    """The largest from 1 to 8 within all limits; 1 where there is none."""
    return 1 << (max(1, min(8, *limits)).bit_length() - 1)


def is_fused(num_x_rows: int, weight: NF4, impl: Impl, eager: bool, with_a: bool = False) -> bool:
    """Whether the weight stays in 4 bits: where that is faster than dequantising and cuBLAS, measured on an H100.

    `with_a`: where `nf4_linear_with_a` is faster than dequantising beside A and cuBLAS, which takes one launch more.
    """
    if weight.shape[1] % BLOCK or impl != "auto":
        return weight.shape[1] % BLOCK == 0
    most, beyond = _fused_rows(*weight.shape, eager, with_a, weight.device)
    return num_x_rows <= most or beyond < num_x_rows <= 512


@functools.cache
def _fused_rows(num_rows: int, num_columns: int, eager: bool, with_a: bool, device: torch.device) -> tuple[int, int]:
    """Up to how many rows of x it is faster, and beyond how many it is again, up to 512, in two tiles well filled."""
    num_values = num_rows * num_columns
    if shared_memory(device) < LARGE or num_values < (2**22 if with_a else 2**23):
        return 64, 512
    is_described = not eager and num_columns % (4 * BLOCK) == 0 and has_descriptors(device)
    most = 256 if with_a or num_values >= 3 * 2**22 else 128
    return most, 384 if num_values >= 2 * WIDE and is_described else 512
