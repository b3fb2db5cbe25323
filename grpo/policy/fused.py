"""FusedModel: decoder-only transformers, their forward pass written over projections.

What a model computes comes as data (`form.py`), found out and proved by `recognition.py`; whatever has no such form is
left to `GenericModel`.

Everything is packed: hidden states are [N, D], whether N counts the tokens of packed groups or the one new token of
each of S sequences. What attention does with them is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from grpo_kernels import lora_mlp, rope
from grpo_kernels.attention import Memory, group_attention, is_flash
from grpo_kernels.gates import ACTIVATIONS, Activation, gated
from grpo_kernels.layout import GroupLayout
from torch import Tensor, nn

from grpo.policy.activations import Around, Offload, Remembered, Treatment, as_they_are, ways
from grpo.policy.cache import KeyValueCache
from grpo.policy.form import AngleOrder, LayerForm, ModelForm, Scores
from grpo.policy.linears import NF4Linear
from grpo.policy.norms import build_norm, norm_of, weights_of
from grpo.policy.projections import Projection, ProjectionStore
from grpo.types import Batch

Angles = tuple[Tensor, Tensor]  # cos and sin of each rotated pair of a head's elements, each [N, R / 2]
Attend = Callable[[int, Tensor, Tensor, Tensor, Scores], Tensor]  # (layer, q, k, v, scores) -> [N, H, E]

Mlp = Callable[[Tensor, int | None], Tensor]  # (x [N, D], rows at once, or all of them) -> [N, D]

ENDLESS = 2**30  # tokens, more than any sequence has

# Rows that pass the MLP at once where its activations are not kept: of the two products of an 8B, 2048 are some whole
# waves of a large GPU's tiles.
MLP_ROWS = 2048


class FusedLayer(nn.Module):
    """One decoder layer over four projections."""

    def __init__(self, layer: Any, form: LayerForm, projections: Mapping[str, Any], index: int):
        super().__init__()
        self.index, self.form = index, form
        self.head_size, self.scores = form.head_size, form.scores
        self.sizes = [form.query_size, form.key_size, form.key_size]
        self.qkv, self.o = projections["qkv"], projections["o"]
        self.gate_up, self.down = projections["gate_up"], projections["down"]
        self.before_attention = norm_of(layer, form.norms.get("before_attention"))
        self.after_attention = norm_of(layer, form.norms.get("after_attention"))
        self.before_mlp = norm_of(layer, form.norms.get("before_mlp"))
        self.after_mlp = norm_of(layer, form.norms.get("after_mlp"))
        self.before_both = norm_of(layer, form.norms.get("before_both"))
        self.of_queries = norm_of(layer, form.norms.get("of_queries"))
        self.of_keys = norm_of(layer, form.norms.get("of_keys"))
        self.of_query_heads = norm_of(layer, form.norms.get("of_query_heads"))
        self.of_key_heads = norm_of(layer, form.norms.get("of_key_heads"))
        self.mlp = build_mlp(self.gate_up, self.down, activation_of(layer.mlp))
        self.turned = self._normed if form.rotation == "none" else self._rotated
        self.share = times(form.share)
        self.mlp_rows: int | None = None

    def treated(self, treatment: Treatment) -> None:
        """An MLP of which nothing is to be kept has some rows at once, and computes what its backward pass reads there.
        Where a norm reads its result, all of it would be computed once more for that."""
        self.mlp_rows = MLP_ROWS if treatment != "keep" and "after_mlp" not in self.form.norms else None

    def forward(self, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """[N, D] -> [N, D]."""
        attended = self._attended(self.before_attention(x), angles, attend)
        normed, x = self.before_mlp.add(self.share(attended), x)
        return x + self.share(self.after_mlp(self.mlp(normed, self.mlp_rows)))

    def _attended(self, normed: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """The block of attention, [N, D] -> [N, D]."""
        q, k, v = self.qkv(normed).split(self.sizes, dim=-1)
        q, k = self.turned(self._heads(self.of_queries(q)), self._heads(self.of_keys(k)), angles)
        return self.after_attention(self.o(attend(self.index, q, k, self._heads(v), self.scores).flatten(-2)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size))

    def _rotated(self, q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        of_q, of_k = self.of_query_heads, self.of_key_heads
        norms = {"q_norm": of_q.weight, "k_norm": of_k.weight, "eps": of_q.epsilon, "offset": of_q.offset}
        return rope(q, k, *angles, **norms, interleaved=self.form.rotation == "pairs")

    def _normed(self, q: Tensor, k: Tensor, _angles: Angles) -> tuple[Tensor, Tensor]:
        return self.of_query_heads(q), self.of_key_heads(k)

    def norms(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name within the layer, tensor) of all norms."""
        for place, norm in self.form.norms.items():
            yield from weights_of(getattr(self, place), norm.name)


