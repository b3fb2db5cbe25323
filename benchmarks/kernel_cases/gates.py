"""Benchmark cases of the gates, SwiGLU and GeGLU.
Knows nothing of how contests are run or reported.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from contest import Case
from grpo_kernels.gates import Activation, gated

from kernel_cases.shared import prepare_elementwise, randn


def gated_case(N: int, I: int, activation: Activation, backward: bool) -> Case:
    return Case(
        f"{'swiglu' if activation == 'silu' else 'geglu'} {'backward' if backward else 'forward'}",
        f"{N} x {I}",
        "1.18",
        lambda: prepare_elementwise(
            lambda: [randn(N, I), randn(N, I)],
            lambda: partial(gated, activation=activation),
            lambda: partial(gated, activation=activation, impl="torch"),
            liger_swiglu if activation == "silu" else liger_geglu,
            N * I * (5 if backward else 3),
            backward,
        ),
    )


def liger_swiglu() -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


def liger_geglu() -> Callable[..., Any]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return lambda gate, up: LigerGELUMulFunction.apply(gate, up)


CASES = [
    *(
        gated_case(N, I, activation, backward)
        for N, I in ((16384, 14336), (16384, 6144))
        for activation in ("silu", "gelu_tanh")
        for backward in (False, True)
    ),
]
