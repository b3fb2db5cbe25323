"""The trainer's weights inside vLLM: a linear method and a model loader, registered through vLLM's two public hooks.
Knows nothing of sampling.

While vLLM builds its model, every linear layer asks the registered quantisation config for its method, before any
memory is allocated, and gets one with a stand-in for a weight. Which linears of the checkpoint a layer holds is then
seen, and not supposed: vLLM's own loading code is given a stand-in for each of them, by its name in the checkpoint, and
the method notes which come to its layer, and in what order. It gives the layer the trainer's tensors as parameters:

    a layer of vLLM's        <-  rows of projections        base (dense or NF4), LoRA mirrors, scale
    a layer of experts       <-  the policy's own module    (vllm_experts.py)
    embed_tokens, lm_head    <-  the policy's embedding, wherever it is, and head

So no model is named here. The base exists once, and an optimizer step followed by `ProjectionStore.refresh` is seen by
the next token that is sampled, captured CUDA graphs included: the addresses never change. What vLLM holds in one layer
and the trainer in several projections is multiplied one after the other. All else (norms, biases), small and frozen, is
copied. Where vLLM's loading comes out in another way, the model is not shared (`NotShareableError`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from grpo_kernels.rows import next_number, numbered
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.core_model_loading import revert_weight_conversion
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
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

from grpo.errors import UserError, is_out_of_memory
from grpo.policy.experts import Experts
from grpo.policy.fused import FusedModel
from grpo.policy.host_embedding import is_hosted
from grpo.policy.load import Model
from grpo.policy.projections import Masters, ProjectionStore
from grpo.rollout.vllm_compat import reason_of
from grpo.rollout.vllm_experts import SharedExperts, experts_by_layer
from grpo.rollout.vllm_norms import use_our_kernel
from grpo.rollout.vllm_rows import BLOCKS, NotShareableError, Rows, StandIns, base_tensors, joined

# The name under which vLLM knows the quantisation config and the loader.
SHARED = "grpo_shared"

# Its latent attention (DeepSeek) multiplies by a copy of weights, absorbed into others once and reached by no update.
# With this in the environment it multiplies by them as they are.
LATENT = "VLLM_MLA_DISABLE"

# Where a model for text alone has its layers.
TEXT = "model"

# vLLM pads its tables to a multiple of this many rows.
VOCABULARY_MULTIPLE = 64


class Loan(NamedTuple):
    """Whose weights are being lent."""

    model: Model
    store: ProjectionStore
    transposed: bool  # whether the checkpoint keeps its linears transposed
    tables: tuple[Tensor, Tensor]  # embedding and head
    experts: dict[int, Experts]  # by layer


class _Lender:
    """vLLM builds the hooks' classes itself, so there is no argument to pass it in."""

    loan: Loan | None = None


@contextmanager
def lending(model: Model, store: ProjectionStore, transposed: bool) -> Iterator[None]:
    """Inside, a vLLM engine that is built takes this model's weights for its own."""
    _Lender.loan = Loan(model, store, transposed, pad_vocabulary(model), experts_by_layer(model))
    before = os.environ.get(LATENT)
    os.environ[LATENT] = "1"
    try:
        yield
    finally:
        _Lender.loan = None
        os.environ.pop(LATENT)
        if before is not None:
            os.environ[LATENT] = before


def _lent() -> Loan:
    assert _Lender.loan, "no model is being lent"
    return _Lender.loan


def pad_vocabulary(model: Model) -> tuple[Tensor, Tensor]:
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
    """[V, D] -> [V rounded up, D], the table itself where nothing is missing; in pinned memory where it was."""
    missing = -table.shape[0] % VOCABULARY_MULTIPLE
    if not missing:
        return table
    padded = nn.functional.pad(table, (0, 0, 0, missing))
    return padded.pin_memory() if table.is_pinned() else padded


def text_alone(model: Model, source: str) -> dict[str, Any]:
    """Arguments of vllm.LLM such that of a model that also sees the part for text is built, if that is what we have."""
    if not isinstance(model, FusedModel) or model.name == TEXT:
        return {}
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(source).get_text_config())]

    def of_text(settings: Any) -> Any:
        text = settings.get_text_config()
        text.architectures = [kind.__name__]
        return text

    return {"hf_overrides": of_text}


