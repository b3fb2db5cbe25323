"""Recognition: the form of a Hugging Face model, by structure and by trial, never by its class's name.

    structure   its modules have the names and kinds that a form knows, and nothing else in it has weights
    frame       with layers, norm and head that only look on, in float64: what the embedding is multiplied by, what each
                layer is handed (its mask and its rotary angles), which is how its window and its rotary embedding are
                found out, and what is made of the head's products
    trial       a layer of each kind, in float32 on random input, must give what FusedLayer gives: turned in one of
                three ways or not at all, and with one of the numbers that the layer holds as its blocks' share

What a trial of a few tokens would not show, a window of thousands or a cap far above its scores, is made small for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from grpo_kernels.layout import GroupLayout
from torch import Tensor, nn

from grpo.errors import is_out_of_memory
from grpo.policy.form import (
    BLOCK_NORMS,
    BODIES,
    HEAD_NORMS,
    LINEARS,
    ROW_NORMS,
    AngleOrder,
    LayerForm,
    ModelForm,
    NormForm,
    Rotation,
    Scores,
)
from grpo.policy.fused import ONCE, build_layer, packed
from grpo.policy.head import Logits, instead, read_logits
from grpo.policy.linears import NF4Linear
from grpo.policy.norms import epsilon_of, kind_of
from grpo.policy.promises import read_copy

TOKENS = 11  # of a trial
WINDOW = 5  # tokens, in a trial
SOFTCAP = 0.25  # of scores, in a trial
ROTATIONS: tuple[Rotation, ...] = ("halves", "pairs", "none")  # in the order in which they are tried


class NotRecognisedError(Exception):
    """A model has no form, and why; a clause that goes on after "because"."""


@dataclass(frozen=True)
class Handed:
    """What a model hands one of its layers."""

    windowed: bool
    rotary: str | None


@dataclass(frozen=True)
class Frame:
    """What a model computes beside its layers and its last norm."""

    embedding: float
    handed: list[Handed]
    logits: Logits


@torch.no_grad()
def recognise(model: Any, longest: int) -> ModelForm:
    """The form of this Hugging Face model on sequences up to `longest` tokens.

    Raises:
        NotRecognisedError: FusedModel cannot compute what it computes.
    """
    name = _name_of_body(model)
    body = model.get_submodule(name)
    linears = [_linears_of(index, layer) for index, layer in enumerate(body.layers)]
    norm = kind_of(read_copy(body.norm))
    if norm is None:
        raise NotRecognisedError("its last norm is of an unknown kind")
    frame = _watch(model, body)
    found: dict[str, LayerForm] = {}
    forms = []
    for index, layer in enumerate(body.layers):
        kind = f"{_kind(layer)} {frame.handed[index]}"
        if kind not in found:
            found[kind] = _form_of(body, index, linears[index], frame.handed[index], longest)
        forms.append(found[kind])
    return ModelForm(name, frame.embedding, tuple(forms), norm, frame.logits)


# ---- structure


def _name_of_body(model: Any) -> str:
    """The module with embedding, layers, norm and rotary embedding, beside a head without a bias."""
    needed = {"embed_tokens", "layers", "norm", "rotary_emb"}
    modules = dict(model.named_modules())
    found = [name for name in BODIES if name in modules and needed <= dict(modules[name].named_children()).keys()]
    if not found or len(modules[found[0]].layers) == 0:
        raise NotRecognisedError(f"it is not made of {', '.join(sorted(needed))} alone")
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or not _is_product(head):
        raise NotRecognisedError("its head is no plain product")
    return found[0]


def _is_product(linear: nn.Linear) -> bool:
    x = linear.weight[:2]
    return torch.equal(linear(x), F.linear(x, linear.weight))


def _linears_of(index: int, layer: Any) -> dict[str, tuple[str, ...]]:
    """The linears of a layer, by projection."""
    kinds = {name: type(module) for name, module in layer.named_modules()}
    found = {}
    for projection, ways in LINEARS.items():
        way = next((way for way in ways if all(kinds.get(name) in (nn.Linear, NF4Linear) for name in way)), None)
        if way is None:
            raise NotRecognisedError(f"layer {index} has no linears {' or '.join(map(', '.join, ways))}")
        found[projection] = way
    return found


def _norms_of(index: int, layer: Any, linears: dict[str, tuple[str, ...]], head_size: int) -> dict[str, NormForm]:
    """The norms of a layer, by place. Nothing else has weights but its linears."""
    owners = {name.rpartition(".")[0] for name, _ in layer.named_parameters()}
    others = owners - {name for names in linears.values() for name in names}
    of_heads = set(HEAD_NORMS.values()) & others
    places = next((places for places in BLOCK_NORMS if set(places.values()) == others - of_heads), None)
    if places is None or len(of_heads) == 1:
        raise NotRecognisedError(f"layer {index} has {', '.join(sorted(others))}, which no known layer has together")
    if of_heads:
        sizes = {len(layer.get_submodule(name).weight) for name in of_heads}
        places = places | (HEAD_NORMS if sizes == {head_size} else ROW_NORMS)
    return {place: _norm_of(index, layer, name) for place, name in places.items()}


def _norm_of(index: int, layer: Any, name: str) -> NormForm:
    kind = kind_of(layer.get_submodule(name))
    if kind is None:
        raise NotRecognisedError(f"{name} of layer {index} is of an unknown kind")
    return NormForm(name, kind)


def _kind(layer: Any) -> str:
    """Layers of one kind compute the same function of their weights: the same modules, sizes and settings."""
    settings = {
        f"{module}.{name}": value
        for module, each in layer.named_modules()
        for name, value in vars(each).items()
        if isinstance(value, (int, float, str)) and name != "layer_idx"
    }
    return f"{layer} {sorted(settings.items())}"


# ---- the frame


class _Onlooker(nn.Module):
    """In the place of a layer: keeps what it is handed, and passes the hidden states on."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = [layer]  # in a list: no module of this one
        self.handed: dict[str, Any] = {}
        self.x = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer[0], name) if name not in ("layer", "handed", "x") else super().__getattr__(name)

    def forward(self, hidden_states: Tensor, **handed: Any) -> Tensor:
        self.x, self.handed = hidden_states, handed
        return hidden_states


