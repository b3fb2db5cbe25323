"""The trainer's experts inside vLLM: a method for its layers of experts, which chooses them and lets ours compute.
Knows nothing of how vLLM loads the other layers.

vLLM's layer of experts is its router and a method, which a quantisation config may name. Ours has no weights: it calls
the module that the policy's own forward calls, so that base (dense or NF4), adapter and activation are the trainer's
whatever they are, and no second copy of them exists. Which layer is whose is said by its number.

An NF4 base stays packed while rows are few, as in decoding, by our kernel (grpo_kernels/grouped_nf4.py), and is
dequantised else, all of a layer's experts: nothing of vLLM's multiplies by packed ones in bitsandbytes' blocks.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from grpo.policy.experts import Experts
from grpo.rollout.vllm_rows import NotShareableError

LAYER = re.compile(r"\.(\d+)\.")  # the first number in a module's name


def experts_by_layer(model: nn.Module) -> dict[int, Experts]:
    """Number of the layer -> its experts, in the policy's model."""
    found: dict[int, Experts] = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            number = _number(name)
            assert number not in found, f"two modules of experts in layer {number}"
            found[number] = module
    return found


def _number(name: str) -> int:
    match = LAYER.search(name)
    return int(match[1]) if match else -1


class SharedExperts(FusedMoEMethodBase):
    """Computes with the policy's experts what vLLM's router has chosen."""

    def __init__(self, layer: RoutedExperts, prefix: str, lent: dict[int, Experts]):
        """prefix: the layer's full name in vLLM's model; lent: the trainer's experts by layer.

        Raises:
            NotShareableError: they are not those of this layer, or it uses them otherwise.
        """
        super().__init__(layer.moe_config)
        self.name, found = prefix, lent.get(_number(prefix))
        if found is None:
            raise NotShareableError(f"it has experts in {prefix}, which the trainer leaves to transformers")
        if layer.apply_router_weight_on_input:
            raise NotShareableError(f"the experts of its {prefix} weigh their input")
        self.experts: Experts = found

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *_: Any) -> tuple[int, int]:
        """Nothing is padded: the weights are not vLLM's."""
        return hidden_size, intermediate_size_per_partition

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The layer has none of its own."""
        up, down = self.experts.maps()
        ours = up.num_experts, up.base.shape[1], down.base.shape[1]
        wanted = num_experts, hidden_size, intermediate_size_per_partition
        if ours != wanted:
            raise NotShareableError(
                f"its {self.name} has experts of {list(wanted)} where the trainer's are {list(ours)}"
            )

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig | None:
        """There is nothing that vLLM's kernels would have to know."""
        return None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing may be repacked: the weights are not vLLM's."""

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """x [N, D], the router's choices [N, k] -> [N, D]."""
        return self.experts(x, topk_ids.long(), topk_weights)
