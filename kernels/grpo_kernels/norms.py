"""RMSNorm, alone and fused with the residual addition before it.
Knows nothing of what the norm feeds.

Axes: N rows, D hidden size. For s = x, or s = x + residual rounded to their dtype, and w = weight + offset:

    r = 1 / sqrt(mean(s^2) + eps)        y = s r w
    g = dy w        ds = r (g - s r mean(g s r)) [+ the gradient of the sum itself]        dw = sum_rows dy s r

In float32, rounded once (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4). Gemma keeps weight - 1: offset = 1.

Floor in elements: 2 D forward and 3 D backward; fused with the addition 4 D and 4 D.
"""

import functools

import torch
from torch import Tensor

from grpo_kernels.dispatch import (
    Impl,
    Operator,
    cdiv,
    choose,
    isolated,
    next_power_of_2,
    num_multiprocessors,
    tl,
    triton,
)


@isolated
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, impl: Impl = "auto") -> Tensor:
    """x [..., D] normalised over D and times weight [D] + offset; differentiable in both."""
    _check(x, weight)
    if choose("rms_norm", impl, x, weight) == "torch":
        return _torch_norm(x, weight, eps, offset)
    normed, _, _ = _norm_op(x, None, weight, eps, offset)
    return normed


@isolated
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), each [..., D]; differentiable in all three, through both results."""
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"x is {list(x.shape)} {x.dtype} and residual {list(residual.shape)} {residual.dtype}; give both the same."
        )
    if choose("add_rms_norm", impl, x, weight) == "torch":
        total = x + residual
        return _torch_norm(total, weight, eps, offset), total
    normed, total, _ = _norm_op(x, residual, weight, eps, offset)
    return normed, total


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {list(weight.shape)}; x is {list(x.shape)}, so give [{x.shape[-1]}].")


def _torch_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = weight.to(compute) + offset if offset else weight.to(compute)
    return torch.nn.functional.rms_norm(x.to(compute), x.shape[-1:], scale, eps).to(x.dtype)


# The kernel, as autograd and torch.compile see it.


def _launch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed rows, x + residual (empty without one), and r [N] in float32."""
    normed, total, scales = _allocate(x, residual)
    rows, weight = _as_rows(x), weight.contiguous()
    N, D = rows.shape
    if N > 0:
        others = rows if residual is None else _as_rows(residual)
        shape = _shape(D)
        _forward_kernel[(cdiv(N, shape["ROWS"]),)](
            rows, others, weight, normed, total, scales, N, D, rows.stride(0), others.stride(0), eps, offset,
            ADD=residual is not None, **shape,
        )  # fmt: skip
    return normed, total, scales


