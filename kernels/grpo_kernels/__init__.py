"""Kernels of GRPO training: tensors in, tensors out, each with a torch twin that runs anywhere.
Knows nothing of `grpo`.
"""

from grpo_kernels.attention import GroupLayout, group_attention
from grpo_kernels.linear_logprob import linear_logprob
from grpo_kernels.lora_linear import LoraFactors, lora_linear, lora_linear_inference
from grpo_kernels.mlp import lora_mlp
from grpo_kernels.nf4 import NF4, nf4_concat, nf4_dequantize, nf4_linear, nf4_quantize
from grpo_kernels.qkv import lora_qkv
from grpo_kernels.rms_norm import add_rms_norm, rms_norm
from grpo_kernels.rope import rope
from grpo_kernels.swiglu import geglu, swiglu

__all__ = [
    "NF4",
    "GroupLayout",
    "LoraFactors",
    "add_rms_norm",
    "geglu",
    "group_attention",
    "linear_logprob",
    "lora_linear",
    "lora_linear_inference",
    "lora_mlp",
    "lora_qkv",
    "nf4_concat",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "rms_norm",
    "rope",
    "swiglu",
]
