"""Benchmark cases of `grouped_linear`: a decoding step's rows times the weights of their experts, in NF4.
Knows nothing of how contests are run or reported.
"""

from functools import partial
from itertools import pairwise

import torch
from contest import Case, Contest, relative_error
from grpo_kernels.grouped import Routing, grouped_linear, quantize_experts
from grpo_kernels.nf4 import nf4_dequantize, nf4_double_quantize

from kernel_cases.shared import in_graph, randn


def prepare(tokens: int, experts: int, choices: int, M: int, K: int, double_quant: bool) -> Contest:
    """Routers choose with equal chances."""
    picked = torch.rand(tokens, experts, device="cuda").topk(choices).indices
    routing = Routing.of(picked, experts)
    x, offsets = randn(tokens * choices, K), routing.offsets
    base = quantize_experts(randn(experts, M, K, scale=K**-0.5), torch.device("cuda"))
    base = nf4_double_quantize(base) if double_quant else base
    dense = nf4_dequantize(base, torch.bfloat16)
    ends = [0, *offsets.tolist()]
    truth = torch.cat(
        [
            x[begin:end].double() @ weight.double().T
            for (begin, end), weight in zip(pairwise(ends), dense.unflatten(0, (experts, M)), strict=True)
        ]
    )
    in_use = sum(begin < end for begin, end in pairwise(ends)) / experts
    return Contest(
        {
            "ours": in_graph(lambda: grouped_linear(x, base, offsets, impl="triton")),
            "dequantise, then torch's grouped product": in_graph(
                lambda: torch.nn.functional.grouped_mm(
                    x, nf4_dequantize(base, torch.bfloat16).unflatten(0, (experts, M)).mT, offs=offsets
                )
            ),
            "torch's grouped product, bfloat16 weights": in_graph(lambda: grouped_linear(x, dense, offsets)),
        },
        "the bytes of the experts in use, of rows in and out",
        floor_bytes=int(base.nbytes * in_use) + 2 * (x.numel() + x.shape[0] * M),
        errors=lambda got: {"output": relative_error(got, truth)},
    )


# experts, choices, (M, K) of up with gate, and of down
MODELS = {
    "Qwen3-30B-A3B": (128, 8, (1536, 2048), (2048, 768)),
    "DeepSeek-V2-Lite": (64, 6, (2816, 2048), (2048, 1408)),
    "gpt-oss-20b": (32, 4, (5760, 2880), (2880, 2880)),
}
CASES = [
    Case(
        f"grouped_linear, {tokens} tokens{', double quantisation' if double_quant else ''}",
        f"{model}, {experts} x {K} -> {M}",
        "2" if tokens <= 64 else "",
        partial(prepare, tokens, experts, choices, M, K, double_quant),
    )
    for model, (experts, choices, *maps) in MODELS.items()
    for M, K in maps
    for double_quant, counts in ((False, (1, 8, 64, 256, 512)), (True, (64,)))
    for tokens in counts
]