def _watch(model: Any, body: Any) -> Frame:
    """Run the model with layers and a last norm that pass on what they are handed, and a head that gives what it is
    told."""
    embed, layers = body.embed_tokens.forward, body.layers
    onlookers = [_Onlooker(layer) for layer in layers]
    tokens = torch.arange(TOKENS, device=body.embed_tokens.weight.device)
    embedded = embed(tokens[None]).double()
    ends: list[Tensor] = []  # what the last norm is handed

    def pass_on(x: Tensor) -> Tensor:
        ends.append(x)
        return x

    with (
        _made_small(body.config),
        instead(body.embed_tokens, lambda ids: embed(ids).double()),
        instead(body.norm, pass_on),
    ):
        body.layers = nn.ModuleList(onlookers)
        try:
            with _not_recognised_if_raised("a layer that only looks on in its place"):
                logits = read_logits(model.lm_head, lambda: model(input_ids=tokens[None], use_cache=False).logits)
        finally:
            body.layers = layers
    if logits is None:
        raise NotRecognisedError("its logits are more than its head's products, times a number or capped")
    passed = [*(each.x for each in onlookers), *ends]
    factor = _factor(embedded, passed)
    return Frame(factor, [_read_handed(body, embedded, i, each.handed) for i, each in enumerate(onlookers)], logits)


def _factor(embedded: Tensor, passed: list[Tensor]) -> float:
    """What the embedding of tokens [1, T, D] is multiplied by before the layers, between which nothing happens."""
    first = passed[0]
    factor = float((first * embedded).sum() / embedded.square().sum()) if first.shape == embedded.shape else math.nan
    unchanged = all(torch.equal(x, first) for x in passed[1:])
    if (
        not unchanged
        or not 0 < abs(factor) < math.inf
        or not torch.allclose(first, factor * embedded, rtol=1e-6, atol=0)
    ):
        raise NotRecognisedError("its layers are handed something else than its embedding times a number")
    if not first.float().isfinite().all():
        raise NotRecognisedError(f"its embedding is multiplied by {factor:g}")
    return factor


