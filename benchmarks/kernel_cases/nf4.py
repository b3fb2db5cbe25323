"""Benchmark cases of `nf4_dequantize`, over memory speed.
Knows nothing of how contests are run or reported.
"""

from functools import partial

import torch
from contest import Case, Contest, Run, relative_error
from grpo_kernels.nf4 import nf4_dequantize, nf4_quantize

from kernel_cases.shared import randn


def prepare_dequantize(N: int, K: int, double_quant: bool) -> Contest:
    weight = randn(N, K)
    nf4 = nf4_quantize(weight, double_quant)
    truth = nf4_dequantize(nf4, torch.bfloat16, impl="torch")

    def bitsandbytes() -> Run:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
        return lambda: functional.dequantize_4bit(packed, state)

    return Contest(
        {"ours": lambda: nf4_dequantize(nf4, torch.bfloat16)},
        "bytes read and written once",
        floor_bytes=nf4.nbytes + truth.nbytes,
        peers={"bitsandbytes": bitsandbytes},
        errors=lambda got: {"weight": relative_error(got, truth)},
    )


CASES = [
    *(
        Case(
            f"nf4_dequantize{', double quantisation' if double_quant else ''}",
            f"{N} x {K}",
            target,
            partial(prepare_dequantize, N, K, double_quant),
        )
        for (N, K), target in (((14336, 4096), "1.18"), ((4096, 4096), "1.43"))
        for double_quant in (False, True)
    ),
]
