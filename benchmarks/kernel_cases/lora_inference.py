"""Benchmark cases of `lora_linear_inference`, over one plain product.
Knows nothing of how contests are run or reported.
"""

from functools import partial

import torch
from contest import Case, Contest, relative_error
from grpo_kernels.lora import LoraFactors, lora_linear, lora_linear_inference
from grpo_kernels.nf4 import NF4, nf4_dequantize
from torch import Tensor

from kernel_cases.shared import more_than_the_cache, one_after_the_other, randn
from kernel_cases.shared_lora import dense_products, quantized, random_factors, with_a_below, with_b_beside


def prepare_inference(M: int, sizes: list[int], K: int) -> Contest:
    x, count = randn(M, K), more_than_the_cache(sum(sizes), K)
    factors = [random_factors(sizes, K) for _ in range(count)]
    bases = [quantized([randn(size, K, scale=K**-0.5) for size in sizes]) for _ in range(count)]
    weights = [nf4_dequantize(base, torch.bfloat16) for base in bases]
    dense = list(zip(weights, factors, strict=True))
    truth = x.double() @ dense_products(bases[0], factors[0]).T

    def ours(projection: tuple[Tensor | NF4, LoraFactors]) -> Tensor:
        return lora_linear_inference(x, *projection)

    def separately(projection: tuple[Tensor, LoraFactors]) -> Tensor:
        with torch.no_grad():
            return lora_linear(x, *projection, impl="torch")

    def k_extended(projection: tuple[Tensor, Tensor]) -> Tensor:
        extended, a = projection
        return torch.cat([x, x @ a.T], dim=1) @ extended.T

    return Contest(
        {
            "ours": one_after_the_other(ours, list(zip(bases, factors, strict=True))),
            "ours, bfloat16 base": one_after_the_other(ours, [with_a_below(*projection) for projection in dense]),
            "ours, bfloat16 base, A elsewhere": one_after_the_other(ours, dense),
            "separate products, bfloat16 base": one_after_the_other(separately, dense),
            "K extended, bfloat16 base": one_after_the_other(
                k_extended, [(with_b_beside(weight, own), own.a_mirror) for weight, own in dense]
            ),
        },
        "one product with the bfloat16 weight",
        floor_run=one_after_the_other(lambda weight: x @ weight.T, weights),
        times=count,
        errors=lambda got: {"output": relative_error(got[0], truth)},
    )


CASES = [
    *(
        Case(
            f"lora_linear_inference, {M} rows",
            f"{K} -> {'+'.join(map(str, sizes))}",
            "",
            partial(prepare_inference, M, sizes, K),
        )
        for sizes, K in (([4096, 1024, 1024], 4096), ([14336, 14336], 4096), ([4096], 14336))
        for M in (1, 16, 64, 256)
    ),
    *(
        Case(
            f"lora_linear_inference, {M} rows",
            f"{K} -> {'+'.join(map(str, sizes))}",
            "",
            partial(prepare_inference, M, sizes, K),
        )
        for sizes, K in (([2048, 1024, 1024], 2048), ([6144, 6144], 2048), ([2048], 6144), ([2048], 2048))
        for M in (64, 256)
    ),
]
