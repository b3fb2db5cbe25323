"""Benchmark cases of `group_attention`: one copy of each prompt against packed whole sequences.
Knows nothing of how contests are run or reported.
"""

import math
from functools import partial

import torch
from contest import Case, Contest, Run
from grpo_kernels import GroupLayout, group_attention
from torch import Tensor

from kernel_cases.shared import (
    forward_and_backward,
    randn,
)


def prepare_attention(prompt: int, completion: int, size: int, Hq: int, Hk: int, E: int, backward: bool) -> Contest:
    shared = GroupLayout.of([prompt], [[completion] * size], device="cuda")
    gathered, merged = (
        GroupLayout.of([prompt], [[completion] * size], device="cuda", most_copies=most) for most in (math.inf, 0)
    )
    whole = GroupLayout.of([prompt + completion] * size, device="cuda")

    def attend(layout: GroupLayout) -> tuple[Run, Run]:
        N = layout.num_tokens
        inputs = [randn(N, Hq, E), randn(N, Hk, E), randn(N, Hk, E)]
        return forward_and_backward(lambda q, k, v: group_attention(q, k, v, layout), inputs)

    def flex() -> Run:
        """The same tokens, one copy of the prompt, by a mask; compiled for this shape."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        N = shared.num_tokens
        segment = torch.arange(1 + size, device="cuda").repeat_interleave(shared.segments.diff())

        def visible(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & ((segment[i] == segment[j]) | (segment[j] == 0))

        mask = create_block_mask(visible, None, None, N, N, device="cuda")
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        inputs = [randn(1, heads, N, E) for heads in (Hq, Hk, Hk)]
        return forward_and_backward(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True), inputs)[
            backward
        ]

    return Contest(
        {
            "ours": attend(shared)[backward],
            "ours, gathered": attend(gathered)[backward],
            "ours, merged": attend(merged)[backward],
        },
        "packed whole sequences, flash attention",
        floor_run=attend(whole)[backward],
        peers={"packed whole sequences": lambda: attend(whole)[backward], "FlexAttention, shared prompt": flex},
    )


CASES = [
    *(
        Case(
            f"group_attention {'backward' if backward else 'forward'}",
            f"{prompt} + {size} x {completion}, {Hq}/{Hk} x {E}",
            "0.77" if (prompt, completion) == (1024, 512) else "",
            partial(prepare_attention, prompt, completion, size, Hq, Hk, E, backward),
        )
        for prompt, completion, size in ((1024, 512, 8), (256, 512, 8), (128, 256, 16), (3072, 512, 8))
        for Hq, Hk, E in ((32, 8, 128),)
        for backward in (False, True)
    ),
]
