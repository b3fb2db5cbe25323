"""LoRA MLP: gate and up, the gated activation, down: SwiGLU and GeGLU.
Knows nothing of norms or residuals.

    gate | up = x W_gu^T + LoRA        h = f(gate) * up        y = h W_d^T + LoRA

with f = SiLU for SwiGLU, GELU for GeGLU (arXiv 2002.05202), the projections as in `lora_linear`.

The fused form keeps x and the product [x W_gu^T | x A_gu^T], nothing else of size T * I, and keeps them before it
multiplies by W_d: where a layer is computed once more for its backward pass, that product is not (`kept_now`). Two
kernels stand between the products: forward, one adds the LoRA part of gate and up and writes h; backward, one
recomputes gate, up and h, writes d gate and d up over the kept product, and gathers dB_gate, dB_up and dA_down, which
need the tile in its registers.

    dh = dy W_d + s (dy B_d) A_d      d gate = dh * up * f'(gate)      d up = dh * f(gate)

In parts of some rows at a time it keeps x alone and multiplies by W_gu once more in its backward pass: nothing of size
T * I exists at any time. For a layer whose activations are not kept that is no more work, for it computes gate and up
again anyway. A base in 4 bits is dequantised once for all parts.

Shapes: T rows of x (tokens), D inputs and outputs, I inner width, r the rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels.dispatch import Impl, cdiv, choose, isolated, num_multiprocessors, shared_memory, tl, triton
from grpo_kernels.gates import ACTIVATIONS, Activation, gated
from grpo_kernels.lora import (
    LoraFactors,
    Product,
    decoded,
    gradient_of_input,
    is_decoding,
    lora_linear,
    product_float32,
    product_with_b,
    scaled,
    times_a,
    times_a_and_b,
    times_b,
)
from grpo_kernels.low_rank import add_low_rank
from grpo_kernels.nf4 import NF4
from grpo_kernels.saving import kept_now, tensors_of

# Of the backward kernel: rank, in a block -> tokens, columns of the inner width, warps, registers of a thread at most.
# A tile's three gradients are in registers. Where these do not do, every thread of the GPU has memory for the rest, for
# as long as the process lives: at rank 256, cut up as at 32, 4 KB each, 1 GiB of an H100.
BACKWARD_TILINGS = {64: (32, 64, 4, 168), 128: (32, 64, 8, None), 256: (16, 32, 8, None)}


@isolated
def lora_mlp(
    x: Tensor,
    gate_up_base: Tensor | NF4,
    gate_up_factors: LoraFactors,
    down_base: Tensor | NF4,
    down_factors: LoraFactors,
    activation: Activation = "silu",
    impl: Impl = "auto",
    rows_at_once: int | None = None,
) -> Tensor:
    """x [..., D] through the gated MLP: [..., D]. `gate_up_base` is [2 * I, D], gate first; `down_base` is [D, I].

    rows_at_once: in parts of about so many rows, of which x alone is kept; None: all at once, with what the backward
    pass reads. Ranks that differ, or are too large for the GPU, are computed by `lora_linear` and `gated`, which keep
    more.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}. Use 'silu' (SwiGLU), 'gelu' or 'gelu_tanh' (GeGLU).")
    if choose("lora_mlp", impl, x) == "torch":
        gate, up = lora_linear(x, gate_up_base, gate_up_factors, impl="torch").chunk(2, dim=-1)
        return lora_linear(_activate(gate, activation) * up, down_base, down_factors, impl="torch")
    rows = x.reshape(-1, x.shape[-1])
    if is_decoding(rows):
        gate, up = decoded(rows, gate_up_base, gate_up_factors, None, impl).chunk(2, dim=-1)
        h = gated(gate, up, activation, impl=impl)
        return decoded(h, down_base, down_factors, None, impl).view(x.shape)
    if not _has_fused_form(x, gate_up_factors.rank, down_factors.rank):
        gate, up = lora_linear(x, gate_up_base, gate_up_factors, impl=impl).chunk(2, dim=-1)
        return lora_linear(gated(gate, up, activation, impl=impl), down_base, down_factors, impl=impl)
    kind, *size = (_LoraMlpFused,) if rows_at_once is None else (_LoraMlpInParts, rows_at_once)
    out = kind.apply(
        torch.is_grad_enabled(), *size, rows, gate_up_base, gate_up_factors, down_base, down_factors, activation,
        gate_up_factors.a, *gate_up_factors.b, down_factors.a, *down_factors.b,
    )  # fmt: skip
    return out.view(x.shape)


