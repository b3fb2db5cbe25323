"""Rewards of a step -> advantages, one function an estimator. Knows nothing of tokens or models.

An estimator takes the rewards of all groups of the step, `rewards [B, G]`, and returns `advantages [B, G]`. `gdpo`
looks at the parts of the reward instead. Equal rewards give advantage 0 under every estimator but lite_ppo's shared
scale, which gives 0 too because the group mean is taken off first.

A completion without a score (a reward failed on it) is NaN in both, and in no mean and no spread: the others have the
advantages that they would have without it. One that is alone has advantage 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo.types import Group

# Keeps a group of nearly equal rewards from being blown up; the size that the field uses.
EPSILON = 1e-4

Estimator = Callable[[list[Group], dict[str, float]], Tensor]


def assign_advantages(groups: list[Group], estimator: Estimator, weights: dict[str, float]) -> None:
    """Write `advantages [G]` into each group. weights: {reward name: weight}."""
    for group, advantages in zip(groups, estimator(groups, weights), strict=True):
        group.advantages = advantages


def grpo(groups: list[Group], weights: dict[str, float]) -> Tensor:
    """(r - mean of the group) / (std of the group + eps): Shao et al. 2024, arXiv 2402.03300, section 4.1.2."""
    rewards = _rewards(groups)
    spread = torch.stack([_std(row) for row in rewards])  # [B]
    return _centered(rewards) / (spread[:, None] + EPSILON)


def dr_grpo(groups: list[Group], weights: dict[str, float]) -> Tensor:
    """r - mean of the group; no std, which favours questions that are nearly always or never solved:
    Liu et al. 2025, arXiv 2503.20783, section 3.2."""
    return _centered(_rewards(groups))


def lite_ppo(groups: list[Group], weights: dict[str, float]) -> Tensor:
    """(r - mean of the group) / (std of the whole step + eps): Liu et al. 2025, arXiv 2508.08221, section 4.1."""
    rewards = _rewards(groups)
    return _centered(rewards) / (_std(rewards) + EPSILON)


def rloo(groups: list[Group], weights: dict[str, float]) -> Tensor:
    """r - mean of the *other* completions of the group: Ahmadian et al. 2024, arXiv 2402.14740, equation 8."""
    rewards = _rewards(groups)
    others = _num_scored(rewards) - 1
    return _centered(rewards) * ((others + 1) / others.clamp(min=1))


def gdpo(groups: list[Group], weights: dict[str, float]) -> Tensor:
    """Each reward normalised in its group, then the weighted sum, scaled by its std over the step:
    Liu et al. 2026, arXiv 2601.05242, section 3. Rewards that do not apply (NaN) count 0."""
    rewards = _rewards(groups)
    total = torch.zeros_like(rewards).where(~rewards.isnan(), torch.nan)
    for name, weight in weights.items():
        part = torch.stack([group.parts[name] for group in groups]).where(~total.isnan(), torch.nan)
        total += weight * torch.nan_to_num(_normalized_where_known(part))
    return total / (_std(total) + EPSILON)


def earned(groups: list[Group], weights: dict[str, float]) -> Tensor:
    """r itself, for `--advantage gae`: with the value head's values it becomes the advantages of tokens in the update
    (grpo/gae.py)."""
    return _rewards(groups)


def _rewards(groups: list[Group]) -> Tensor:
    return torch.stack([group.rewards for group in groups])  # [B, G]


def _num_scored(values: Tensor) -> Tensor:
    """How many of each group are not NaN, [B, 1]."""
    return (~values.isnan()).sum(dim=1, keepdim=True)


def _std(values: Tensor) -> Tensor:
    """Of all entries that are not NaN, []; 0 of one alone."""
    known = values[~values.isnan()]
    return known.std(correction=min(1, len(known) - 1))


def _centered(values: Tensor) -> Tensor:
    """Values less their group's mean, [B, G]; NaN entries stay NaN and do not count."""
    centered = values - values.nanmean(dim=1, keepdim=True)
    # The mean of equal numbers may differ from them by a rounding; equal rewards must give exactly 0.
    highest = values.nan_to_num(-torch.inf).amax(dim=1, keepdim=True)
    lowest = values.nan_to_num(torch.inf).amin(dim=1, keepdim=True)
    return torch.where((highest == lowest) & ~values.isnan(), 0.0, centered)


def _normalized_where_known(part: Tensor) -> Tensor:
    """(x - mean) / (std + eps) along the group, [B, G], over the entries that are not NaN."""
    centered = _centered(part)
    degrees = (_num_scored(part) - 1).clamp(min=1)
    variance = (centered**2).nansum(dim=1, keepdim=True) / degrees
    return centered / (variance.sqrt() + EPSILON)


ESTIMATORS: dict[str, Estimator] = {"grpo": grpo, "dr_grpo": dr_grpo, "lite_ppo": lite_ppo, "rloo": rloo, "gdpo": gdpo}
