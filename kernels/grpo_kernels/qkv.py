"""LoRA QKV: one projection of three parts, whose outputs are views of one tensor and whose gradients may be.
Knows nothing of heads, rotary embeddings or attention.

The mathematics is `lora_linear`'s, with the parts q, k and v (see there). What differs is the boundary: q, k and v
leave as views of one tensor [T, N_q + N_k + N_v], and when their gradients come back as neighbouring views of one
tensor, no copy joins them.

Shapes: T rows of x (tokens), K inputs, N_q + N_k + N_v outputs, r the rank.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels.dispatch import Impl, choose, isolated
from grpo_kernels.lora_linear import LoraFactors, column_parts, linear_backward, linear_forward
from grpo_kernels.nf4 import NF4


@isolated
def lora_qkv(
    x: Tensor, base: Tensor | NF4, factors: LoraFactors, bias: Tensor | None = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K] to q [..., N_q], k [..., N_k] and v [..., N_v], views of one tensor [..., N_q + N_k + N_v]."""
    fused = choose("lora_qkv", impl, x) == "triton"
    parts = _LoraQkv.apply(x.reshape(-1, x.shape[-1]), base, factors, bias, fused, factors.a, *factors.b)
    q, k, v = (part.view(*x.shape[:-1], part.shape[1]) for part in parts)
    return q, k, v


class _LoraQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base, factors, bias, fused, *_masters):
        out = linear_forward(ctx, x, base, factors, bias, fused)
        return tuple(column_parts(out, factors.b_mirror))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        grad_x, grad_a, grad_b = linear_backward(ctx, joined_columns(grads))
        return grad_x, None, None, None, None, grad_a, *grad_b


def joined_columns(parts: tuple[Tensor, ...]) -> Tensor:
    """The parts [T, N_j] beside each other, [T, sum N_j]: the tensor that they already are views of, or a copy."""
    first, width = parts[0], sum(part.shape[1] for part in parts)
    address, pitch = first.data_ptr(), first.stride(0)
    for part in parts:
        if part.data_ptr() != address or part.stride() != (pitch, 1) or pitch < width:
            return torch.cat(parts, dim=1)
        address += part.shape[1] * part.element_size()
    return first.as_strided((first.shape[0], width), (pitch, 1))
