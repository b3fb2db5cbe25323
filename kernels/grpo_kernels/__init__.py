"""Kernels of GRPO training: tensors in, tensors out, each with a torch twin that runs anywhere.
Knows nothing of `grpo`.

A name is imported from its file when it is first asked for: who only lays tokens out needs no Triton. No file has the
name of a function: importing it would put the file in the function's place.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_kernels.attention import group_attention
    from grpo_kernels.gates import swiglu
    from grpo_kernels.layout import GroupLayout
    from grpo_kernels.logprob import linear_logprob
    from grpo_kernels.logprob_head import head_product
    from grpo_kernels.lora import LoraFactors, lora_linear, lora_linear_inference
    from grpo_kernels.mlp import lora_mlp
    from grpo_kernels.nf4 import NF4, nf4_concat, nf4_dequantize, nf4_quantize
    from grpo_kernels.nf4_product import nf4_linear
    from grpo_kernels.norms import add_rms_norm, rms_norm
    from grpo_kernels.rotary import rope
    from grpo_kernels.rows import take_rows
    from grpo_kernels.sampled import token_logprobs

_FILES = {
    "attention": ("group_attention",),
    "layout": ("GroupLayout",),
    "logprob": ("linear_logprob",),
    "logprob_head": ("head_product",),
    "lora": ("LoraFactors", "lora_linear", "lora_linear_inference"),
    "mlp": ("lora_mlp",),
    "nf4": ("NF4", "nf4_concat", "nf4_dequantize", "nf4_quantize"),
    "nf4_product": ("nf4_linear",),
    "norms": ("add_rms_norm", "rms_norm"),
    "rotary": ("rope",),
    "rows": ("take_rows",),
    "sampled": ("token_logprobs",),
    "gates": ("swiglu",),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}

__all__ = [
    "NF4",
    "GroupLayout",
    "LoraFactors",
    "add_rms_norm",
    "group_attention",
    "head_product",
    "linear_logprob",
    "lora_linear",
    "lora_linear_inference",
    "lora_mlp",
    "nf4_concat",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "rms_norm",
    "rope",
    "swiglu",
    "take_rows",
    "token_logprobs",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"grpo_kernels has no {name}. It has: {', '.join(__all__)}.")
    value = getattr(import_module(f"grpo_kernels.{_FILE_OF[name]}"), name)
    globals()[name] = value
    return value
