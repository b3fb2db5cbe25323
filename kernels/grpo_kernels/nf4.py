"""NF4: weights of 4 bits in bitsandbytes' format: quantise, dequantise, multiply by few rows.
Knows nothing of layers, LoRA or models.

The format (QLoRA, arXiv 2305.14314; the layout is that of bitsandbytes, which also fixes every rounding here): the
weight [N, K] is read row by row and cut in blocks of 64 values. A block keeps its largest magnitude, `absmax`, and
each value becomes the nearest of 16 levels of value / absmax: w = NF4_LEVELS[code] * absmax. Two codes share a byte,
the even element in the high four bits. With double quantisation the absmax values, less their mean (`offset`), become
codes of 8 bits in blocks of 256.

Shapes: N rows (outputs), K columns (inputs), B = ceil(N * K / 64) blocks, C = ceil(B / 256) nested blocks, M rows of x.
"""

import functools
from dataclasses import dataclass, replace

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
    next_power_of_2,
    num_multiprocessors,
    shared_memory,
    tl,
    triton,
)

BLOCK = 64
NESTED_BLOCK = 256
WIDE = 3 * 2**23  # values of a weight from which on large tiles leave no multiprocessor idle
MOST_COUNTED = 4096  # output tiles among which K is split; more of them fill any GPU without
LARGE = 160 * 1024  # bytes of shared memory that the largest tiles need (A100, H100 and later)

