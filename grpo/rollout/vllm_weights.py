"""The trainer's weights inside vLLM: a linear method and a model loader, registered through vLLM's two public hooks.
Knows nothing of sampling.

While vLLM builds its model, every linear layer asks the registered quantisation config for its method, before any
memory is allocated. The method gives the layer the tensors of the trainer's projection as its parameters:

    <layer>.self_attn.qkv_proj  <-  projection "<layer>.qkv"         base (dense or NF4), LoRA mirrors, scale
    embed_tokens, lm_head       <-  the policy's embedding and head

So the base exists once, and an optimizer step followed by `ProjectionStore.refresh` is seen by the next token that is
sampled, captured CUDA graphs included: the addresses never change. Norms and biases, tiny and frozen, are copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from grpo_kernels import NF4
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from grpo.errors import UserError
from grpo.policy.fused import FusedModel
from grpo.policy.projections import Projection, ProjectionStore

# The name under which vLLM knows the quantisation config and the loader.
SHARED = "grpo_shared"

# vLLM pads its tables to a multiple of this many rows.
VOCABULARY_MULTIPLE = 64

PROJECTIONS = {
    "self_attn.qkv_proj": "qkv",
    "self_attn.o_proj": "o",
    "mlp.gate_up_proj": "gate_up",
    "mlp.down_proj": "down",
}


class _Lender:
    """Whose weights are being lent: vLLM builds the hooks' classes itself, so there is no argument to pass it in."""

    model: FusedModel | None = None
    store: ProjectionStore | None = None
    tables: tuple[Tensor, Tensor] | None = None  # embedding and head


@contextmanager
def lending(model: FusedModel, store: ProjectionStore) -> Iterator[None]:
    """Inside, a vLLM engine that is built takes this model's weights for its own."""
    _Lender.model, _Lender.store, _Lender.tables = model, store, pad_vocabulary(model)
    try:
        yield
    finally:
        _Lender.model = _Lender.store = _Lender.tables = None


def _lent() -> tuple[FusedModel, ProjectionStore, tuple[Tensor, Tensor]]:
    assert _Lender.model and _Lender.store and _Lender.tables, "no model is being lent"
    return _Lender.model, _Lender.store, _Lender.tables


def pad_vocabulary(model: FusedModel) -> tuple[Tensor, Tensor]:
    """Tables as vLLM wants them, embedding and head [V rounded up, D], whose first V rows are the model's from now on.

    Nothing changes for the model. Where its two tables are one, so are these.
    """
    tied = model.head.data_ptr() == model.embed.weight.data_ptr()
    embedding = _padded(model.embed.weight.data)
    head = embedding if tied else _padded(model.head.data)
    size = model.head.shape[0]
    model.embed.weight.data, model.head.data = embedding[:size], head[:size]
    return embedding, head


def _padded(table: Tensor) -> Tensor:
    """[V, D] -> [V rounded up, D], the table itself where nothing is missing."""
    missing = -table.shape[0] % VOCABULARY_MULTIPLE
    return nn.functional.pad(table, (0, 0, 0, missing)) if missing else table


def layout_key(store: ProjectionStore) -> str:
    """A digest of what vLLM's compiled code depends on: shapes and dtypes of all that is lent, not their values."""
    lent = [[(tuple(t.shape), str(t.dtype)) for t in _tensors(p, store)] for p in store.projections.values()]
    return hashlib.sha256(repr(lent).encode()).hexdigest()


def check_shared(model: Any, lender: FusedModel, store: ProjectionStore) -> None:
    """Raise unless every projection, the embedding and the head of vLLM's model are the trainer's own memory."""
    layers = list(model.modules())
    built_on = {id(layer.quant_method.projection): layer for layer in layers if _is_shared(layer)}
    for name, projection in store.projections.items():
        layer = built_on.get(id(projection))
        if layer is None or not _same_memory(_parameters(layer), _tensors(projection, store)):
            raise UserError(
                f"vLLM built this model without the trainer's weights (projection {name}), so it cannot sample from "
                "the policy. Use --engine torch, and please report this with the model's name."
            )
    tables = {layer.weight.data_ptr() for layer in layers if isinstance(layer, VocabParallelEmbedding)}
    assert tables == {lender.embed.weight.data_ptr(), lender.head.data_ptr()}, "embedding or head is a copy"


def _is_shared(layer: nn.Module) -> bool:
    return isinstance(layer, LinearBase) and isinstance(layer.quant_method, SharedDense)


def _same_memory(theirs: list[Tensor], ours: list[Tensor]) -> bool:
    return [tensor.data_ptr() for tensor in theirs] == [tensor.data_ptr() for tensor in ours]


def _parameters(layer: Any) -> list[Tensor]:
    """What a shared layer multiplies by, in the order of `_tensors`."""
    base = [getattr(layer, name) for name in layer.quant_method.base_names()]
    return [*base, layer.lora_a, *layer.lora_b, layer.lora_scale]


def _tensors(projection: Projection, store: ProjectionStore) -> list[Tensor]:
    """What a projection consists of: base, A, the parts' B, scale."""
    return [*_base_tensors(projection), *projection.mirrors, store.scale]


