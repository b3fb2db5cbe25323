"""NF4: weights of 4 bits in bitsandbytes' format: quantise, dequantise, join.
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
    cdiv,
    choose,
    isolated,
    tl,
    triton,
)

BLOCK = 64
NESTED_BLOCK = 256
MOST_COUNTED = 4096  # output tiles among which K is split; more of them fill any GPU without

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
    return nf4_double_quantize(quantized) if double_quant else quantized


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
        values = dequantize_torch(nf4, dtype)
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


def absmax_float32(nf4: NF4) -> Tensor:
    """The blocks' largest magnitudes, float32 [B], with double quantisation undone."""
    if nf4.nested_absmax is None or nf4.offset is None:
        return nf4.absmax
    codes = dynamic_levels_on(nf4.device)[nf4.absmax.int()]
    nested = torch.repeat_interleave(torch.stack([nf4.nested_absmax, nf4.offset]), NESTED_BLOCK, dim=1)[
        :, : codes.numel()
    ]
    return codes * nested[0] + nested[1]


def dequantize_torch(nf4: NF4, dtype: torch.dtype) -> Tensor:
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
    return absmax, torch.bucketize(scaled, _midpoints(levels_on(values.device)), out_int32=True).to(torch.uint8)


def nf4_double_quantize(nf4: NF4) -> NF4:
    """Double quantisation: absmax less its mean, in 8-bit codes of bitsandbytes' signed dynamic map, blocks of 256.

    The packed bytes stay the same memory. What has it already is returned as it is.
    """
    if nf4.nested_absmax is not None:
        return nf4
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
    codes = torch.bucketize(scaled, _midpoints(dynamic_levels_on(nf4.device)), out_int32=True).to(torch.uint8)
    return replace(
        nf4,
        absmax=codes.view(-1)[:num_blocks].clone(),
        nested_absmax=largest,
        offset=offset.expand(num_nested).contiguous(),
    )


def _empty(nf4: NF4, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=nf4.device)


@triton.jit
def block_scale(absmax, nested_absmax, offset, dynamic_levels, block, mask, NESTED: tl.constexpr):
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
    scale = block_scale(absmax, nested_absmax, offset, dynamic_levels, block, some, NESTED)
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
        dynamic_levels_on(out.device), levels_on(out.device), out, num_rows * num_columns, num_columns, out.stride(0),
        NESTED=nested, WHOLE_BLOCKS=num_columns % BLOCK == 0, PITCHED=not out.is_contiguous(), BLOCKS=blocks,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _make_constants(device: torch.device) -> None:
    """What launches need of a device is made with the first weight there, in a compiled function when it is traced.

    Made within a launch it could lie in the memory of a CUDA graph, which others would write to.
    """
    for make in (arrived_on, levels_on, dynamic_levels_on):
        make(device)


@functools.cache
def arrived_on(device: torch.device) -> Tensor:
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


@functools.cache
def levels_on(device: torch.device) -> Tensor:
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


@functools.cache
def _pair_levels(device: torch.device) -> Tensor:
    """The two levels of each byte, float32 [256, 2]."""
    levels = levels_on(device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)


@functools.cache
def dynamic_levels_on(device: torch.device) -> Tensor:
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
