"""What every way to compute `linear_logprob` shares: the head's products and what a call gives back.
Knows nothing of how logits become probabilities. Axes and notation are those of logprob.py.
"""

import torch
from torch import Tensor

from grpo_kernels.dispatch import tl, triton

# What a chunk of a Triton route may hold at once, unless `chunk_rows` says otherwise.
ROUTE_CHUNK_BYTES = 3 * 2**28

# Nats: exp of it, summed over any vocabulary and weighted by it, is within float32 and bfloat16.
LIMIT = 60.0

# Probabilities of a large vocabulary are subnormal in float16: scaled before a float16 product, and back after it.
FLOAT16_SCALE = 4096.0


def allocate(hidden: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    M, D = hidden.shape
    logprobs = torch.empty(M, dtype=value_dtype(hidden), device=hidden.device)
    unit = hidden.new_empty(M if form in ("unit", "unit_entropy") else 0, D)
    unit_scale = logprobs.new_empty(len(unit))
    unit_entropy = hidden.new_empty(M if form == "unit_entropy" else 0, D)
    return logprobs, torch.empty_like(logprobs), unit, unit_scale, unit_entropy


def value_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunks_of(M: int, chunk_rows: int) -> list[slice]:
    """Slices that cover M rows; none for M = 0."""
    return [slice(start, min(start + chunk_rows, M)) for start in range(0, M, chunk_rows)]


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def head_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [S, V] of final hidden states [S, D] and a head's weight [V, D], as `linear_logprob` has them before its
    softcap and temperature: accumulated and returned in float32, or in float64 if the weight is.

    16-bit operands are multiplied as they are where a float32 result is to be had (CUDA), else in float32.
    """
    if multiplies_16_bit(weight):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    dtype = value_dtype(weight)
    return hidden.to(dtype) @ weight.to(dtype).T


def multiplies_16_bit(weight: Tensor) -> bool:
    return weight.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16)


class Head:
    """The weight [V, D] and its two products, both as in `head_product`; converted once where that is needed."""

    def __init__(self, weight: Tensor):
        self.dtype = weight.dtype
        self.multiplies_16_bit = multiplies_16_bit(weight)
        self.matrix = weight if self.multiplies_16_bit else weight.to(value_dtype(weight))
        self.scale = FLOAT16_SCALE if weight.dtype == torch.float16 else 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [C, D] -> [C, V]"""
        return head_product(hidden, self.matrix)

    def combine(self, coefficients: Tensor) -> Tensor:
        """coefficients [C, V] -> their combinations of the rows of the head [C, D]"""
        return self.combine_scaled(
            (coefficients * self.scale).to(self.dtype) if self.multiplies_16_bit else coefficients
        )

    def combine_scaled(self, coefficients: Tensor) -> Tensor:
        """As `combine`, of coefficients already multiplied by `scale` and rounded where the product needs that."""
        if self.multiplies_16_bit:
            product = torch.mm(coefficients, self.matrix, out_dtype=torch.float32)
            return product / self.scale if self.scale != 1 else product
        return coefficients.to(self.matrix.dtype) @ self.matrix


@triton.jit
def tanh(x):
    # exp of a negative number cannot overflow.
    decay = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def scaled_logit(x, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """z and s' of raw logits x."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if SOFTCAP:
        bent = tanh(x / softcap)
        slope = 1.0 - bent * bent
        x = softcap * bent
    return x * inverse_temperature, slope
