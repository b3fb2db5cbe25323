"""LoRA linear: a frozen base weight, dense or NF4, plus trained low-rank factors, in one differentiable function.
Knows nothing of what the projection is for, nor of optimizers.

A projection of P parts (q, k and v, say) holds their base rows below each other. With W_j, A_j, B_j of part j, scale s:

    y_j  = x W_j^T + s (x A_j^T) B_j^T + bias_j
    dx   = sum_j  dy_j W_j + s (dy_j B_j) A_j
    dA_j = s (dy_j B_j)^T x
    dB_j = s dy_j^T (x A_j^T)

(LoRA, arXiv 2106.09685.) With A below W, x [W; A]^T = [x W^T | x A^T] is one product, and with the B_j beside W,
dy [W | B] = [dy W | dy B] is another. An NF4 base is dequantised in the forward and once more in the backward, so
autograd never holds it, and each time the factors are put in their place. A dense base has its A there from the start
if its memory is that of `empty_with_room`. What is left is a product of rank r, added in one pass over the result.

Shapes: T rows of x (tokens), K inputs, N = sum N_j outputs, r the rank, R = P r rounded up for aligned memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels.dispatch import Impl, Operator, cdiv, choose, isolated
from grpo_kernels.low_rank import add_low_rank, place_b
from grpo_kernels.nf4 import NF4, dequantize_into, nf4_dequantize
from grpo_kernels.nf4_product import nf4_linear_with_a
from grpo_kernels.nf4_tilings import is_fused

MOST_DECODED_ROWS = 256

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LoraFactors:
    """The low-rank factors of a projection of P parts.

    The masters get the gradients, in float32. The mirrors, their copies in the compute dtype, are what is multiplied
    by; in float32 they are the masters themselves. All are contiguous.
    """

    a: Tensor  # float32 [P * r, K], A of the parts below each other
    b: tuple[Tensor, ...]  # P times float32 [N_j, r]
    a_mirror: Tensor  # [P * r, K]
    b_mirror: tuple[Tensor, ...]  # P times [N_j, r]
    scale: Tensor  # float32 [1], on the device: alpha / r, or 0 for the reference policy

    @property
    def rank(self) -> int:
        return self.b[0].shape[1]


def empty_with_room(
    num_outputs: int, num_factors: int, num_inputs: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Memory for a dense base [N, K] and, right below it, for the mirror of A [P * r, K]. What is in it is undefined.

    Whoever multiplies by both finds them there, in whatever tensors over this memory they are handed on.
    """
    joined = torch.empty(_joined_rows(num_outputs, num_factors), num_inputs, dtype=dtype, device=device)
    weight, a, padding = joined.split([num_outputs, num_factors, len(joined) - num_outputs - num_factors])
    padding.zero_()
    return weight, a