# The 16 quantiles of a normal distribution of QLoRA's appendix E, in the float32 values that bitsandbytes uses.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NF4:
    """A weight [N, K] in 4 bits. `nested_absmax` and `offset` are there when the absmax values are quantised too."""

    packed: Tensor  # uint8 [ceil(N * K / 2)], the even element in the high four bits
    absmax: Tensor  # float32 [B], or uint8 [B] when double-quantised
    shape: tuple[int, int]  # (N, K)
    nested_absmax: Tensor | None = None  # float32 [C]
    offset: Tensor | None = None  # float32 [C]: bitsandbytes has one for a tensor, several tensors joined have several

    def __post_init__(self) -> None:
        if type(self.packed) in (Tensor, torch.nn.Parameter):  # and no fake one of a tracer
            _make_constants(self.packed.device)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def to(self, device: torch.device | str) -> "NF4":
        packed, absmax, *nested = (tensor.to(device) for tensor in self._tensors())
        return NF4(packed, absmax, self.shape, *nested)

    def row_slice(self, start: int, stop: int) -> "NF4":
        """Rows start to stop, over the same memory. Needs K % 64 == 0, so that no block spans two rows.

        A double-quantised slice that starts inside a nested block gets its absmax values in float32, as a copy.
        """
        num_rows, num_columns = self.shape
        if num_columns % BLOCK:
            raise ValueError(
                f"Rows of {num_columns} columns cannot be sliced: blocks of {BLOCK} values span two rows. "
                "Dequantise first."
            )
        if not 0 <= start <= stop <= num_rows:
            raise ValueError(f"Rows {start} to {stop} are not within the {num_rows} rows of this weight.")
        first, last = start * num_columns // BLOCK, stop * num_columns // BLOCK
        packed, shape = self.packed[first * BLOCK // 2 : last * BLOCK // 2], (stop - start, num_columns)
        if self.nested_absmax is None or self.offset is None:
            return NF4(packed, self.absmax[first:last], shape)
        if first % NESTED_BLOCK:
            return NF4(packed, absmax_float32(self)[first:last], shape)
        nested = slice(first // NESTED_BLOCK, -(-last // NESTED_BLOCK))
        return NF4(packed, self.absmax[first:last], shape, self.nested_absmax[nested], self.offset[nested])

    def _tensors(self) -> tuple[Tensor, ...]:
        if self.nested_absmax is None or self.offset is None:
            return (self.packed, self.absmax)
        return (self.packed, self.absmax, self.nested_absmax, self.offset)


def nf4_concat(parts: list[NF4]) -> NF4:
    """The rows of all parts below each other, [sum N_j, K]. Needs K % 64 == 0.

    Double quantisation is kept when every part but the last fills its nested blocks; else absmax becomes float32.
    """
    columns = {part.shape[1] for part in parts}
    if len(columns) != 1 or columns.pop() % BLOCK:
        raise ValueError(
            f"Parts of {[part.shape for part in parts]} cannot be joined by rows: "
            f"the columns must agree and be a multiple of {BLOCK}."
        )
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    packed = torch.cat([part.packed for part in parts])
    nested = [(part.nested_absmax, part.offset) for part in parts]
    if all(a is not None for a, _ in nested) and not any(part.absmax.numel() % NESTED_BLOCK for part in parts[:-1]):
        absmax = torch.cat([part.absmax for part in parts])
        nested_absmax = torch.cat([a for a, _ in nested if a is not None])
        return NF4(packed, absmax, shape, nested_absmax, torch.cat([o for _, o in nested if o is not None]))
    return NF4(packed, torch.cat([absmax_float32(part) for part in parts]), shape)


def nf4_quantize(weight: Tensor, double_quant: bool = False, impl: Impl = "auto") -> NF4:
    """The weight [N, K] (float32, float16 or bfloat16) in 4 bits, bit for bit as bitsandbytes writes it.

    It runs once for a weight, so torch serves on every device and `impl` makes no difference.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"A weight is [rows, columns] in float32, float16 or bfloat16; this is {weight.dtype} {list(weight.shape)}."
        )
    values = weight.detach().reshape(-1)
    absmax, codes = _scale_to_levels(values)
    packed = codes[0::2] << 4 | codes[1::2]
    quantized = NF4(packed, absmax, (weight.shape[0], weight.shape[1]))
    return _nest_absmax(quantized) if double_quant else quantized


@isolated
def nf4_dequantize(nf4: NF4, dtype: torch.dtype, out: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """The weight [N, K] in `dtype`, each value rounded once from float32 level * absmax.

    `out` may be a view whose rows are further apart than K.
    """
    if out is not None and (out.shape != nf4.shape or out.dtype != dtype):
        raise ValueError(f"out is {out.dtype} {list(out.shape)}; the weight needs {dtype} {list(nf4.shape)}.")
    if out is not None and out.stride(1) != 1:
        raise ValueError(f"out has strides {list(out.stride())}; give one whose rows are contiguous.")
    if choose("nf4_dequantize", impl, _empty(nf4, dtype)) == "torch":
        values = _dequantize_torch(nf4, dtype)
        return values if out is None else out.copy_(values)
    if out is None:
        out = torch.empty(nf4.shape, dtype=dtype, device=nf4.device)
    if torch.compiler.is_compiling():
        _dequantize_op(nf4.packed, nf4.absmax, nf4.nested_absmax, nf4.offset, out)
    else:
        dequantize_into(nf4, out)
    return out


def dequantize_into(nf4: NF4, out: Tensor) -> None:
    """`nf4_dequantize` by its kernel, for callers that have chosen it already. out [N, K], its rows at any pitch."""
    _launch_dequantize(nf4.packed, nf4.absmax, nf4.nested_absmax, nf4.offset, out)


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
        out = torch.nn.functional.linear(rows, _dequantize_torch(weight, x.dtype), bias)
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


def absmax_float32(nf4: NF4) -> Tensor:
    """The blocks' largest magnitudes, float32 [B], with double quantisation undone."""
    if nf4.nested_absmax is None or nf4.offset is None:
        return nf4.absmax
    codes = _dynamic_levels(nf4.device)[nf4.absmax.int()]
    nested = torch.repeat_interleave(torch.stack([nf4.nested_absmax, nf4.offset]), NESTED_BLOCK, dim=1)[
        :, : codes.numel()
    ]
    return codes * nested[0] + nested[1]


def _dequantize_torch(nf4: NF4, dtype: torch.dtype) -> Tensor:
    num_values = nf4.shape[0] * nf4.shape[1]
    levels = (
        _pair_levels(nf4.device).index_select(0, nf4.packed.int()).view(-1)
    )  # float32 [N * K], with the odd one's padding
    absmax = absmax_float32(nf4)
    if num_values % BLOCK == 0:
        values = levels.view(-1, BLOCK).mul_(absmax[:, None])
    else:
        values = levels[:num_values] * torch.repeat_interleave(absmax, BLOCK)[:num_values]
    return values.view(nf4.shape).to(dtype)


def _scale_to_levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """absmax float32 [B] and codes uint8 [N * K], padded to an even count, of values [N * K]."""
    num_values, values = values.numel(), values.float()
    whole = num_values - num_values % BLOCK
    blocks = values[:whole].view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)
    if whole < num_values:
        # bitsandbytes divides in the short last block and multiplies by the reciprocal in the others.
        last = values[whole:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, values[whole:] / last])
    scaled = torch.nn.functional.pad(scaled, (0, num_values % 2))
    return absmax, torch.bucketize(scaled, _midpoints(_levels(values.device)), out_int32=True).to(torch.uint8)


