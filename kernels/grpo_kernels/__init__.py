"""Kernels of GRPO training: tensors in, tensors out, each with a torch twin that runs anywhere.
Knows nothing of `grpo`.
"""

from grpo_kernels.attention import GroupLayout, group_attention
from grpo_kernels.linear_logprob import linear_logprob
from grpo_kernels.rms_norm import add_rms_norm, rms_norm
from grpo_kernels.rope import rope
from grpo_kernels.swiglu import geglu, swiglu

__all__ = [
    "GroupLayout",
    "add_rms_norm",
    "geglu",
    "group_attention",
    "linear_logprob",
    "rms_norm",
    "rope",
    "swiglu",
]
