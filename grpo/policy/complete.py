"""Complete: whether a checkpoint has the weights that its config.json asks for, and no others.

Knows nothing of files: it reads what transformers reports of loading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from grpo.errors import UserError

# What old checkpoints keep in their layers although the model computes it: masks, positions and rotary frequencies.
COMPUTED = re.compile(r"(rotary_emb\.\w+|masked_bias|attn\.bias|attention\.bias|position_ids|_extra_state)$")

# What quantised checkpoints call a weight's packed values and their scales: GPTQ, AWQ, compressed-tensors, FP8, MXFP4.
QUANTISED = re.compile(
    r"(\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_scale_2)|_proj_(blocks|scales))$"
)


def check_complete(name: str, model: Any, report: dict[str, Any]) -> None:
    """Every parameter came from the checkpoint, and every weight of its layers has a module: transformers draws the
    others at random, leaves out what is too many, and goes on."""
    if packed := sorted(key for key in report["unexpected_keys"] if QUANTISED.search(key)):
        raise UserError(
            f"The checkpoint of {name} is quantised, by the names of its weights ({packed[0]}), though its config.json "
            "does not say how. Use the checkpoint that it was made from (--base nf4 quantises it on loading), or one "
            "in bitsandbytes' NF4 (as a rule its name ends in -bnb-4bit)."
        )
    missing = sorted(set(report["missing_keys"]) & dict(model.named_parameters()).keys())
    if missing:
        raise UserError(
            f"The checkpoint of {name} lacks {len(missing)} of the weights that its config.json asks for, such as "
            f"{missing[0]}. Get the whole checkpoint, or the config.json that belongs to it."
        )
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        weight, found, wanted = mismatched[0]
        raise UserError(
            f"The checkpoint of {name} does not go with its config.json: {weight} is {list(found)} where the config "
            f"asks for {list(wanted)} ({len(mismatched)} such weights). Get the config.json that belongs to it."
        )
    surplus = _surplus(model, report["unexpected_keys"])
    if surplus:
        raise UserError(
            f"The checkpoint of {name} has {len(surplus)} weights that its config.json does not ask for, such as "
            f"{surplus[0]}: without them it would be another model. Get the config.json that belongs to it."
        )


def _surplus(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Of the weights without a module those of the model's own layers, beyond the last one or within one.

    What is elsewhere, such as the vision tower of a model whose text is trained, is left out on purpose.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return sorted(
        name
        for name in unexpected
        if (first := re.search(r"\.\d+\.", name)) and name[: first.start()] in layers and not COMPUTED.search(name)
    )