def _allocate(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = x.numel() // x.shape[-1]
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(normed)
    return normed, total, torch.empty(num_rows, dtype=torch.float32, device=x.device)


def _fake_norm(x, residual, weight, eps, offset):
    return _allocate(x, residual)


def _launch_norm_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    scales: Tensor,
    offset: float,
    weight_is_trained: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum [..., D] and of the weight [D], the latter empty unless it is trained."""
    grad = torch.empty_like(total, memory_format=torch.contiguous_format)
    rows, weight = _as_rows(total), weight.contiguous()
    N, D = rows.shape
    if N == 0:
        return grad, torch.zeros_like(weight) if weight_is_trained else weight.new_empty(0)
    grad_normed = _as_rows(grad_normed)
    others = grad_normed if grad_total is None else _as_rows(grad_total)
    shape = _shape(D)
    programs = cdiv(N, shape["ROWS"])
    if weight_is_trained:
        programs = min(programs, 2 * num_multiprocessors(total.device))
    partial_sums = scales.new_empty(programs if weight_is_trained else 0, D)
    _backward_kernel[(programs,)](
        grad_normed, others, rows, weight, scales, grad, partial_sums,
        N, D, grad_normed.stride(0), others.stride(0), rows.stride(0), programs, offset,
        ADD=grad_total is not None, WEIGHT=weight_is_trained, **shape,
    )  # fmt: skip
    return grad, partial_sums.sum(0).to(weight.dtype) if weight_is_trained else weight.new_empty(0)


def _fake_norm_backward(grad_normed, grad_total, total, weight, scales, offset, weight_is_trained):
    return total.new_empty(total.shape), weight.new_empty(weight.shape if weight_is_trained else (0,))


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, _, ctx.offset = inputs
    _, total, scales = output
    ctx.mark_non_differentiable(*((scales, total) if residual is None else (scales,)))
    ctx.set_materialize_grads(False)
    ctx.adds = residual is not None
    ctx.save_for_backward(total if ctx.adds else x, weight, scales)


def _backward(ctx, grad_normed: Tensor | None, grad_total: Tensor | None, _scales):
    total, weight, scales = ctx.saved_tensors
    if grad_normed is None:
        return grad_total, grad_total, None, None, None
    grad, grad_weight = _norm_backward_op(
        grad_normed, grad_total if ctx.adds else None, total, weight, scales, ctx.offset, ctx.needs_input_grad[2]
    )
    return grad, grad if ctx.adds else None, grad_weight if ctx.needs_input_grad[2] else None, None, None


_norm_op = Operator("rms_norm", _launch_norm, _fake_norm)
_norm_backward_op = Operator("rms_norm_backward", _launch_norm_backward, _fake_norm_backward)
_norm_op.differentiate(_setup_context, _backward)


def _as_rows(tensor: Tensor) -> Tensor:
    """[..., D] as [N, D] whose last axis is contiguous; a view wherever the strides allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@functools.cache
def _shape(D: int) -> dict[str, int]:
    """One wide row, or several narrow ones, to a program: about 2048 elements for each 4 warps."""
    block = next_power_of_2(D)
    return {"BLOCK": block, "ROWS": max(1, 2048 // block), "num_warps": min(16, max(4, block // 512))}


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    x, residual, weight, normed, total, scales, N, D, x_stride, residual_stride, eps, offset,
    ADD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < N)[:, None] & (columns < D)
    wide = rows.to(tl.int64)[:, None]
    s = tl.load(x + wide * x_stride + columns, mask=mask, other=0.0)
    if ADD:
        s = s.to(tl.float32) + tl.load(residual + wide * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
        s = s.to(total.dtype.element_ty)
        tl.store(total + wide * D + columns, s, mask=mask)
    s = s.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(s * s, 1) / D + eps)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32) + offset
    tl.store(normed + wide * D + columns, (s * scale[:, None] * w).to(normed.dtype.element_ty), mask=mask)
    tl.store(scales + rows, scale, mask=rows < N)


@triton.jit(do_not_specialize=["N", "num_programs"])
def _backward_kernel(
    grad_normed, grad_total, total, weight, scales, grad, partial_sums,
    N, D, grad_stride, grad_total_stride, total_stride, num_programs, offset,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32) + offset
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), num_programs):
        rows = block * ROWS + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (columns < D)
        wide = rows.to(tl.int64)[:, None]
        dy = tl.load(grad_normed + wide * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(total + wide * total_stride + columns, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scales + rows, mask=rows < N, other=0.0)[:, None]
        unit = s * scale
        g = dy * w
        ds = scale * (g - unit * (tl.sum(g * unit, 1) / D)[:, None])
        if ADD:
            ds += tl.load(grad_total + wide * grad_total_stride + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad + wide * D + columns, ds.to(grad.dtype.element_ty), mask=mask)
        if WEIGHT:
            grad_weight += dy * unit
    if WEIGHT:
        offsets = tl.program_id(0) * D + tl.arange(0, BLOCK)
        tl.store(partial_sums + offsets, tl.sum(grad_weight, 0), mask=tl.arange(0, BLOCK) < D)