def _has_fused_form(x: Tensor, rank: int, down_rank: int) -> bool:
    """Whether there is one rank, and for the backward kernel as much shared memory as it takes compiled for 8.0."""
    if rank != down_rank or rank > max(BACKWARD_TILINGS):
        return False
    block_t, block_i, *_ = _backward_tiling(rank)
    return (10 * block_i + 24 * _rank_block(rank)) * block_t * x.itemsize // 2 <= shared_memory(x.device)


def _backward_tiling(rank: int) -> tuple[int, int, int, int | None]:
    return BACKWARD_TILINGS[max(64, _rank_block(rank))]


def _activate(gate: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


class _LoraMlpFused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, has_gradient, x, gate_up_base, gate_up_factors, down_base, down_factors, activation, *_masters):
        gate_up = times_a(gate_up_base, gate_up_factors.a_mirror, x.dtype)(x)  # [T, 2 * I + R]
        if has_gradient:
            ctx.kept = kept_now(x, gate_up, *_read_by_backward(gate_up_factors, down_factors))
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ha = _times_down(
            gate_up, times_a(down_base, down_factors.a_mirror, x.dtype), gate_up_factors, down_factors, activation, out
        )
        ctx.bases, ctx.activation = (gate_up_base, down_base), activation
        ctx.ha = scaled(ha, down_factors.scale)  # r numbers a token, which stay even where the rest is computed again
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # grad [T, D]
        (x, gate_up, gu_scale, gu_a, b_gate, b_up, down_scale, down_a, b_down), ha = _taken(ctx)
        gate_up_base, down_base = ctx.bases
        inner = down_base.shape[1]
        grad_b_down = product_float32(grad.t(), ha)  # [D, r]
        grad_h = product_with_b(
            grad, down_base, [b_down], down_scale
        )  # [T, I + R], dh without its LoRA part | s dy B_d
        grad_b_gate, grad_b_up, grad_a_down = _launch_gated_backward(
            gate_up, (b_gate, b_up), gu_scale, grad_h, down_a, ctx.activation
        )
        del grad_h
        # x's gradient is wanted in every layer but the first, where it costs little to have it for nothing.
        grad_x, grad_xa = gradient_of_input(gate_up[:, : 2 * inner], gate_up_base, gu_a, [b_gate, b_up], gu_scale)
        grad_a = product_float32(grad_xa.t(), x)
        return None, grad_x, None, None, None, None, None, grad_a, grad_b_gate, grad_b_up, grad_a_down, grad_b_down


