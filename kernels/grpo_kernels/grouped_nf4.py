"""`grouped_nf4_linear`: few rows an expert, each times the weight of its expert, which stays in 4 bits.
Knows nothing of routers, LoRA or models; the format is nf4.py's, the order of the rows grouped.py's.

Axes: S rows of x, sorted by expert, E experts, K columns (inputs), M rows of an expert's weight (outputs).

A step of a rollout has some rows for nearly every expert, so it must read all weights, and that is all it should do:
dequantised for a dense product they would be written and read again in 16 bits, nine times the bytes in all. Here a
program has a tile of one expert's outputs, for all of that expert's rows, 16 to 64 at a time. Where they begin and end
is read on the device: the same launch serves any routing, in a CUDA graph too.
"""

import torch
from torch import Tensor

from grpo_kernels.dispatch import Impl, cdiv, choose, interpreting, isolated, next_power_of_2, tl, triton
from grpo_kernels.nf4 import BLOCK, NF4, dynamic_levels_on, levels_on
from grpo_kernels.nf4_product import tile_of_nf4

# Rows an expert, on average, up to which a weight stays in 4 bits. Each further pass over an expert's rows turns its
# codes into numbers again, a dense product does that once. Reckoned, not measured: 32 rows are one or two passes.
MOST_ROWS = 32
WIDEST = 64  # rows of a pass


@triton.jit
def _grouped_kernel(
    x, packed, absmax, nested_absmax, offset, dynamic_levels, levels, ends, out,
    num_outputs, num_columns, x_stride, out_stride,
    NESTED: tl.constexpr, SHUFFLE: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one expert for all of its rows, BLOCK_M at a time."""
    expert, first = tl.program_id(1), tl.program_id(0) * BLOCK_N
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    own = expert * num_outputs  # the first row of its weight
    n = first + tl.arange(0, BLOCK_N)
    for first_m in tl.range(begin, end, BLOCK_M):
        tile = tile_of_nf4(
            x, packed, absmax, nested_absmax, offset, dynamic_levels, levels, own + first, first_m,
            0, tl.cdiv(num_columns, BLOCK_K), end, own + num_outputs, num_columns, x_stride, out.dtype.element_ty,
            False, NESTED, SHUFFLE, TOGETHER, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, STAGES,
        )  # fmt: skip
        m = first_m + tl.arange(0, BLOCK_M)
        target = out + m[None, :].to(tl.int64) * out_stride + n[:, None]
        tl.store(target, tile.to(out.dtype.element_ty), mask=(n < num_outputs)[:, None] & (m < end)[None, :])


def stays_packed(x: Tensor, base: NF4, num_experts: int, impl: Impl) -> bool:
    """Whether `grouped_nf4_linear` is to be had for these, and the faster."""
    if base.shape[1] % BLOCK or torch.compiler.is_compiling():  # blocks of 64 must not span two rows
        return False
    if choose("grouped_nf4_linear", impl, x) == "torch":
        return False
    return impl == "triton" or x.shape[0] <= MOST_ROWS * num_experts


@isolated
def grouped_nf4_linear(x: Tensor, base: NF4, offsets: Tensor) -> Tensor:
    """Sorted rows x [S, K] by the weights of their experts, base [E M, K]: [S, M], for callers that have asked
    `stays_packed`.

    offsets: int32 [E], where an expert's rows end. No gradient, no host synchronisation.
    """
    num_experts, num_columns = len(offsets), base.shape[1]
    num_outputs = base.shape[0] // num_experts
    out = torch.empty(x.shape[0], num_outputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    nested, ptx = base.nested_absmax, not interpreting()
    # The hottest experts have several times the rows of the average.
    rows = min(WIDEST, max(16, next_power_of_2(2 * cdiv(x.shape[0], num_experts))))
    block_n = 64
    _grouped_kernel[(cdiv(num_outputs, block_n), num_experts)](
        x, base.packed.view(torch.int32), base.absmax,
        base.absmax if nested is None else nested, base.absmax if base.offset is None else base.offset,
        dynamic_levels_on(x.device), levels_on(x.device), offsets, out, num_outputs, num_columns, x.stride(0),
        out.stride(0), NESTED=nested is not None, SHUFFLE=ptx, TOGETHER=ptx, BLOCK_M=rows, BLOCK_N=block_n,
        BLOCK_K=128, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", STAGES=3 if x.dtype.itemsize == 2 else 2,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
