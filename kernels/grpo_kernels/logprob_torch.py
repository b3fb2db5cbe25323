"""The torch twin of `linear_logprob`, and the backward of a head that is trained.
Axes and notation are those of logprob.py.
"""

import torch
from torch import Tensor

from grpo_kernels.logprob_head import Head, allocate, chunks_of, value_dtype

# Logits alive at once in the twin: 4 MiB of float32 stays in a CPU's caches, 512 MiB keeps a GPU's products efficient.
TORCH_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
SMALLEST_TORCH_CHUNK = 64


def torch_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float, form: str, chunk_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs, entropy, unit, unit_scale, unit_entropy = allocate(hidden, form)
    unit_scale.fill_(1.0)
    head = Head(weight)
    for rows in chunks_of(len(hidden), chunk_rows or _torch_chunk_rows(weight)):
        logits = head.logits(hidden[rows])
        chunk = SoftmaxRows(logits, targets[rows], temperature, softcap)
        logprobs[rows], entropy[rows] = chunk.logprob, chunk.entropy
        if form in ("unit", "unit_entropy"):
            unit[rows] = head.combine(chunk.unit_coefficients())
        if form == "unit_entropy":
            unit_entropy[rows] = head.combine(chunk.entropy_coefficients())
    return logprobs, entropy, unit, unit_scale, unit_entropy


def torch_recompute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    temperature: float,
    softcap: float,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of `hidden` [M, D] and of `weight` [V, D] for a trained head, from logits computed again."""
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros(weight.shape, dtype=value_dtype(hidden), device=weight.device)
    head = Head(weight)
    for rows in chunks_of(len(hidden), chunk_rows or _torch_chunk_rows(weight)):
        chunk = SoftmaxRows(head.logits(hidden[rows]), targets[rows], temperature, softcap)
        grad_logits = chunk.unit_coefficients().mul_((grad_logprobs[rows] / temperature)[:, None])
        grad_logits += chunk.entropy_coefficients().mul_((grad_entropy[rows] / temperature)[:, None])
        grad_hidden[rows] = head.combine(grad_logits)
        grad_weight += grad_logits.T @ hidden[rows].to(grad_logits.dtype)
    return grad_hidden, grad_weight.to(weight.dtype)


def _torch_chunk_rows(weight: Tensor) -> int:
    elements = TORCH_CHUNK_ELEMENTS.get(weight.device.type, TORCH_CHUNK_ELEMENTS["cpu"])
    return max(SMALLEST_TORCH_CHUNK, elements // len(weight))


class SoftmaxRows:
    """Softmax statistics of a chunk of rows, in the notation of the file's first lines. Overwrites `logits` [C, V]."""

    def __init__(self, logits: Tensor, targets: Tensor, temperature: float, softcap: float):
        self.target = targets[:, None]
        self.slope = None  # s' [C, V], None where it is 1
        if softcap > 0:
            logits.div_(softcap).tanh_()
            self.slope = 1 - logits * logits
            logits.mul_(softcap)
        if temperature != 1:
            logits.div_(temperature)
        logits.sub_(logits.amax(1, keepdim=True))
        self.shifted = logits  # z - r
        self.exponentials = logits.exp()  # exp(z - r), 0 at the target
        shifted_target = self.shifted.gather(1, self.target)
        self.target_exponential = shifted_target.exp()  # a
        self.exponentials.scatter_(1, self.target, 0.0)
        self.rest = self.exponentials.sum(1, keepdim=True)  # R
        self.total = self.target_exponential + self.rest  # Z
        self.log_total = self.total.log()
        weighted = (self.exponentials * self.shifted).sum(1, keepdim=True) + self.target_exponential * shifted_target
        self.logprob = (shifted_target - self.log_total).squeeze(1)
        self.entropy = (self.log_total - weighted / self.total).squeeze(1)

    def unit_coefficients(self) -> Tensor:
        """(1[v = y] - p_v) s'_v, [C, V]"""
        coefficients = self.exponentials / -self.total
        coefficients.scatter_(1, self.target, self.rest / self.total)
        return coefficients if self.slope is None else coefficients.mul_(self.slope)

    def entropy_coefficients(self) -> Tensor:
        """-p_v (log p_v + entropy) s'_v, [C, V]"""
        probabilities = self.exponentials / self.total
        probabilities.scatter_(1, self.target, self.target_exponential / self.total)
        coefficients = probabilities.mul_(self.log_total - self.entropy[:, None] - self.shifted)
        return coefficients if self.slope is None else coefficients.mul_(self.slope)
