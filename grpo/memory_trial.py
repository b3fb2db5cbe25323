"""The trial of the memory plan: what a policy takes of its GPU, measured before there is an engine. Chooses nothing.

measure(policy, longest)    by forward and backward passes over a few tokens -> Sizes
taken(device)               bytes in use on a GPU, by whomever
"""

from __future__ import annotations

import gc
import math
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from grpo.errors import is_out_of_memory
from grpo.fitting import forget
from grpo.packing import lay_out_to_read
from grpo.policy import Policy
from grpo.policy.allocator import hold_to
from grpo.policy.experts import ExpertWeights
from grpo.policy.projections import Projection
from grpo.policy.routing import experts_in, watched
from grpo.types import Batch, Completion, Group, Prompt

# Of the trial: completions of a group; tokens, and the least of them; layers that keep their activations, a few and
# more. With one alone the highest moment of few tokens may be that of a layer that is computed again.
TRIAL_GROUP, TRIAL, LEAST_TRIAL, TRIAL_KEPT = 4, 4096, 512, (2, 5)
ROUTED = 16  # tokens that are sent to experts, to see to how many of them

# What CUDA's own memory grows by while a run goes on, as kernels are loaded: 70 to 180 MiB were seen. PyTorch is held
# to so much less than a limit.
OF_CUDA_LATER = 160 * 2**20

ON_THEIR_WAY = 2  # layers whose parked inputs are on the GPU at a time: that at work, and the next

SMALL_HEAD = 256  # tokens whose logits there are at once, where memory is short


@dataclass(frozen=True)
class Sizes:
    """Bytes, as measured."""

    others: int  # in use by CUDA itself and by other processes
    weights: int  # of the base: its linears, embedding, head, norms
    adapter: int  # of the adapter: its masters, and their mirrors in the dtype of the computation
    parameters: int  # numbers that are trained
    layers: int
    weights_per_layer: float  # numbers
    fixed: int  # of a batch in its backward pass through layers that are computed again, whatever its size
    recomputing: float  # a token likewise
    kept_fixed: int  # of a batch in its backward pass through the last layer, which keeps its activations, likewise
    one_kept: float  # a token likewise, of the other layers the input alone being there
    keeping: float  # a token, for each further layer that keeps its activations
    layer_input: int  # a token
    head_fixed: int = 0  # of a batch while its head is at work, whatever its size
    head: float = 0.0  # a token likewise, every layer to be recomputed
    small_head: int = 0  # what `head_fixed` is with the logits of few tokens at once; 0: not measured
    head_rows: int = 0  # such tokens at once, in `head_fixed`; 0: as many as the kernel likes
    spared: int = 0  # of the weights, were the scales of a base in 4 bits quantised too; 0: they stay as they are
    double_quantised: bool = False  # `weights` is with that done, which it is not yet
    shared_by: int = 1  # ranks that keep a part each of the layers in `weights`
    remembered: int = 0  # a token of what attention leaves to an offloaded layer's second pass; 0: it leaves nothing
    reading_fixed: int = 0  # of a batch that nothing is kept of, as a rollout reads prompts, whatever its size
    reading: float = 0.0  # a token likewise
    met: float = 1.0  # share of weights_per_layer that a token is multiplied by: of experts those that it is sent to

    def with_double_quant(self) -> Sizes:
        """The same with these scales in 8 bits."""
        return replace(self, weights=self.weights - self.spared, spared=0, double_quantised=True)

    def with_small_head(self) -> Sizes:
        """The same with logits of few tokens at once, where that is less."""
        if not 0 < self.small_head < self.head_fixed:
            return self
        return replace(self, head_fixed=self.small_head, head_rows=SMALL_HEAD)

    def read(self, tokens: int) -> int:
        """Of so many tokens that nothing is kept of, beside weights, adapter and their keys and values."""
        return int(self.reading_fixed + tokens * self.reading)

    def update(self, tokens: int, kept: int, offloaded: int) -> int:
        """Of a batch of so many tokens, beside weights, adapter and optimizer."""
        # What attention gave to the layer at work is where it would be had it been computed again.
        on_their_way = ON_THEIR_WAY * self.layer_input + (ON_THEIR_WAY - 1) * self.remembered
        parked = max(0, offloaded * self.layer_input - on_their_way)
        in_head = self.head_fixed + tokens * (self.head + kept * self.keeping - parked)
        again = self.fixed + tokens * (self.recomputing - parked)
        in_kept = self.kept_fixed + tokens * (self.one_kept + (kept - 1) * self.keeping - parked) if kept else 0
        gradients = 4 * self.parameters
        at_the_end = gradients + self.fixed + tokens * (self.recomputing - (self.layers - 1) * self.layer_input)
        return int(gradients + max(in_head, again, in_kept, at_the_end))  # those so far, and the batch's own


