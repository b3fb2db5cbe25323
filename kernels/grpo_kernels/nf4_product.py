"""`nf4_linear`: few rows times a weight that stays in 4 bits.
Knows nothing of layers, LoRA or models; the format is nf4.py's.

Shapes: N rows of the weight (outputs), K columns (inputs), M rows of x.
"""

import torch
from torch import Tensor

from grpo_kernels.dispatch import (
    Impl,
    TensorDescriptor,
    cdiv,
    choose,
    has_descriptors,
    interpreting,
    isolated,
    tl,
    triton,
)
from grpo_kernels.nf4 import (
    BLOCK,
    MOST_COUNTED,
    NF4,
    arrived_on,
    block_scale,
    dequantize_torch,
    dynamic_levels_on,
    levels_on,
    nf4_dequantize,
)
from grpo_kernels.nf4_tilings import addressed_tiling, described_tiling, is_fused


@isolated
def nf4_linear(x: Tensor, weight: NF4, bias: Tensor | None = None, impl: Impl = "auto", eager: bool = False) -> Tensor:
    """x [..., K] times the weight, [..., N]: x W^T + bias, for inference (no gradient).

    The weight stays in 4 bits while that is faster than dequantising it for a dense product: up to 64 to 512 rows.
    Raises ValueError for shapes that do not belong together.
    Safe in a CUDA graph: no host synchronisation, the same launches for the same shapes. Not safe on two streams at
    once, because the programs that share a tile count themselves in one place of a device.

    `eager` says that no graph will replay the launch. Then tensor descriptors are left out: to fill them costs the host
    some 50 microseconds, and with launches one by one it is the host that a decoder waits for.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)} and the weight {list(weight.shape)}; give [..., {weight.shape[1]}].")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}; give [{weight.shape[0]}].")
    rows = x.reshape(-1, x.shape[-1])
    if choose("nf4_linear", impl, x) == "torch":
        out = torch.nn.functional.linear(rows, dequantize_torch(weight, x.dtype), bias)
    elif not is_fused(rows.shape[0], weight, impl, eager):
        out = torch.nn.functional.linear(rows, nf4_dequantize(weight, x.dtype), bias)
    elif torch.compiler.is_compiling():
        out = _linear_op(rows, weight.packed, weight.absmax, weight.nested_absmax, weight.offset, bias, weight.shape[0])
    else:
        out = _launch_linear(
            rows, weight.packed, weight.absmax, weight.nested_absmax, weight.offset, bias, weight.shape[0], eager
        )
    return out.view(*x.shape[:-1], weight.shape[0])


def nf4_linear_with_a(x: Tensor, weight: NF4, a: Tensor, width: int, eager: bool) -> Tensor:
    """[x W^T | x A^T], [M, width], in one launch of `nf4_linear`'s kernel, for callers that have chosen it already.

    x [M, K]; a [R, K], dense, in x's dtype; width >= N + R: what is in the columns beyond is undefined.
    """
    nested = weight.nested_absmax, weight.offset
    return _launch_linear(x, weight.packed, weight.absmax, *nested, None, weight.shape[0], eager, a.contiguous(), width)


# One code picks its level from the lane that holds it: lane l of each half warp holds level l, and a shuffle needs no
# address. As loads, in a pipelined loop, the levels would each become an asynchronous copy of four bytes.
_LEVEL_OF_LANE = tl.constexpr("""{
    .reg .b32 lane;
    .reg .b64 address;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 15;
    mul.wide.u32 address, lane, 4;
    add.s64 address, address, $1;
    ld.global.nc.b32 $0, [address];
}""")
_SHUFFLE_BYTE = tl.constexpr("""{
    .reg .b32 code;
    shr.u32 code, $2, 4;
    shfl.sync.idx.b32 $0, $3, code, 0x101f, 0xffffffff;
    shfl.sync.idx.b32 $1, $3, $2, 0x101f, 0xffffffff;
}""")


@triton.jit
def _hold_levels(levels, SHUFFLE: tl.constexpr):
    """What `_levels_of_bytes` takes: the level that this lane holds, or where the levels are."""
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            _LEVEL_OF_LANE, "=f,l", [levels.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return levels


@triton.jit
def _levels_of_bytes(word, held, SHUFFLE: tl.constexpr):
    """The levels of the two codes in the lowest byte of each word, in their order: the high half is the even one."""
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            _SHUFFLE_BYTE, "=f,=f,r,f", [word, held], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        return tl.load(held + (word >> 4 & 15)), tl.load(held + (word & 15))


@triton.jit
def _step_scale(
    absmax, nested_absmax, offset, dynamic_levels, first_row, row, step, blocks_of_row,
    DESCRIBED: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """absmax in float32 [BLOCK_N, BLOCKS] of one step along K, for the rows `row` [BLOCK_N] from `first_row` on."""
    if DESCRIBED and BLOCKS == 4 and NESTED:
        # The codes of a step are the four bytes of a word.
        step_of_row = row * (blocks_of_row // 4) + step
        codes = tl.load(absmax + step_of_row)[:, None] >> (8 * tl.arange(0, 4))[None, :]
        scale = tl.load(dynamic_levels + (codes & 255)) * tl.load(nested_absmax + step_of_row // 64)[:, None]
        scale += tl.load(offset + step_of_row // 64)[:, None]
    elif DESCRIBED and BLOCKS == 4:
        scale = absmax.load([first_row, step * BLOCKS])
    else:
        column_block = step * BLOCKS + tl.arange(0, BLOCKS)
        block = row[:, None] * blocks_of_row + column_block[None, :]
        within_row = (column_block < blocks_of_row)[None, :]
        scale = block_scale(absmax, nested_absmax, offset, dynamic_levels, block, within_row, NESTED)
    return scale


# With the sum passing through here, Triton issues a step's products together and waits for them once. Else it waits
# after each sixteen columns, which costs programs of four warps up to 17%; with eight warps the others fill the time.
_PASS = tl.constexpr("mov.b32 $0, $1;")


@triton.jit
def tile_of_nf4(
    x, packed, absmax, nested_absmax, offset, dynamic_levels, levels, first_n, first_m, first_step, end_step,
    num_x_rows, num_rows, num_columns, x_stride, dtype: tl.constexpr,
    DESCRIBED: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, BLOCK_M] of W x^T over some steps along K, from row `first_n` of W and row `first_m` of x on.

    Weights become numbers in the very registers that the tensor cores read. There four neighbouring lanes hold, of
    eight neighbouring values along K, two each: the four bytes of a word. So the four all read the word from shared
    memory (one broadcast), and each keeps its own byte.
    """
    BLOCKS: tl.constexpr = BLOCK_K // 64
    blocks_of_row = num_columns // 64
    m = first_m + tl.arange(0, BLOCK_M)
    # Rows beyond the edge read the last row and are not stored, so that the loop has no masks in N.
    row = tl.minimum(first_n + tl.arange(0, BLOCK_N), num_rows - 1).to(tl.int64)
    held = _hold_levels(levels, SHUFFLE)
    accumulator = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for step in tl.range(first_step, end_step, num_stages=STAGES):
        if DESCRIBED:
            word = packed.load([first_n, step * (BLOCKS * 8)])
            x_tile = x.load([first_m, step * BLOCK_K]).T
        else:
            column_word = step * (BLOCKS * 8) + tl.arange(0, BLOCKS * 8)
            word = tl.load(
                packed + row[:, None] * (blocks_of_row * 8) + column_word[None, :],
                mask=(column_word < blocks_of_row * 8)[None, :],
                other=0,
            )
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            x_tile = tl.load(
                x + m[None, :].to(tl.int64) * x_stride + k[:, None],
                mask=(m < num_x_rows)[None, :] & (k < num_columns)[:, None],
                other=0.0,
            )
        scale = _step_scale(
            absmax, nested_absmax, offset, dynamic_levels, first_n, row, step, blocks_of_row, DESCRIBED, NESTED, BLOCKS
        )
        byte = word.reshape(BLOCK_N, BLOCKS, 8)[:, :, :, None] >> (8 * tl.arange(0, 4))[None, None, None, :]
        even, odd = _levels_of_bytes(byte, held, SHUFFLE)
        scale = scale[:, :, None, None]
        weight = tl.join((even * scale).to(dtype), (odd * scale).to(dtype)).reshape(BLOCK_N, BLOCK_K)
        accumulator = tl.dot(weight, x_tile, accumulator, input_precision=PRECISION)
        if TOGETHER:
            accumulator = tl.inline_asm_elementwise(
                _PASS, "=f,f", [accumulator], dtype=tl.float32, is_pure=True, pack=1
            )
    return accumulator


