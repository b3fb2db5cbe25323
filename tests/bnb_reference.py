"""What bitsandbytes makes of its own quantised weights: the reference of the NF4 tests. No test is here."""

import copy

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit

BLOCK = 64


def dequantize_4bit(packed, state):
    """bitsandbytes' dequantize_4bit, one block a row.

    bitsandbytes 0.50 on CPUs with AVX-512 takes the wrong scale where a row is no multiple of 64 wide; of the same
    bytes as rows of one block it makes what its definition says.
    """
    flat = copy.copy(state)
    flat.shape = torch.Size((state.shape.numel() // BLOCK, BLOCK))
    return functional.dequantize_4bit(packed, flat).reshape(state.shape)


def dequantize_linears(model):
    """A dense linear in place of every Linear4bit of a transformers' model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense = torch.nn.Linear(*weight.shape[::-1], bias=module.bias is not None, dtype=weight.dtype)
            dense.weight.data = weight
            dense.bias = module.bias
            model.set_submodule(name, dense)
    return model
