"""Packed attention: transformers' own layers over the packed tokens of groups, by its interface for attention.
Knows nothing of projections, experts or how a model is loaded.

    find(model)        proves that the layers of a model can be run so, and lets them be -> Packed; or says why not
    Packed.hidden      packed tokens [N] -> hidden states [N, D]

A function registered under a name of ours is what the model's attention calls from then on. Where it is handed a layout
it lets every token attend to its prompt and its own completion (grpo_kernels/attention.py), by the scale, the window,
the cap and the sinks that the layer says; elsewhere, in a rollout, it does what the model would have done without it.
Everything else of a layer is told positions and sees one long row of tokens.

That is right where tokens meet nowhere but in attention, and attention says all that it does. So each layer has to ask
for it once and say its window, nothing that slides along a row (a convolution) may be there, and a trial has to give
what sequences one by one give, with nothing of one group seen in another.

A sink (gpt-oss) is a key that every token meets and that has no value: its score is a learned number of the head. Keys
are not scored by a kernel here then, but by torch's, one sequence after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from grpo_kernels.attention import group_attention
from grpo_kernels.layout import GroupLayout
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo.errors import is_out_of_memory

NAME = "grpo_packed_or_"  # and what it stands before
LAYOUT = "group_layout"  # the argument that is handed down
KINDS = {"full_attention", "sliding_attention"}  # of layers

# What attention may be handed beside what it computes by, and need not heed.
HARMLESS = {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "return_dict"}

# Of a trial: prompts, each with its completions, in tokens. In 16 bits two ways to compute the same differ by some.
TRIAL = ((5, (4, 6)), (3, (2, 7)))
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the norm of what is compared


class NotPackedError(Exception):
    """A model's layers cannot be run over packed sequences, and why; a clause that goes on after "because"."""


@dataclass(frozen=True)
class Packed:
    """A model whose layers run over packed tokens."""

    body: Any  # of a Hugging Face model: all but its head

    def hidden(self, tokens: Tensor, positions: Tensor, layout: GroupLayout) -> Tensor:
        """Final hidden states, [N, D]."""
        mask = torch.zeros(1, 1, 1, 1, device=tokens.device)  # of four axes: a model takes it for a mask that is made
        asked = {"position_ids": positions[None], "attention_mask": mask, LAYOUT: layout}
        return self.body(input_ids=tokens[None], use_cache=False, **asked).last_hidden_state[0]


def find(model: Any, body: Any, layers: int, one_by_one: Callable[[Tensor], Tensor]) -> Packed:
    """The model's way over packed tokens. Afterwards its attention computes what it did before, where it is handed no
    layout.

    layers: how many ask for attention. one_by_one: a sequence [1, T] -> its final hidden states [1, T, D].
    Raises:
        NotPackedError: it has none; it is left as it was.
    """
    configs = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    before = [config._attn_implementation for config in configs]
    calls: list[_Call] = []
    packed = Packed(body)
    try:
        _check_structure(model)
        expected = _expected(model, one_by_one)
        with torch.no_grad():
            _name(configs, [_register(f"{NAME}watch", partial(_watched, calls), "sdpa")] * len(configs))
            found = _run_trial(packed, model, 0)
            _check_calls(model, calls, layers)
            _check_same(found, expected, _run_trial(packed, model, 1))
    except Exception as error:  # whatever a model raises that is asked for what it does not know
        _name(configs, before)
        if isinstance(error, NotPackedError) or is_out_of_memory(error):
            raise
        words = (str(error).splitlines() or [""])[0][:80]
        raise NotPackedError(f"over packed sequences it raises {type(error).__name__}: {words}") from error
    _name(configs, [_register(f"{NAME}{name}", partial(_either, _function(name)), name) for name in before])
    return packed


# ---- attention


def _either(otherwise: Callable[..., Any], module: Any, *arguments: Any, **named: Any) -> tuple[Tensor, Any]:
    """What stands in the place of a model's attention function."""
    run = attend if named.get(LAYOUT) is not None else otherwise
    return run(module, *arguments, **named)