@triton.jit
def _tile_of_dense(
    x, a, first_n, first_m, first_column, end_column, num_x_rows, num_a_rows, num_columns, x_stride,
    DESCRIBED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, BLOCK_M] of A x^T over some columns, in steps of 64: those of NF4 would fill shared memory."""
    n, m = first_n + tl.arange(0, BLOCK_N), first_m + tl.arange(0, BLOCK_M)
    accumulator = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for column in tl.range(first_column, end_column, 64, num_stages=4 if DESCRIBED else STAGES):
        if DESCRIBED:
            a_tile = a.load([first_n, column])
            x_tile = x.load([first_m, column]).T
        else:
            k = column + tl.arange(0, 64)
            a_tile = tl.load(
                a + n[:, None].to(tl.int64) * num_columns + k[None, :],
                mask=(n < num_a_rows)[:, None] & (k < num_columns)[None, :],
                other=0.0,
            )
            x_tile = tl.load(
                x + m[None, :].to(tl.int64) * x_stride + k[:, None],
                mask=(m < num_x_rows)[None, :] & (k < num_columns)[:, None],
                other=0.0,
            )
        accumulator = tl.dot(a_tile, x_tile, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit(do_not_specialize=["num_x_rows"])
def _linear_kernel(
    x, packed, absmax, nested_absmax, offset, dynamic_levels, levels, bias, x_narrow, a, out, partial, arrived,
    num_x_rows, num_rows, num_a_rows, num_columns, x_stride, out_stride,
    DESCRIBED: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr, TOGETHER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_A: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_N, BLOCK_M] of W x^T over one of SPLITS stretches of K, or all of it. A tile's last program adds
    the stretches up. The tiles of A x^T, if it is asked for too, come first, because dense ones take longest.

    DESCRIBED: x, x_narrow, a and packed are tensor descriptors. So is absmax where a step is 256 columns, or, NESTED,
    words of four codes.
    """
    tile_n, tile_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    steps_of_split = tl.cdiv(tl.cdiv(num_columns, BLOCK_K), SPLITS)
    first_step = split * steps_of_split
    end_step = tl.minimum(first_step + steps_of_split, tl.cdiv(num_columns, BLOCK_K))
    first_n, end_n = tile_n * BLOCK_N, num_rows
    if HAS_A:
        first_n -= tl.cdiv(num_a_rows, BLOCK_N) * BLOCK_N
    if HAS_A and first_n < 0:
        accumulator = _tile_of_dense(
            x_narrow, a, tile_n * BLOCK_N, tile_m * BLOCK_M, first_step * BLOCK_K, end_step * BLOCK_K,
            num_x_rows, num_a_rows, num_columns, x_stride, DESCRIBED, BLOCK_M, BLOCK_N, PRECISION, STAGES,
        )  # fmt: skip
        first_n, end_n = num_rows + tile_n * BLOCK_N, num_rows + num_a_rows
    else:
        accumulator = tile_of_nf4(
            x, packed, absmax, nested_absmax, offset, dynamic_levels, levels, first_n, tile_m * BLOCK_M,
            first_step, end_step, num_x_rows, num_rows, num_columns, x_stride, out.dtype.element_ty,
            DESCRIBED, NESTED, SHUFFLE, TOGETHER, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, STAGES,
        )  # fmt: skip
    n = first_n + tl.arange(0, BLOCK_N)
    inside = (n < end_n)[:, None] & (m < num_x_rows)[None, :]
    target = m[None, :].to(tl.int64) * out_stride + n[:, None]
    # With many rows the sum is compiled even where K is in one piece. It never runs then, but ptxas, which sees that it
    # could, gives the loop more registers: 6 to 12% less time (LOG.md, "2026-11-21 nf4_linear fed by tensor
    # descriptors: works, 0.49x to 0.94x").
    if SPLITS > 1 or (BLOCK_M >= 64 and tl.num_programs(2) > 1):
        tl.store(partial + split.to(tl.int64) * num_x_rows * out_stride + target, accumulator, mask=inside)
        tl.debug_barrier()
        tile = tile_m * tl.num_programs(0) + tile_n
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        if before < SPLITS - 1:
            return
        tl.store(arrived + tile, 0)
        accumulator = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        of_split = partial + target
        for _ in tl.static_range(SPLITS):
            accumulator += tl.load(of_split, mask=inside, other=0.0, cache_modifier=".cg")
            of_split += tl.cast(out_stride, tl.int64) * num_x_rows
    if HAS_BIAS:
        accumulator += tl.load(bias + n, mask=n < num_rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + target, accumulator.to(out.dtype.element_ty), mask=inside)


