"""MXFP4: what a checkpoint has in blocks of 32 values, of 4 bits each and one power of two, as the dense weights that
it stands for. Knows nothing of models or files.

    value = level * 2^(scale - 127)         OCP Microscaling Formats v1.0: levels in E2M1, scales in E8M0, 255 is none

gpt-oss comes so. Its files have, in place of the experts' weight X [E, K, M], of which K is a multiple of 32,

    X_blocks   uint8 [E, M, K / 32, 16]     two levels a byte, the first in the low four bits
    X_scales   uint8 [E, M, K / 32]

All values are exact in bf16, whose exponents are the scales' own, but for those beyond its largest number.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.policy.promises import Promise, value_of

METHOD = "mxfp4"  # as quantization_config has it
BLOCKS, SCALES = "_blocks", "_scales"
BYTES = 16  # of a block

# 0, then those of exponents 0 to 3 with their one bit of mantissa; with the sign, the highest bit, once more.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NO_NUMBER = 255


def is_mxfp4(settings: Any) -> bool:
    """Whether the checkpoint of this Hugging Face config has weights of this kind."""
    return (getattr(settings, "quantization_config", None) or {}).get("quant_method") == METHOD


def dense_promises(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with a promise of each dense weight [E, K, M] in place of its blocks and scales.

    Raises:
        UserError: blocks have no scales, scales no blocks, or they do not belong together.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((BLOCKS, SCALES))}
    for name in {name.removesuffix(BLOCKS).removesuffix(SCALES): None for name in tensors if name not in found}:
        blocks, scales = tensors.get(f"{name}{BLOCKS}"), tensors.get(f"{name}{SCALES}")
        _check(name, blocks, scales)
        assert blocks is not None and scales is not None
        experts, rows, count, _ = blocks.shape
        form = torch.empty(experts, rows, 2 * BYTES * count, dtype=torch.bfloat16, device="meta").mT
        found[name] = Promise(form, partial(_read, name, blocks, scales))
    return found


def _check(name: str, blocks: Tensor | None, scales: Tensor | None) -> None:
    if blocks is None or scales is None:
        lost, there = (SCALES, BLOCKS) if scales is None else (BLOCKS, SCALES)
        raise UserError(f"The checkpoint has {name}{there} without {name}{lost}. Get it anew.")
    shapes = list(blocks.shape), list(scales.shape)
    bytes_alone = blocks.dtype == scales.dtype == torch.uint8
    if not bytes_alone or blocks.dim() != 4 or shapes[0] != [*shapes[1], BYTES]:
        raise UserError(
            f"The checkpoint's {name} is not in MXFP4 as its config.json says: its blocks are {blocks.dtype} "
            f"{shapes[0]}, its scales {scales.dtype} {shapes[1]}, where bytes of [experts, rows, blocks, {BYTES}] and "
            "[experts, rows, blocks] are wanted. Get it anew."
        )


def _read(name: str, blocks: Tensor, scales: Tensor) -> Tensor:
    scales = value_of(scales)
    if (scales == NO_NUMBER).any():
        raise UserError(f"The checkpoint's {name} has scales that are no numbers ({NO_NUMBER}). Get it anew.")
    return dequantize(value_of(blocks), scales)


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [E, M, G, 16] and uint8 [E, M, G] -> bf16 [E, 32 G, M], one expert after the other. In memory it lies as
    [E, M, 32 G]."""
    experts, rows, count, _ = blocks.shape
    out = torch.empty(experts, rows, count, 2 * BYTES, dtype=torch.bfloat16, device=blocks.device)
    pairs, powers = _pairs(blocks.device), _powers(blocks.device)
    for of_one, block, scale in zip(out, blocks, scales, strict=True):
        levels = pairs.index_select(0, block.reshape(-1).int()).view(of_one.shape)
        torch.mul(levels, powers.index_select(0, scale.reshape(-1).int()).view(rows, count, 1), out=of_one)
    return out.flatten(2).mT


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels of each byte, the low four bits' first, bf16 [256, 2]."""
    levels = torch.tensor([*MAGNITUDES, *(-each for each in MAGNITUDES)], dtype=torch.bfloat16, device=device)
    return torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=1)


@functools.cache
def _powers(device: torch.device) -> Tensor:
    """2^(scale - 127) of each scale, bf16 [256]."""
    powers = [2.0 ** (scale - 127) for scale in range(NO_NUMBER)]
    return torch.tensor([*powers, float("nan")], dtype=torch.float32, device=device).bfloat16()