class _LoraMlpInParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        has_gradient,
        rows_at_once,
        x,
        gate_up_base,
        gate_up_factors,
        down_base,
        down_factors,
        activation,
        *_masters,
    ):
        if has_gradient:
            ctx.kept = kept_now(x, *_read_by_backward(gate_up_factors, down_factors))
        times_gate_up = times_a(gate_up_base, gate_up_factors.a_mirror, x.dtype)
        times_down = times_a(down_base, down_factors.a_mirror, x.dtype)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ha = torch.empty(x.shape[0], down_factors.rank, dtype=x.dtype, device=x.device)
        for part in _parts(x.shape[0], rows_at_once):
            gate_up = times_gate_up(x[part])
            ha[part] = _times_down(gate_up, times_down, gate_up_factors, down_factors, activation, out[part])
            del gate_up  # or it is there beside the next one
        ctx.bases, ctx.activation, ctx.rows_at_once = (gate_up_base, down_base), activation, rows_at_once
        ctx.ha = scaled(ha, down_factors.scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # grad [T, D]
        (x, gu_scale, gu_a, b_gate, b_up, down_scale, down_a, b_down), ha = _taken(ctx)
        gate_up_base, down_base = ctx.bases
        inner, width = down_base.shape[1], x.shape[1]
        times_gate_up, times_back = times_a_and_b(gate_up_base, gu_a, [b_gate, b_up], gu_scale, x.dtype)
        times_down_back = times_b(down_base, [b_down], down_scale, x.dtype)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums: list[Tensor] = []  # of dA, dB_gate, dB_up, dA_down
        for part in _parts(x.shape[0], ctx.rows_at_once):
            gate_up = times_gate_up(x[part])
            grad_h = times_down_back(grad[part])
            of_gates = _launch_gated_backward(gate_up, (b_gate, b_up), gu_scale, grad_h, down_a, ctx.activation)
            del grad_h
            extended = times_back(gate_up[:, : 2 * inner])
            del gate_up
            grad_xa = extended[:, width : width + gu_a.shape[0]]
            add_low_rank(extended, grad_xa, [gu_a], None, None, grad_x[part])
            gradients = [product_float32(grad_xa.t(), x[part]), *of_gates]
            del extended, grad_xa
            sums = [total.add_(each) for total, each in zip(sums, gradients, strict=True)] if sums else gradients
        grad_a, grad_b_gate, grad_b_up, grad_a_down = sums
        grad_b_down = product_float32(grad.t(), ha)  # [D, r]
        return (
            None, None, grad_x, None, None, None, None, None,
            grad_a, grad_b_gate, grad_b_up, grad_a_down, grad_b_down,
        )  # fmt: skip


def _read_by_backward(gate_up: LoraFactors, down: LoraFactors) -> tuple[Tensor, ...]:
    return gate_up.scale, gate_up.a_mirror, *gate_up.b_mirror, down.scale, down.a_mirror, *down.b_mirror


def _times_down(
    gate_up: Tensor,
    times_down: Product,
    gate_up_factors: LoraFactors,
    down_factors: LoraFactors,
    activation: Activation,
    out: Tensor,
) -> Tensor:
    """y [T, D] into `out`, and h A_d^T [T, r], of gate_up [T, 2 * I + R] = [x W_gu^T | x A_gu^T]."""
    inner = gate_up_factors.b_mirror[0].shape[0]
    h = torch.empty(gate_up.shape[0], inner, dtype=gate_up.dtype, device=gate_up.device)
    _launch_gated(gate_up, gate_up_factors.b_mirror, gate_up_factors.scale, activation, h)
    extended = times_down(h)  # [T, D + R]
    del h
    ha = extended[:, out.shape[1] : out.shape[1] + down_factors.rank]
    add_low_rank(extended, ha, [down_factors.b_mirror[0].t()], down_factors.scale, None, out)
    return ha


def _taken(ctx) -> tuple[tuple[Tensor, ...], Tensor]:
    """What was kept, and s h A_d^T [T, r]: freed with this call, as autograd frees what it keeps itself."""
    if ctx.kept is None:
        raise RuntimeError(
            "lora_mlp's backward writes over what its forward kept, so it runs once. Run the forward again."
        )
    kept, ha = tensors_of(ctx.kept), ctx.ha
    ctx.kept = ctx.ha = None
    return kept, ha


def _parts(num_rows: int, at_once: int) -> Sequence[slice]:
    """Rows in parts of one size, whole tiles of 128, and a smaller last one; one of none where there are no rows."""
    size = max(1, cdiv(cdiv(num_rows, max(1, cdiv(num_rows, at_once))), 128)) * 128
    return [slice(start, start + size) for start in range(0, max(1, num_rows), size)]


@triton.jit
def _gate(gate, ACTIVATION: tl.constexpr):
    """f(gate) and f'(gate), float32."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        return value, sigmoid * (1 + gate - value)
    if ACTIVATION == "gelu":
        cumulative = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        return gate * cumulative, cumulative + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    # tanh(u) = 2 sigmoid(2 u) - 1, and GELU's tanh form is gate * sigmoid(2 u).
    twice = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    sigmoid = tl.sigmoid(twice)
    slope = 1.5957691216057308 * (1 + 3 * 0.044715 * gate * gate)
    return gate * sigmoid, sigmoid + gate * sigmoid * (1 - sigmoid) * slope


@triton.jit
def _gated_kernel(
    gate_up, b_gate, b_up, scale, h, num_rows, inner, rank, gate_up_stride,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    r = tl.arange(0, BLOCK_R)
    factor_inside = (column < inner)[None, :] & (r < rank)[:, None]
    low_inside = (row < num_rows)[:, None] & (r < rank)[None, :]
    inside = (row < num_rows)[:, None] & (column < inner)[None, :]
    kept = gate_up + row.to(tl.int64)[:, None] * gate_up_stride
    xa = kept + 2 * inner + r[None, :]
    factor = column[None, :] * rank + r[:, None]
    s = tl.load(scale)
    gate = s * tl.dot(
        tl.load(xa, mask=low_inside, other=0.0),
        tl.load(b_gate + factor, mask=factor_inside, other=0.0),
        input_precision=PRECISION,
    )
    up = s * tl.dot(
        tl.load(xa + rank, mask=low_inside, other=0.0),
        tl.load(b_up + factor, mask=factor_inside, other=0.0),
        input_precision=PRECISION,
    )
    gate += tl.load(kept + column[None, :], mask=inside, other=0.0).to(tl.float32)
    up += tl.load(kept + inner + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value, _ = _gate(gate, ACTIVATION)
    target = row.to(tl.int64)[:, None] * inner + column[None, :]
    tl.store(h + target, (value * up).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward_kernel(
    gate_up, b_gate, b_up, scale, grad_h, a_down, partial,
    num_rows, inner, rank, gate_up_stride, grad_h_stride, rows_of_program,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_I columns of gate and up of a stretch of rows: d gate, d up in place; its dB_gate, dB_up, dA_down."""
    column = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    stretch = tl.program_id(1)
    r = tl.arange(0, BLOCK_R)
    factor_inside = (column < inner)[None, :] & (r < rank)[:, None]
    factor = column[None, :] * rank + r[:, None]
    gate_factor = tl.load(b_gate + factor, mask=factor_inside, other=0.0)  # [R, I], B_gate^T
    up_factor = tl.load(b_up + factor, mask=factor_inside, other=0.0)
    down_factor = tl.load(a_down + r[:, None] * inner + column[None, :], mask=factor_inside, other=0.0)
    s = tl.load(scale)
    grad_b_gate = tl.zeros([BLOCK_I, BLOCK_R], dtype=tl.float32)
    grad_b_up = tl.zeros([BLOCK_I, BLOCK_R], dtype=tl.float32)
    grad_a_down = tl.zeros([BLOCK_I, BLOCK_R], dtype=tl.float32)
    first = stretch * rows_of_program
    for start in range(first, tl.minimum(first + rows_of_program, num_rows), BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        inside = (row < num_rows)[:, None] & (column < inner)[None, :]
        low_inside = (row < num_rows)[:, None] & (r < rank)[None, :]
        kept = gate_up + row.to(tl.int64)[:, None] * gate_up_stride
        incoming = grad_h + row.to(tl.int64)[:, None] * grad_h_stride
        xa_gate = tl.load(kept + 2 * inner + r[None, :], mask=low_inside, other=0.0)
        xa_up = tl.load(kept + 2 * inner + rank + r[None, :], mask=low_inside, other=0.0)
        grad_ha = tl.load(incoming + inner + r[None, :], mask=low_inside, other=0.0)  # s dy B_d
        gate = s * tl.dot(xa_gate, gate_factor, input_precision=PRECISION)
        gate += tl.load(kept + column[None, :], mask=inside, other=0.0).to(tl.float32)
        up = s * tl.dot(xa_up, up_factor, input_precision=PRECISION)
        up += tl.load(kept + inner + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.dot(grad_ha, down_factor, input_precision=PRECISION)
        grad += tl.load(incoming + column[None, :], mask=inside, other=0.0).to(tl.float32)
        value, slope = _gate(gate, ACTIVATION)
        grad_gate = (grad * up * slope).to(xa_gate.dtype)
        grad_up = (grad * value).to(xa_gate.dtype)
        h = (value * up).to(xa_gate.dtype)
        tl.store(kept + column[None, :], grad_gate, mask=inside)
        tl.store(kept + inner + column[None, :], grad_up, mask=inside)
        grad_b_gate = tl.dot(tl.trans(grad_gate), xa_gate, grad_b_gate, input_precision=PRECISION)
        grad_b_up = tl.dot(tl.trans(grad_up), xa_up, grad_b_up, input_precision=PRECISION)
        grad_a_down = tl.dot(tl.trans(h), grad_ha, grad_a_down, input_precision=PRECISION)
    target = column[:, None] * rank + r[None, :]
    target_inside = (column < inner)[:, None] & (r < rank)[None, :]
    size = inner * rank
    partial += stretch.to(tl.int64) * 3 * size
    tl.store(partial + target, grad_b_gate * s, mask=target_inside)
    tl.store(partial + size + target, grad_b_up * s, mask=target_inside)
    tl.store(partial + 2 * size + r[None, :] * inner + column[:, None], grad_a_down, mask=target_inside)


def _launch_gated(gate_up: Tensor, b: tuple[Tensor, ...], scale: Tensor, activation: Activation, h: Tensor) -> None:
    """h [T, I] from gate_up [T, 2 * I + R] = [x W_gu^T | x A_gu^T] and B of gate and up, each [I, r]."""
    num_rows, inner = h.shape
    if h.numel() == 0:
        return
    block_t, block_i = 64, 64
    _gated_kernel[(triton.cdiv(inner, block_i), triton.cdiv(num_rows, block_t))](
        gate_up, b[0], b[1], scale, h, num_rows, inner, b[0].shape[1], gate_up.stride(0),
        ACTIVATION=activation, PRECISION=_precision(h),
        BLOCK_T=block_t, BLOCK_I=block_i, BLOCK_R=_rank_block(b[0].shape[1]), num_warps=4,
    )  # fmt: skip


def _launch_gated_backward(
    gate_up: Tensor, b: tuple[Tensor, Tensor], scale: Tensor, grad_h: Tensor, a_down: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """dB_gate [I, r], dB_up [I, r], dA_down [r, I] in float32; gate_up's first 2 * I columns become d gate | d up."""
    (inner, rank), num_rows = b[0].shape, gate_up.shape[0]
    block_t, block_i, warps, registers = _backward_tiling(rank)
    tiles = triton.cdiv(inner, block_i)
    # With no rows the kernel still writes its zeros.
    stretches = max(1, min(8 * num_multiprocessors(gate_up.device) // tiles, triton.cdiv(num_rows, 4 * block_t)))
    rows_of_program = triton.cdiv(triton.cdiv(num_rows, stretches), block_t) * block_t
    partial = torch.empty(stretches, 3, inner * rank, dtype=torch.float32, device=gate_up.device)
    _gated_backward_kernel[(tiles, stretches)](
        gate_up, b[0], b[1], scale, grad_h, a_down, partial,
        num_rows, inner, rank, gate_up.stride(0), grad_h.stride(0), rows_of_program,
        ACTIVATION=activation, PRECISION=_precision(gate_up),
        BLOCK_T=block_t, BLOCK_I=block_i, BLOCK_R=_rank_block(rank), num_warps=warps, num_stages=3, maxnreg=registers,
    )  # fmt: skip
    grad_b_gate, grad_b_up, grad_a_down = partial.sum(0) if stretches > 1 else partial[0]
    return grad_b_gate.view(inner, rank), grad_b_up.view(inner, rank), grad_a_down.view(rank, inner)


def _rank_block(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _precision(tensor: Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"
