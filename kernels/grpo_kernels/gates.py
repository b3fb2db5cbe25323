"""Gated activations (SwiGLU, GeGLU): activation(gate) * up, and its gradients without storing the activation.
Knows nothing of the projections before and after it.

Axes: N rows, I intermediate size. With a the activation and h = a(gate) up:

    dgate = dh up a'(gate)        dup = dh a(gate)

    silu       a(x) = x sigmoid(x)                                     a' = sigmoid(x) (1 + x (1 - sigmoid(x)))
    gelu       a(x) = x F(x), F the normal distribution function       a' = F(x) + x exp(-x^2 / 2) / sqrt(2 pi)
    gelu_tanh  a(x) = x (1 + tanh(u)) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3)

Everything is computed in float32 and rounded once. The backward reads gate, up and dh and writes dgate, dup and, if
asked, h again: an MLP that recomputes needs h for the gradient of the projection after it.

Floor: 3 I elements read or written forward, 5 I backward (6 I with h).
"""

from typing import Literal

import torch
from torch import Tensor

from grpo_kernels.dispatch import Impl, Operator, cdiv, choose, isolated, tl, triton

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")


def swiglu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """silu(gate) * up, [..., I], differentiable. `gate` and `up` may be the halves of one [..., 2 I] tensor."""
    return gated(gate, up, "silu", impl=impl)


@isolated
def gated(gate: Tensor, up: Tensor, activation: Activation, *, impl: Impl = "auto") -> Tensor:
    """activation(gate) * up, [..., I], differentiable.

    Raises ValueError for an unknown activation and for shapes or dtypes that differ.
    """
    _check(gate, up, activation)
    if choose("gated", impl, gate, up) == "torch":
        return _torch_gated(gate, up, activation)
    return _gated_op(gate, up, activation)


@isolated
def gated_backward(
    gate: Tensor,  # [..., I]
    up: Tensor,  # [..., I]
    grad: Tensor,  # [..., I]
    activation: Activation,
    *,
    out: Tensor | None = None,  # [..., 2 I]
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """(gradients of gate and up as the halves of one [..., 2 I] tensor, the product h [..., I]), in one pass.

    For a caller that did not keep h. `out` receives the gradients; it may be the [..., 2 I] tensor whose halves `gate`
    and `up` are, which then costs no memory.
    """
    _check(gate, up, activation)
    if choose("gated_backward", impl, gate, up, grad) == "torch":
        product = _torch_gated(gate, up, activation)
        grads = torch.cat(_torch_gated_backward(gate, up, grad, activation), -1)
        return (grads if out is None else out.copy_(grads)), product
    if out is not None and out.stride(-1) != 1:
        raise ValueError(f"out has strides {list(out.stride())}; give one whose last axis is contiguous.")
    grads = grad.new_empty(*grad.shape[:-1], 2 * grad.shape[-1]) if out is None else out
    product = torch.empty_like(grad, memory_format=torch.contiguous_format)
    grad_gate, grad_up = grads.chunk(2, -1)
    _fill_gradients(gate, up, grad, activation, grad_gate, grad_up, product)
    return grads, product


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}. Use one of {', '.join(ACTIVATIONS)}.")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {list(gate.shape)} {gate.dtype} and up {list(up.shape)} {up.dtype}; give both the same of both."
        )


# The torch twin.


def _torch_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gate_32, up_32 = _at_least_float32(gate), _at_least_float32(up)
    if activation == "silu":
        activated = torch.nn.functional.silu(gate_32)
    else:
        activated = torch.nn.functional.gelu(gate_32, approximate="tanh" if activation == "gelu_tanh" else "none")
    return (activated * up_32).to(gate.dtype)


def _torch_gated_backward(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        grad_gate, grad_up = torch.autograd.grad(_torch_gated(gate, up, activation), (gate, up), grad)
    return grad_gate, grad_up


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# The kernel, as autograd and torch.compile see it.


def _launch_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    product = torch.empty_like(gate, memory_format=torch.contiguous_format)
    I = gate.shape[-1]
    gate, up = _as_rows(gate), _as_rows(up)
    if gate.numel() > 0:
        _forward_kernel[_grid(gate)](
            gate,
            up,
            product,
            I,
            gate.stride(0),
            up.stride(0),
            I,
            ACTIVATION=activation,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return product


def _fake_gated(gate, up, activation):
    return gate.new_empty(gate.shape)


def _launch_gated_backward(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
    _fill_gradients(gate, up, grad, activation, grad_gate, grad_up, None)
    return grad_gate, grad_up


def _fake_gated_backward(gate, up, grad, activation):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx, inputs, output) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, grad: Tensor):
    gate, up = ctx.saved_tensors
    return (*_gated_backward_op(gate, up, grad, ctx.activation), None)


_gated_op = Operator("gated", _launch_gated, _fake_gated)
_gated_backward_op = Operator("gated_backward", _launch_gated_backward, _fake_gated_backward)
_gated_op.differentiate(_setup_context, _backward)

BLOCK = 1024
NUM_WARPS = 4


def _as_rows(tensor: Tensor) -> Tensor:
    """[..., I] as [N, I] whose last axis is contiguous; a view wherever the strides allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _grid(rows: Tensor) -> tuple[int, int]:
    # Rows first: a grid's other axes hold at most 65535.
    return rows.shape[0], cdiv(rows.shape[1], BLOCK)


def _fill_gradients(
    gate: Tensor, up: Tensor, grad: Tensor, activation: str, grad_gate: Tensor, grad_up: Tensor, product: Tensor | None
) -> None:
    """Fills grad_gate, grad_up and, if given, product; the first two have to be views of rows."""
    if gate.numel() == 0:
        return
    I = gate.shape[-1]
    gate, up, grad = _as_rows(gate), _as_rows(up), _as_rows(grad)
    grad_gate, grad_up = grad_gate.view(-1, I), grad_up.view(-1, I)
    _backward_kernel[_grid(gate)](
        gate, up, grad, grad_gate, grad_up, grad_gate if product is None else product,
        I, gate.stride(0), up.stride(0), grad.stride(0), grad_gate.stride(0), grad_up.stride(0), I,
        ACTIVATION=activation, PRODUCT=product is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """a(x) and a'(x)."""
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        value = x * sigmoid
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        distribution = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * distribution
        slope = distribution + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        cubic = x * x * x * 0.044715
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        sigmoid = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + cubic)))
        value = x * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return value, slope


@triton.jit
def _forward_kernel(
    gate, up, product, I, gate_stride, up_stride, product_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < I
    g = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activate(g, ACTIVATION)
    tl.store(product + row * product_stride + columns, (value * u).to(product.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    gate, up, grad, grad_gate, grad_up, product,
    I, gate_stride, up_stride, grad_stride, grad_gate_stride, grad_up_stride, product_stride,
    ACTIVATION: tl.constexpr, PRODUCT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < I
    g = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(grad + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activate(g, ACTIVATION)
    dtype = grad_gate.dtype.element_ty
    tl.store(grad_gate + row * grad_gate_stride + columns, (dh * u * slope).to(dtype), mask=mask)
    tl.store(grad_up + row * grad_up_stride + columns, (dh * value).to(dtype), mask=mask)
    if PRODUCT:
        tl.store(product + row * product_stride + columns, (value * u).to(dtype), mask=mask)
