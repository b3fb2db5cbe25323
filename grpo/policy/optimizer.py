"""Learning rate and AdamW of the adapter. Knows nothing of losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from grpo.config import Config, UpdateConfig
from grpo.errors import UserError


def learning_rate(step: int, config: Config) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then the schedule. Pure, so a resumed run needs no state."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    left = (config.steps - step) / max(1, config.steps - config.warmup_steps)
    shape: dict[str, Callable[[float], float]] = {
        "constant": lambda left: 1.0,
        "linear": lambda left: min(1.0, left),
        "cosine": lambda left: (1 - math.cos(math.pi * min(1.0, left))) / 2,
    }
    return config.learning_rate * warm * shape[config.schedule](left)


def build_optimizer(parameters: list[nn.Parameter], config: UpdateConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) over the float32 masters of the adapter."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        foreach=True,
    )


def clip_gradient(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale the gradient down to `max_norm` and return the norm that it had.

    Raises:
        UserError: it is NaN or infinite; the parameters have not been touched.
    """
    norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
    if not math.isfinite(norm):
        raise UserError(
            f"The gradient's norm is {norm}, so this step would ruin the adapter. Resume from the last checkpoint with "
            "a lower --learning-rate, or look into completions.jsonl for what the policy had come to."
        )
    return norm


def state_to_come(optimizer: torch.optim.AdamW) -> list[Tensor]:
    """As much memory as the optimizer takes at its first step: two moments of each parameter that has none yet."""
    without = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    return [torch.empty_like(parameter) for parameter in without for _ in range(2)]


def optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, "<parameter number>.<name>"; empty before the first step."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
