"""The adapter in PEFT's files and names: saved here it opens in `PeftModel`, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from grpo.errors import UserError
from grpo.policy.policy import Policy

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def adapter_files(policy: Policy) -> dict[str, bytes]:
    """File name -> content of the adapter as it is now, in float32."""
    tensors: dict[str, Tensor] = {}
    for name, a, b in policy.store.factors():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.cpu().contiguous()
    return {
        WEIGHTS: save(tensors, {"format": "pt"}),
        SETTINGS: json.dumps(_settings(policy), indent=2).encode(),
    }


def _settings(policy: Policy) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that differ from its defaults or that a reader looks for."""
    config = policy.config
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": policy.source,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        # Full names: a suffix such as "dense" would also match modules that have no adapter.
        "target_modules": [name for name, _, _ in policy.store.factors()],
        "fan_in_fan_out": policy.conv1d,
    }


@torch.no_grad()
def load_adapter(policy: Policy, folder: Path) -> None:
    """Copy an adapter in PEFT's format into the policy's store.

    Raises:
        UserError: the files are missing or damaged, or belong to another model or rank.
    """
    try:
        tensors = load((folder / WEIGHTS).read_bytes())
        settings = json.loads((folder / SETTINGS).read_bytes())
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"The adapter in {folder} cannot be read: {error}. Choose another checkpoint.") from error
    wanted = {
        f"{PREFIX}{name}.lora_{x}.weight": t for name, a, b in policy.store.factors() for x, t in (("A", a), ("B", b))
    }
    missing = sorted(set(wanted) - set(tensors))
    if missing or len(tensors) != len(wanted):
        raise UserError(
            f"The adapter in {folder} was made for {settings.get('base_model_name_or_path')}, not for this model "
            f"({policy.source}): it has {len(tensors)} tensors where {len(wanted)} are needed. Give its --model."
        )
    for name, target in wanted.items():
        if tensors[name].shape != target.shape:
            raise UserError(
                f"The adapter in {folder} has {name} of shape {list(tensors[name].shape)} where this run has "
                f"{list(target.shape)}. Give the --lora-rank ({settings.get('r')}) and --model it was trained with."
            )
        target.copy_(tensors[name])
    policy.store.set_alpha(settings["lora_alpha"])
    policy.store.refresh()
