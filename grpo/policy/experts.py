"""Experts: the feed-forward networks of a mixture-of-experts layer as one module over two three-dimensional weights.
Knows nothing of routers or checkpoints.

transformers keeps the experts of a layer as two parameters, [experts, rows, columns], and lets whoever asks compute
with them (its `use_experts_implementation`). What it says of a module there is all that is needed here, so no model is
named: whether there are a gate and biases, whether the weights lie transposed, and how a gate is applied.

    y = sum over a token's experts e of  w_e (down_e gate(up_e x))            up_e: gate and up, joined

The weights lie below each other as [E M, K], never transposed, in float32, bf16 or NF4, and all of a layer's experts
are multiplied by in one grouped product (grpo_kernels/grouped.py). They are frozen; where `rank` asks for it both have
LoRA factors in the layout of PEFT's `target_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from grpo_kernels.grouped import ExpertFactors, Routing, grouped_linear
from torch import Tensor, nn

from grpo.policy.projections import Base, Masters

# What transformers says of a module of experts, and how it names their biases.
SAID = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
BIAS = "_bias"


class ExpertWeights(nn.Module):
    """One linear map of each expert, frozen."""

    def __init__(self, name: str, base: Base, bias: Tensor | None, num_experts: int):
        """name: the Hugging Face name of the parameter; base [E M, K]; bias [E, M]."""
        super().__init__()
        self.name, self.base, self.bias, self.num_experts = name, base, bias, num_experts
        self.factors_of: ExpertFactors | None = None

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """Sorted rows [S, K] -> [S, M]."""
        out = grouped_linear(rows, self.base, routing.offsets, self.factors_of)
        return out if self.bias is None else out + self.bias.index_select(0, routing.experts)

    def biases(self) -> Iterator[tuple[str, Tensor]]:
        """(name, bias [E, M]), if there is one."""
        if self.bias is not None:
            yield f"{self.name}{BIAS}", self.bias


class AdaptedExperts(ExpertWeights, Masters):
    """The same with LoRA factors of each expert, for a ProjectionStore."""

    def __init__(self, name: str, base: Base, bias: Tensor | None, num_experts: int, rank: int, dtype: torch.dtype):
        """dtype: of the computation."""
        ExpertWeights.__init__(self, name, base, bias, num_experts)
        rows, columns = base.shape[0] // num_experts, base.shape[1]
        self.names, self.sizes, self.rank = [name], [rows], rank
        self.lora_a = nn.Parameter(torch.zeros(num_experts * rank, columns, device=base.device))
        self.lora_b = nn.ParameterList([nn.Parameter(torch.zeros(rows, rank * num_experts, device=base.device))])
        self.mirrors = [m.detach() if dtype == torch.float32 else m.detach().to(dtype) for m in self.masters()]
        self.share_scale(torch.ones(1, device=base.device))

    def share_scale(self, scale: Tensor) -> None:
        """Multiply the adapter by this one-element tensor from now on."""
        a, b = self.mirrors
        self.factors_of = ExpertFactors(self.lora_a, self.lora_b[0], a, b, scale)

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, A [E r, K], B [M, r E]): views of the masters."""
        yield self.name, self.lora_a.detach(), self.lora_b[0].detach()


class Experts(nn.Module):
    """What stands in a model for a module of experts."""

    def __init__(self, up: ExpertWeights, down: ExpertWeights, gate: Callable[[Tensor], Tensor]):
        """gate: of up's rows [S, M], what down multiplies by."""
        super().__init__()
        self.up, self.down, self.gate = up, down, gate

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [N, D], the experts of each token and their weights [N, k] -> [N, D]."""
        routing = Routing.of(chosen, self.up.num_experts)
        rows = self.down(self.gate(self.up(routing.spread(x), routing)), routing)
        return (routing.gathered(rows) * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def maps(self) -> list[ExpertWeights]:
        """Both linear maps, in the order of their parameters."""
        return [self.up, self.down]


def are_experts(module: nn.Module) -> bool:
    """Whether a module is one of experts that transformers lets others compute with, and holds nothing else."""
    return all(hasattr(module, name) for name in SAID) and set(dict(module.named_parameters())) == set(
        parameters_of(module)
    )


def parameters_of(module: Any) -> list[str]:
    """Its parameters: up, down, and their biases."""
    weights = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    return [*weights, *(f"{name}{BIAS}" for name in weights if module.has_bias)]
