"""Memory: what a run takes of a GPU, planned before it starts from measured sizes. Knows nothing of tasks or engines.

    measure(policy, longest)         what a token takes in the update, by trial on a few tokens -> Sizes
    foresee, choose(sizes, need, ..) the settings that fit, the fastest of them -> Plan; arithmetic alone
    Plan.table()                     what was chosen, what it costs, and how far the card is filled

A step has two peaks. In the rollout there is the KV cache, in the update there are activations; where the engine gives
its cache back in between, each may have all that the rest leaves. That takes time, so with memory enough it stays. Of
the update, over n tokens in a batch of a model of L layers, of which the last k keep their activations and the first o
park their inputs in the host's memory:

    bytes(n, k, o) = gradients + fixed + n (recomputing + max(0, k - 1) keeping - max(0, o - 2) input)

`recomputing` (all layers but their inputs computed again), `keeping` (what one more kept layer adds) are measured. The
backward pass begins at the last layer: the kept ones are gone when the first is computed again, so the two never add
up, and the first kept layer costs nothing, because one that is computed again keeps as much while it is at work. Two
parked inputs are on the GPU at a time. A batch of few tokens takes most at the end of its backward pass, when there
are all of its gradients; the trial must be above that, or it measures the slope of something else.

Time is counted in tokens, of a layer that keeps its activations: one computed again takes half as much more, a batch
costs some hundred whatever is in it (a 4-bit base is unpacked), and no batch is done before its kernels are launched.
Counted by constants, not measured on the spot: equal runs on equal cards choose alike.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch

from grpo.config import Config
from grpo.errors import UserError, is_out_of_memory
from grpo.fitting import forget
from grpo.packing import lay_out_to_read
from grpo.policy import Policy
from grpo.policy.activations import Treatment
from grpo.policy.cache import full_cache_bytes
from grpo.types import Batch, Completion, Group, Prompt

GIB = 2**30

# Of the limit: what the allocator cannot hand out because it lies between other things, and what libraries take later.
SPARE_SHARE, SPARE_BYTES = 0.04, 2**28

# What a vLLM engine takes beside its cache is only known when it stands; before, so much is set aside for it, or, where
# that leaves too little, the least that was seen.
ENGINE_BYTES, LEAST_ENGINE_BYTES = int(1.25 * GIB), GIB // 4

# Batches to choose from: a step in so many equal parts, of at most so many tokens. Larger ones gain nothing.
MOST_PARTS, LARGEST_BATCH = 64, 32768

# Time, in tokens of a layer that keeps its activations, as seen on an H100 with an 8B of 218 million weights a layer: a
# token whose layer is computed again; the same with its input away; a batch's own; launching a batch's kernels.
RECOMPUTED, OFFLOADED, OF_A_BATCH, OF_LAUNCHES = 1.45, 1.47, 620, 3140
OF_SO_MANY_WEIGHTS = 218e6

# Giving the KV cache back for an update and taking it again, counted likewise for 32 such layers.
OF_GIVING_BACK, OF_SO_MANY_LAYERS = 2500, 32

# Tokens of the KV cache beside those of the longest sequence: blocks are whole, and some are always kept free.
CACHE_TO_SPARE = 1024

# Of the trial: completions of a group; tokens, and the least of them; layers that keep their activations.
TRIAL_GROUP, TRIAL, LEAST_TRIAL, TRIAL_KEPT = 4, 4096, 512, 5


@dataclass(frozen=True)
class Need:
    """What a run asks for."""

    longest: int  # prompt and completion together, tokens
    longest_completion: int
    tokens_per_step: int  # of an optimizer step, packed, at most
    sequences: int  # written at once
    kv_bytes_per_token: int
    bytes_per_parameter: int  # of the optimizer's state: 8, or 2 in 8 bits
    gives_cache_back: tuple[bool, ...]  # between rollout and update: what there is to choose from
    engine_bytes: int  # beside the cache: expected, or measured
    cache_stands: int = 0  # bytes of a cache that is there already
    batch_before: int = 0  # tokens: a resumed run's, which it goes on with where they fit; 0: a new run


@dataclass(frozen=True)
class Sizes:
    """Bytes, as measured."""

    others: int  # in use by CUDA itself and by other processes
    weights: int  # of the base: its linears, embedding, head, norms
    adapter: int  # of the adapter: its masters, and their mirrors in the dtype of the computation
    parameters: int  # numbers that are trained
    layers: int
    weights_per_layer: float  # numbers
    fixed: int  # of a batch, whatever its size
    recomputing: float  # a token, every layer recomputed
    keeping: float  # a token, for each layer that keeps its activations
    layer_input: int  # a token

    def update(self, tokens: int, kept: int, offloaded: int) -> int:
        """Of a batch of so many tokens, beside weights, adapter and optimizer."""
        per_token = self.recomputing + max(0, kept - 1) * self.keeping - max(0, offloaded - 2) * self.layer_input
        gradients = 4 * self.parameters
        at_the_end = gradients + tokens * (self.recomputing - (self.layers - 1) * self.layer_input)
        return int(gradients + max(self.fixed + tokens * per_token, at_the_end))  # those so far, and the batch's own


@dataclass(frozen=True)
class Asked:
    """What the user has decided; auto and 0 leave it to the plan."""

    recompute: str  # auto, none, layer or offload
    tokens_per_batch: int
    kv_cache: int  # bytes


@dataclass(frozen=True)
class Plan:
    """What was chosen, and what it takes."""

    sizes: Sizes
    need: Need
    limit: int  # bytes
    tokens_per_batch: int
    kept: int
    offloaded: int
    kv_cache: int
    gives_cache_back: bool  # for the update

    @property
    def treatments(self) -> list[Treatment]:
        """Of every layer, the first to the last."""
        recomputed = self.sizes.layers - self.kept - self.offloaded
        shares: list[tuple[Treatment, int]] = [
            ("offload", self.offloaded),
            ("recompute", recomputed),
            ("keep", self.kept),
        ]
        return [treatment for treatment, count in shares for _ in range(count)]

    @property
    def standing(self) -> int:
        """Bytes that are there in rollout and update."""
        optimizer = self.need.bytes_per_parameter * self.sizes.parameters
        return self.sizes.others + self.sizes.weights + self.sizes.adapter + optimizer + self.need.engine_bytes

    @property
    def update(self) -> int:
        """Bytes of an update."""
        batch = max(self.tokens_per_batch, self.need.longest)
        return self.sizes.update(batch, self.kept, self.offloaded)

    @property
    def peaks(self) -> tuple[int, int]:
        """Bytes of rollout and update at their highest."""
        held = 0 if self.gives_cache_back else self.kv_cache
        return self.standing + self.kv_cache, self.standing + held + self.update

    def settled(self, config: Config) -> Config:
        """The same with the cache, and the batches' size, as planned."""
        return replace(
            config,
            kv_cache_gib=self.kv_cache / GIB,
            release_kv_cache=self.gives_cache_back,
            tokens_per_batch=self.tokens_per_batch,
        )

    def time(self) -> float:
        """Of an update, in tokens of a model whose layers all keep their activations."""
        whole, batch = self.need.tokens_per_step, max(self.tokens_per_batch, self.need.longest)
        # What the last completion leaves of a batch, and a prompt that comes again, are at most a sequence.
        batches = 1 if batch >= whole else math.ceil(whole / max(batch - self.need.longest, batch / 2))
        again = (RECOMPUTED - 1) * (self.sizes.layers - self.kept) + (OFFLOADED - RECOMPUTED) * self.offloaded
        factor = 1 + again / max(1, self.sizes.layers)
        smaller = OF_SO_MANY_WEIGHTS / max(1.0, self.sizes.weights_per_layer)
        of_batches = max(factor * self.need.tokens_per_step, OF_LAUNCHES * smaller * factor * batches)
        giving_back = OF_GIVING_BACK * smaller * OF_SO_MANY_LAYERS / max(1, self.sizes.layers)
        return of_batches + OF_A_BATCH * batches + giving_back * self.gives_cache_back

    def table(self) -> str:
        """Row by row, in GiB, with the flags that decide otherwise."""
        rollout, update = self.peaks
        beside = ", given back for the update" if self.gives_cache_back else ", there during the update too"
        cached = self.kv_cache / max(1, self.need.kv_bytes_per_token * self.need.longest)
        cache = f"KV cache, {cached:.0f} sequences of {self.need.longest:,} tokens{beside}"
        batches = f"update, batches of {self.tokens_per_batch:,} tokens, {self._told()}"
        rows = [
            ("CUDA and other processes", self.sizes.others, ""),
            ("base weights", self.sizes.weights, "--base"),
            ("adapter", self.sizes.adapter, "--lora-rank"),
            ("optimizer", self.need.bytes_per_parameter * self.sizes.parameters, "--optimizer"),
            ("engine beside its cache", self.need.engine_bytes, ""),
            (cache, self.kv_cache, "--kv-cache-gib"),
            (batches, self.update, "--tokens-per-batch"),
        ]
        width = max(len(name) for name, *_ in rows)
        lines = [f"  {name:{width}}  {size / GIB:7.2f}  {flag}".rstrip() for name, size, flag in rows if size]
        return "\n".join(
            [
                f"memory, GiB of the {self.limit / GIB:.1f} to be had: at most {rollout / GIB:.1f} in a rollout, "
                f"{update / GIB:.1f} in an update",
                *lines,
            ]
        )

    def _told(self) -> str:
        recomputed = self.sizes.layers - self.kept - self.offloaded
        parts = [(self.kept, "kept"), (recomputed, "recomputed"), (self.offloaded, "recomputed from host memory")]
        told = " and ".join(f"{count} {what}" for count, what in parts if count)
        return f"layers: {told or 'none'} (--recompute)"