def _as_text(model: Model, name: str) -> str:
    """A weight's name in the model that is for text alone."""
    if isinstance(model, FusedModel) and name.startswith(f"{model.name}."):
        return f"{TEXT}.{name.removeprefix(f'{model.name}.')}"
    return name


def layout_key(model: Model, store: ProjectionStore) -> str:
    """A digest of what vLLM's compiled code depends on: shapes and dtypes of all that is lent, not their values, and
    where the embedding is read."""
    lent = [[(tuple(t.shape), str(t.dtype)) for t in _tensors(p, store)] for p in store.adapted()]
    table = next_number() if is_hosted(model) else None
    return hashlib.sha256(repr([lent, table]).encode()).hexdigest()


def _is_shared(layer: nn.Module) -> bool:
    return isinstance(layer, LinearBase) and isinstance(layer.quant_method, SharedLinear)


def check_shared(model: Any, lender: Model, store: ProjectionStore) -> None:
    """Raise unless what vLLM's layers multiply by, and its embedding and head, are the trainer's own memory."""
    for name, layer in model.named_modules():
        if _is_shared(layer) and not layer.quant_method.is_bound(layer):
            raise UserError(
                f"vLLM built this model without the trainer's weights ({name}), so it cannot sample from the policy. "
                "Use --engine torch, and please report this with the model's name."
            )
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    tables = {layer.quant_method.read_by(layer).data_ptr() for layer in layers}
    assert tables == {lender.embed.weight.data_ptr(), lender.head.data_ptr()}, "embedding or head is a copy"


def _tensors(projection: Masters, store: ProjectionStore) -> list[Tensor]:
    """What a projection, or a weight of experts, consists of: base, A, the parts' B, scale."""
    return [*base_tensors(projection.base), *projection.mirrors, store.scale]


# A base's tensors, as a layer's parameters. Model code asks `weight` for its device and dtype.
BASE_NAMES = ("weight", "absmax", "nested_absmax", "absmax_offset")


