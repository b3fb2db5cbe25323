"""Benchmark cases of `nf4_linear`: few rows times weights that stay in 4 bits.
Knows nothing of how contests are run or reported.
"""

from functools import partial

import torch
from contest import Case, Contest, Run, relative_error
from grpo_kernels.nf4 import nf4_dequantize, nf4_quantize
from grpo_kernels.nf4_product import nf4_linear

from kernel_cases.shared import more_than_the_cache, one_after_the_other, randn


def prepare_linear(M: int, N: int, K: int, double_quant: bool) -> Contest:
    x, dense = randn(M, K), [randn(N, K) for _ in range(more_than_the_cache(N, K))]
    nf4 = [nf4_quantize(weight, double_quant) for weight in dense]
    truth = x.double() @ nf4_dequantize(nf4[0], torch.bfloat16, impl="torch").double().T

    def bitsandbytes() -> Run:
        import bitsandbytes

        quantize = partial(bitsandbytes.functional.quantize_4bit, quant_type="nf4", compress_statistics=double_quant)
        weights = [quantize(weight) for weight in dense]
        return one_after_the_other(
            lambda weight: bitsandbytes.matmul_4bit(x, weight[0].t(), quant_state=weight[1]), weights
        )

    return Contest(
        {
            "ours": one_after_the_other(lambda weight: nf4_linear(x, weight), nf4),
            "dequantise, then a product": one_after_the_other(
                lambda weight: x @ nf4_dequantize(weight, torch.bfloat16).T, nf4
            ),
        },
        "one product with the bfloat16 weight",
        floor_run=one_after_the_other(lambda weight: x @ weight.T, dense),
        times=len(dense),
        peers={"bitsandbytes": bitsandbytes},
        errors=lambda got: {"output": relative_error(got[0], truth)},
    )


CASES = [
    *(
        Case(
            f"nf4_linear, {M} rows{', double quantisation' if double_quant else ''}",
            f"{K} -> {N}",
            "0.75" if M <= 64 else "",
            partial(prepare_linear, M, N, K, double_quant),
        )
        for N, K in ((14336, 4096), (4096, 4096), (4096, 14336))
        for double_quant, rows in ((False, (1, 8, 16, 32, 64, 128, 256, 512)), (True, (1, 8, 32, 64)))
        for M in rows
    ),
]
