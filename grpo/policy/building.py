"""Building: the linears and the experts of a Hugging Face model as weights of ours, on the device and in the dtype that
a configuration asks for. Knows nothing of checkpoints or of which linears belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from grpo_kernels.grouped import quantize_experts
from torch import Tensor

from grpo.config import ModelConfig
from grpo.policy.experts import BIAS, AdaptedExperts, Experts, ExpertWeights, parameters_of
from grpo.policy.linears import Linear, weight_of
from grpo.policy.projections import Base, Projection, join_dense, join_nf4
from grpo.policy.promises import value_of


def compute_dtype(base: str, device: torch.device) -> torch.dtype:
    """The dtype of activations: float32 over a float32 base and on a CPU, else bf16 (float16 on GPUs without it)."""
    if base == "float32" or device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def kept_dtype(base: str, computed: torch.dtype) -> torch.dtype:
    """The dtype of a dense base. Where a GPU computes in float16 it is kept in that, not converted at every product."""
    if base == "float32":
        return torch.float32
    return torch.float16 if computed == torch.float16 else torch.bfloat16


def build_projection(
    name: str,
    linears: list[Linear],
    names: list[str],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    dense: Sequence[str] = (),
    has_room: bool = True,
) -> Projection:
    """One projection of these linears, whose own weights are freed. dense: the names of those that stay in 16 bits over
    a base that is in 4. has_room: a dense base may have the mirror of A right below it."""
    weights = [weight_of(linear) for linear in linears]
    sizes = [weight.shape[0] for weight in weights]
    biases = [linear.bias for linear in linears]
    there: list[Base] = [(value_of(w) if isinstance(w, Tensor) else w).to(device) for w in weights]
    if config.base == "nf4" and name not in dense:
        base, below = join_nf4(there), None
    else:
        kept = kept_dtype(config.base, dtype)
        # Beside a float32 base A has no mirror; one of another dtype cannot be multiplied by together with the base.
        base, below = join_dense(there, kept, config.lora_rank if has_room and kept == dtype != torch.float32 else 0)
    bias = None
    if any(b is not None for b in biases):
        parts = [torch.zeros(n) if b is None else value_of(b).data for b, n in zip(biases, sizes, strict=True)]
        bias = torch.cat([part.to(device, dtype) for part in parts])
    for linear in linears:
        del linear.weight
    return Projection(base, bias, names, sizes, config.lora_rank, dtype, below)


def build_experts(name: str, module: Any, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Experts:
    """The experts of a Hugging Face module of this name, whose own weights are freed.

    dtype: of the computation. One of the module's weights is read after the other, and moved and quantised expert by
    expert.
    """
    up, down = (_weights(name, module, part, config, dtype, device) for part in parameters_of(module)[:2])
    return Experts(up, down, module._apply_gate if module.has_gate else module.act_fn)


def _weights(
    name: str, module: Any, part: str, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> ExpertWeights:
    weights = _taken(module, part)
    weights = weights.mT if module.is_transposed else weights
    if config.base == "nf4":
        base: Base = quantize_experts(weights, device)
    else:
        kept = kept_dtype(config.base, dtype)
        base = torch.cat([weight.to(device, kept) for weight in weights]).contiguous()
    bias = _taken(module, f"{part}{BIAS}").to(device, dtype) if module.has_bias else None
    held = f"{name}.{part}", base, bias, len(weights)
    return AdaptedExperts(*held, config.lora_rank, dtype) if config.expert_adapters else ExpertWeights(*held)


def _taken(module: Any, parameter: str) -> Tensor:
    """A parameter's value, read if it was promised; the module has it no longer."""
    value = value_of(getattr(module, parameter)).detach()
    delattr(module, parameter)
    return value
