"""Gemma's norms inside vLLM, by the kernel that the policy's own layers use. Knows nothing of how vLLM loads a model.

vLLM has no kernel for x / rms(x) * (1 + w): it leaves some eight operations of PyTorch to its compiler, which is off
here unless it is asked for (--rollout-graphs compiled), for it takes minutes. With six norms a layer in Gemma 3 that is
the larger part of a decode step.
"""

from __future__ import annotations

from typing import Any

from grpo_kernels import add_rms_norm, rms_norm
from torch import Tensor
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

OFFSET = 1.0


def use_our_kernel(model: Any) -> None:
    """From now on, of every such norm in a model of vLLM's."""
    for module in model.modules():
        if isinstance(module, GemmaRMSNorm):
            module._forward_method = _Norm(module)


class _Norm:
    """What vLLM calls in place of a norm's forward pass."""

    def __init__(self, module: Any):
        self.weight, self.epsilon = module.weight, module.variance_epsilon

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., D] -> the norm; with a residual, the norm of the sum, and the sum."""
        if residual is None:
            return rms_norm(x, self.weight, self.epsilon, offset=OFFSET)
        return add_rms_norm(x, residual, self.weight, self.epsilon, offset=OFFSET)
