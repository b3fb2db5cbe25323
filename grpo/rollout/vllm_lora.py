"""The memory in which vLLM's own LoRA machinery keeps an adapter. Knows nothing of what is copied there.

open_adapter(llm, request)     an adapter of zeros that vLLM leaves alone
find_lora_slices(llm, id)      Hugging Face name of a linear -> where vLLM reads its A and B
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch

from grpo.policy.peft_names import tensor_name
from grpo.rollout.vllm_compat import runner_of


@dataclass(frozen=True)
class LoraSlice:
    """The memory that vLLM reads an adapter from: one of the blocks of rows of a linear, each with an A and a B."""

    a: torch.Tensor  # [largest rank, K]
    b: torch.Tensor  # [M_s, largest rank]


def lora_ranks() -> tuple[int, ...]:
    """The ranks that adapters' memory can be laid out for, ascending."""
    from vllm.config.lora import MaxLoRARanks

    return get_args(MaxLoRARanks)


def open_adapter(llm: Any, request: Any) -> None:
    """Register an adapter of zeros under this request's id, such that vLLM never loads, drops or overwrites it.

    It is the one that vLLM warms up with. Tensors of ours are not handed over: vLLM would scale them where they are.
    """
    manager = runner_of(llm).lora_manager
    manager.add_dummy_lora(request, rank=1)
    manager.pin_adapter(request.lora_int_id)


def find_lora_slices(llm: Any, adapter: int) -> Callable[[str], list[LoraSlice]]:
    """Hugging Face name of a linear -> the slices that hold its rows in order; none if vLLM puts no adapter on it.

    Names are translated as vLLM's own loader of adapters does it. A linear of the checkpoint may be one of several in a
    layer of vLLM's (q_proj in qkv_proj), be a layer, or be a layer that vLLM itself keeps in slices.
    """
    from vllm.lora.utils import parse_fine_tuned_lora_name

    manager = runner_of(llm).lora_manager._adapter_manager
    slot = manager.lora_index_to_id.index(adapter)
    mapper = _rename_mapper(manager.model)
    parts = {
        part: (layer, number, len(names))
        for layer, names in manager.packed_modules.items()
        for number, part in enumerate(names)
    }

    def slices(layer: str) -> list[LoraSlice]:
        stacked = manager.modules[layer]
        pairs = zip(stacked.lora_a_stacked, stacked.lora_b_stacked, strict=True)
        return [LoraSlice(a[slot, 0], b[slot, 0]) for a, b in pairs]

    def find(name: str) -> list[LoraSlice]:
        translated, _ = parse_fine_tuned_lora_name(tensor_name(name, "A"), mapper)
        if translated in parts:
            layer, number, count = parts[translated]
            found = slices(layer)
            return found[number : number + 1] if len(found) == count else []
        return slices(translated) if translated in manager.modules else []

    return find


def _rename_mapper(model: Any) -> Any:
    """How this model's class renames what a checkpoint holds, without the joining of linears; None if it does not."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for name in ("get_rename_mapper", "get_unstacked_mapper"):  # 0.29 and later; 0.25 to 0.28
        if hasattr(mapper, name):
            return getattr(mapper, name)()
    return mapper
