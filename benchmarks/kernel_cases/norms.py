"""Benchmark cases of `rms_norm` and `add_rms_norm`.
Knows nothing of how contests are run or reported.
"""

from collections.abc import Callable
from typing import Any

import torch
from contest import Case
from grpo_kernels import add_rms_norm, rms_norm

from kernel_cases.shared import prepare_elementwise, randn


def norm_case(N: int, D: int, adds: bool, backward: bool) -> Case:
    def frozen(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """With a norm's weight that gets no gradient, as LoRA training has it."""
        weights = {dtype: torch.ones(D, device="cuda", dtype=dtype) for dtype in (torch.bfloat16, torch.float64)}
        return lambda *inputs: function(*inputs, weights[inputs[0].dtype], **options)

    function = add_rms_norm if adds else rms_norm
    peer = liger_add_rms_norm if adds else liger_rms_norm
    forward_elements, backward_elements = (4, 4) if adds else (2, 3)
    return Case(
        f"{function.__name__} {'backward' if backward else 'forward'}",
        f"{N} x {D}",
        "1.18",
        lambda: prepare_elementwise(
            lambda: [randn(N, D) for _ in range(1 + adds)],
            lambda: frozen(function),
            lambda: frozen(function, impl="torch"),
            lambda: frozen(peer()),
            N * D * (backward_elements if backward else forward_elements),
            backward,
        ),
    )


def liger_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)


def liger_add_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, residual, w: LigerFusedAddRMSNormFunction.apply(x, residual, w, 1e-6, 0.0, "llama", False)


CASES = [
    *(
        norm_case(N, D, adds, backward)
        for N, D in ((16384, 4096), (16384, 2048))
        for adds in (False, True)
        for backward in (False, True)
    ),
]