def measure(policy: Policy, longest: int, limit: int = 0) -> Sizes:
    """What the policy takes on its GPU and, by a forward and backward pass over a few tokens, what a token takes.

    The trial is of so many tokens that the head works on whole chunks of rows, and that activations outweigh gradients.
    Where that does not fit, the head has few rows at once, in the run too, and then the trial fewer tokens. limit:
    bytes of the GPU, other processes' among them, that it keeps within; where not even the smallest trial does, it goes
    beyond, or nobody would know by how much. 0: there is none.
    """
    parameters = sum(each.numel() for each in policy.masters())
    inputs = len(policy.model.layers) * _layer_input(policy)  # bytes a token, of all layers; 0 where none is known
    tokens = max(TRIAL, 6 * parameters // inputs if inputs else 0)
    if limit:
        hold_to(limit - _others(policy.device) - OF_CUDA_LATER, policy.device)
        with suppress(RuntimeError):
            return _largest(policy, longest, tokens)
        hold_to(torch.cuda.get_device_properties(policy.device).total_memory, policy.device)
    return _largest(policy, longest, tokens)


def _largest(policy: Policy, longest: int, tokens: int) -> Sizes:
    """By the largest trial that fits, of so many tokens or fewer."""
    policy.head_rows = None
    while True:
        try:
            return _measured(policy, longest, tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            forget(error)
            if policy.head_rows and tokens < 2 * LEAST_TRIAL:
                raise
        tokens //= 2 if policy.head_rows else 1
        policy.head_rows = SMALL_HEAD


def _measured(policy: Policy, longest: int, tokens: int) -> Sizes:
    """The same of a trial of so many tokens, and of twice as many."""
    parameters, device, layers = policy.masters(), policy.device, len(policy.model.layers)
    few, more = (_batch_of(policy, size, longest) for size in (tokens, 2 * tokens))
    num_few, num_more = len(few.tokens), len(more.tokens)
    most = min(layers, TRIAL_KEPT[1])
    some = max(1, min(most - 1, TRIAL_KEPT[0]))
    at_few, at_more = _peaks(policy, few, 0), _peaks(policy, more, 0)
    (head_fixed, head), (fixed, recomputing) = (
        _line(num_few, one, num_more, other) for one, other in zip(at_few, at_more, strict=True)
    )
    some_of_few, some_of_more = _peaks(policy, few, some), _peaks(policy, more, some)
    most_of_few = _peaks(policy, few, most)
    # Of a model of one layer it is what keeping it adds while the head is at work.
    grown = most_of_few[1] - some_of_few[1] if most > some else some_of_few[0] - at_few[0]
    keeping = max(0.0, grown / num_few / max(1, most - some))
    kept_fixed, some_kept = _line(num_few, some_of_few[1], num_more, some_of_more[1])
    reading_fixed, reading = _line(num_few, _read(policy, few), num_more, _read(policy, more))
    adapter = _adapter_bytes(policy)
    return Sizes(
        others=_others(device),
        weights=torch.cuda.memory_allocated(device) - adapter,
        adapter=adapter,
        parameters=sum(each.numel() for each in parameters),
        layers=layers,
        weights_per_layer=_base_weights(policy) / max(1, layers),
        met=_met(policy, _batch_of(policy, ROUTED, longest)),
        fixed=fixed,
        recomputing=recomputing,
        kept_fixed=kept_fixed,
        one_kept=some_kept - (some - 1) * keeping,
        keeping=keeping,
        layer_input=_layer_input(policy),
        remembered=policy.model.remembered,
        reading_fixed=reading_fixed,
        reading=reading,
        head_fixed=head_fixed,
        head=head,
        small_head=_small_head(policy, few, head),
        head_rows=policy.head_rows or 0,
        shared_by=policy.store.shared_by,
        spared=policy.store.spared_by_double_quant if policy.config.double_quant == "auto" else 0,
    )


def _line(num_few: int, at_few: int, num_more: int, at_more: int) -> tuple[int, float]:
    """(bytes whatever the size, bytes a token) of what takes so much of so many tokens."""
    per_token = (at_more - at_few) / (num_more - num_few)
    return max(0, int(at_few - per_token * num_few)), per_token


def _small_head(policy: Policy, batch: Batch, per_token: float) -> int:
    """Bytes of a batch while its head is at work with the logits of few tokens at once; 0 where it does so already."""
    if policy.head_rows:
        return 0
    policy.head_rows = SMALL_HEAD
    peak, _ = _peaks(policy, batch, 0)
    policy.head_rows = None
    return max(1, int(peak - per_token * len(batch.tokens)))


def _others(device: torch.device) -> int:
    """Bytes of a GPU that are not PyTorch's: CUDA's own, and other processes'."""
    return taken(device) - torch.cuda.memory_reserved(device)


def taken(device: torch.device) -> int:
    """Bytes in use on a GPU, by whomever."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _adapter_bytes(policy: Policy) -> int:
    """Of its masters, and of their mirrors where these are other memory."""
    held = [tensor for each in policy.store.adapted() for tensor in (*each.masters(), *each.mirrors)]
    return sum(_bytes(tensor) for tensor in {tensor.data_ptr(): tensor for tensor in held}.values())


def _base_weights(policy: Policy) -> int:
    """How many numbers its linears hold, and its experts, with an adapter or without."""
    held = [each for each in policy.model.modules() if isinstance(each, (Projection, ExpertWeights))]
    return sum(math.prod(each.base.shape) for each in held)


@torch.no_grad()
def _met(policy: Policy, batch: Batch) -> float:
    """The share of these numbers that a token is multiplied by: of a layer's experts as many as routers choose."""
    experts, held = experts_in(policy.model), _base_weights(policy)
    if not experts:
        return 1.0
    with watched(experts) as seen:
        policy.model.hidden(batch)
    spared = 0.0
    for each, (chosen, *_) in zip(experts, seen, strict=True):
        of_them = sum(math.prod(weights.base.shape) for weights in each.maps())
        spared += of_them * (1 - chosen.shape[-1] / each.up.num_experts)
    return 1 - spared / held


def _batch_of(policy: Policy, tokens: int, longest: int) -> Batch:
    """About so many tokens, in sequences no longer than the longest, half of each a completion."""
    length = min(longest, tokens)
    prompt = [0] * max(1, length // 2)
    completion = Completion([0] * max(1, length - len(prompt)), [0.0] * max(1, length - len(prompt)), "", "stop", 0)
    share = len(prompt) + TRIAL_GROUP * len(completion.tokens)
    members = TRIAL_GROUP if share <= tokens else 1
    one = len(prompt) + members * len(completion.tokens)
    groups = [Group(Prompt(0, "", prompt, {}), [completion] * members) for _ in range(max(1, tokens // one))]
    return lay_out_to_read(groups, policy.device)


def _layer_input(policy: Policy) -> int:
    """Bytes of a token's hidden state."""
    return policy.model.head.shape[1] * policy.store.compute_dtype.itemsize


def _peaks(policy: Policy, batch: Batch, kept: int) -> tuple[int, int]:
    """Bytes that a forward pass, which ends with the head, and then its backward pass take at most, beside what is
    there before and after, where so many layers keep their activations."""
    layers = len(policy.model.layers)
    policy.model.treat(["keep" if index >= layers - kept else "recompute" for index in range(layers)])
    forward = backward = 0
    for _ in range(2):  # the first time kernels are chosen, by running them in memory of their own
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(policy.device)
        torch.cuda.reset_peak_memory_stats(policy.device)
        logprobs, _, passed = policy.forward(batch)
        forward = torch.cuda.max_memory_allocated(policy.device) - before
        torch.cuda.reset_peak_memory_stats(policy.device)
        torch.autograd.grad(logprobs.sum() + passed.values.sum(), policy.masters(), allow_unused=True)
        backward = torch.cuda.max_memory_allocated(policy.device) - before
        del logprobs, passed
    return forward, backward


@torch.no_grad()
def _read(policy: Policy, batch: Batch) -> int:
    """Bytes that a pass takes at most of which nothing is kept, beside what is there before."""
    policy.model.treat(["keep" for _ in policy.model.layers])  # as engines have it: no MLP in parts
    peak = 0
    for _ in range(2):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(policy.device)
        torch.cuda.reset_peak_memory_stats(policy.device)
        policy.model.hidden(batch)
        peak = torch.cuda.max_memory_allocated(policy.device) - before
    return peak
