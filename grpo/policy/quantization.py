"""Quantization: which projections of an NF4 base stay in 16 bits, because their rounding changes the model most.

Knows nothing of checkpoints or runs. On a few prompts the distribution of the next token is compared with that of the
model without rounding, once with everything in NF4 and once for each projection with that one in 16 bits:

    gain(p) = KL(exact || all in NF4) - KL(exact || all but p in NF4)        mean over the tokens, in nats

Those with the largest gain for a byte are kept in 16 bits, until the allowance is spent. How far a layer's own output
moves is no measure of this: what an early layer rounds goes through all the others (LOG.md, "2026-11-27 which
projections stay in 16 bits: works, by the next token").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from grpo_kernels import head_product
from grpo_kernels.layout import GroupLayout
from torch import Tensor

from grpo.policy.form import ModelForm
from grpo.policy.fused import FusedModel, fuse
from grpo.policy.projections import Projection, join_dense
from grpo.policy.promises import read_copy, settle, value_of
from grpo.policy.recognition import rotary_angles, run_layer

PROMPTS, PROMPT_TOKENS = 16, 512  # that are looked at, and tokens of each
LOGITS = 2**25  # that are compared at most, in float32: with a large vocabulary not those of every token

Build = Callable[[str, list, list[str]], Projection]


@dataclass(frozen=True)
class Choice:
    """What stays in 16 bits, what that does to the mean divergence in nats, and what it costs in bytes."""

    dense: list[str]  # projections, such as "3.qkv", those with the largest gain for a byte first
    before: float
    after: float
    bytes_more: int
    bytes_allowed: int

    def __str__(self) -> str:
        return (
            f"--quantization dynamic keeps {', '.join(self.dense) or 'nothing'} in 16 bits: "
            f"{self.bytes_more / 2**20:,.2f} MiB more, of {self.bytes_allowed / 2**20:,.2f} allowed. The next token's "
            f"divergence from the model without rounding is {self.after:.2g} nats instead of {self.before:.2g}."
        )


@torch.no_grad()
def choose(
    model: Any,
    form: ModelForm,
    build: Build,
    prompts: Sequence[list[int]],
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    allowance: float,
) -> Choice:
    """Choose for a Hugging Face model of this form, whose linears are afterwards as they were.

    build: the projections, all in NF4. prompts: tokens [P] of each. dtypes: that of the computation, and the 16 bits.
    allowance: bytes that may be taken more, as a share of those of all projections in NF4.
    """
    computed, kept = dtypes
    prompts = [tokens[:PROMPT_TOKENS] for tokens in prompts[:PROMPTS]]
    rows = spread(sum(map(len, prompts)), max(1, LOGITS // model.lm_head.weight.shape[0]))
    states = exact_states(model, form, prompts, device)[rows]
    linears = {
        f"{index}.{name}": [(linear := layer.get_submodule(part), linear.weight) for part in parts]
        for index, (layer, of_layer) in enumerate(zip(model.get_submodule(form.body).layers, form.layers, strict=True))
        for name, parts in of_layer.linears.items()
    }
    store = fuse(model, form, build)
    settle(model, device)
    rounded = FusedModel(model, form, store, recompute=False).to(device)
    for linear, weight in chain(*linears.values()):
        linear.weight = weight
    exact = next_token(rounded, states.to(device, computed))
    diverges = partial(divergence, rounded, prompts, rows, exact)
    before, gains, costs = diverges(), {}, {}
    for name, projection in store.projections.items():
        base = projection.base
        projection.base = in_16_bits(linears[name], device, kept)
        gains[name], costs[name] = before - diverges(), projection.base.nbytes - base.nbytes
        projection.base = base
    allowed = int(allowance * sum(projection.base.nbytes for projection in store.projections.values()))
    dense = best_within(gains, costs, allowed)
    for name in dense:
        store[name].base = in_16_bits(linears[name], device, kept)
    return Choice(dense, before, diverges(), sum(costs[name] for name in dense), allowed)


def spread(count: int, most: int) -> Tensor:
    """At most `most` of the numbers below `count`, evenly spread."""
    return torch.arange(count)[:: -(-count // most)]


def exact_states(model: Any, form: ModelForm, prompts: Sequence[list[int]], device: torch.device) -> Tensor:
    """What the head reads of all prompts, [N, D]: by Hugging Face's layers in float32, of which one is read at a
    time."""
    body = model.get_submodule(form.body)
    states = [form.embedding * body.embed_tokens(torch.tensor([tokens])).float() for tokens in prompts]
    for promised, of_layer in zip(body.layers, form.layers, strict=True):
        layer = read_copy(promised).to(device)
        for number, x in enumerate(states):
            cos, sin = rotary_angles(body, of_layer, torch.empty(*x.shape[:2], 0))
            states[number] = run_layer(layer, of_layer, x.to(device), (cos.to(device), sin.to(device)))
    return read_copy(body.norm).to(device)(torch.cat(states, dim=1)[0])


def divergence(model: FusedModel, prompts: Sequence[list[int]], rows: Tensor, exact: Tensor) -> float:
    """Mean KL(exact || model) of the next token in nats. exact: log-probabilities [R, V] after these rows of the
    prompts' tokens."""
    device = exact.device
    tokens = torch.tensor(list(chain(*prompts)), device=device)
    layout = GroupLayout.of([len(prompt) for prompt in prompts], device=device)
    states, _ = model.prefill(tokens, layout, [1 for _ in prompts], 1)
    found = next_token(model, states[rows.to(device)])
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def next_token(model: FusedModel, states: Tensor) -> Tensor:
    """log p of every token after these final hidden states [R, D], float32 [R, V]."""
    return model.logits(head_product(states, model.head)).log_softmax(-1)


def in_16_bits(linears: list[tuple[Any, Tensor]], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The base of a projection of these linears and weights [M_p, K], without rounding to 4 bits."""
    return join_dense([value_of(weight).to(device) for _, weight in linears], dtype)[0]


def best_within(gains: dict[str, float], costs: dict[str, int], allowed: int) -> list[str]:
    """The names with the largest gain for a byte, as far as `allowed` bytes go; what does not fit is passed over, and
    what gains nothing is left out. Among equals the first."""
    chosen = []
    for name in sorted(gains, key=lambda name: -gains[name] / costs[name]):
        if gains[name] > 0 and costs[name] <= allowed:
            allowed -= costs[name]
            chosen.append(name)
    return chosen
