"""What the LoRA tests share: random projections, and the projection in plain autograd, at any precision.
Knows nothing of how grpo_kernels computes it.
"""

from dataclasses import replace

import torch
from grpo_kernels.lora import LoraFactors, empty_with_room
from grpo_kernels.nf4 import NF4, nf4_dequantize, nf4_quantize
from torch import Tensor


def random_base(num_outputs: int, num_inputs: int, dtype: torch.dtype, device: torch.device, kind: str) -> Tensor | NF4:
    weight = torch.randn(num_outputs, num_inputs, device=device) / num_inputs**0.5
    return weight.to(dtype) if kind == "dense" else nf4_quantize(weight.to(dtype), double_quant=kind == "nf4 double")


def random_factors(
    sizes: list[int], num_inputs: int, rank: int, dtype: torch.dtype, device: torch.device, scale: float = 0.75
) -> LoraFactors:
    a = (torch.randn(len(sizes) * rank, num_inputs, device=device) / num_inputs**0.5).requires_grad_()
    b = tuple(torch.randn(size, rank, device=device).mul_(0.3).requires_grad_() for size in sizes)
    mirrors = (a.detach().to(dtype), tuple(part.detach().to(dtype) for part in b))
    return LoraFactors(a, b, *mirrors, torch.tensor([scale], device=device))


def random_projection(
    sizes: list[int],
    num_inputs: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    kind: str,
    scale: float = 0.75,
) -> tuple[Tensor | NF4, LoraFactors]:
    """Base and factors; of kind "dense, A below" they are one piece of memory."""
    factors = random_factors(sizes, num_inputs, rank, dtype, device, scale)
    base = random_base(sum(sizes), num_inputs, dtype, device, kind.removesuffix(", A below"))
    if kind == "dense, A below":
        weight, a = empty_with_room(sum(sizes), len(sizes) * rank, num_inputs, dtype, device)
        base, factors = weight.copy_(base), replace(factors, a_mirror=a.copy_(factors.a_mirror))
    return base, factors


def plain(base: Tensor | NF4, dtype: torch.dtype, compute: torch.dtype) -> Tensor:
    """The base as a dense weight, rounded to `dtype` as the kernels see it, then in `compute`."""
    return (nf4_dequantize(base, dtype, impl="torch") if isinstance(base, NF4) else base).to(compute)


def leaves(factors: LoraFactors, compute: torch.dtype) -> list[Tensor]:
    """A and the B_j as the kernels multiply by them, in `compute`, requiring gradients."""
    return [t.detach().to(compute).requires_grad_() for t in (factors.a_mirror, *factors.b_mirror)]


def reference_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: list[Tensor], scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    rows, rank, outputs = 0, b[0].shape[1], []
    for j, b_part in enumerate(b):
        part = x @ weight[rows : rows + b_part.shape[0]].t()
        outputs.append(part + (x @ a[j * rank : (j + 1) * rank].t()) @ b_part.t() * scale.to(x.dtype))
        rows += b_part.shape[0]
    out = torch.cat(outputs, dim=-1)
    return out if bias is None else out + bias.to(x.dtype)