def _base_tensors(projection: Projection) -> list[Tensor]:
    base = projection.base
    tensors = (base,) if isinstance(base, Tensor) else (base.packed, base.absmax, base.nested_absmax, base.offset)
    return [tensor for tensor in tensors if tensor is not None]


class SharedDense(LinearMethodBase):
    """Multiplies by a projection of the trainer: dense base and adapter."""

    def __init__(self, projection: Projection, store: ProjectionStore):
        self.projection, self.store = projection, store

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer the projection's tensors as its parameters: the same memory, nothing allocated."""
        projection = self.projection
        if list(output_partition_sizes) != projection.sizes or input_size != projection.base.shape[1]:
            raise UserError(
                f"vLLM wants {output_partition_sizes} rows of {input_size} inputs for {', '.join(projection.names)}, "
                f"but the trainer holds {projection.sizes} of {projection.base.shape[1]}. Use --engine torch."
            )
        a, *b = projection.mirrors
        for name, tensor in zip(self.base_names(), _base_tensors(projection), strict=True):
            layer.register_parameter(name, _frozen(tensor))
        layer.register_parameter("lora_a", _frozen(a))
        layer.register_parameter("lora_scale", _frozen(self.store.scale))
        layer.lora_b = nn.ParameterList(map(_frozen, b))

    def base_names(self) -> tuple[str, ...]:
        """The layer's parameters that are the base. Model code asks `weight` for its device."""
        return ("weight",)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing may be repacked: the weights are not vLLM's."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, K] -> [M, N]."""
        operation = torch.ops.grpo_kernels.lora_linear_dense
        return operation(x, layer.weight, layer.lora_a, list(layer.lora_b), layer.lora_scale, bias)


class SharedNF4(SharedDense):
    """The same over a 4-bit base."""

    def create_weights(self, layer: Any, *arguments: Any, **named: Any) -> None:
        """See SharedDense.create_weights."""
        layer.register_parameter("nested_absmax", None)
        layer.register_parameter("absmax_offset", None)
        layer.num_rows = self.projection.base.shape[0]
        super().create_weights(layer, *arguments, **named)

    def base_names(self) -> tuple[str, ...]:
        """See SharedDense.base_names. Single quantisation has the first two alone."""
        return ("weight", "absmax", "nested_absmax", "absmax_offset")[: len(_base_tensors(self.projection))]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, K] -> [M, N]."""
        return torch.ops.grpo_kernels.lora_linear_nf4(
            x, layer.weight, layer.absmax, layer.nested_absmax, layer.absmax_offset, layer.num_rows,
            layer.lora_a, list(layer.lora_b), layer.lora_scale, bias,
        )  # fmt: skip


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class SharedTable(UnquantizedEmbeddingMethod):
    """The policy's embedding or head. Logits leave it in float32, unrounded, as the policy computes them."""

    def __init__(self, weight: Tensor):
        self.table = weight

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The policy's table as the layer's parameter."""
        assert tuple(self.table.shape) == (sum(output_partition_sizes), input_size_per_partition)
        layer.register_parameter("weight", nn.Parameter(self.table, requires_grad=False))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """See SharedDense.process_weights_after_loading."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Hidden states [M, D] -> logits [M, V], float32."""
        assert bias is None
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, layer.weight.t(), out_dtype=torch.float32)
        return nn.functional.linear(x, layer.weight)


@register_quantization_config(SHARED)
class SharedConfig(QuantizationConfig):
    """Hands each layer of vLLM's model its method."""

    @classmethod
    def get_name(cls) -> str:
        """The name it is registered under."""
        return SHARED

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Whatever the policy computes in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU that vLLM runs on."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """There is no file to read."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SharedConfig:
        """There is nothing to configure."""
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """A checkpoint that is itself quantised is the trainer's business, not vLLM's."""
        return SHARED if user_quant == SHARED else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer by its full name (model.layers.3.mlp.down_proj); None for attention and others."""
        _, store, (embedding, head) = _lent()
        if isinstance(layer, VocabParallelEmbedding):
            return SharedTable(head if isinstance(layer, ParallelLMHead) else embedding)  # not all have a name
        if not isinstance(layer, LinearBase):
            return None
        _, _, rest = prefix.rpartition("layers.")
        index, _, part = rest.partition(".")
        name = f"{index}.{PROJECTIONS.get(part)}"
        if name not in store.projections:
            raise UserError(f"vLLM has a linear layer {prefix} that the trainer does not have. Use --engine torch.")
        method = SharedNF4 if isinstance(store[name].base, NF4) else SharedDense
        return method(store[name], store)


@register_model_loader(SHARED)
class SharedLoader(BaseModelLoader):
    """Loads what is not shared: norms and biases, from the trainer's memory."""

    def download_model(self, model_config: Any) -> None:
        """The trainer has it."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Copy norms and biases by their Hugging Face names; vLLM knows which of them it keeps joined."""
        model.load_weights(_lent()[0].small_weights())

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Bytes that were there before vLLM (0.32 and later ask)."""
        _, store, tables = _lent()
        projections = [t for p in store.projections.values() for t in _tensors(p, store)]
        return sum(tensor.nbytes for tensor in [*projections, *tables])
