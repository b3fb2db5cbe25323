"""FusedModel: decoder-only transformers of the Llama family, their forward pass written over projections.

Which architectures are fused is decided by structure and by trial, not by class name: a layer with q/k/v/o and
gate/up/down linears and two norms is rebuilt here, and must give what Hugging Face's own layer gives on random input
(`recognise`). Llama, Mistral, Qwen2 and Qwen3 pass; whatever does not is left to `GenericModel`.

Everything is packed: hidden states are [N, D], whether N counts the tokens of packed groups or the one new token of
each of S sequences. What attention does with them is the caller's choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from grpo_kernels import add_rms_norm, lora_mlp, rms_norm, rope
from grpo_kernels.attention import group_attention
from grpo_kernels.gates import ACTIVATIONS, Activation, gated
from grpo_kernels.layout import GroupLayout
from torch import Tensor, nn

from grpo.policy.activations import Treatment, ways
from grpo.policy.cache import KeyValueCache
from grpo.policy.linears import NF4Linear
from grpo.policy.projections import Projection, ProjectionStore
from grpo.policy.promises import read_copy
from grpo.types import Batch

Angles = tuple[Tensor, Tensor]  # cos and sin of each pair of a head's elements, each [N, E / 2]
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]  # (layer, q, k, v, scale) -> [N, H, E]

# Each projection's name, and the Hugging Face linears whose rows it holds in order.
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


# Each norm's attribute of FusedLayer, and its Hugging Face name.
NORMS = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


class Norm(nn.Module):
    """RMSNorm as in Llama: Zhang and Sennrich 2019, arXiv 1910.07467, in float32."""

    def __init__(self, module: Any):
        super().__init__()
        self.weight: nn.Parameter = module.weight
        self.epsilon: float = module.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.epsilon)


class NoNorm(nn.Module):
    """What stands in for the norm of queries and keys where a layer has none."""

    weight = None
    epsilon = 0.0


class FusedLayer(nn.Module):
    """One decoder layer over four projections."""

    def __init__(self, layer: Any, projections: dict[str, Any], index: int):
        super().__init__()
        attention = layer.self_attn
        self.index = index
        self.head_size: int = attention.head_dim
        self.scale: float = attention.scaling
        self.input_norm = Norm(layer.input_layernorm)
        self.mlp_norm = Norm(layer.post_attention_layernorm)
        self.q_norm = Norm(attention.q_norm) if hasattr(attention, "q_norm") else NoNorm()
        self.k_norm = Norm(attention.k_norm) if hasattr(attention, "k_norm") else NoNorm()
        self.qkv, self.o = projections["qkv"], projections["o"]
        self.gate_up, self.down = projections["gate_up"], projections["down"]
        self.q_size = attention.q_proj.out_features
        self.kv_size = attention.k_proj.out_features
        self.mlp = build_mlp(self.gate_up, self.down, layer.mlp.act_fn)

    def forward(self, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """[N, D] -> [N, D]."""
        fused = self.qkv(self.input_norm(x))
        q, k, v = (
            part.unflatten(-1, (-1, self.head_size))
            for part in fused.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        )
        norms = {"q_norm": self.q_norm.weight, "k_norm": self.k_norm.weight, "eps": self.q_norm.epsilon}
        q, k = rope(q, k, *angles, **norms)
        attended = self.o(attend(self.index, q, k, v, self.scale).flatten(-2))
        normed, x = add_rms_norm(attended, x, self.mlp_norm.weight, self.mlp_norm.epsilon)
        return x + self.mlp(normed)


def build_mlp(gate_up: Any, down: Any, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """[N, D] -> [N, D], down(activation(gate) * up): as one operation where there is one for it."""
    fused = _fused_activation(activation)
    plain = all(isinstance(projection, Projection) and projection.bias is None for projection in (gate_up, down))
    if fused is not None and plain:
        return lambda x: lora_mlp(x, gate_up.base, gate_up.lora, down.base, down.lora, fused)

    def separately(x: Tensor) -> Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(activation(gate) * up)

    return separately


def _fused_activation(activation: Callable[[Tensor], Tensor]) -> Activation | None:
    """The kernels' name of an activation, found by what it computes."""
    x = torch.linspace(-8, 8, 129)
    for name in ACTIVATIONS:
        if torch.allclose(activation(x), gated(x, torch.ones(129), name)):
            return name
    return None


