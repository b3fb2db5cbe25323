"""Benchmark cases of `lora_mlp`, forward and backward, over the six plain products that any version contains.
Knows nothing of how contests are run or reported.
"""

from functools import partial
from typing import Any

import torch
from contest import Case, Contest, Run
from grpo_kernels.dispatch import Impl
from grpo_kernels.gates import Activation
from grpo_kernels.lora import LoraFactors
from grpo_kernels.mlp import lora_mlp
from grpo_kernels.nf4 import NF4, nf4_dequantize
from torch import Tensor

from kernel_cases.shared import randn
from kernel_cases.shared_lora import (
    CHECKED_ROWS,
    dense_products,
    errors_against,
    output_and_gradient,
    peft_layers,
    quantized,
    random_factors,
    with_a_below,
)


def prepare_mlp(T: int, D: int, I: int, activation: Activation) -> Contest:
    gate, up, down = randn(I, D, scale=D**-0.5), randn(I, D, scale=D**-0.5), randn(D, I, scale=I**-0.5)
    bases = quantized([gate, up]), quantized([down])
    factors = random_factors([I, I], D), random_factors([D], I)
    dense = [with_a_below(nf4_dequantize(base, torch.bfloat16), own) for base, own in zip(bases, factors, strict=True)]
    x, grad = randn(T, D), randn(T, D)
    truths = mlp_in_float64(x[:CHECKED_ROWS], grad[:CHECKED_ROWS], bases, factors, activation)

    def ours(impl: Impl, *bases_and_factors: Any) -> Run:
        def forward(leaf: Tensor) -> Tensor:
            return lora_mlp(leaf, *bases_and_factors, activation, impl=impl)

        return output_and_gradient(forward, x, grad)

    def peft() -> Run:
        gates, ups = peft_layers([gate, up], factors[0])
        (downs,) = peft_layers([down], factors[1])
        return output_and_gradient(lambda leaf: downs(torch.nn.functional.silu(gates(leaf)) * ups(leaf)), x, grad)

    def unsloth() -> Run:
        import unsloth  # noqa: F401  # it patches what the next import reads
        from unsloth.kernels.fast_lora import apply_lora_mlp_swiglu

        block = torch.nn.Module()
        block.gate_proj, block.up_proj = peft_layers([gate, up], factors[0])
        (block.down_proj,) = peft_layers([down], factors[1])

        def forward(leaf: Tensor) -> Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return apply_lora_mlp_swiglu(block, leaf[None])[0]

        return output_and_gradient(forward, x, grad)

    quantized_and_factors = bases[0], factors[0], bases[1], factors[1]
    inner = randn(T, I)

    def six_products() -> None:
        for _ in range(2):
            x @ gate.T, inner @ gate
        inner @ down.T, grad @ down

    return Contest(
        {
            "ours": ours("auto", *quantized_and_factors),
            "ours, bfloat16 base": ours("auto", *dense[0], *dense[1]),
            "ours, torch twin": ours("torch", *quantized_and_factors),
        },
        "the six products with bfloat16 weights",
        floor_run=six_products,
        peers={"PEFT + bitsandbytes": peft, "Unsloth": unsloth} if activation == "silu" else {},
        errors=errors_against(truths),
    )


def mlp_in_float64(
    x: Tensor, grad: Tensor, bases: tuple[NF4, NF4], factors: tuple[LoraFactors, LoraFactors], activation: Activation
) -> tuple[Tensor, Tensor]:
    x = x.double().requires_grad_()
    gate, up = (x @ dense_products(bases[0], factors[0]).T).chunk(2, dim=1)
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    }
    out = (functions[activation](gate) * up) @ dense_products(bases[1], factors[1]).T
    return out.detach(), torch.autograd.grad(out, x, grad.double())[0]


CASES = [
    *(
        Case(
            f"lora_mlp {activation} forward + backward",
            f"{T} x {D} / {I}",
            target,
            partial(prepare_mlp, T, D, I, activation),
        )
        for T, D, I, activation, target in (
            (1024, 4096, 14336, "silu", "1.6"),
            (4096, 4096, 14336, "silu", "1.25"),
            (8192, 4096, 14336, "silu", "1.12"),
            (16384, 4096, 14336, "silu", "1.10"),
            (8192, 4096, 14336, "gelu_tanh", ""),
        )
    ),
]
