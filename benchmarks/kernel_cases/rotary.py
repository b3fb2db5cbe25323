"""Benchmark cases of `rope`.
Knows nothing of how contests are run or reported.
"""

from collections.abc import Callable
from functools import partial

import torch
from contest import Case
from grpo_kernels import rope
from grpo_kernels.dispatch import Impl
from torch import Tensor

from kernel_cases.shared import prepare_elementwise, randn


def rope_case(N: int, Hq: int, Hk: int, E: int, normed: bool, backward: bool) -> Case:
    def build(impl: Impl) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        frequencies = 10000.0 ** -(torch.arange(0, E, 2, device="cuda") / E)
        angles = torch.arange(N, device="cuda")[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        norm = torch.ones(E, device="cuda", dtype=torch.bfloat16) if normed else None
        return lambda q, k: rope(q, k, cos, sin, q_norm=norm, k_norm=norm, impl=impl)

    elements = N * (Hq + Hk) * E * (3 if normed and backward else 2)
    return Case(
        f"rope{' + QK-norm' if normed else ''} {'backward' if backward else 'forward'}",
        f"{N} x ({Hq} + {Hk}) x {E}",
        "1.18",
        lambda: prepare_elementwise(
            lambda: [randn(N, Hq, E), randn(N, Hk, E)],
            partial(build, "auto"),
            partial(build, "torch"),
            None,
            elements,
            backward,
        ),
    )


CASES = [
    *(
        rope_case(N, Hq, Hk, 128, normed, backward)
        for N, Hq, Hk in ((16384, 32, 8),)
        for normed in (False, True)
        for backward in (False, True)
    ),
]