class SharedLinear(LinearMethodBase):
    """Multiplies by rows of the trainer's projections, base and adapter."""

    def __init__(self, store: ProjectionStore):
        self.store = store
        self.loaded: list[tuple[int, Tensor]] = []  # number of its block of rows, and what was loaded there
        self.pieces: list[Rows] = []

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
        """Give the layer a stand-in of one element, which notes what is loaded into it."""
        self.shape = (sum(output_partition_sizes), input_size_per_partition)
        layer.register_parameter("weight", _frozen(torch.empty(1, 1, dtype=params_dtype).expand(self.shape)))
        layer.weight.weight_loader = self.note

    def note(self, _weight: Tensor, loaded: Tensor, block: Any = None, **named: Any) -> None:
        """In vLLM's loading, the weight of a linear comes to the layer. block: of its rows; all, if there is none."""
        block = next(iter(named.values()), block)
        block = block[0] if isinstance(block, tuple | list) else block
        self.loaded.append((BLOCKS.get(block, block) or 0, loaded))

    def bind(self, layer: Any, name: str, stand_ins: StandIns) -> None:
        """Give the layer the trainer's tensors of what was noted as its parameters: nothing is allocated."""
        pieces = [stand_ins.rows(loaded) for _, loaded in sorted(self.loaded, key=lambda noted: noted[0])]
        self.pieces = joined(pieces)
        rows = sum(piece.stop - piece.start for piece in pieces)
        if rows != self.shape[0]:
            raise NotShareableError(f"its layer {name} has {self.shape[0]} rows, of which the trainer holds {rows}")
        del layer.weight
        layer.pieces = nn.ModuleList(nn.Module() for _ in self.pieces[1:])
        for holder, piece in zip([layer, *layer.pieces], self.pieces, strict=True):
            _hold(holder, piece, self.store)
        self.loaded.clear()

    def is_bound(self, layer: Any) -> bool:
        """Whether the layer's parameters are still the trainer's memory."""
        holders = zip([layer, *layer.pieces], self.pieces, strict=True)
        return bool(self.pieces) and all(
            [t.data_ptr() for t in _held(holder)] == [t.data_ptr() for part in piece.tensors(self.store) for t in part]
            for holder, piece in holders
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing may be repacked: the weights are not vLLM's."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]."""
        if x.dim() != 2:  # the code of transformers has a row for each sequence
            return self.apply(layer, x.flatten(0, -2), bias).unflatten(0, x.shape[:-1])
        if not layer.pieces:
            return _multiply(layer, x, bias)
        sizes = [piece.stop - piece.start for piece in self.pieces]
        biases = [None for _ in sizes] if bias is None else bias.split(sizes)
        holders = zip([layer, *layer.pieces], biases, strict=True)
        return torch.cat([_multiply(holder, x, part) for holder, part in holders], dim=-1)


def _hold(holder: Any, piece: Rows, store: ProjectionStore) -> None:
    """Register a piece's tensors as parameters of a module."""
    base, adapter = piece.tensors(store)
    for name in BASE_NAMES:
        holder.register_parameter(name, None)
    for name, tensor in zip(BASE_NAMES, base, strict=False):
        holder.register_parameter(name, _frozen(tensor))
    holder.num_rows = piece.stop - piece.start
    holder.multiply = _dense if len(base) == 1 else _nf4
    if not adapter:
        holder.multiply = _plain
        return
    a, *b, scale = adapter
    holder.register_parameter("lora_a", _frozen(a))
    holder.register_parameter("lora_scale", _frozen(scale))
    holder.lora_b = nn.ParameterList(map(_frozen, b))


def _held(holder: Any) -> list[Tensor]:
    """What `_hold` has registered, in the order of `Rows.tensors`."""
    base = [tensor for name in BASE_NAMES if (tensor := getattr(holder, name)) is not None]
    return base if holder.multiply is _plain else [*base, holder.lora_a, *holder.lora_b, holder.lora_scale]


def _multiply(holder: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    return holder.multiply(holder, x, bias)


def _plain(holder: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, holder.weight, bias)


def _dense(holder: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    operation = torch.ops.grpo_kernels.lora_linear_dense
    return operation(x, holder.weight, holder.lora_a, list(holder.lora_b), holder.lora_scale, bias)


def _nf4(holder: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.grpo_kernels.lora_linear_nf4(
        x, holder.weight, holder.absmax, holder.nested_absmax, holder.absmax_offset, holder.num_rows,
        holder.lora_a, list(holder.lora_b), holder.lora_scale, bias,
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
        wanted = (sum(output_partition_sizes), input_size_per_partition)
        if tuple(self.table.shape) != wanted:
            raise NotShareableError(f"it has a table of {list(wanted)} where the policy's is {list(self.table.shape)}")
        layer.register_parameter("weight", _frozen(self.weight_on()))

    def weight_on(self, device: torch.device | None = None) -> Tensor:
        """What a layer has as its weight, on a device of the policy's; None: on that which vLLM builds for."""
        return self.table

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """See SharedDense.process_weights_after_loading."""

    def read_by(self, layer: Any) -> Tensor:
        """What a layer reads."""
        return layer.weight

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Hidden states [M, D] -> logits [M, V], float32."""
        assert bias is None
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, layer.weight.t(), out_dtype=torch.float32)
        return nn.functional.linear(x, layer.weight)


class HostTable(SharedTable):
    """The policy's embedding in the host's memory. The layer has a stand-in of one element: vLLM would bring a
    parameter of the host's to the GPU while it loads, and compiles no graph with one."""

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.number = numbered(weight)

    def weight_on(self, device: torch.device | None = None) -> Tensor:
        """See SharedTable."""
        return torch.empty(1, 1, dtype=self.table.dtype, device=device).expand(self.table.shape)

    def read_by(self, layer: Any) -> Tensor:
        """See SharedTable."""
        return self.table

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Tokens [M] -> [M, D]."""
        return torch.ops.grpo_kernels.numbered_rows(input_, self.number)


def _method_of(layer: nn.Module, loan: Loan) -> SharedTable:
    """Of the embedding or the head, as the layer is."""
    embedding, head = loan.tables
    if isinstance(layer, ParallelLMHead):
        return SharedTable(head)
    return HostTable(embedding) if is_hosted(loan.model) else SharedTable(embedding)


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
        loan = _lent()
        if isinstance(layer, VocabParallelEmbedding):
            return _method_of(layer, loan)
        if isinstance(layer, RoutedExperts):
            return SharedExperts(layer, prefix, loan.experts)
        return SharedLinear(loan.store) if isinstance(layer, LinearBase) else None


@register_model_loader(SHARED)
class SharedLoader(BaseModelLoader):
    """Lets vLLM load stand-ins, gives its layers what these stand for, and copies the rest from the trainer."""

    def download_model(self, model_config: Any) -> None:
        """The trainer has it."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        """By Hugging Face names; vLLM knows which of them it keeps joined.

        Raises:
            NotShareableError: vLLM cannot load this, or makes something else of it.
        """
        loan = _lent()
        stand_ins = StandIns(loan.store, loan.transposed)
        parameters = {name for name, _ in model.named_parameters()} - _names_of_tables(model)
        try:
            # By name, so that what is in one module comes together.
            named = [*stand_ins.named, *_without_experts(loan)]
            weights = _as_in_checkpoints({_as_text(loan.model, name): weight for name, weight in named}, loan)
            loaded = model.load_weights((name, weights[name]) for name in sorted(weights))
        except (ValueError, KeyError, AttributeError, AssertionError, RuntimeError, TypeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise NotShareableError(f"it does not load what the trainer holds: {reason_of(error)}") from error
        if loaded is not None and (missing := sorted(parameters - loaded)):
            raise NotShareableError(f"the trainer has nothing for {missing[0]} in it")
        _share_tables(model, loan)
        use_our_kernel(model)
        layers = [(name, layer) for name, layer in model.named_modules() if _is_shared(layer)]
        for name, layer in layers:
            layer.quant_method.bind(layer, name, stand_ins)
        _check_all_are_held(loan.store, [piece for _, layer in layers for piece in layer.quant_method.pieces])

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Bytes that were there before vLLM (0.32 and later ask)."""
        loan = _lent()
        projections = [t for p in loan.store.projections.values() for t in _tensors(p, loan.store)]
        experts = [weights.base for each in loan.experts.values() for weights in each.maps()]
        embedding, head = loan.tables
        tables = [head] if is_hosted(loan.model) else [embedding, head]
        return sum(tensor.nbytes for tensor in [*projections, *tables, *experts])


def _without_experts(loan: Loan) -> Iterator[tuple[str, Tensor]]:
    """The small weights but for the biases of experts, which compute with their own."""
    theirs = {id(bias) for e in loan.experts.values() for weights in e.maps() for _, bias in weights.biases()}
    yield from ((name, weight) for name, weight in loan.model.small_weights() if id(weight) not in theirs)


def _as_in_checkpoints(weights: dict[str, Tensor], loan: Loan) -> dict[str, Tensor]:
    """By the names that checkpoints have, which vLLM knows: transformers renames those of some mixtures of experts."""
    if not loan.experts:
        return weights
    model: Any = loan.model.model  # one of transformers: what has experts is generic, which a Model does not say
    return revert_weight_conversion(model, weights)


def _names_of_tables(model: Any) -> set[str]:
    return {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, VocabParallelEmbedding)}


def _share_tables(model: Any, loan: Loan) -> None:
    """Some classes do not ask for a table's method, and have made one of their own, which their head may be too."""
    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding):
            method = _method_of(layer, loan)
            shape = method.table.shape
            if layer.weight.shape != shape:
                raise NotShareableError(f"it has a table of {list(layer.weight.shape)}, the policy {list(shape)}")
            layer.quant_method, layer.weight = method, _frozen(method.weight_on(loan.model.head.device))


def _check_all_are_held(store: ProjectionStore, pieces: list[Rows]) -> None:
    """Every row of every projection is in one layer of vLLM's, and in one only."""
    for projection in store.projections.values():
        spans = sorted((piece.start, piece.stop) for piece in pieces if piece.owner is projection)
        ends = [0, *(stop for _, stop in spans)]
        if [start for start, _ in spans] != ends[:-1] or ends[-1] != projection.base.shape[0]:
            raise NotShareableError(f"its layers do not hold each row of {', '.join(projection.names)} once")