@contextmanager
def _not_recognised_if_raised(tried: str) -> Iterator[None]:
    """Inside runs code of transformers in a way that it may not be made for."""
    try:
        yield
    except Exception as error:  # whatever it raises, the model may still be trained as it is
        if is_out_of_memory(error):
            raise
        words = (str(error).splitlines() or [""])[0][:80]
        raise NotRecognisedError(f"{tried} raises {type(error).__name__}: {words}") from error


@contextmanager
def _made_small(config: Any) -> Iterator[None]:
    """Inside, windows are small enough to show; attention is what shows and computes all of them."""
    small = {"sliding_window": WINDOW, "_attn_implementation": "eager"}
    before = {name: value for name in small if (value := getattr(config, name, None)) is not None}
    try:
        for name in before:
            setattr(config, name, small[name])
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _read_handed(body: Any, embedded: Tensor, index: int, handed: dict[str, Any]) -> Handed:
    """What a layer's mask allows, and which of the model's rotary angles it has."""
    if not {"attention_mask", "position_embeddings"} <= set(handed):
        raise NotRecognisedError(f"layer {index} is not handed a mask and the angles of its positions")
    windowed = _is_windowed(handed["attention_mask"])
    if windowed is None or (windowed and body.config.sliding_window < 1):
        raise NotRecognisedError(f"layer {index} attends to something else than the past or a window of it")
    positions = torch.arange(TOKENS, device=embedded.device)[None]
    for rotary in (None, *sorted(set(getattr(body.config, "layer_types", None) or []))):
        try:
            angles = body.rotary_emb(embedded, positions, *([] if rotary is None else [rotary]))
        except (TypeError, AttributeError):  # it wants to be asked for something, or for nothing
            continue
        if all(torch.equal(ours, theirs) for ours, theirs in zip(angles, handed["position_embeddings"], strict=True)):
            return Handed(windowed, rotary)
    raise NotRecognisedError(f"layer {index} has positions that are no rotary embedding's")


def _is_windowed(mask: Tensor | None) -> bool | None:
    """Whether a mask [1, 1, T, T], bool or added to scores, is that of a window; None if it is not causal at all."""
    past = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    if mask is None:
        return False
    allowed = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[0, 0].cpu()
    if allowed.shape != past.shape:
        return None
    if torch.equal(allowed, past):
        return False
    return True if torch.equal(allowed, past.triu(1 - WINDOW)) else None


# ---- the trial


def _form_of(body: Any, index: int, linears: dict[str, tuple[str, ...]], handed: Handed, longest: int) -> LayerForm:
    """The form of a layer, proved on random input: in float32 whatever the checkpoint's dtype."""
    layer = read_copy(body.layers[index])
    attention = layer.self_attn
    if not hasattr(attention, "head_dim") or not hasattr(attention, "scaling"):
        raise NotRecognisedError(f"the attention of layer {index} does not say its head size and scale")
    norms = _norms_of(index, layer, linears, attention.head_dim)
    rows = sum(layer.get_submodule(name).out_features for name in linears["qkv"])
    queries = layer.get_submodule(linears["o"][0]).in_features
    softcap = getattr(attention, "attn_logit_softcapping", None)
    scores = Scores(attention.scaling, WINDOW if handed.windowed else None, None if softcap is None else SOFTCAP)
    sizes = attention.head_dim, queries, (rows - queries) // 2
    form = LayerForm(linears, norms, *sizes, scores, handed.rotary, "halves", "halves", 1.0)
    found = _proved(layer, form, body, index)
    window = body.config.sliding_window if handed.windowed and body.config.sliding_window < longest else None
    return replace(found, scores=replace(scores, window=window, softcap=softcap))


