"""Norms: the kinds that fused layers have, over the weights of Hugging Face's. Knows nothing of layers.

`norm(x)` is the norm, `norm.add(x, residual)` the norm of their sum and the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from grpo_kernels import add_rms_norm, rms_norm
from torch import Tensor, nn

from grpo.policy.form import NormForm, NormKind


class RMSNorm(nn.Module):
    """x / rms(x) * (weight + offset), in float32: Zhang and Sennrich 2019, arXiv 1910.07467."""

    def __init__(self, module: Any, offset: float = 0.0):
        super().__init__()
        self.weight: nn.Parameter = module.weight
        self.epsilon: float = epsilon_of(module)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.epsilon, offset=self.offset)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum, [..., D] each."""
        return add_rms_norm(x, residual, self.weight, self.epsilon, offset=self.offset)


class LayerNorm(nn.Module):
    """(x - mean(x)) / deviation(x) * weight + bias: Ba et al. 2016, arXiv 1607.06450."""

    def __init__(self, module: Any):
        super().__init__()
        self.weight: nn.Parameter = module.weight
        self.bias: nn.Parameter | None = getattr(module, "bias", None)
        self.epsilon: float = epsilon_of(module)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.epsilon)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum, [..., D] each."""
        total = x + residual
        return self(total), total


class NoNorm(nn.Module):
    """What stands where a layer has no norm."""

    weight = None
    epsilon = 0.0
    offset = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual, twice."""
        total = x + residual
        return total, total


Norm = RMSNorm | LayerNorm | NoNorm


def epsilon_of(module: Any) -> float:
    """Hugging Face has two names for it."""
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


def build_norm(module: Any, kind: NormKind) -> Norm:
    """A norm of this kind over a Hugging Face norm's weights."""
    if kind == "layer":
        return LayerNorm(module)
    return RMSNorm(module, offset=1.0 if kind == "rms of 1 + weight" else 0.0)


def norm_of(layer: Any, form: NormForm | None) -> Norm:
    """The norm of a Hugging Face layer that a form names."""
    return build_norm(layer.get_submodule(form.name), form.kind) if form else NoNorm()


@torch.no_grad()
def kind_of(module: Any) -> NormKind | None:
    """What a Hugging Face norm computes, found by a trial in float32; None where it is none of the kinds."""
    named = hasattr(module, "variance_epsilon") or isinstance(getattr(module, "eps", None), float)
    if not named or not isinstance(getattr(module, "weight", None), Tensor) or module.weight.dim() != 1:
        return None
    x = torch.randn(3, len(module.weight), generator=torch.Generator().manual_seed(0))
    theirs = module(x)
    kinds: tuple[NormKind, ...] = ("layer",) if hasattr(module, "bias") else ("rms", "rms of 1 + weight", "layer")
    return next((kind for kind in kinds if torch.allclose(build_norm(module, kind)(x), theirs, atol=1e-5)), None)


def weights_of(norm: Norm, name: str) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of what a norm with this name holds."""
    yield from ((f"{name}.{key}", weight) for key, weight in norm.named_parameters())