class ParallelLayer(FusedLayer):
    """One whose MLP reads what its attention reads."""

    def forward(self, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """[N, D] -> [N, D]."""
        normed = self.before_both(x)
        x = x + self.share(self._attended(normed, angles, attend))
        return x + self.share(self.after_mlp(self.mlp(normed, self.mlp_rows)))


def build_layer(layer: Any, form: LayerForm, projections: Mapping[str, Any], index: int) -> FusedLayer:
    """A layer of this form over the norms of a Hugging Face layer and projections of its linears."""
    kind = ParallelLayer if "before_both" in form.norms else FusedLayer
    return kind(layer, form, projections, index)


def times(factor: float) -> Callable[[Tensor], Tensor]:
    """x -> factor x."""
    return (lambda x: x) if factor == 1 else (lambda x: factor * x)


def activation_of(mlp: Any) -> Callable[[Tensor], Tensor]:
    """The one module of a Hugging Face MLP that is no linear."""
    [activation] = [module for module in mlp.children() if not isinstance(module, (nn.Linear, NF4Linear))]
    return activation


def build_mlp(gate_up: Any, down: Any, activation: Callable[[Tensor], Tensor]) -> Mlp:
    """[N, D] -> [N, D], down(activation(gate) * up): as one operation where there is one for it, which alone can have
    some rows at once."""
    known = _known_activation(activation)
    plain = all(isinstance(projection, Projection) and projection.bias is None for projection in (gate_up, down))
    if known is not None and plain and len(gate_up.sizes) == 2:
        return lambda x, rows: lora_mlp(x, gate_up.base, gate_up.lora, down.base, down.lora, known, rows_at_once=rows)

    def product(gate: Tensor, up: Tensor) -> Tensor:
        return activation(gate) * up

    gates = product if known is None else partial(gated, activation=known)

    def separately(x: Tensor, _rows: int | None) -> Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(gates(gate, up))

    return separately


def _known_activation(activation: Callable[[Tensor], Tensor]) -> Activation | None:
    """The kernels' name of an activation, found by what it computes."""
    x = torch.linspace(-8, 8, 129)
    for name in ACTIVATIONS:
        if torch.allclose(activation(x), gated(x, torch.ones(129), name)):
            return name
    return None


def first_half(x: Tensor) -> Tensor:
    """[1, N, R] -> [N, R / 2], of two equal halves."""
    return x[0, :, : x.shape[-1] // 2]


def every_other(x: Tensor) -> Tensor:
    """[1, N, R] -> [N, R / 2], of equal neighbours."""
    return x[0, :, ::2].contiguous()


# What Hugging Face's rotary embeddings return, of which each angle is there twice, as `rope` takes it: cos, or sin.
ONCE: dict[AngleOrder, Callable[[Tensor], Tensor]] = {"halves": first_half, "pairs": every_other}


class FusedModel(nn.Module):
    """Embedding, fused layers, final norm; the head is a plain weight that `linear_logprob` multiplies by."""

    def __init__(
        self, model: Any, form: ModelForm, store: ProjectionStore, recompute: bool, around: Around = as_they_are
    ):
        """around: what is done about each layer, whatever becomes of its activations."""
        super().__init__()
        self.around = around
        body = model.get_submodule(form.body)
        self.name = form.body
        self.embed = body.embed_tokens
        self.embedded = times(form.embedding)
        self.rope = body.rotary_emb
        self.norm = build_norm(body.norm, form.norm)
        self.layers = nn.ModuleList(
            build_layer(layer, of_layer, {name: store[f"{index}.{name}"] for name in of_layer.linears}, index)
            for index, (layer, of_layer) in enumerate(zip(body.layers, form.layers, strict=True))
        )
        self.head: Tensor = model.lm_head.weight  # [V, D]
        self.logits = form.logits
        windows = {layer.scores.window for layer in form.layers}
        self.reach = {window: ENDLESS if window is None else window for window in windows}
        # The rotary embedding takes an argument where it is not the same in all layers.
        asked = list(dict.fromkeys(layer.rotary for layer in form.layers))
        self.rotaries = [[] if argument is None else [argument] for argument in asked]
        self.rotary_of = [asked.index(layer.rotary) for layer in form.layers]
        self.once = ONCE[form.layers[0].angles]
        treatment: Treatment = "recompute" if recompute else "keep"
        self.treat([treatment for _ in self.layers])

    def treat(self, treatments: Sequence[Treatment]) -> None:
        """What of each layer waits for the backward pass, and where."""
        self.treatments = list(treatments)
        offload = Offload(self.head.device)
        self.ways = self.around(ways(treatments, offload))
        memories: dict[Treatment, Callable[[], Memory | None]] = {"offload": partial(Remembered, offload)}
        self.memories = [memories.get(treatment, _no_memory) for treatment in treatments]
        for layer, treatment in zip(self.layers, treatments, strict=True):
            assert isinstance(layer, FusedLayer)
            layer.treated(treatment)

    @property
    def remembered(self) -> int:
        """Bytes a token of what attention in an offloaded layer leaves to its second pass: result and log-sum-exp; 0
        where there is a layer whose attention leaves nothing."""
        sizes = [_remembered(layer) for layer in self.layers if isinstance(layer, FusedLayer)]
        return max(sizes) if all(sizes) else 0

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states of a packed batch, [N, D]."""
        return self._run(batch.tokens, batch.positions, [packed(batch.layout, memory()) for memory in self.memories])

    def prefill(
        self, tokens: Tensor, layout: GroupLayout, copies: list[int], max_tokens: int
    ) -> tuple[Tensor, KeyValueCache]:
        """Packed prompts [N] -> hidden states [N, D] and a cache with each prompt `copies` times, a number for each."""
        attention = packed(layout)
        cache = KeyValueCache(len(self.layers), self.reach)

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
            cache.fill(index, k, v, layout.prompt_lengths, copies, max_tokens)
            return attention(index, q, k, v, scores)

        return self._run(tokens, layout.positions(), repeat(attend)), cache

    def decode(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """One new token a sequence, [S] -> hidden states [S, D]."""
        positions = torch.tensor(cache.lengths, device=tokens.device)
        cache.advance()
        return self._run(tokens, positions, repeat(cache.append))

    def small_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of all that is neither a projection's base nor a table: norms and biases."""
        yield from weights_of(self.norm, f"{self.name}.norm")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, FusedLayer)
            for name, weight in layer.norms():
                yield f"{self.name}.layers.{index}.{name}", weight
            for name in layer.form.linears:
                yield from getattr(layer, name).biases()

    def _run(self, tokens: Tensor, positions: Tensor, attends: Iterable[Attend]) -> Tensor:
        """attends: of each layer."""
        x = self.embedded(self.embed(tokens))
        twice = [self.rope(x, positions.unsqueeze(0), *asked) for asked in self.rotaries]
        angles = [(self.once(cos), self.once(sin)) for cos, sin in twice]
        of_layers = zip(self.layers, self.ways, self.rotary_of, strict=True)
        for (layer, run, rotary), attend in zip(of_layers, attends, strict=False):  # they may be endless
            x = run(layer, x, angles[rotary], attend)
        return self.norm(x)


def _remembered(layer: FusedLayer) -> int:
    mirror, queries = layer.qkv.mirrors[0], layer.form.query_size
    plain = layer.scores.window is None and layer.scores.softcap is None
    known = plain and is_flash(mirror.device, mirror.dtype, layer.head_size)
    return queries * mirror.itemsize + 4 * (queries // layer.head_size) if known else 0


def _no_memory() -> None:
    return None


def packed(layout: GroupLayout, memory: Memory | None = None) -> Attend:
    """Attention among the tokens of a packed batch: each to its prompt and its own past. memory: of one layer's."""

    def attend(_index: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        options = {"scale": scores.scale, "window": scores.window, "softcap": scores.softcap}
        return group_attention(q, k, v, layout, **options, memory=memory)

    return attend


def fuse(
    model: Any,
    form: ModelForm,
    build: Callable[[str, list, list[str]], Projection],
    take: Callable[[list[Projection]], object] = list,
) -> ProjectionStore:
    """The projections of every layer, under names such as "3.qkv"; each linear's own weight is given up.

    build: (name, linears, their Hugging Face names) -> Projection. take: is given those of a layer, before those of the
    next one are built.
    """
    store = ProjectionStore()
    layers = model.get_submodule(form.body).layers
    for index, (layer, of_layer) in enumerate(zip(layers, form.layers, strict=True)):
        for name, parts in of_layer.linears.items():
            linears = [layer.get_submodule(part) for part in parts]
            names = [f"{form.body}.layers.{index}.{part}" for part in parts]
            store.add(f"{index}.{name}", build(f"{index}.{name}", linears, names))
        take([store[f"{index}.{name}"] for name in of_layer.linears])
    return store
