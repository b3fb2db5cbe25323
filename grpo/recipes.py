"""Recipes: the fields of Config that a paper's objective means, together. Knows nothing of the command line.

A recipe says what is optimised. How many completions and optimizer steps, learning rate and lengths are matters of
size and stay as they are, and so does the correction of the sampler's numerics, which none of the papers speaks of.
Where each value is from: docs/algorithm.md.
"""

from __future__ import annotations

import math
from typing import Any, Literal

Recipe = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"]

# What every recipe says, so that nothing of the task's own objective stays behind.
_COMMON: dict[str, Any] = dict(
    objective="grpo",
    advantage="grpo",
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=math.inf,
    kl_coef=0.0,
    entropy_coef=0.0,
    top_entropy=1.0,
    off_policy_mask=math.inf,
    mask_truncated=False,
    dynamic_sampling=False,
)

RECIPES: dict[Recipe, dict[str, Any]] = {
    # DeepSeekMath, Shao et al. 2024, arXiv 2402.03300, equations 3 and 4, section 4.2
    "grpo": _COMMON | dict(normalization="grpo", kl_coef=0.04, kl_estimator="k3"),
    # Yu et al. 2025, arXiv 2503.14476, sections 2.3 and 3, section 4.1
    "dapo": _COMMON | dict(normalization="dapo", clip_high=0.28, mask_truncated=True, dynamic_sampling=True),
    # Liu et al. 2025, arXiv 2503.20783, section 3
    "dr_grpo": _COMMON | dict(normalization="dr_grpo", advantage="dr_grpo"),
    # Zheng et al. 2025, arXiv 2507.18071, equation 5, section 5.1: without several mini-batches nothing is ever clipped
    "gspo": _COMMON | dict(normalization="grpo", objective="gspo", clip_low=3e-4, clip_high=4e-4, mini_batches=4),
    # MiniMax 2025, arXiv 2506.13585, section 3.1; it publishes no cap: 5 is Khatri et al. 2025, arXiv 2510.13786
    "cispo": _COMMON | dict(normalization="dapo", objective="cispo", cispo_cap=5.0, dynamic_sampling=True),
}

# What teaches, and what it means for the fields of a task that was written for GRPO: over the task's, under the flags.
Method = Literal["grpo", "sft", "dpo"]
_TAUGHT: dict[str, Any] = dict(temperature=1.0, epochs=1, mini_batches=1)
METHODS: dict[Method, dict[str, Any]] = {
    "grpo": {},
    # About ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA without regret").
    "sft": _TAUGHT | dict(method="sft", learning_rate=2e-4),
    # Rafailov et al. 2023, appendix B: beta 0.1 and 1e-6 in full training.
    "dpo": _TAUGHT | dict(method="dpo", learning_rate=1e-5),
}


def module_of(method: Method | None) -> str:
    """What `python -m` starts for it; for GRPO too where nobody has said."""
    return "grpo.run" if method in (None, "grpo") else f"grpo.{method}"