def _nest_absmax(nf4: NF4) -> NF4:
    """Double quantisation: absmax less its mean, in 8-bit codes of bitsandbytes' signed dynamic map, blocks of 256."""
    offset = nf4.absmax.mean()
    num_blocks = nf4.absmax.numel()
    num_nested = -(-num_blocks // NESTED_BLOCK)
    centred = torch.nn.functional.pad(nf4.absmax - offset, (0, num_nested * NESTED_BLOCK - num_blocks)).view(
        num_nested, NESTED_BLOCK
    )
    largest = centred.abs().amax(1)
    # A block of zeros has code 0 throughout; so has the value -1.
    scaled = torch.where(largest[:, None] > 0, centred * (1.0 / largest)[:, None], -1.0)
    if nf4.device.type == "cpu":
        # bitsandbytes' CPU library looks codes up on a grid of 2**16 points; on a GPU it compares with exact midpoints.
        grid = ((scaled.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).int()
        scaled = grid / 65535.0 * 2 - 1
    codes = torch.bucketize(scaled, _midpoints(_dynamic_levels(nf4.device)), out_int32=True).to(torch.uint8)
    return replace(
        nf4,
        absmax=codes.view(-1)[:num_blocks].clone(),
        nested_absmax=largest,
        offset=offset.expand(num_nested).contiguous(),
    )


def _empty(nf4: NF4, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=nf4.device)


@triton.jit
def _block_scale(absmax, nested_absmax, offset, dynamic_levels, block, mask, NESTED: tl.constexpr):
    """absmax in float32 of the blocks `block` (int64 or int32, any shape)."""
    if NESTED:
        code = tl.load(absmax + block, mask=mask, other=0)
        scale = tl.load(dynamic_levels + code) * tl.load(nested_absmax + block // 256, mask=mask, other=0.0)
        scale += tl.load(offset + block // 256, mask=mask, other=0.0)
    else:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    return scale


@triton.jit
def _dequantize_kernel(
    packed, absmax, nested_absmax, offset, dynamic_levels, levels, out,
    num_values, num_columns, out_stride,
    NESTED: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, PITCHED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of 64 values. WHOLE_BLOCKS: 64 divides K. PITCHED: besides, the rows of `out` are apart."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    element = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    some = block * 64 < num_values
    if WHOLE_BLOCKS:
        code = tl.load(packed + byte, mask=some[:, None], other=0)
    else:
        code = tl.load(packed + byte, mask=byte * 2 < num_values, other=0)
    scale = _block_scale(absmax, nested_absmax, offset, dynamic_levels, block, some, NESTED)
    even = tl.load(levels + (code >> 4)) * scale[:, None]
    odd = tl.load(levels + (code & 15)) * scale[:, None]
    values = tl.interleave(even, odd).to(out.dtype.element_ty)
    if PITCHED:
        row = block * 64 // num_columns
        tl.store(out + element + (row * (out_stride - num_columns))[:, None], values, mask=some[:, None])
    elif WHOLE_BLOCKS:
        tl.store(out + element, values, mask=some[:, None])
    else:
        tl.store(out + element, values, mask=element < num_values)


def _launch_dequantize(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, out: Tensor
) -> None:
    num_rows, num_columns = out.shape
    if out.numel() == 0:
        return
    if num_columns % BLOCK and not out.is_contiguous():
        contiguous = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        _launch_dequantize(packed, absmax, nested_absmax, offset, contiguous)
        out.copy_(contiguous)
        return
    nested = nested_absmax is not None
    blocks = 64
    # Without fusion of multiply and add: double quantisation rounds the product, then the sum, as bitsandbytes does.
    _dequantize_kernel[(cdiv(absmax.numel(), blocks),)](
        packed, absmax, nested_absmax if nested else absmax, offset if nested else absmax,
        _dynamic_levels(out.device), _levels(out.device), out, num_rows * num_columns, num_columns, out.stride(0),
        NESTED=nested, WHOLE_BLOCKS=num_columns % BLOCK == 0, PITCHED=not out.is_contiguous(), BLOCKS=blocks,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


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
        scale = _block_scale(absmax, nested_absmax, offset, dynamic_levels, block, within_row, NESTED)
    return scale


# With the sum passing through here, Triton issues a step's products together and waits for them once. Else it waits
# after each sixteen columns, which costs programs of four warps up to 17%; with eight warps the others fill the time.
_PASS = tl.constexpr("mov.b32 $0, $1;")


@triton.jit
def _tile_of_nf4(
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
        accumulator = _tile_of_nf4(
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
    partial, arrived = _levels(x.device), words
    described = not eager and _can_be_described(x, packed, absmax, a_rows)
    if described:
        tiling = _described_tiling(num_x_rows, num_rows, num_columns, nested, x.device)
        rows = TensorDescriptor.from_tensor(x, [tiling.block_m, tiling.block_k])
        words = _described(words, num_rows, tiling.block_n, tiling.block_k // 8)
        if tiling.block_k == 4 * BLOCK:
            scales = absmax.view(torch.int32) if nested else _described(absmax, num_rows, tiling.block_n, 4)
        if a is not None:
            narrow_rows = TensorDescriptor.from_tensor(x, [tiling.block_m, BLOCK])
            a_rows = TensorDescriptor.from_tensor(a, [tiling.block_n, BLOCK])
    else:
        tiling = _addressed_tiling(num_x_rows, num_rows, num_columns, x.dtype, x.device)
    tiles = cdiv(num_rows, tiling.block_n) + cdiv(num_a_rows, tiling.block_n)
    grid = (tiles, cdiv(num_x_rows, tiling.block_m), tiling.splits)
    if tiling.splits > 1:
        partial = torch.empty((tiling.splits, *out.shape), dtype=torch.float32, device=x.device)
        num_tiles = grid[0] * grid[1]
        is_counted = num_tiles <= MOST_COUNTED
        arrived = _arrived(x.device) if is_counted else torch.zeros(num_tiles, dtype=torch.int32, device=x.device)
    options = {} if tiling.registers is None else {"maxnreg": tiling.registers}
    _linear_kernel[grid](
        rows, words, scales, nested_absmax if nested else absmax, offset if nested else absmax,
        _dynamic_levels(x.device), _levels(x.device), x if bias is None else bias.contiguous(), narrow_rows, a_rows,
        out, partial, arrived, num_x_rows, num_rows, num_a_rows, num_columns, x.stride(0), out.stride(0),
        DESCRIBED=described, NESTED=nested, SHUFFLE=ptx, TOGETHER=ptx and tiling.warps == 4, HAS_BIAS=bias is not None,
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


@dataclass(frozen=True)
class _Tiling:
    """How a product is cut up: output tiles [block_n, block_m], K in `splits` stretches, block_k columns a step."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int
    registers: int | None = None  # the most of a thread; None leaves it to the compiler


@functools.cache
def _described_tiling(num_x_rows: int, num_rows: int, num_columns: int, nested: bool, device: torch.device) -> _Tiling:
    """Tiles that descriptors fetch, and the split of K, from measurements on an H100.

    LOG.md, "2026-11-21 nf4_linear fed by tensor descriptors: works, 0.49x to 0.94x".

    With few rows of x, reading weights and turning them into numbers takes the time, and three or four programs share a
    multiprocessor. With more, reading x does, which wide tiles read less often.
    """
    is_wide = num_rows * num_columns >= WIDE
    block_m = max(16, next_power_of_2(num_x_rows))
    block_m = min(block_m, 256 if is_wide else 128)
    if block_m <= 32:
        # Nested scales are looked up in three steps, of which each takes a stage.
        block_n, block_k, warps, stages, programs = 64, 256, 4, 5 if nested else 3, 4 if block_m == 16 else 3
    elif block_m == 64 and nested:
        block_n, block_k, warps, stages, programs = 64, 256, 4, 3, 3
    elif block_m == 64 and is_wide:
        block_n, block_k, warps, stages, programs = 128, 256, 8, 3, 1
    elif block_m <= 128:
        block_n, block_k, warps, stages, programs = 64, 128, 4, 3, 3 if block_m == 64 else 2
    else:
        block_n, block_k, warps, stages, programs = 128, 128, 8, 3, 1
    tiles = cdiv(num_rows, block_n) * cdiv(num_x_rows, block_m)
    shortest = 512 if block_m <= 32 else 1024
    splits = _power_of_2(programs * num_multiprocessors(device) // tiles, num_columns // shortest)
    return _Tiling(block_m, block_n, block_k, warps, stages, splits, registers=128 if block_m == 16 else None)


@functools.cache
def _addressed_tiling(
    num_x_rows: int, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device
) -> _Tiling:
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
    return _Tiling(block_m, block_n, 128, warps, stages, splits)


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


@torch.compiler.assume_constant_result
def _make_constants(device: torch.device) -> None:
    """What launches need of a device is made with the first weight there, in a compiled function when it is traced.

    Made within a launch it could lie in the memory of a CUDA graph, which others would write to.
    """
    for make in (_arrived, _levels, _dynamic_levels):
        make(device)


@functools.cache
def _arrived(device: torch.device) -> Tensor:
    """A counter for each output tile, zero between launches: the last program to arrive sets it back."""
    return torch.zeros(MOST_COUNTED, dtype=torch.int32, device=device)


@torch.library.custom_op("grpo_kernels::nf4_dequantize", mutates_args=("out",))
def _dequantize_op(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, out: Tensor
) -> None:
    _launch_dequantize(packed, absmax, nested_absmax, offset, out)


@_dequantize_op.register_fake
def _(packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, out: Tensor) -> None:
    return None


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
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    num_rows: int,
) -> Tensor:
    return x.new_empty(x.shape[0], num_rows)


@functools.cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


@functools.cache
def _pair_levels(device: torch.device) -> Tensor:
    """The two levels of each byte, float32 [256, 2]."""
    levels = _levels(device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)


@functools.cache
def _dynamic_levels(device: torch.device) -> Tensor:
    """bitsandbytes' signed dynamic map (arXiv 1511.04561, 2110.02861), float32 [256] in rising order.

    Seven decades, each with twice the steps of the one below, at the centres of equal steps from 0.1 to 1 of the
    decade; and 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2.0
        decade = ((10 ** (exponent - 6)) * centres).tolist()
        values += decade + [-value for value in decade]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _midpoints(levels: Tensor) -> Tensor:
    return (levels[:-1] + levels[1:]) / 2