def attend(
    module: Any,
    query: Tensor,  # [1, Hq, N, E]
    key: Tensor,  # [1, Hk, N, E]
    value: Tensor,  # [1, Hk, N, E or fewer]
    mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [Hq], the scores of sinks
    **named: Any,
) -> tuple[Tensor, None]:  # [1, N, Hq, of the value]
    """Attention of packed tokens, as transformers asks for it."""
    layout = named[LAYOUT]
    size = value.shape[-1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, F.pad(value, (0, query.shape[-1] - size))))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if s_aux is None:
        out = group_attention(q, k, v, layout, scale=scale, window=sliding_window, softcap=softcap)
    else:
        out = _with_sinks(q, k, v, layout, scale, sliding_window, s_aux)
    return out[None, ..., :size], None


def _with_sinks(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float, window: int | None, sinks: Tensor
) -> Tensor:
    """[N, Hq, E]. The sink is a key of zeros, to which the mask adds its score."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    outs = []
    for first, length, prompt, prompt_length in (*_prompts(layout), *_completions(layout)):
        near = torch.arange(first, first + length, device=q.device)
        met = torch.cat([torch.arange(prompt, prompt + prompt_length, device=q.device), near])
        distance = torch.arange(prompt_length, len(met), device=q.device)[:, None] - torch.arange(
            len(met), device=q.device
        )
        seen = (distance >= 0) & (distance < (len(met) if window is None else window))
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
        of_sinks = sinks.to(q.dtype)[:, None, None].expand(-1, length, 1)
        mask = torch.cat([of_sinks, mask.expand(len(sinks), -1, -1)], dim=-1)
        keys, values = (F.pad(x[:, met], (0, 0, 1, 0))[None] for x in (k, v))
        own = q[None, :, first : first + length]
        grouped = q.shape[0] != k.shape[0]
        outs.append(F.scaled_dot_product_attention(own, keys, values, mask[None], scale=scale, enable_gqa=grouped)[0])
    return torch.cat(outs, dim=1).transpose(0, 1)


def _prompts(layout: GroupLayout) -> Iterator[tuple[int, int, int, int]]:
    """First token and length of each prompt, and that nothing is before it; on the CPU, which waits for no GPU."""
    for end, length in zip(accumulate(layout.prompt_lengths), layout.prompt_lengths, strict=True):
        yield end - length, length, 0, 0


def _completions(layout: GroupLayout) -> Iterator[tuple[int, int, int, int]]:
    """First token and length of each completion, and those of its prompt."""
    first = layout.num_prompt_tokens
    for (prompt, prompt_length, *_), lengths in zip(_prompts(layout), layout.completion_lengths, strict=True):
        for length in lengths:
            yield first, length, prompt, prompt_length
            first += length


def _register(name: str, function: Callable[..., Any], like: str) -> str:
    """A name of an attention function, whose masks are those of the function `like`."""
    AttentionInterface.register(name, function)
    masks = AttentionMaskInterface()
    if like in masks:
        AttentionMaskInterface.register(name, masks[like])
    return name


def _name(configs: list[Any], names: list[str]) -> None:
    """Let the attention of these configurations be the function of that name."""
    for config, name in zip(configs, names, strict=True):
        config._attn_implementation = name


def _function(name: str) -> Callable[..., Any]:
    """The attention function that a model has by a name. "eager" is each model's own."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]

    def eager(module: Any, *arguments: Any, **named: Any) -> Any:
        return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **named)

    return eager


# ---- the proof


class _Call(NamedTuple):
    """What a layer asked of attention."""

    layer: int
    window: int | None
    named: set[str]  # arguments that say something, beyond those that are known