def _launch_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    num_rows: int,
    eager: bool = False,
    a: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """x [M, K] -> [M, N], or [M, width] with x A^T from the column N on."""
    num_x_rows, num_columns = x.shape
    out = torch.empty(num_x_rows, num_rows if width is None else width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    nested, ptx = nested_absmax is not None, not interpreting()
    num_a_rows = 0 if a is None else a.shape[0]
    # What is not asked for, or unused where one program has a tile to itself, has its type all the same.
    rows, narrow_rows, a_rows, words, scales = x, x, x if a is None else a, packed.view(torch.int32), absmax
    partial, arrived = levels_on(x.device), words
    described = not eager and _can_be_described(x, packed, absmax, a_rows)
    if described:
        tiling = described_tiling(num_x_rows, num_rows, num_columns, nested, x.device)
        rows = TensorDescriptor.from_tensor(x, [tiling.block_m, tiling.block_k])
        words = _described(words, num_rows, tiling.block_n, tiling.block_k // 8)
        if tiling.block_k == 4 * BLOCK:
            scales = absmax.view(torch.int32) if nested else _described(absmax, num_rows, tiling.block_n, 4)
        if a is not None:
            narrow_rows = TensorDescriptor.from_tensor(x, [tiling.block_m, BLOCK])
            a_rows = TensorDescriptor.from_tensor(a, [tiling.block_n, BLOCK])
    else:
        tiling = addressed_tiling(num_x_rows, num_rows, num_columns, x.dtype, x.device)
    tiles = cdiv(num_rows, tiling.block_n) + cdiv(num_a_rows, tiling.block_n)
    grid = (tiles, cdiv(num_x_rows, tiling.block_m), tiling.splits)
    if tiling.splits > 1:
        partial = torch.empty((tiling.splits, *out.shape), dtype=torch.float32, device=x.device)
        num_tiles = grid[0] * grid[1]
        is_counted = num_tiles <= MOST_COUNTED
        arrived = arrived_on(x.device) if is_counted else torch.zeros(num_tiles, dtype=torch.int32, device=x.device)
    options = {} if tiling.registers is None else {"maxnreg": tiling.registers}
    _linear_kernel[grid](
        rows, words, scales, nested_absmax if nested else absmax, offset if nested else absmax,
        dynamic_levels_on(x.device), levels_on(x.device), x if bias is None else bias.contiguous(), narrow_rows, a_rows,
        out, partial, arrived, num_x_rows, num_rows, num_a_rows, num_columns, x.stride(0), out.stride(0),
        DESCRIBED=described, NESTED=nested, SHUFFLE=ptx, TOGETHER=ptx and tiling.together, HAS_BIAS=bias is not None,
        HAS_A=a is not None, SPLITS=tiling.splits,
        BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", STAGES=tiling.stages,
        num_warps=tiling.warps, enable_fp_fusion=False, **options,
    )  # fmt: skip
    return out


def _can_be_described(x: Tensor, packed: Tensor, absmax: Tensor, a: Tensor) -> bool:
    """Whether tensor descriptors can fetch these: rows that start at multiples of 16 bytes."""
    pitch = x.stride(0)
    return (
        (interpreting() or (has_descriptors(x.device) and x.dtype.itemsize == 2))
        and x.shape[1] % (4 * BLOCK) == 0
        and pitch >= x.shape[1]
        and pitch * x.itemsize % 16 == 0
        and all(tensor.data_ptr() % 16 == 0 for tensor in (x, packed, absmax, a))
    )


def _described(values: Tensor, num_rows: int, block_rows: int, block_columns: int) -> TensorDescriptor:
    """Values of a weight, [num_rows * columns], as a matrix [num_rows, columns] that is fetched in blocks."""
    num_columns = values.numel() // num_rows
    return TensorDescriptor(values, [num_rows, num_columns], [num_columns, 1], [block_rows, block_columns])


@torch.library.custom_op("grpo_kernels::nf4_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    num_rows: int,
) -> Tensor:
    return _launch_linear(x, packed, absmax, nested_absmax, offset, bias, num_rows)


@_linear_op.register_fake
def _(x, packed, absmax, nested_absmax, offset, bias, num_rows):
    return x.new_empty(x.shape[0], num_rows)