@isolated
def lora_linear(
    x: Tensor, base: Tensor | NF4, factors: LoraFactors, bias: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """x [..., K] through the projection: [..., N]. Differentiable in x and the masters; base and bias are frozen.

    Few rows without gradient, as in decoding, are computed as `lora_linear_inference` does.
    """
    rows = x.reshape(-1, x.shape[-1])
    fused = choose("lora_linear", impl, x) == "triton"
    if fused and is_decoding(rows):
        out = decoded(rows, base, factors, bias, impl)
    else:
        out = _LoraLinear.apply(rows, base, factors, bias, fused, factors.a, *factors.b)
    return out.view(*x.shape[:-1], out.shape[-1])


def is_decoding(rows: Tensor) -> bool:
    """Whether x [T, K] has few rows and no gradient. With more rows, scores are rounded as the trained forward's."""
    return not torch.is_grad_enabled() and rows.shape[0] <= MOST_DECODED_ROWS


def decoded(rows: Tensor, base: Tensor | NF4, factors: LoraFactors, bias: Tensor | None, impl: Impl) -> Tensor:
    """`lora_linear_inference`, rows [T, K] -> [T, N], for decoders that launch one by one (`eager` in `nf4_linear`)."""
    if torch.compiler.is_compiling():
        return lora_linear_inference(rows, base, factors, bias, impl)
    return _infer(rows, base, factors.a_mirror, factors.b_mirror, factors.scale, bias, impl, eager=True)


@isolated
def lora_linear_inference(
    x: Tensor, base: Tensor | NF4, factors: LoraFactors, bias: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """`lora_linear` without gradient for a rollout engine: x [M, K] -> [M, N], M from 0 to thousands.

    Two launches for few rows: [x W^T | x A^T], in which an NF4 base stays in 4 bits while that is faster, and one pass
    that adds every part; three where A does not lie below a dense base. It reads the mirrors and the scale, not the
    masters. Safe in a CUDA graph; what a replay computes follows the factors and the scale. With an NF4 base not on two
    streams at once.

    Under torch.compile, or called as such, it is one of two operators:
        grpo_kernels::lora_linear_dense(x, weight, a, b, scale, bias=None, impl="auto")
        grpo_kernels::lora_linear_nf4(x, packed, absmax, nested_absmax, offset, num_rows, a, b, scale, bias=None,
                                      impl="auto")
    """
    a, b = factors.a_mirror, list(factors.b_mirror)
    if isinstance(base, NF4):
        nested = base.nested_absmax, base.offset
        return _inference_nf4_op(x, base.packed, base.absmax, *nested, base.shape[0], a, b, factors.scale, bias, impl)
    return _inference_dense_op(x, base, a, b, factors.scale, bias, impl)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base, factors, bias, fused, *_masters):
        return linear_forward(ctx, x, base, factors, bias, fused)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x, grad_a, grad_b = linear_backward(ctx, grad)
        return grad_x, None, None, None, None, grad_a, *grad_b


def linear_forward(
    ctx, x: Tensor, base: Tensor | NF4, factors: LoraFactors, bias: Tensor | None, fused: bool
) -> Tensor:
    """y [T, N] of x [T, K]; `ctx` keeps what `linear_backward` needs."""
    _check(x, base, factors.a_mirror, factors.b_mirror, bias)
    out, xa = (fused_forward if fused else twin_forward)(x, base, factors, bias)
    ctx.base, ctx.fused = base, fused
    ctx.save_for_backward(x, xa, factors.scale, factors.a_mirror, *factors.b_mirror)
    return out


def _check(x: Tensor, base: Tensor | NF4, a: Tensor, b: Sequence[Tensor], bias: Tensor | None) -> None:
    num_outputs, num_inputs = base.shape
    if x.shape[1] != num_inputs or a.shape[1] != num_inputs:
        raise ValueError(
            f"The base is {list(base.shape)}, x {list(x.shape)} and A {list(a.shape)}; give both {num_inputs} columns."
        )
    if isinstance(base, NF4) and base.packed.numel() != cdiv(num_outputs * num_inputs, 2):
        raise ValueError(f"The base is {list(base.shape)}, in {base.packed.numel()} bytes; a byte holds two values.")
    if sum(part.shape[0] for part in b) != num_outputs or sum(part.shape[1] for part in b) != a.shape[0]:
        raise ValueError(
            f"The base is {list(base.shape)}, A {list(a.shape)} and B {[list(part.shape) for part in b]}; "
            f"the parts' rows have to add up to {num_outputs} and their ranks to {a.shape[0]}."
        )
    if bias is not None and bias.shape != (num_outputs,):
        raise ValueError(f"bias is {list(bias.shape)}; give [{num_outputs}].")


def linear_backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """dx [T, K] where x needs it, dA [P * r, K] and the dB_j [N_j, r] in float32, of grad [T, N]."""
    x, xa, scale, a, *b = ctx.saved_tensors
    backward = fused_backward if ctx.fused else twin_backward
    return backward(grad, x, xa, ctx.base, a, b, scale, ctx.needs_input_grad[0])


def twin_forward(x: Tensor, base: Tensor | NF4, factors: LoraFactors, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [T, N] and s x A^T [T, P * r] of x [T, K], in separate products."""
    out = torch.nn.functional.linear(x, dense_weight(base, x.dtype), bias)
    xa = scaled(x @ factors.a_mirror.t(), factors.scale)
    for out_part, xa_part, b in parts_of(out, xa, factors.b_mirror):
        out_part.addmm_(xa_part, b.t())
    return out, xa


def twin_backward(
    grad: Tensor,
    x: Tensor,
    xa: Tensor,
    base: Tensor | NF4,
    a: Tensor,
    b: Sequence[Tensor],
    scale: Tensor,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    grad_xa = scaled(joined_low_rank(grad, b), scale)  # [T, P * r]
    grad_b = [product_float32(grad_part.t(), xa_part) for grad_part, xa_part, _ in parts_of(grad, xa, b)]
    grad_x = torch.mm(grad, dense_weight(base, x.dtype)).addmm_(grad_xa, a) if needs_x else None
    return grad_x, product_float32(grad_xa.t(), x), grad_b


def fused_forward(x: Tensor, base: Tensor | NF4, factors: LoraFactors, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [T, N] and s x A^T [T, P * r] of x [T, K], from one product."""
    extended = product_with_a(x, base, factors.a_mirror)
    num_outputs = base.shape[0]
    out = torch.empty(x.shape[0], num_outputs, dtype=x.dtype, device=x.device)
    xa = extended[:, num_outputs : num_outputs + factors.a_mirror.shape[0]]
    add_low_rank(extended, xa, _transposed(factors.b_mirror), factors.scale, bias, out)
    return out, scaled(xa, factors.scale)


def fused_backward(
    grad: Tensor,
    x: Tensor,
    xa: Tensor,
    base: Tensor | NF4,
    a: Tensor,
    b: Sequence[Tensor],
    scale: Tensor,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """dx [T, K], dA [P * r, K] and the dB_j [N_j, r] of grad [T, N], the last two in float32."""
    grad_b = [product_float32(grad_part.t(), xa_part) for grad_part, xa_part, _ in parts_of(grad, xa, b)]
    if not needs_x:
        return None, product_float32(scaled(joined_low_rank(grad, b), scale).t(), x), grad_b
    grad_x, grad_xa = gradient_of_input(grad, base, a, b, scale)
    return grad_x, product_float32(grad_xa.t(), x), grad_b


def _infer_dense(
    x: Tensor, weight: Tensor, a: Tensor, b: list[Tensor], scale: Tensor, bias: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    return _infer(x, weight, a, b, scale, bias, impl)


def _infer_nf4(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    num_rows: int,
    a: Tensor,
    b: list[Tensor],
    scale: Tensor,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    base = NF4(packed, absmax, (num_rows, a.shape[1]), nested_absmax, offset)
    return _infer(x, base, a, b, scale, bias, impl)


@torch.no_grad()
def _infer(
    x: Tensor,
    base: Tensor | NF4,
    a: Tensor,
    b: Sequence[Tensor],
    scale: Tensor,
    bias: Tensor | None,
    impl: Any,
    eager: bool = False,
) -> Tensor:
    _check(x, base, a, b, bias)
    if choose("lora_linear_inference", impl, x) == "torch":
        return twin_forward(x, base, LoraFactors(a, tuple(b), a, tuple(b), scale), bias)[0]
    num_outputs, num_factors = base.shape[0], a.shape[0]
    if isinstance(base, NF4) and is_fused(x.shape[0], base, impl, eager, with_a=True):
        extended = nf4_linear_with_a(x, base, a, num_outputs + _padded(num_factors), eager)
    else:
        extended = product_with_a(x, base, a)
    out = torch.empty(x.shape[0], num_outputs, dtype=x.dtype, device=x.device)
    xa = extended[:, num_outputs : num_outputs + num_factors]
    add_low_rank(extended, xa, _transposed(b), scale, bias, out)
    return out


def _fake_inference_dense(x, weight, a, b, scale, bias=None, impl="auto"):
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_inference_nf4(x, packed, absmax, nested_absmax, offset, num_rows, a, b, scale, bias=None, impl="auto"):
    return x.new_empty(x.shape[0], num_rows)


_inference_dense_op = Operator("lora_linear_dense", _infer_dense, _fake_inference_dense)
_inference_nf4_op = Operator("lora_linear_nf4", _infer_nf4, _fake_inference_nf4)


def gradient_of_input(
    grad: Tensor, base: Tensor | NF4, a: Tensor, b: Sequence[Tensor], scale: Tensor
) -> tuple[Tensor, Tensor]:
    """dx [T, K] and s [dy_1 B_1 | ...] [T, P * r] of grad [T, N], from one product."""
    num_inputs = a.shape[1]
    extended = product_with_b(grad, base, b, scale)
    grad_xa = extended[:, num_inputs : num_inputs + a.shape[0]]
    grad_x = torch.empty(grad.shape[0], num_inputs, dtype=grad.dtype, device=grad.device)
    add_low_rank(extended, grad_xa, [a], None, None, grad_x)
    return grad_x, grad_xa


def product_with_a(x: Tensor, base: Tensor | NF4, a: Tensor) -> Tensor:
    """[x W^T | x A^T], [T, N + R], for x [T, K] and a [P * r, K]. The columns beyond N + P * r are undefined."""
    return times_a(base, a, x.dtype)(x)


def times_a(base: Tensor | NF4, a: Tensor, dtype: torch.dtype) -> Product:
    """`product_with_a` for any number of x: an NF4 base is dequantised once, and its weights live as long as this."""
    if (joined := _joined(base, a, dtype)) is not None:
        return lambda x: x @ joined.t()
    if isinstance(base, NF4):
        weight, _ = _dequantized_between(base, a, [], None, dtype)
        return lambda x: x @ weight.t()
    dense, num_outputs = base.to(dtype), base.shape[0]

    def product(x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], num_outputs + _padded(a.shape[0]), dtype=dtype, device=x.device)
        torch.mm(x, dense.t(), out=out[:, :num_outputs])
        torch.mm(x, a.t(), out=out[:, num_outputs : num_outputs + a.shape[0]])
        return out

    return product


def product_with_b(grad: Tensor, base: Tensor | NF4, b: Sequence[Tensor], scale: Tensor) -> Tensor:
    """[dy W | s dy_1 B_1 | s dy_2 B_2 ...], [T, K + R], for grad [T, N] and the B_j [N_j, r].

    The columns beyond K + P * r are undefined.
    """
    return times_b(base, b, scale, grad.dtype)(grad)


def times_b(base: Tensor | NF4, b: Sequence[Tensor], scale: Tensor, dtype: torch.dtype) -> Product:
    """`product_with_b` for any number of dy, as `times_a`."""
    if isinstance(base, NF4):
        _, weight = _dequantized_between(base, None, b, scale, dtype)
        return lambda grad: grad @ weight
    dense, rank, num_inputs = base.to(dtype), b[0].shape[1], base.shape[1]

    def product(grad: Tensor) -> Tensor:
        out = torch.empty(grad.shape[0], num_inputs + _padded(len(b) * rank), dtype=dtype, device=grad.device)
        torch.mm(grad, dense, out=out[:, :num_inputs])
        out[:, num_inputs : num_inputs + len(b) * rank] = joined_low_rank(grad, b) * scale
        return out

    return product


def times_a_and_b(
    base: Tensor | NF4, a: Tensor, b: Sequence[Tensor], scale: Tensor, dtype: torch.dtype
) -> tuple[Product, Product]:
    """`times_a` and `times_b` over the same dequantised weights."""
    if not isinstance(base, NF4):
        return times_a(base, a, dtype), times_b(base, b, scale, dtype)
    with_a, with_b = _dequantized_between(base, a, b, scale, dtype)
    return lambda x: x @ with_a.t(), lambda grad: grad @ with_b


def _dequantized_between(
    base: NF4, a: Tensor | None, b: Sequence[Tensor], scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """W dequantised once: with A below it, [N + R, K], and with the s B_j beside it, [N, K + R], of those that are
    given. What pads them is undefined."""
    num_outputs, num_inputs = base.shape
    rows = num_outputs + (_padded(a.shape[0]) if a is not None else 0)
    columns = num_inputs + (_padded(len(b) * b[0].shape[1]) if b else 0)
    weight = torch.empty(rows, columns, dtype=dtype, device=base.packed.device)
    dequantize_into(base, weight[:num_outputs, :num_inputs])
    if a is not None:
        weight[num_outputs : num_outputs + a.shape[0], :num_inputs] = a
    if b:
        assert scale is not None
        place_b(b, scale, weight[:num_outputs, num_inputs:])
    return weight[:, :num_inputs], weight[:num_outputs]


def joined_low_rank(grad: Tensor, b: Sequence[Tensor]) -> Tensor:
    """[dy_1 B_1 | dy_2 B_2 ...], [T, P * r]."""
    products = [part @ b_part for part, b_part in zip(column_parts(grad, b), b, strict=True)]
    return products[0] if len(b) == 1 else torch.cat(products, dim=1)


def dense_weight(base: Tensor | NF4, dtype: torch.dtype) -> Tensor:
    """The base weight [N, K] as a tensor to multiply by."""
    return nf4_dequantize(base, dtype) if isinstance(base, NF4) else base.to(dtype)


def product_float32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right as float32, with no rounding to the inputs' dtype in between."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def column_parts(columns: Tensor, b: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns [T, N_j] of each part in [T, N]."""
    return [columns] if len(b) == 1 else columns.split([part.shape[0] for part in b], dim=1)


def parts_of(columns: Tensor, low_rank: Tensor, b: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each part's columns of [T, N], its columns of [T, P * r], and its B."""
    if len(b) == 1:
        return [(columns, low_rank, b[0])]
    return list(zip(column_parts(columns, b), low_rank.split(b[0].shape[1], dim=1), b, strict=True))


def _joined(base: Tensor | NF4, a: Tensor, dtype: torch.dtype) -> Tensor | None:
    """[W; A; zeros], [N + R, K], where they lie so (`empty_with_room`) and are in this dtype."""
    # A compiler traces with tensors that have no address.
    if isinstance(base, NF4) or not base.dtype == a.dtype == dtype or torch.compiler.is_compiling():
        return None
    num_inputs, rows = base.shape[1], _joined_rows(base.shape[0], a.shape[0])
    if not (base.is_contiguous() and a.is_contiguous() and a.data_ptr() == base.data_ptr() + base.nbytes):
        return None
    # Two tensors may be neighbours by chance, each in memory of its own.
    memory = base.untyped_storage()
    end = (base.storage_offset() + rows * num_inputs) * base.element_size()
    if memory.data_ptr() != a.untyped_storage().data_ptr() or memory.nbytes() < end:
        return None
    return base.as_strided((rows, num_inputs), (num_inputs, 1))


def _joined_rows(num_outputs: int, num_factors: int) -> int:
    """N + R: with whole tiles of 128, cuBLAS is up to 14% faster on few rows of x than with the fewest that do."""
    return -(-(num_outputs + num_factors) // 128) * 128


def _transposed(b: Sequence[Tensor]) -> list[Tensor]:
    return [part.contiguous().t() for part in b]


def scaled(low_rank: Tensor, scale: Tensor) -> Tensor:
    """scale * low_rank [T, r], in low_rank's dtype, multiplied in float32."""
    return torch.mul(low_rank, scale, out=torch.empty(low_rank.shape, dtype=low_rank.dtype, device=low_rank.device))


def _padded(count: int) -> int:
    """Rounded up so that rows of the extended products stay aligned to 16 bytes and more."""
    return -(-count // 16) * 16