def _watched(calls: list[_Call], module: Any, *arguments: Any, **named: Any) -> tuple[Tensor, Any]:
    if LAYOUT not in named:
        raise NotPackedError("its layers do not hand down to their attention what they are given")
    known = {"scaling", "sliding_window", "softcap", "s_aux", LAYOUT} | HARMLESS
    said = {name for name, value in named.items() if value is not None and value is not False}
    calls.append(_Call(module.layer_idx, named.get("sliding_window"), said - known))
    return attend(module, *arguments, **named)


def _check_structure(model: Any) -> None:
    settings = model.config.get_text_config()
    if any(isinstance(module, (nn.Conv1d, nn.Conv2d)) for module in model.modules()):
        raise NotPackedError("it has a convolution")
    others = set(getattr(settings, "layer_types", None) or []) - KINDS
    if others or getattr(settings, "attention_chunk_size", None):
        raise NotPackedError(f"it has layers of {', '.join(sorted(others)) or 'chunked attention'}")


def _check_calls(model: Any, calls: list[_Call], layers: int) -> None:
    """Each layer asked once, and said all that its attention is."""
    if sorted(call.layer for call in calls) != list(range(layers)):
        raise NotPackedError("not each of its layers asks for attention once")
    if told := sorted({name for call in calls for name in call.named}):
        raise NotPackedError(f"its attention is told {', '.join(told)}")
    settings = model.config.get_text_config()
    window, kinds = getattr(settings, "sliding_window", None), getattr(settings, "layer_types", None)
    for call in calls:
        slides = kinds is None or kinds[call.layer] == "sliding_attention"
        if call.window != (window if slides else None):
            raise NotPackedError(f"layer {call.layer} does not say its window to its attention")


def _trial(model: Any, other: int) -> tuple[Tensor, GroupLayout]:
    """Packed tokens [N], of which `other` changes those of the first group."""
    device = model.get_input_embeddings().weight.device
    layout = GroupLayout.of([prompt for prompt, _ in TRIAL], [lengths for _, lengths in TRIAL], device)
    tokens = torch.arange(3, 3 + layout.num_tokens, device=device)
    tokens[_of_first()] += other
    return tokens % model.get_input_embeddings().num_embeddings, layout


def _of_first() -> list[int]:
    """The packed tokens of the first group."""
    prompts, first = sum(prompt for prompt, _ in TRIAL), TRIAL[0]
    return [*range(first[0]), *range(prompts, prompts + sum(first[1]))]


def _run_trial(packed: Packed, model: Any, other: int) -> Tensor:
    tokens, layout = _trial(model, other)
    return packed.hidden(tokens, layout.positions(), layout)


def _expected(model: Any, one_by_one: Callable[[Tensor], Tensor]) -> Tensor:
    """The states of the trial's tokens [N, D], one sequence after the other."""
    tokens, layout = _trial(model, 0)
    prompts: dict[int, Tensor] = {}
    completions = []
    for first, length, prompt, prompt_length in _completions(layout):
        states = one_by_one(torch.cat([tokens[prompt : prompt + prompt_length], tokens[first : first + length]])[None])
        prompts.setdefault(prompt, states[0, :prompt_length])
        completions.append(states[0, prompt_length:])
    return torch.cat([*prompts.values(), *completions])


def _check_same(found: Tensor, expected: Tensor, with_others: Tensor) -> None:
    """The trial gives what sequences one by one give, and the second group has seen nothing of the first."""
    tolerance = TOLERANCE[found.dtype]
    second = torch.ones(len(found), dtype=torch.bool, device=found.device)
    second[_of_first()] = False
    if _apart(found, expected) > tolerance:
        raise NotPackedError("over packed sequences it computes something else")
    if _apart(with_others[second], found[second]) > tolerance or torch.equal(with_others, found):
        raise NotPackedError("packed sequences see each other")


def _apart(one: Tensor, other: Tensor) -> float:
    """How far states [N, D] are apart, in the size of the second: the most of all tokens, or, in 16 bits, where
    rounding may send a token to another expert, of the usual one."""
    apart = (one - other).float().norm(dim=-1) / other.float().norm(dim=-1)
    return float(apart.max() if one.dtype == torch.float32 else apart.median())
