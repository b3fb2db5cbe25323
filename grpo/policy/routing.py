"""Routing: which experts a model's routers choose, token by token, seen as they are handed their tokens, and how many
choices of two ways to compute the same differ. Knows nothing of batches or engines.

Experts are handed tokens and choices together, by whatever runs the model: transformers, or vLLM's layers over the same
modules. So the choices are looked at there, and nothing of a router has to be known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grpo.policy.experts import Experts


def experts_in(model: nn.Module) -> list[Experts]:
    """The experts of each layer that has some, in order."""
    return [module for module in model.modules() if isinstance(module, Experts)]


@contextmanager
def watched(experts: Sequence[Experts]) -> Iterator[list[list[Tensor]]]:
    """Inside, what each of these is handed is kept: the choices [rows, k] of each call, one after the other."""
    seen: list[list[Tensor]] = [[] for _ in experts]
    hooks = [each.register_forward_pre_hook(partial(_keep, kept)) for each, kept in zip(experts, seen, strict=True)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _keep(kept: list[Tensor], module: Any, handed: tuple[Tensor, Tensor, Tensor]) -> None:
    kept.append(handed[1].clone())


def together(seen: list[list[Tensor]]) -> Tensor | None:
    """The choices of all layers, [rows, layers, k]; None where not all were seen: code that is replayed from a graph
    calls nobody."""
    rows = [torch.cat(kept) if kept else torch.empty(0, 1) for kept in seen]
    return torch.stack(rows, dim=1) if len({each.shape for each in rows}) == 1 and len(rows[0]) else None


def share_elsewhere(one: Tensor, other: Tensor) -> float:
    """The share of choices [..., k] of one that the other does not make, in whatever order they stand."""
    kept = (one[..., :, None] == other.to(one)[..., None, :]).any(-1)
    return 1 - float(kept.float().mean())