def _proved(layer: Any, form: LayerForm, body: Any, index: int) -> LayerForm:
    """The form of which FusedLayer computes what the layer does, by what the layer adds, so that the residual hides
    nothing. Rotation and share of the form given are to be found."""
    size = layer.get_submodule(form.linears["o"][0]).out_features
    x = torch.randn(TOKENS, size, generator=torch.Generator().manual_seed(index))
    cos, sin = rotary_angles(body, form, x[None])
    if cos.shape[-1] <= form.head_size and _sizes_fit(layer, form):
        with _not_recognised_if_raised(f"layer {index} alone"):
            theirs = run_layer(layer, form, x[None], (cos, sin))[0]
        if torch.equal(theirs, x):
            raise NotRecognisedError(f"layer {index} adds nothing to what it reads")
        once = ONCE[order := _order_of(cos)]
        together = {name: _Together(layer, parts) for name, parts in form.linears.items()}
        for share, rotation in product(_shares(layer), ROTATIONS):
            candidate = replace(form, angles=order, rotation=rotation, share=share)
            ours = build_layer(layer, candidate, together, index)
            if _agree(ours(x, (once(cos), once(sin)), packed(GroupLayout.of([TOKENS]))) - x, theirs - x):
                return candidate
    raise NotRecognisedError(f"layer {index} computes something else than its modules' names say")


def _order_of(cos: Tensor) -> AngleOrder:
    first, second = cos.chunk(2, dim=-1)
    return "halves" if torch.equal(first, second) else "pairs"


def _shares(layer: Any) -> list[float]:
    """What the blocks' share of the sum may be: all, or a number that the layer holds."""
    held = [float(value) for value in vars(layer).values() if isinstance(value, (int, float))]
    return list(dict.fromkeys([1.0, *(value for value in held if 0 < value < math.inf)]))


def _sizes_fit(layer: Any, form: LayerForm) -> bool:
    """Heads of one size, those of the keys dividing those of the queries; norms of heads and rows of their sizes."""
    heads, rest = divmod(form.query_size, form.head_size)
    key_heads, key_rest = divmod(form.key_size, form.head_size)
    if rest or key_rest or key_heads < 1 or heads % key_heads:
        return False
    sizes = {"of_query_heads": form.head_size, "of_key_heads": form.head_size}
    sizes |= {"of_queries": form.query_size, "of_keys": form.key_size}
    there = {place: layer.get_submodule(norm.name) for place, norm in form.norms.items() if place in sizes}
    epsilons = {epsilon_of(module) for module in there.values()}
    one_kind = {norm.kind for place, norm in form.norms.items() if place in HEAD_NORMS} <= {"rms", "rms of 1 + weight"}
    return all(len(module.weight) == sizes[place] for place, module in there.items()) and len(epsilons) < 2 and one_kind


def rotary_angles(body: Any, form: LayerForm, x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin that a Hugging Face model hands this layer for hidden states x [1, T, D], [1, T, R] each."""
    asked = [] if form.rotary is None else [form.rotary]
    return body.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None], *asked)


def run_layer(layer: Any, form: LayerForm, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Hugging Face's own layer, a copy, over one sequence [1, T, D] with the window and cap of this form."""
    past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    allowed = past if form.scores.window is None else past.triu(1 - form.scores.window)
    mask = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill(~allowed, torch.finfo(x.dtype).min)
    if form.scores.softcap is not None:
        layer.self_attn.attn_logit_softcapping = form.scores.softcap
    # Transformers' other ways leave a cap out without a word.
    layer.self_attn.config._attn_implementation = "eager"
    made = layer(x, attention_mask=mask[None, None], position_embeddings=angles)
    return made if isinstance(made, Tensor) else made[0]


class _Together(nn.Module):
    """Several Hugging Face linears read as one, for the trial: no copy of their weights is kept."""

    def __init__(self, layer: Any, parts: tuple[str, ...]):
        super().__init__()
        self.linears: list[Callable[[Tensor], Tensor]] = [layer.get_submodule(part) for part in parts]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to rounding in their dtype."""
    difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    return bool(difference < max(1e-5, 4 * torch.finfo(theirs.dtype).eps))
