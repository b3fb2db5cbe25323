"""Grouped products: rows sorted by expert, each times the weight of its own expert, base and LoRA.
Knows nothing of routers, activations or models.

Axes: N tokens, k experts a token, S = N k pairs of both, E experts, K columns (inputs), M rows (outputs), r rank.

The pairs are sorted by expert, so that an expert's rows lie together and `offsets` [E] says where they end. The base
is [E M, K], the experts' rows below each other, dense or in NF4; it is frozen. In NF4 it is dequantised for a product
and let go, in the backward pass again; forward, few rows are multiplied by what stays in 4 bits (grouped_nf4.py). The
factors are laid out as PEFT does those of a three-dimensional parameter (ParamWrapper):

    a [E r, K]   row e r + j is row j of expert e's A          b [M, r E]   column j E + e is column j of expert e's B

    y_s = W_e x_s + scale B_e A_e x_s          e the expert of row s

torch's grouped product does all of it: one call for a matrix of each expert, forward and backward. It wants rows of a
multiple of 16 bytes, so what has not is padded with zeros, which in models that people use is at most the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels.dispatch import Impl
from grpo_kernels.grouped_nf4 import grouped_nf4_linear, stays_packed
from grpo_kernels.lora import dense_weight
from grpo_kernels.nf4 import BLOCK, NF4, nf4_quantize

ALIGNED = 16  # bytes


@dataclass(frozen=True)
class Routing:
    """Which rows go to which expert, sorted."""

    order: Tensor  # [S], the pair that a sorted row is; pair n k + j is the j-th choice of token n
    inverse: Tensor  # [S], the sorted row of a pair
    experts: Tensor  # [S], of the sorted rows
    offsets: Tensor  # int32 [E], where an expert's rows end
    choices: int  # k

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int) -> Routing:
        """chosen: the experts of each token, [N, k]."""
        flat = chosen.reshape(-1)
        experts, order = torch.sort(flat, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        offsets = torch.searchsorted(experts, torch.arange(num_experts, device=flat.device), right=True)
        return cls(order, inverse, experts, offsets.int(), chosen.shape[-1])

    def spread(self, x: Tensor) -> Tensor:
        """[N, D] -> [S, D]: each token once for each of its experts, sorted."""
        return _Spread.apply(x, self)

    def gathered(self, rows: Tensor) -> Tensor:
        """[S, D] sorted -> [N, k, D]."""
        return _Gathered.apply(rows, self).unflatten(0, (-1, self.choices))


class _Spread(torch.autograd.Function):
    """A gather whose backward is one too: nothing is added in an order that may change."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return x.index_select(0, routing.order // routing.choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        pairs = grad.index_select(0, ctx.routing.inverse)
        return pairs.unflatten(0, (-1, ctx.routing.choices)).sum(1), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return rows.index_select(0, routing.inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.routing.order), None


@dataclass(frozen=True)
class ExpertFactors:
    """The low-rank factors of all experts, as the module's docstring lays them out. The masters, float32, get the
    gradients; the mirrors, in the dtype of the computation, are what is multiplied by."""

    a: Tensor
    b: Tensor
    a_mirror: Tensor
    b_mirror: Tensor
    scale: Tensor  # float32 [1], on the device: alpha / r, or 0 for the reference policy


def quantize_experts(weights: Tensor, device: torch.device) -> NF4:
    """The weights [E, M, K] in NF4 on `device`, as one of [E M, K]: each expert moved and quantised by itself. Where
    blocks of 64 span two experts they are quantised together."""
    count, rows, columns = weights.shape
    if rows * columns % BLOCK:
        return nf4_quantize(weights.flatten(0, 1).contiguous().to(device))
    parts = [nf4_quantize(weight.to(device).contiguous()) for weight in weights]
    packed, absmax = torch.cat([part.packed for part in parts]), torch.cat([part.absmax for part in parts])
    return NF4(packed, absmax, (count * rows, columns))