# ---- the trial


def measure(policy: Policy, longest: int) -> Sizes:
    """What the policy takes on its GPU and, by a forward and backward pass over a few tokens, what a token takes.

    The trial is of so many tokens that the head works on whole chunks of rows, and that activations outweigh gradients;
    of fewer where that does not fit.
    """
    parameters = sum(each.numel() for each in policy.store.parameters())
    inputs = len(policy.model.layers) * _layer_input(policy)  # bytes a token, of all layers; 0 where none is known
    tokens = max(TRIAL, 6 * parameters // inputs if inputs else 0)
    while True:
        try:
            return _measured(policy, longest, tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error) or tokens < 2 * LEAST_TRIAL:
                raise
            forget(error)
        tokens //= 2


def _measured(policy: Policy, longest: int, tokens: int) -> Sizes:
    """The same of a trial of so many tokens, and of twice as many."""
    parameters, device, layers = policy.store.parameters(), policy.device, len(policy.model.layers)
    few, more = (_batch_of(policy, size, longest) for size in (tokens, 2 * tokens))
    keeps = min(layers, TRIAL_KEPT)
    kept = _peak(policy, few, keeps)
    at_few, at_more = _peak(policy, few, 0), _peak(policy, more, 0)
    in_use = taken(device)
    num_few, num_more = len(few.tokens), len(more.tokens)
    recomputing = (at_more - at_few) / (num_more - num_few)
    adapter = sum(_bytes(each) for each in parameters) + sum(
        _bytes(mirror) for each in policy.store.projections.values() for mirror in each.mirrors
    )
    allocated = torch.cuda.memory_allocated(device)
    return Sizes(
        others=in_use - torch.cuda.memory_reserved(device),
        weights=allocated - adapter,
        adapter=adapter,
        parameters=sum(each.numel() for each in parameters),
        layers=layers,
        weights_per_layer=_base_weights(policy) / max(1, layers),
        fixed=max(0, int(at_few - recomputing * num_few)),
        recomputing=recomputing,
        keeping=max(0.0, (kept - at_few) / num_few / max(1, keeps - 1)),
        layer_input=_layer_input(policy),
    )


def taken(device: torch.device) -> int:
    """Bytes in use on a GPU, by whomever."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def keep_within(plan: Plan, device: torch.device) -> None:
    """PyTorch takes no more of a GPU than the plan's limit leaves it, from now on and whatever is asked for.

    It counts a KV cache that was given back as if it were there.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = plan.limit - plan.sizes.others + plan.kv_cache * plan.gives_cache_back
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _base_weights(policy: Policy) -> int:
    """How many numbers its linears hold."""
    return sum(math.prod(each.base.shape) for each in policy.store.projections.values())


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


def _peak(policy: Policy, batch: Batch, kept: int) -> int:
    """Bytes that a forward and backward pass takes at most, beside what is there before and after, where so many layers
    keep their activations."""
    layers = len(policy.model.layers)
    policy.model.treat(["keep" if index >= layers - kept else "recompute" for index in range(layers)])
    peak = 0
    for _ in range(2):  # the first time kernels are chosen, by running them in memory of their own
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(policy.device)
        torch.cuda.reset_peak_memory_stats(policy.device)
        logprobs, _ = policy.logprobs(batch)
        torch.autograd.grad(logprobs.sum(), policy.store.parameters(), allow_unused=True)
        peak = torch.cuda.max_memory_allocated(policy.device) - before
        del logprobs
    return peak


# ---- the choice


def foresee(sizes: Sizes, need: Need, limit: int, asked: Asked) -> Plan:
    """The plan before there is an engine, `need` being with what it is expected to take; with less where nothing fits
    beside that.

    Raises:
        UserError: nothing fits beside the least either.
    """
    try:
        return choose(sizes, need, limit, asked)
    except UserError:
        if need.engine_bytes < ENGINE_BYTES:  # there is to be none
            raise
        # Where it was expected to have a copy of the weights, it may share them after all.
        return choose(sizes, replace(need, engine_bytes=LEAST_ENGINE_BYTES), limit, asked)


def choose(sizes: Sizes, need: Need, limit: int, asked: Asked) -> Plan:
    """The fastest plan that fits into `limit` bytes.

    Raises:
        UserError: there is none; with the nearest settings that there is one for.
    """
    usable = int(limit * (1 - SPARE_SHARE)) - SPARE_BYTES
    anything = Plan(sizes, need, limit, 0, 0, 0, 0, gives_cache_back=False)
    # The cache first: with a small one sequences wait for each other, which costs more than layers computed again.
    for batches in _batches(need, asked):
        for cache in _caches(need, asked, usable - anything.standing):
            some = [replace(anything, kv_cache=cache, gives_cache_back=given) for given in need.gives_cache_back]
            if fitting := [plan for each in some for plan in _fitting(each, batches, asked, usable)]:
                return min(fitting, key=lambda plan: (plan.time(), -plan.tokens_per_batch))
    raise UserError(_refusal(sizes, need, asked, limit, usable))


def _caches(need: Need, asked: Asked, left: int) -> list[int]:
    """Bytes of the KV cache to try, the largest first."""
    if given := need.cache_stands or asked.kv_cache:
        return [given]
    wanted, least = full_cache_bytes(need.sequences, need.longest, need.kv_bytes_per_token), _least_cache(need)
    sizes = {wanted, left, least, *(int(wanted * share / 16) for share in range(1, 16))}
    return sorted((size for size in sizes if least <= size <= max(wanted, least)), reverse=True)


def _fitting(plan: Plan, batches: list[int], asked: Asked, usable: int) -> Iterator[Plan]:
    """For each size of a batch the plan that keeps most and offloads least, if one fits."""
    for tokens in batches:
        splits = _splits(plan.sizes.layers, asked.recompute)
        plans = (replace(plan, tokens_per_batch=tokens, kept=kept, offloaded=away) for kept, away in splits)
        yield from islice((each for each in plans if max(each.peaks) <= usable), 1)


def _batches(need: Need, asked: Asked) -> list[list[int]]:
    """Tokens in a batch, in lists of which the first that has one that fits is taken: what was asked for; or those that
    a resumed run began with, else any. None is smaller than the longest sequence, and one of all of a step is the
    largest. Equal parts of a step are a sequence larger than that: a completion that does not fit any more is part of
    the next batch, with its prompt again."""
    if asked.tokens_per_batch:
        return [[asked.tokens_per_batch]]
    whole = need.tokens_per_step
    parts = (min(whole, math.ceil(whole / count) + need.longest) for count in range(2, MOST_PARTS + 1))
    sizes = {max(need.longest, size) for size in (whole, *parts) if size <= LARGEST_BATCH} | {need.longest}
    before = [[need.batch_before]] if need.batch_before else []
    return [*before, sorted(sizes, reverse=True)]


def _splits(layers: int, recompute: str) -> list[tuple[int, int]]:
    """(kept, offloaded) layers, the fastest first. The last layer's input is wanted at once, and never offloaded."""
    most = max(0, layers - 1)
    if recompute == "none":
        return [(layers, 0)]
    if recompute == "layer":
        return [(0, 0)]
    if recompute == "offload":
        return [(0, most)]
    return [*((kept, 0) for kept in range(layers, -1, -1)), *((0, offloaded) for offloaded in range(1, most + 1))]


def _least_cache(need: Need) -> int:
    """Of one sequence."""
    return (need.longest + CACHE_TO_SPARE) * need.kv_bytes_per_token


def _refusal(sizes: Sizes, need: Need, asked: Asked, limit: int, usable: int) -> str:
    """What does not fit, and what would."""
    gives_back = any(need.gives_cache_back)
    smallest = Plan(sizes, need, limit, need.longest, 0, max(0, sizes.layers - 1), 0, gives_back)
    left = usable - smallest.standing
    flags = _flags(asked)
    told = f"A run of sequences of {need.longest:,} tokens does not fit into {limit / GIB:.1f} GiB"
    told += f" with {', '.join(flags)}" * bool(flags)
    if left <= 0:
        return (
            f"{told}: weights, adapter and engine alone take {smallest.standing / GIB:.1f}. Take a smaller model, keep "
            "its base in 4 bits with --base nf4, or lower --lora-rank."
        )
    fixed = sizes.update(0, 0, 0)
    per_token = (smallest.update - fixed) / need.longest
    held = 0 if gives_back else need.kv_bytes_per_token
    of_update = (left - fixed - CACHE_TO_SPARE * held) / (per_token + held)
    of_cache = left / max(1, need.kv_bytes_per_token) - CACHE_TO_SPARE
    fits, prompts = math.floor(min(of_update, of_cache)), need.longest - need.longest_completion
    if fits >= need.longest:
        return f"{told}. It does where that is left to the plan: without {' and '.join(flags)}."
    if fits > prompts:
        return f"{told}. {fits:,} tokens do: lower --max-completion-tokens to {fits - prompts:,}."
    return f"{told}, nor do its prompts of {prompts:,} tokens. Leave long prompts out, or take a smaller model."


def _flags(asked: Asked) -> list[str]:
    """What the user has decided, as it was said."""
    flags = [
        (asked.recompute != "auto", f"--recompute {asked.recompute}"),
        (asked.tokens_per_batch, f"--tokens-per-batch {asked.tokens_per_batch}"),
        (asked.kv_cache, f"--kv-cache-gib {asked.kv_cache / GIB:g}"),
    ]
    return [flag for given, flag in flags if given]