def half_angles(cos: Tensor, sin: Tensor) -> Angles:
    """What Hugging Face's rotary embeddings return, each [1, N, E] of two equal halves, as `rope` takes it."""
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


class FusedModel(nn.Module):
    """Embedding, fused layers, final norm; the head is a plain weight that `linear_logprob` multiplies by."""

    def __init__(self, model: Any, store: ProjectionStore, recompute: bool):
        super().__init__()
        body = model.model
        self.embed = body.embed_tokens
        self.rope = body.rotary_emb
        self.norm = Norm(body.norm)
        self.layers = nn.ModuleList(
            FusedLayer(layer, {name: store[f"{index}.{name}"] for name in FUSED}, index)
            for index, layer in enumerate(body.layers)
        )
        self.head: Tensor = model.lm_head.weight  # [V, D]
        self.softcap: float | None = None
        treatment: Treatment = "recompute" if recompute else "keep"
        self.treat([treatment for _ in self.layers])

    def treat(self, treatments: Sequence[Treatment]) -> None:
        """What of each layer waits for the backward pass, and where."""
        self.treatments = list(treatments)
        self.ways = ways(treatments, self.head.device)

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states of a packed batch, [N, D]."""
        return self._run(batch.tokens, batch.positions, packed(batch.layout))

    def prefill(
        self, tokens: Tensor, layout: GroupLayout, copies: list[int], max_tokens: int
    ) -> tuple[Tensor, KeyValueCache]:
        """Packed prompts [N] -> hidden states [N, D] and a cache with each prompt `copies` times, a number for each."""
        attention = packed(layout)
        cache = KeyValueCache(len(self.layers))

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            cache.fill(index, k, v, layout.prompt_lengths, copies, max_tokens)
            return attention(index, q, k, v, scale)

        return self._run(tokens, layout.positions(), attend), cache

    def decode(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """One new token a sequence, [S] -> hidden states [S, D]."""
        positions = torch.tensor(cache.lengths, device=tokens.device)
        cache.advance()
        return self._run(tokens, positions, cache.append)

    def small_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of all that is neither a projection's base nor a table: norms and biases."""
        yield "model.norm.weight", self.norm.weight
        for index, layer in enumerate(self.layers):
            for ours, theirs in NORMS.items():
                norm = getattr(layer, ours)
                if isinstance(norm, Norm):
                    yield f"model.layers.{index}.{theirs}.weight", norm.weight
            for name in FUSED:
                yield from getattr(layer, name).biases()

    def _run(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self.embed(tokens)
        angles = half_angles(*self.rope(x, positions.unsqueeze(0)))
        for layer, run in zip(self.layers, self.ways, strict=True):
            x = run(layer, x, angles, attend)
        return self.norm(x)


def packed(layout: GroupLayout) -> Attend:
    """Attention among the tokens of a packed batch: each to its prompt and its own past."""
    return lambda index, q, k, v, scale: group_attention(q, k, v, layout, scale=scale)


# ---- recognition


def recognise(model: Any, longest: int) -> bool:
    """Whether FusedModel computes what this Hugging Face model computes on sequences up to `longest` tokens.

    By structure first, then by trial: a layer of each kind, and the way from token to logits without layers, on
    random input.
    """
    if not _has_structure(model, longest):
        return False
    first_of_kind = {_kind(layer): index for index, layer in reversed(list(enumerate(model.model.layers)))}
    with torch.no_grad():
        return _same_frame(model) and all(_same_layer(model, index) for index in first_of_kind.values())


def _has_structure(model: Any, longest: int) -> bool:
    body = getattr(model, "model", None)
    named = {"embed_tokens", "layers", "norm", "rotary_emb"}
    if body is None or not named <= {name for name, _ in body.named_children()} or len(body.layers) == 0:
        return False
    if not isinstance(getattr(model, "lm_head", None), nn.Linear) or model.lm_head.bias is not None:
        return False
    parts = [part for parts in FUSED.values() for part in parts]
    norms = ["input_layernorm", "post_attention_layernorm"]
    allowed = {*norms, *parts, "self_attn", "mlp", "self_attn.q_norm", "self_attn.k_norm", "mlp.act_fn"}
    for layer in body.layers:
        modules = {name: module for name, module in layer.named_modules() if name}
        if not {*parts, *norms} <= set(modules) <= allowed:
            return False
        if not all(type(modules[part]) in (nn.Linear, NF4Linear) for part in parts):
            return False
        of_heads = [modules[name] for name in ("self_attn.q_norm", "self_attn.k_norm") if name in modules]
        if not all(hasattr(norm, "variance_epsilon") for norm in [*(modules[name] for name in norms), *of_heads]):
            return False
        attention = layer.self_attn
        if not hasattr(attention, "head_dim") or not hasattr(attention, "scaling"):
            return False
        if any(norm.weight.shape != (attention.head_dim,) for norm in of_heads):
            return False
        if _window(attention, model.config) < longest:
            return False
    return hasattr(body.norm, "variance_epsilon")


def _window(attention: Any, config: Any) -> float:
    """How many tokens back a layer looks: its own setting where the class has one, else the model's (Mistral)."""
    owner = attention if hasattr(attention, "sliding_window") else config
    window = getattr(owner, "sliding_window", None)  # Llama has neither
    return math.inf if window is None else window


def _same_frame(model: Any) -> bool:
    """Token to logits with the layers taken out: embedding, final norm and head, and nothing else."""
    body, layers = model.model, model.model.layers
    tokens = torch.arange(7, device=body.embed_tokens.weight.device)
    body.layers = nn.ModuleList()
    try:
        theirs = model(input_ids=tokens[None], use_cache=False).logits[0]
    finally:
        body.layers = layers
    return _agree(F.linear(Norm(body.norm)(body.embed_tokens(tokens)), model.lm_head.weight), theirs)


def _kind(layer: Any) -> str:
    """Layers of one kind compute the same function of their weights: the same modules, sizes and settings."""
    settings = {name: value for name, value in vars(layer.self_attn).items() if isinstance(value, (int, float, str))}
    settings.pop("layer_idx", None)
    return f"{layer} {sorted(settings.items())}"


def _same_layer(model: Any, index: int) -> bool:
    """In float32 whatever the checkpoint's dtype, and by what the layer adds: rounding and residual hide nothing."""
    layer = read_copy(model.model.layers[index])
    size = layer.input_layernorm.weight.shape[0]
    x = torch.randn(11, size, generator=torch.Generator().manual_seed(index))
    cos, sin = model.model.rotary_emb(x, torch.arange(11)[None])
    if cos.shape[-1] != layer.self_attn.head_dim:
        return False
    theirs = layer(x[None], attention_mask=None, position_embeddings=(cos, sin))
    theirs = theirs[0] if theirs.ndim == 3 else theirs
    ours = FusedLayer(layer, {name: _Together(layer, parts) for name, parts in FUSED.items()}, index)
    return _agree(ours(x, half_angles(cos, sin), packed(GroupLayout.of([11]))) - x, theirs - x)


class _Together(nn.Module):
    """Several Hugging Face linears read as one, for the trial: no copy of their weights is kept."""

    def __init__(self, layer: Any, parts: tuple[str, ...]):
        super().__init__()
        self.linears = [layer.get_submodule(part) for part in parts]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to rounding in their dtype."""
    difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    return bool(difference < max(1e-5, 4 * torch.finfo(theirs.dtype).eps))


def fuse(model: Any, build: Callable[[str, list, list[str]], Projection]) -> ProjectionStore:
    """The projections of every layer, under names such as "3.qkv"; each linear's own weight is given up.

    build: (name, linears, their Hugging Face names) -> Projection.
    """
    store = ProjectionStore()
    for index, layer in enumerate(model.model.layers):
        for name, parts in FUSED.items():
            linears = [layer.get_submodule(part) for part in parts]
            names = [f"model.layers.{index}.{part}" for part in parts]
            store.add(f"{index}.{name}", build(f"{index}.{name}", linears, names))
    return store
