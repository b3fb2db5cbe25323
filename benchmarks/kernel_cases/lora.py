"""Benchmark cases of `lora_linear`, forward and backward, over the plain products that any version contains.
Knows nothing of how contests are run or reported.
"""

from functools import partial
from typing import Any

import torch
from contest import Case, Contest, Run
from grpo_kernels.dispatch import Impl
from grpo_kernels.lora import LoraFactors, lora_linear
from grpo_kernels.nf4 import NF4, nf4_dequantize
from torch import Tensor

from kernel_cases.shared import randn
from kernel_cases.shared_lora import (
    CHECKED_ROWS,
    RANK,
    dense_products,
    errors_against,
    output_and_gradient,
    peft_layers,
    quantized,
    random_factors,
    with_a_below,
    with_b_beside,
)


def prepare_lora_linear(T: int, sizes: list[int], K: int) -> Contest:
    factors, parts = random_factors(sizes, K), [randn(size, K, scale=K**-0.5) for size in sizes]
    base, weight = quantized(parts), torch.cat(parts)
    x, grad = randn(T, K), randn(T, sum(sizes))
    merged = dense_products(base, factors)
    truths = (x[:CHECKED_ROWS].double() @ merged.T, grad[:CHECKED_ROWS].double() @ merged)

    plain = nf4_dequantize(base, torch.bfloat16)
    dense, extended = with_a_below(plain, factors), with_b_beside(plain, factors)

    def ours(impl: Impl, base: Tensor | NF4, factors: LoraFactors) -> Run:
        return output_and_gradient(lambda leaf: lora_linear(leaf, base, factors, impl=impl), x, grad)

    def k_extended(leaf: Tensor) -> Tensor:
        out = KExtended.apply(leaf, extended, factors.a_mirror, factors.a, *factors.b)
        assert isinstance(out, Tensor)
        return out

    def peft() -> Run:
        layers = peft_layers(parts, factors)
        return output_and_gradient(lambda leaf: torch.cat([layer(leaf) for layer in layers], dim=-1), x, grad)

    return Contest(
        {
            "ours": ours("auto", base, factors),
            "ours, bfloat16 base": ours("auto", *dense),
            "ours, torch twin": ours("torch", base, factors),
            "K extended, bfloat16 base": output_and_gradient(k_extended, x, grad),
        },
        "the two products with the bfloat16 weight",
        floor_run=lambda: (x @ weight.T, grad @ weight),
        peers={"PEFT + bitsandbytes": peft},
        errors=errors_against(truths),
    )


class KExtended(torch.autograd.Function):
    """The form of LoRA that extends K, [x | x A^T] [W | B]^T: one product, for a copy of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, extended: Tensor, a_mirror: Tensor, _a: Tensor, *b: Tensor) -> Tensor:
        """x [T, K], extended [N, K + R], A [R, K], the parts' B [N_j, RANK] -> [T, N]"""
        low = x @ a_mirror.T
        ctx.save_for_backward(x, low, extended, a_mirror)
        ctx.sizes = [part.shape[0] for part in b]
        return torch.cat([x, low], dim=1) @ extended.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad [T, N] -> gradients of x in its dtype, of A and B in float32"""
        x, low, extended, a_mirror = ctx.saved_tensors
        grad_x, grad_low = (grad @ extended).tensor_split([x.shape[1]], dim=1)
        parts = zip(grad.split(ctx.sizes, dim=1), low.split(RANK, dim=1), strict=True)
        grads_b = [(part.T @ own).float() for part, own in parts]
        return torch.addmm(grad_x, grad_low, a_mirror), None, None, (grad_low.T @ x).float(), *grads_b


CASES = [
    *(
        Case(
            "lora_linear forward + backward",
            f"{T} x {K} -> {'+'.join(map(str, sizes))}",
            "",
            partial(prepare_lora_linear, T, sizes, K),
        )
        for T in (1024, 8192)
        for sizes, K in (([4096], 4096), ([4096, 1024, 1024], 4096))
    ),
]
