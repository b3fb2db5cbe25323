"""GenericModel: any Hugging Face causal language model, its linears replaced by projections, its forward left as it is.

Slower than FusedModel and never wrong. Its layers run over packed sequences, a group's prompt once, where that is
proved of them (packed_attention.py). Else sequences are run one group at a time, padded at their end, each with its own
copy of the prompt, because an unknown architecture cannot be trusted with packed or shared sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.errors import UserError, is_out_of_memory
from grpo.policy.activations import Offload, Treatment, ways
from grpo.policy.experts import AdaptedExperts, Experts, ExpertWeights, are_experts
from grpo.policy.head import Logits, read_logits
from grpo.policy.linears import Linear, is_linear
from grpo.policy.packed_attention import NotPackedError, Packed, find
from grpo.policy.projections import Masters, Projection, ProjectionStore
from grpo.policy.routing import experts_in, together, watched
from grpo.types import Batch


class GenericModel(nn.Module):
    """The same calls as FusedModel for training; for rollouts `PaddedDecoder` runs `model` itself."""

    def __init__(self, model: Any, recompute: bool):
        super().__init__()
        self.model = model
        if getattr(model.config, "attn_logit_softcapping", None) is not None:
            model.set_attn_implementation("eager")  # the others leave the cap out without a word
        self.head, self.logits = _find_head(model)
        # Hugging Face recomputes in train mode only, in which dropout is on, routers are noisy and some layers read the
        # weights of their linears past their forward. The policy that is trained must be the policy that sampled: it
        # never is in that mode.
        self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.forwards = [layer.forward for layer in self.layers]
        treatment: Treatment = "recompute" if recompute else "keep"
        self.treat([treatment for _ in self.layers])
        self.experts = experts_in(model)
        self.packed, self.why = self._find_packed()
        self._run = self._over_packed if self.packed else self._one_by_one

    def _find_packed(self) -> tuple[Packed | None, str]:
        """Its way over packed sequences, or why there is none."""
        try:
            return find(self.model, body_of(self.model), len(self.layers), partial(last_hidden, self.model)), ""
        except NotPackedError as why:
            return None, str(why)

    @property
    def told(self) -> str:
        """How its layers are run, for the user."""
        return "over packed sequences" if self.packed else f"a sequence at a time, as {self.why}"

    @property
    def embed(self) -> Any:
        """The embedding of tokens, with a weight [V, D]."""
        return self.model.get_input_embeddings()

    def small_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of all that is neither a projection's base nor a table: norms, biases, whatever
        else the model has."""
        tables = {self.head.data_ptr(), self.embed.weight.data_ptr()}
        modules = list(self.model.modules())
        factors = {id(factor) for module in modules if isinstance(module, Masters) for factor in module.masters()}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in factors and tensor.data_ptr() not in tables:
                yield name, tensor.detach()
        for module in modules:
            if isinstance(module, Projection | ExpertWeights):
                yield from module.biases()

    def treat(self, treatments: Sequence[Treatment]) -> None:
        """What of each layer waits for the backward pass, and where."""
        self.treatments = list(treatments)
        runs = ways(treatments, Offload(self.head.device))
        for layer, forward, run in zip(self.layers, self.forwards, runs, strict=True):
            layer.forward = partial(run, forward)

    @property
    def remembered(self) -> int:
        """See FusedModel: its layers' attention leaves nothing."""
        return 0

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states of a packed batch, [N, D]."""
        states, places = self._run(batch)
        return states if places is None else states[places]

    @torch.no_grad()
    def choices(self, batch: Batch) -> Tensor:
        """The experts that are chosen at each token of a packed batch: [N, layers that have some, k]."""
        with watched(self.experts) as seen:
            _, places = self._run(batch)
        chosen = together(seen)
        assert chosen is not None
        return chosen if places is None else chosen[places]

    def _over_packed(self, batch: Batch) -> tuple[Tensor, None]:
        """A group's prompt once, tokens as they lie in the batch."""
        assert self.packed
        return self.packed.hidden(batch.tokens, batch.positions, batch.layout), None

    def _one_by_one(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Final hidden states of each group, padded, each completion after a copy of the prompt, [rows, D]; and the
        rows of the packed tokens, [N]."""
        layout = batch.layout
        heads = batch.tokens[: layout.num_prompt_tokens].split(layout.prompt_lengths)
        rest = iter(batch.tokens[layout.num_prompt_tokens :].split([n for g in layout.completion_lengths for n in g]))
        states: list[Tensor] = []
        prompts: list[int] = []
        completions: list[int] = []
        first = 0
        for head, lengths in zip(heads, layout.completion_lengths, strict=True):
            padded = pad_sequence([torch.cat([head, next(rest)]) for _ in lengths], batch_first=True)
            longest = padded.shape[1]
            states.append(last_hidden(self.model, padded).flatten(0, 1))  # a causal model cannot see the padding
            prompts += range(first, first + len(head))
            for row, length in enumerate(lengths):
                start = first + row * longest + len(head)
                completions += range(start, start + length)
            first += padded.numel()
        return torch.cat(states), torch.tensor(prompts + completions, device=batch.tokens.device)


def last_hidden(model: Any, tokens: Tensor) -> Tensor:
    """What the head reads: [rows, L] -> [rows, L, D]."""
    return body_of(model)(input_ids=tokens, use_cache=False).last_hidden_state


def body_of(model: Any) -> Any:
    """The model without its head. Llama 4's has not the name that Hugging Face's `base_model` looks for."""
    return model.model if model.base_model is model else model.base_model


def _find_head(model: Any) -> tuple[Tensor, Logits]:
    """The head's weight [V, D] and what is made of its products, proved on a few tokens.

    Raises:
        UserError: the model cannot run on projections, a number of its config or its logits are none, or these are
            something else than `Logits` of the products with its output embedding.
    """
    head = model.get_output_embeddings()
    weight = head.weight
    tokens = torch.arange(1, 9, device=weight.device)[None]

    def run() -> Tensor:
        return model(input_ids=tokens, use_cache=False).logits

    with torch.no_grad():
        try:
            theirs = run().float()
        except AttributeError as error:  # Mamba multiplies by the weights of its linears itself
            raise UserError(
                f"{type(model).__name__} cannot be trained: it reads the weights of its linear layers past their "
                f"forward ({error}), where no adapter can be. Use another model."
            ) from error
        except Exception as error:  # what transformers raises where a config asks for what there is not
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"{type(model).__name__} does not run as its config.json describes it ({type(error).__name__}: "
                f"{error}). Get the config.json that belongs to the checkpoint."
            ) from error
        _check_numbers(model, theirs)
        logits = read_logits(head, run) or Logits()
        ours = logits(last_hidden(model, tokens).float() @ weight.float().T)
    # A shift of all logits changes no probability.
    theirs, ours = (x.log_softmax(-1) for x in (theirs, ours))
    if not torch.allclose(ours, theirs, rtol=0, atol=256 * torch.finfo(weight.dtype).eps):
        raise UserError(
            f"{type(model).__name__} computes its logits in a way that is not supported (they are not the product of "
            "the last hidden state and the output embedding, times a number or capped). Use another model."
        )
    return weight, logits


def _check_numbers(model: Any, logits: Tensor) -> None:
    """Logits are numbers, and not all 0; nor is one of the config's no number, which some kernels pass over."""
    settings = model.config.get_text_config()
    damaged = [name for name, value in vars(settings).items() if isinstance(value, float) and math.isnan(value)]
    window = getattr(settings, "sliding_window", None)
    if "sliding_attention" in (getattr(settings, "layer_types", None) or []) and window is not None and window < 1:
        damaged.append("sliding_window")
    if damaged:
        raise UserError(
            f"{damaged[0]} in the config.json of {type(model).__name__} is {getattr(settings, damaged[0])}. Get the "
            "checkpoint anew."
        )
    if not logits.isfinite().all() or not logits.any():
        wrong = "no finite numbers" if logits.any() else "all 0"
        raise UserError(
            f"{type(model).__name__} gives logits that are {wrong}: a weight of it or a multiplier in its config.json "
            "is damaged. Get the checkpoint anew."
        )


def fuse(
    model: Any,
    build: Callable[[str, list, list[str]], Projection],
    build_experts: Callable[[str, Any], Experts],
) -> ProjectionStore:
    """A projection of its own in place of every linear that gets an adapter, and experts of ours in place of theirs.

    build: (name, [linear], [Hugging Face name]) -> Projection. build_experts: (Hugging Face name, module) -> Experts.
    """
    store = ProjectionStore()
    store.beside_experts = _has_fused_experts(model)
    for parent, child, name, linear in list(_linears(model)):
        projection = build(name, [linear], [name])
        store.add(name, projection)
        setattr(parent, child, projection)
    for name, theirs in list(model.named_modules()):
        if are_experts(theirs):
            experts = build_experts(name, theirs)
            model.set_submodule(name, experts)
            for weights in experts.maps():
                if isinstance(weights, AdaptedExperts):
                    store.add_experts(weights)
                else:
                    store.add_frozen(weights)
    if not store.projections and not store.experts:
        raise UserError(f"{type(model).__name__} has no linear layers that an adapter could be put on.")
    return store


def _has_fused_experts(model: Any) -> bool:
    """Whether the experts of a layer are one tensor, [experts, rows, columns]."""
    return any(p.dim() == 3 and name.endswith("experts.gate_up_proj") for name, p in model.named_parameters())


def _linears(model: Any) -> Iterator[tuple[Any, str, str, Linear]]:
    """(parent, attribute, full name, linear) of every linear that gets an adapter, in the model's order: all but the
    head, routers, and those whose adapter PEFT could not open: of a Mamba layer (one with A_log) it refuses the output
    projection, whose weight the fast kernels read past its forward."""
    head = model.get_output_embeddings()
    routers = set(_routers(model))
    for parent_name, parent in model.named_modules():
        for child, module in parent.named_children():
            taken = module is head or module in routers or (child == "out_proj" and hasattr(parent, "A_log"))
            if is_linear(module) and not taken:
                yield parent, child, f"{parent_name}.{child}" if parent_name else child, module


def _routers(model: Any) -> Iterator[nn.Module]:
    """The linears that choose among a layer's experts, or weigh a shared one: alone beside them. They stay as they are,
    as the choices must be the sampler's."""
    for parent in model.modules():
        for experts in filter(are_experts, parent.children()):
            for beside in parent.children():
                linears = [module for module in beside.modules() if isinstance(module, Linear)]
                if beside is not experts and len(linears) == 1:
                    yield linears[0]
