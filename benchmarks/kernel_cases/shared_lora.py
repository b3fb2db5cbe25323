"""What the cases of LoRA projections share: bases, factors, PEFT's layers over the same, and what is right in float64.
Knows nothing of how contests are run or reported.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from contest import Run, relative_error
from grpo_kernels.lora import LoraFactors, empty_with_room
from grpo_kernels.nf4 import NF4, nf4_concat, nf4_dequantize, nf4_quantize
from torch import Tensor

RANK = 32
CHECKED_ROWS = 256


def quantized(parts: list[Tensor]) -> NF4:
    """The parts quantised one by one, as rivals hold them, and joined."""
    return nf4_concat([nf4_quantize(part, double_quant=True) for part in parts])


def random_factors(sizes: list[int], num_inputs: int) -> LoraFactors:
    a = torch.randn(len(sizes) * RANK, num_inputs, device="cuda").div_(num_inputs**0.5).requires_grad_()
    b = tuple(torch.randn(size, RANK, device="cuda").mul_(0.02).requires_grad_() for size in sizes)
    return LoraFactors(
        a, b, a.detach().bfloat16(), tuple(part.detach().bfloat16() for part in b), torch.ones(1, device="cuda")
    )


def with_a_below(weight: Tensor, factors: LoraFactors) -> tuple[Tensor, LoraFactors]:
    """A dense base and its factors as a policy holds them."""
    base, a = empty_with_room(weight.shape[0], *factors.a_mirror.shape, weight.dtype, weight.device)
    return base.copy_(weight), replace(factors, a_mirror=a.copy_(factors.a_mirror))


def with_b_beside(weight: Tensor, factors: LoraFactors) -> Tensor:
    """[W | B], each part's B in columns of its own: [N, K + R]."""
    return torch.cat([weight, torch.block_diag(*factors.b_mirror)], dim=1)


def peft_layers(weights: list[Tensor], factors: LoraFactors) -> list[torch.nn.Module]:
    """bitsandbytes' 4-bit linears under PEFT's LoRA, with these weights [N_j, K] and these factors, in bfloat16."""
    import bitsandbytes
    import peft

    holder = torch.nn.Module()
    for j, weight in enumerate(weights):
        layer = bitsandbytes.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16)
        layer.weight = bitsandbytes.nn.Params4bit(
            weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        holder.add_module(f"part_{j}", layer.cuda())
    names = [f"part_{j}" for j in range(len(weights))]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, lora_dropout=0.0)
    peft.inject_adapter_in_model(config, holder)
    layers = [getattr(holder, name) for name in names]
    for layer, a, b in zip(layers, factors.a_mirror.split(RANK), factors.b_mirror, strict=True):
        layer.lora_A["default"].weight = torch.nn.Parameter(a.clone())
        layer.lora_B["default"].weight = torch.nn.Parameter(b.clone())
    return layers


def output_and_gradient(forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Run:
    leaf = x.detach().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        leaf.grad = None
        out = forward(leaf)
        out.backward(grad)
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    return run


def dense_products(base: Tensor | NF4, factors: LoraFactors) -> Tensor:
    """W + B A in float64, part below part."""
    weight = (nf4_dequantize(base, torch.bfloat16) if isinstance(base, NF4) else base).double()
    low_rank = [b.double() @ a.double() for a, b in zip(factors.a_mirror.split(RANK), factors.b_mirror, strict=True)]
    return weight + torch.cat(low_rank)


def errors_against(truths: tuple[Tensor, Tensor]) -> Callable[[Any], dict[str, float]]:
    def errors(outputs: Any) -> dict[str, float]:
        pairs = zip(("output", "gradient"), outputs, truths, strict=True)
        return {name: relative_error(output[:CHECKED_ROWS], truth) for name, output, truth in pairs}

    return errors
