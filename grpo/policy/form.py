"""Form: what a decoder-only transformer computes beside its linears, as data. Knows nothing of weights.

A layer is two blocks, attention and a gated MLP, each added to what it reads, with norms before or after each:

    a = x + share after_attention(o(attend(rotate(q, k), v)))        q, k, v = qkv(before_attention(x))
    y = a + share after_mlp(down(activation(gate) * up))             gate, up = gate_up(before_mlp(a))

or, where both blocks read the same, y = a + share after_mlp(down(activation(gate) * up)) with gate, up and q, k, v of
before_both(x).

Which of the norms there are, what kind they are, what is normed of queries and keys, how these are rotated, if they
are, what is done to their products and the share of a block that is added is all in which architectures differ.
`recognition.py` finds it out for a Hugging Face model, `fused.py` computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from grpo.policy.head import Logits

# What a norm makes of x; the kinds are told apart by what they compute.
NormKind = Literal["rms", "rms of 1 + weight", "layer"]

# Which elements of a head are turned together: its two halves', those beside each other, or none.
Rotation = Literal["halves", "pairs", "none"]

# Where a rotary embedding has its angles, each of which it gives twice: in two halves, or beside each other.
AngleOrder = Literal["halves", "pairs"]

# Where a model may have its layers, with embedding, last norm and rotary embedding beside them.
BODIES = ("model", "model.language_model")

# A layer's projections, and the Hugging Face linears whose rows each holds in order: one of these.
LINEARS: dict[str, tuple[tuple[str, ...], ...]] = {
    "qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.qkv_proj",)),
    "o": (("self_attn.o_proj",),),
    "gate_up": (("mlp.gate_proj", "mlp.up_proj"), ("mlp.gate_up_proj",)),
    "down": (("mlp.down_proj",),),
}

# A layer's norms, and their Hugging Face names: one of these. The same name means another place in another family.
BLOCK_NORMS: tuple[dict[str, str], ...] = (
    {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"},
    {"before_attention": "input_layernorm", "before_mlp": "pre_feedforward_layernorm"},
    {
        "before_attention": "input_layernorm",
        "after_attention": "post_attention_layernorm",
        "before_mlp": "pre_feedforward_layernorm",
        "after_mlp": "post_feedforward_layernorm",
    },
    {
        "before_attention": "input_layernorm",
        "after_attention": "post_self_attn_layernorm",
        "before_mlp": "post_attention_layernorm",
        "after_mlp": "post_mlp_layernorm",
    },
    {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"},
    {"before_both": "input_layernorm"},
)

# Norms of queries and keys: of each head for itself, or of all heads together.
HEAD_NORMS = {"of_query_heads": "self_attn.q_norm", "of_key_heads": "self_attn.k_norm"}
ROW_NORMS = {"of_queries": "self_attn.q_norm", "of_keys": "self_attn.k_norm"}


@dataclass(frozen=True)
class Scores:
    """What attention makes of the products of queries and keys: times scale, capped, seen within a window."""

    scale: float
    window: int | None = None  # tokens, the query's own among them
    softcap: float | None = None


@dataclass(frozen=True)
class NormForm:
    """A norm of a layer."""

    name: str  # of the Hugging Face module, within the layer
    kind: NormKind


@dataclass(frozen=True)
class LayerForm:
    """One decoder layer."""

    linears: Mapping[str, tuple[str, ...]]  # projection -> Hugging Face names within the layer
    norms: Mapping[str, NormForm]  # place -> norm; no place, no norm
    head_size: int
    query_size: int  # rows of the queries, of all heads
    key_size: int  # of the keys, and of the values
    scores: Scores
    rotary: str | None  # what the model's rotary embedding is asked for; None where it is the same in all layers
    angles: AngleOrder
    rotation: Rotation
    share: float  # of what a block computes, that is added to what it reads


@dataclass(frozen=True)
class ModelForm:
    """A whole model: embedding, layers, last norm, head."""

    body: str  # Hugging Face's name of the module that has the layers: of a model that also sees, the part for text
    embedding: float  # what the embedding of a token is multiplied by
    layers: tuple[LayerForm, ...]
    norm: NormKind
    logits: Logits