def grouped_linear(
    x: Tensor, base: Tensor | NF4, offsets: Tensor, factors: ExpertFactors | None = None, impl: Impl = "auto"
) -> Tensor:
    """Sorted rows x [S, K] by the weights of their experts: [S, M]. Differentiable in x and the masters."""
    if x.dim() != 2 or x.shape[1] != base.shape[1] or base.shape[0] % len(offsets):
        raise ValueError(
            f"x is {list(x.shape)} and the base {list(base.shape)} of {len(offsets)} experts; give [S, K] and [E M, K]."
        )
    if factors is None:
        return _Grouped.apply(x, base, offsets, impl)
    return _GroupedLora.apply(x, base, offsets, factors, impl, factors.a, factors.b)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor | NF4, offsets: Tensor, impl: Impl) -> Tensor:
        ctx.base, ctx.offsets = base, offsets
        return _of_base(x, base, offsets, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return product(grad, _by_expert(ctx.base, ctx.offsets, grad.dtype), ctx.offsets), None, None, None


class _GroupedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | NF4,
        offsets: Tensor,
        factors: ExpertFactors,
        impl: Impl,
        *_masters: Tensor,
    ) -> Tensor:
        a, b = _factors_by_expert(factors, len(offsets))
        low = product(x, a.mT, offsets)
        ctx.base, ctx.offsets, ctx.factors = base, offsets, factors
        ctx.save_for_backward(x, low)
        out = _of_base(x, base, offsets, impl)
        return out.add_(product(low * factors.scale.to(low.dtype), b.mT, offsets))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, low = ctx.saved_tensors
        offsets, factors = ctx.offsets, ctx.factors
        a, b = _factors_by_expert(factors, len(offsets))
        scaled = grad * factors.scale.to(grad.dtype)
        grad_low = product(scaled, b, offsets)
        grad_x = product(grad, _by_expert(ctx.base, offsets, grad.dtype), offsets).add_(product(grad_low, a, offsets))
        grad_a = outer_product(grad_low, x, offsets).float()  # [E, r, K]
        grad_b = outer_product(scaled, low, offsets).float()  # [E, M, r]
        return grad_x, None, None, None, None, grad_a.flatten(0, 1), grad_b.permute(1, 2, 0).flatten(1)


def _of_base(x: Tensor, base: Tensor | NF4, offsets: Tensor, impl: Impl) -> Tensor:
    """[S, K] -> [S, M], without the adapter."""
    if isinstance(base, NF4) and stays_packed(x, base, len(offsets), impl):
        return grouped_nf4_linear(x, base, offsets)
    return product(x, _by_expert(base, offsets, x.dtype).mT, offsets)


def _by_expert(base: Tensor | NF4, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """[E M, K] -> dense [E, M, K]."""
    return dense_weight(base, dtype).unflatten(0, (len(offsets), -1))


def _factors_by_expert(factors: ExpertFactors, count: int) -> tuple[Tensor, Tensor]:
    """A [E, r, K] and B [E, M, r]."""
    a = factors.a_mirror.unflatten(0, (count, -1))
    return a, factors.b_mirror.unflatten(1, (-1, count)).permute(2, 0, 1).contiguous()


def product(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Rows x [S, I], each by the matrix of its expert, [E, I, O]: [S, O]."""
    inner, outer = weights.shape[1:]
    x = _padded(x.contiguous(), (inner,))
    if weights.stride(1) == 1:  # as a transposed [E, O, I] is
        weights = _padded(weights.mT.contiguous(), (outer, inner)).mT
    else:
        weights = _padded(weights.contiguous(), (inner, outer))
    return F.grouped_mm(x, weights, offs=offsets)[:, :outer]


def outer_product(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """For each expert left_e^T right_e, over its rows of [S, I] and [S, O]: [E, I, O]."""
    sizes = left.shape[1], right.shape[1]
    left, right = (_padded(side.contiguous(), (side.shape[1],)) for side in (left, right))
    return F.grouped_mm(left.t(), right, offs=offsets)[:, : sizes[0], : sizes[1]]


def _padded(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """With zeros up to a multiple of 16 bytes in the last dimensions, of these sizes; itself where that is nothing."""
    multiple = ALIGNED // tensor.itemsize
    missing = [-size % multiple for size in sizes]
    return F.pad(tensor, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else tensor
