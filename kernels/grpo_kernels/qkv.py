"""LoRA QKV: one projection of three parts, whose outputs and gradients stay where they are.
Knows nothing of heads, rotary embeddings or attention.

The mathematics is `lora_linear`'s, with the parts q, k and v (see there).

Shapes: T rows of x (tokens), K inputs, N_q + N_k + N_v outputs, r the rank.
"""

from torch import Tensor

from grpo_kernels.dispatch import Impl
from grpo_kernels.lora_linear import LoraFactors, lora_linear
from grpo_kernels.nf4 import NF4


def lora_qkv(
    x: Tensor, base: Tensor | NF4, factors: LoraFactors, bias: Tensor | None = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K] to q [..., N_q], k [..., N_k] and v [..., N_v], views of one tensor [..., N_q + N_k + N_v]."""
    q, k, v = lora_linear(x, base, factors, bias, impl).split([b.shape[0] for b in factors.b], dim=-1)
    return q, k, v
