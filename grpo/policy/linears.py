"""Linears: what the linear layers of a checkpoint hold, dense or quantised by bitsandbytes, as weights of ours.

Knows nothing of adapters or of which layers belong together.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from grpo_kernels.nf4 import BLOCK, NESTED_BLOCK, NF4, absmax_float32, nf4_dequantize
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grpo.errors import UserError
from grpo.policy.mxfp4 import is_mxfp4
from grpo.policy.promises import read_copy

# bitsandbytes reads the weights, transformers puts them in place with the help of accelerate.
NEEDED = ("bitsandbytes", "accelerate")


class NF4Linear(nn.Module):
    """A linear whose weight [M, K] is in NF4: what stands in the model for a bitsandbytes' Linear4bit.

    bitsandbytes' own one rounds to a dtype of its choice and, on some CPUs, repacks its weight when it is run.
    """

    def __init__(self, weight: NF4, bias: nn.Parameter | None):
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., M]."""
        return F.linear(x, nf4_dequantize(self.weight, x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


Linear = nn.Linear | Conv1D | NF4Linear


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes a linear map and nothing more. What derives from one may compute something else as
    well, as the routers of Phi-MoE and Llama 4 do, or the same (Falcon): that shows in a trial."""
    if type(module) in (nn.Linear, Conv1D, NF4Linear):
        return True
    return isinstance(module, nn.Linear) and _computes_linear(module)


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    module = read_copy(module)  # what stands in for a weight that is not read yet cannot do all that a forward does
    x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0)).to(module.weight)
    try:
        y = module(x)
    except (TypeError, RuntimeError, ValueError, IndexError):  # it wants another input: no plain linear
        return False
    expected = F.linear(x, module.weight, module.bias)
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-2, atol=1e-2)


def weight_of(linear: Linear) -> Tensor | NF4:
    """The weight of a linear, [M, K]. Conv1D (GPT-2) stores it transposed."""
    if isinstance(linear, NF4Linear):
        return linear.weight
    return linear.weight.data.T.contiguous() if isinstance(linear, Conv1D) else linear.weight.data


def is_quantized(settings: Any, name: str) -> bool:
    """Whether the checkpoint of this Hugging Face config is quantised by bitsandbytes, in the one way that can be read.
    One in MXFP4 is not: dense weights are made of it when it is read (mxfp4.py).

    Raises:
        UserError: it is quantised in another way, or the packages that read it are missing.
    """
    owners = (settings, settings.get_text_config())
    found = next((c for owner in owners if (c := getattr(owner, "quantization_config", None))), None)
    if found is None or is_mxfp4(settings):
        return False
    if not found.get("load_in_4bit") or found.get("bnb_4bit_quant_type") != "nf4":
        raise UserError(
            f"The checkpoint {name} is quantised by {_method(found)}. Use one that is not quantised (--base nf4 "
            "quantises it on loading), or one in bitsandbytes' NF4 (as a rule its name ends in -bnb-4bit)."
        )
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise UserError(
            f"The checkpoint {name} is in bitsandbytes' NF4. Reading it needs {' and '.join(missing)}, not installed "
            f"here: run `pip install {' '.join(missing)}`, or use the checkpoint that it was made from."
        )
    return True


def _method(found: dict[str, Any]) -> str:
    if found.get("load_in_8bit"):
        return "bitsandbytes to 8 bits"
    if found.get("load_in_4bit"):
        return "bitsandbytes to FP4"
    return str(found.get("quant_method", "an unnamed method"))


def adopt_quantized(model: Any, dtype: torch.dtype) -> None:
    """Put an NF4Linear in place of every Linear4bit of a model, over the same bytes.

    A head in 4 bits becomes dense, in `dtype`, because there is no projection for it.

    Raises:
        UserError: the weights are not what the checkpoint's config says, or not in blocks of 64.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    quantized = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    for name, linear in quantized:
        if not isinstance(linear.weight, Params4bit):
            raise UserError(
                f"The checkpoint's {name} is not in 4 bits, though its config.json does not list it in "
                "llm_int8_skip_modules. Add it there, or use the checkpoint that it was made from."
            )
        adopted = NF4Linear(read_nf4(linear.weight), linear.bias)
        model.set_submodule(name, _dense(adopted, dtype) if linear is head else adopted)


def read_nf4(weight: Any) -> NF4:
    """A bitsandbytes' Params4bit as an NF4 over the same memory.

    Its dequantised values are those of `bitsandbytes.functional.dequantize_4bit`, bit for bit.

    Raises:
        UserError: its blocks are not of 64 values.
    """
    from bitsandbytes.functional import dequantize_blockwise

    state = weight.quant_state
    if state.blocksize != BLOCK:
        raise UserError(
            f"The checkpoint's weights are quantised in blocks of {state.blocksize} values, and only blocks of {BLOCK} "
            "can be read. Use the checkpoint that it was made from; --base nf4 quantises it on loading."
        )
    rows, columns = state.shape
    # bitsandbytes may keep the bytes under another dtype, for FSDP.
    packed = weight.data.view(torch.uint8).reshape(-1)
    if not state.nested:
        return NF4(packed, state.absmax, (rows, columns))
    nested = state.state2
    absmax = dequantize_blockwise(state.absmax, nested) + state.offset
    if nested.blocksize == NESTED_BLOCK:
        offset = state.offset.expand(nested.absmax.shape).contiguous()
        kept = NF4(packed, state.absmax, (rows, columns), nested.absmax, offset)
        # The levels of the 8-bit codes come with the checkpoint; computed elsewhere, they may differ in the last bit.
        if torch.equal(absmax_float32(kept), absmax):
            return kept
    return NF4(packed, absmax, (rows, columns))


def _dense(linear: NF4Linear, dtype: torch.dtype) -> nn.Linear:
    dense = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(nf4_dequantize(linear.weight, dtype), requires_grad=False)
    dense.register_parameter("bias", linear.bias)
    return dense
