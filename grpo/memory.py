"""Memory: what a run takes of a GPU, planned before it starts from measured sizes. Knows nothing of tasks or engines.

    memory_trial.measure(...)        what a token takes in the update, by trial on a few tokens -> Sizes
    foresee, choose(sizes, need, ..) the settings that fit, the fastest of them -> Plan; arithmetic alone
    settle(sizes, need, ...)         the same once an engine stands
    Plan.table()                     what was chosen, what it costs, and how far the card is filled

A step has two peaks. In the rollout there is the KV cache, and what the engine has at work while it reads prompts; in
the update there are activations. Where the engine gives its cache back in between, each may have all that the rest
leaves. That takes time, so with memory enough it stays. Of the update, over n tokens in a batch of a model of L layers,
of which the last k keep their activations and the first o park their inputs in the host's memory, three moments are the
highest: when the head is at work; when the backward pass is in its first layer, the last one, where that keeps its
activations; and when it is in one that is computed again:

    bytes(n, k, o) = gradients + max(head_fixed + n (head + k keeping - away),
                                     kept_fixed + n (one_kept + (k - 1) keeping - away)     where k > 0,
                                     fixed + n (recomputing - away)),     away = max(0, o input - 2 input - result)

`head`, `one_kept` and `recomputing` (every layer, or every other one, but its input computed again) and `keeping` (what
one more kept layer adds) are measured, each where it alone changes. A layer that is computed again has its MLP in
parts, so it takes less at work than one that keeps. In the backward pass the kept layers are gone when the first is
computed again, so the two never add up. The head holds some hundred megabytes of logits however few the tokens: taken
together, as one line through two small trials, head and layers made a kept layer 17 to 25% larger than it is. Of what
is parked the GPU has two layers' at a time, of which what attention gave to the one at work would be there anyway. A
batch of few tokens takes most at the end of its backward pass, when there are all of its gradients; the trial must be
above that, or it measures the slope of something else.

Moments in 8 bits may be in pages of the host's memory, and then count nothing here: they are on the GPU for the
optimizer's step, when activations are not, and make way where these want the room. They are moved in every step, so
this is the last resort.

Time is counted in tokens, of a layer that keeps its activations: one computed again takes a third more, a batch
costs some hundred whatever is in it (a 4-bit base is unpacked), and no batch is done before its kernels are launched.
Of a mixture of experts a token takes what the weights that it meets take, a batch what all of them do.
A head that has the logits of few tokens at once reads its weights more often.
Counted by constants, not measured on the spot: equal runs on equal cards choose alike.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from grpo.config import Config
from grpo.errors import UserError
from grpo.memory_trial import OF_CUDA_LATER, Sizes
from grpo.policy.activations import PIECE, Treatment
from grpo.policy.allocator import hold_to
from grpo.policy.cache import full_cache_bytes
from grpo.policy.optimizer import STATE_BYTES

GIB = 2**30

# Of the limit: what the allocator cannot hand out because it lies between other things, and what libraries take later.
SPARE_SHARE, SPARE_BYTES = 0.04, 2**26

# What a vLLM engine takes beside its cache is only known when it stands; before, so much is set aside for it, or, where
# that leaves too little, less, at last the least that was seen: 0.10 GiB of a 1.5B, 0.12 of a 14B.
ENGINE_BYTES, LESS_ENGINE_BYTES, LEAST_ENGINE_BYTES = int(1.25 * GIB), GIB // 2, GIB // 8

# Sequences that are written side by side where the cache does not hold all of them at full length, as a multiple of
# those that it does: most are shorter, or not yet as long.
SEQUENCES_OF_CACHE = 4

LEAST_STATE = STATE_BYTES["adamw8bit"]  # bytes of the optimizer's state for a parameter

# Of what CUDA's own memory grows by later, that which is still to come once an engine stands and has worked.
OF_CUDA_NOW = OF_CUDA_LATER // 2

# Batches to choose from: a step in so many equal parts, of at most so many tokens. Larger ones gain nothing.
MOST_PARTS, LARGEST_BATCH = 64, 32768

# Time, in tokens of a layer that keeps its activations, seen with an 8B of 218 million weights a layer. On an H200: a
# token whose layer is computed again, but for its last product; the same with its input away. On an H100: what a batch
# itself costs; launching its kernels.
RECOMPUTED, OFFLOADED, OF_A_BATCH, OF_LAUNCHES = 1.35, 1.37, 620, 3140
OF_SO_MANY_WEIGHTS = 218e6

# Times as much where the head has the logits of few tokens at once; reckoned, from 6% of an update that it takes and
# products two thirds as fast.
OF_SMALL_HEAD = 1.04

# Giving the KV cache back for an update and taking it again, counted likewise for 32 such layers.
OF_GIVING_BACK, OF_SO_MANY_LAYERS = 2500, 32

# Tokens of the KV cache beside those of the longest sequence: blocks are whole, and some are always kept free.
CACHE_TO_SPARE = 1024


@dataclass(frozen=True)
class Need:
    """What a run asks for."""

    longest: int  # prompt and completion together, tokens
    longest_completion: int
    tokens_per_step: int  # of an optimizer step, packed, at most
    sequences: int  # written at once, at most
    kv_bytes_per_token: int
    bytes_per_parameter: int  # of the optimizer's state: 8, or 2 in 8 bits
    gives_cache_back: tuple[bool, ...]  # between rollout and update: what there is to choose from
    engine_bytes: int  # beside the cache: expected, or measured
    cache_stands: int = 0  # bytes of a cache that is there already
    batch_before: int = 0  # tokens: a resumed run's, which it goes on with where they fit; 0: a new run
    parkable: int = 2**60  # bytes of the host's memory that may be pinned for what layers leave there
    may_page: bool = False  # where the optimizer's state is in 8 bits, it may be in pages of the host's memory
    paged: bool = False  # and is
    beside_pages: int = 0  # bytes of it that stay on the GPU then
    read_at_once: int = 0  # tokens of prompts that the engine reads at once; 0: it is not planned for
    logits: int = 0  # bytes that it draws from for each sequence
    at_work: int | None = None  # bytes that it takes at work, beside its cache: measured; None: to be reckoned

    def state(self, parameters: int) -> int:
        """Bytes of the optimizer's state on the GPU."""
        return self.beside_pages if self.paged else self.bytes_per_parameter * parameters

    def resorts(self) -> list[Need]:
        """The same, and with the optimizer's state in pages, where that may be: to be tried one after the other."""
        pages = self.may_page and not self.paged and self.bytes_per_parameter == LEAST_STATE
        return [self, replace(self, paged=True)] if pages else [self]


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
        optimizer = self.need.state(self.sizes.parameters)
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
        return self.standing + self.kv_cache + self.at_work, self.standing + held + self.update

    @property
    def at_work(self) -> int:
        """Bytes that the engine takes while it reads prompts or draws, beside its cache."""
        if self.need.at_work is not None:
            return self.need.at_work
        drawing = self.need.logits * self.sequences
        return max(self.sizes.read(self.need.read_at_once), drawing) if self.need.read_at_once else 0

    @property
    def sequences(self) -> int:
        """Written at once: all that are wanted, where the cache has room."""
        of_one = self.need.longest * self.need.kv_bytes_per_token
        if not of_one:
            return self.need.sequences
        return min(self.need.sequences, max(1, SEQUENCES_OF_CACHE * self.kv_cache // of_one))

    def is_short(self, asked: Asked) -> bool:
        """Whether a run would be faster with more memory, where it was left to the plan what to do with it."""
        wanted = full_cache_bytes(self.need.sequences, self.need.longest, self.need.kv_bytes_per_token)
        return any(
            [
                self.gives_cache_back and False in self.need.gives_cache_back,
                self.need.paged and self.need.may_page,
                self.sizes.head_rows,
                self.sizes.double_quantised,
                self.kept < self.sizes.layers and asked.recompute == "auto",
                self.kv_cache < wanted and not asked.kv_cache,
            ]
        )

    def fits(self, usable: int) -> bool:
        """Whether both peaks do. Of a rollout whose cache stands nothing is left to foresee: it may take what was kept
        to spare."""
        rollout, update = self.peaks
        return update <= usable and rollout <= (self.limit - OF_CUDA_NOW if self.need.cache_stands else usable)

    def settled(self, config: Config) -> Config:
        """The same with the cache, and the batches' size, as planned."""
        return replace(
            config,
            kv_cache_gib=self.kv_cache / GIB,
            max_num_seqs=self.sequences,
            release_kv_cache=self.gives_cache_back,
            tokens_per_batch=self.tokens_per_batch,
        )

    def time(self) -> float:
        """Of an update, in tokens of a model whose layers all keep their activations."""
        whole, batch = self.need.tokens_per_step, max(self.tokens_per_batch, self.need.longest)
        # What the last completion leaves of a batch, and a prompt that comes again, are at most a sequence.
        batches = 1 if batch >= whole else math.ceil(whole / max(batch - self.need.longest, batch / 2))
        recomputed = self.sizes.layers - self.kept - self.offloaded
        again = (RECOMPUTED - 1 + self._attention()) * recomputed + (OFFLOADED - 1) * self.offloaded
        factor = 1 + again / max(1, self.sizes.layers)
        head = OF_SMALL_HEAD if self.sizes.head_rows else 1.0
        smaller = OF_SO_MANY_WEIGHTS / max(1.0, self.sizes.met * self.sizes.weights_per_layer)
        of_batches = max(factor * head * self.need.tokens_per_step, OF_LAUNCHES * smaller * factor * batches)
        giving_back = OF_GIVING_BACK * smaller * OF_SO_MANY_LAYERS / max(1, self.sizes.layers)
        # All of a base is unpacked, whatever share of it a token meets.
        return of_batches + OF_A_BATCH / self.sizes.met * batches + giving_back * self.gives_cache_back

    def _attention(self) -> float:
        """Of its time what attention takes in a forward pass, which an offloaded layer does not do again: 2 products of
        a hidden state with half of a sequence, where each weight has 2 forward and 2 backward."""
        queries = self.sizes.remembered / 2  # in 16 bits
        return queries * self.need.longest / (2 * max(1.0, self.sizes.met * self.sizes.weights_per_layer))

    def table(self) -> str:
        """Row by row, in GiB, with the flags that decide otherwise."""
        rollout, update = self.peaks
        beside = ", given back for the update" if self.gives_cache_back else ", there during the update too"
        cached = self.kv_cache / max(1, self.need.kv_bytes_per_token * self.need.longest)
        cache = f"KV cache, {cached:.0f} sequences of {self.need.longest:,} tokens{beside}"
        batches = f"update, batches of {self.tokens_per_batch:,} tokens, {self._told()}"
        rows = [
            ("CUDA and other processes", self.sizes.others, ""),
            self._weights_row(),
            ("adapter", self.sizes.adapter, "--lora-rank"),
            self._optimizer_row(),
            ("engine beside its cache" if self.need.kv_bytes_per_token else "the rest", self.need.engine_bytes, ""),
            (cache, self.kv_cache if self.need.kv_bytes_per_token else 0, "--kv-cache-gib"),
            self._at_work_row(),
            (batches, self.update, "--tokens-per-batch"),
        ]
        width = max(len(name) for name, *_ in rows)
        lines = [f"  {name:{width}}  {size / GIB:7.2f}  {flag}".rstrip() for name, size, flag in rows if size]
        # Rollouts of another process, or none, take nothing of this GPU.
        of_rollout = f"{rollout / GIB:.1f} in a rollout, " * bool(self.need.kv_bytes_per_token)
        peaks = f"{of_rollout}{update / GIB:.1f} in an update"
        return "\n".join([f"memory, GiB of the {self.limit / GIB:.1f} to be had: at most {peaks}", *lines])

    def _weights_row(self) -> tuple[str, int, str]:
        if self.sizes.shared_by > 1:
            told = f"base weights, 1/{self.sizes.shared_by} of the layers', and two layers"
            return told, self.sizes.weights, "--base, --shard-base"
        if self.sizes.double_quantised:
            return "base weights, their scales in 8 bits too", self.sizes.weights, "--base, --double-quant"
        return "base weights", self.sizes.weights, "--base"

    def _optimizer_row(self) -> tuple[str, int, str]:
        state = self.need.state(self.sizes.parameters)
        if self.need.paged:
            return "optimizer, its state in pages of the host's memory", state, "--optimizer, --page-optimizer"
        return "optimizer", state, "--optimizer"

    def _at_work_row(self) -> tuple[str, int, str]:
        told = "rollout, at work on prompts"
        if self.sequences < self.need.sequences:
            return f"{told}, {self.sequences:,} sequences at once", self.at_work, "--max-num-seqs"
        return told, self.at_work, ""

    def _told(self) -> str:
        recomputed = self.sizes.layers - self.kept - self.offloaded
        of_host = self.offloaded * _parked(self.tokens_per_batch, self.sizes, self.need) / GIB
        from_host = f"recomputed from {of_host:.1f} GiB of host memory"
        parts = [(self.kept, "kept"), (recomputed, "recomputed"), (self.offloaded, from_host)]
        told = " and ".join(f"{count} {what}" for count, what in parts if count)
        head = f", logits of {self.sizes.head_rows} tokens at once" if self.sizes.head_rows else ""
        return f"layers: {told or 'none'} (--recompute){head}"


# ---- the choice


def foresee(sizes: Sizes, need: Need, limit: int, asked: Asked) -> Plan:
    """The plan before there is an engine, `need` being with what it is expected to take; where nothing fits beside
    that, with less; where that does not either, with the scales of a base in 4 bits quantised too, which costs some of
    a rollout's speed; and at last all of these again with the optimizer's state in pages, where that may be.

    Raises:
        UserError: nothing fits beside the least either.
    """
    # Where an engine was expected to have a copy of the weights, it may share them after all. 0: there is to be none.
    less = [LESS_ENGINE_BYTES, LEAST_ENGINE_BYTES] if need.engine_bytes >= ENGINE_BYTES else []
    engines = [need.engine_bytes, *less]
    weights = [sizes, sizes.with_double_quant()] if sizes.spared else [sizes]
    cases = product(need.resorts(), weights, engines)
    return _first([(each, replace(needed, engine_bytes=engine)) for needed, each, engine in cases], limit, asked)


def settle(sizes: Sizes, need: Need, limit: int, asked: Asked) -> Plan:
    """The plan once an engine stands, `need` being with what it takes: what is left to try is the optimizer's state in
    pages.

    Raises:
        UserError: nothing fits.
    """
    return _first([(sizes, each) for each in need.resorts()], limit, asked)


def _first(cases: list[tuple[Sizes, Need]], limit: int, asked: Asked) -> Plan:
    """Of the first of these that there is a plan for. Raises UserError: there is none for the last either."""
    *others, last = cases
    for each in others:
        with suppress(UserError):
            return choose(*each, limit, asked)
    return choose(*last, limit, asked)


def usable_of(limit: int) -> int:
    """Bytes of so many that are planned with."""
    return int(limit * (1 - SPARE_SHARE)) - SPARE_BYTES


def choose(sizes: Sizes, need: Need, limit: int, asked: Asked) -> Plan:
    """The fastest plan that fits into `limit` bytes.

    Raises:
        UserError: there is none; with the nearest settings that there is one for.
    """
    usable = usable_of(limit)
    small = sizes.with_small_head()
    heads = [sizes] if small == sizes else [sizes, small]
    anything = Plan(sizes, need, limit, 0, 0, 0, 0, gives_cache_back=False)
    # The cache first: with a small one sequences wait for each other, which costs more than layers computed again.
    for batches in _batches(need, asked):
        for cache in _caches(need, asked, usable - anything.standing - anything.at_work):
            some = product(heads, need.gives_cache_back)
            plans = [replace(anything, sizes=each, kv_cache=cache, gives_cache_back=given) for each, given in some]
            if fitting := [plan for each in plans for plan in _fitting(each, batches, asked, usable)]:
                return min(fitting, key=lambda plan: (plan.time(), -plan.tokens_per_batch))
    told = _refusal(small, need, asked, limit, usable)
    if need.bytes_per_parameter > LEAST_STATE:
        with suppress(UserError):
            settle(sizes, replace(need, bytes_per_parameter=LEAST_STATE), limit, asked)
            told += " With --optimizer adamw8bit it fits as it is."
    raise UserError(told)


def _caches(need: Need, asked: Asked, left: int) -> list[int]:
    """Bytes of the KV cache to try, the largest first."""
    if given := need.cache_stands or asked.kv_cache:
        return [given]
    wanted, least = full_cache_bytes(need.sequences, need.longest, need.kv_bytes_per_token), _least_cache(need)
    sizes = {wanted, left, least, *(int(wanted * share / 16) for share in range(1, 16))}
    return sorted((size for size in sizes if least <= size <= max(wanted, least)), reverse=True)


def _fitting(plan: Plan, batches: list[int], asked: Asked, usable: int) -> Iterator[Plan]:
    """For each size of a batch, and each way of splitting the layers, the plan that keeps most, if one fits. From one
    split to the next less is taken, so the first that fits is found by halving."""
    layers = plan.sizes.layers
    for tokens in batches:
        of = partial(_with, plan, tokens)
        for splits in _splits(layers, _most_offloaded(tokens, plan.sizes, plan.need), asked.recompute):
            first = bisect_left(splits, True, key=lambda split: of(*split).fits(usable))
            yield from (of(*split) for split in splits[first : first + 1])


def _parked(tokens: int, sizes: Sizes, need: Need) -> int:
    """Bytes of the host's memory that an offloaded layer takes, in whole pieces."""
    whole = max(tokens, need.longest)
    return sum(math.ceil(each * whole / PIECE) * PIECE for each in (sizes.layer_input, sizes.remembered))


def _most_offloaded(tokens: int, sizes: Sizes, need: Need) -> int:
    """Layers that may be. The last one's input is wanted at once, and never is."""
    of_a_layer = _parked(tokens, sizes, need)
    return max(0, min(sizes.layers - 1, need.parkable // of_a_layer if of_a_layer else sizes.layers))


def _with(plan: Plan, tokens: int, kept: int, offloaded: int) -> Plan:
    return replace(plan, tokens_per_batch=tokens, kept=kept, offloaded=offloaded)


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


def _splits(layers: int, most: int, recompute: str) -> list[list[tuple[int, int]]]:
    """(kept, offloaded) layers, in lists that begin with the fastest: offloaded, of which there may be so many, where
    nothing else is left; or instead of computed again, which is faster where sequences are long."""
    if recompute == "none":
        return [[(layers, 0)]]
    if recompute == "layer":
        return [[(0, 0)]]
    if recompute == "offload":
        return [[(0, most)]]
    keeping = range(layers, -1, -1)
    at_last = [*((kept, 0) for kept in keeping), *((0, offloaded) for offloaded in range(1, most + 1))]
    return [at_last, [(kept, min(layers - kept, most)) for kept in keeping]]


def _least_cache(need: Need) -> int:
    """Of one sequence."""
    return (need.longest + CACHE_TO_SPARE) * need.kv_bytes_per_token


def _refusal(sizes: Sizes, need: Need, asked: Asked, limit: int, usable: int) -> str:
    """What does not fit, and what would."""
    gives_back = any(need.gives_cache_back)
    smallest = Plan(sizes, need, limit, need.longest, 0, _most_offloaded(need.longest, sizes, need), 0, gives_back)
    left = usable - smallest.standing
    flags = _flags(asked)
    told = f"A run of sequences of {need.longest:,} tokens does not fit into {limit / GIB:.1f} GiB"
    told += f" with {', '.join(flags)}" * bool(flags)
    if left <= smallest.at_work:
        alone = (smallest.standing + smallest.at_work) / GIB
        return (
            f"{told}: weights, adapter and engine alone take {alone:.1f}. Take a smaller model, keep "
            "its base in 4 bits with --base nf4, or lower --lora-rank; several GPUs share a base by --shard-base."
        )
    fixed = sizes.update(0, 0, 0)
    per_token = (smallest.update - fixed) / need.longest
    held = 0 if gives_back else need.kv_bytes_per_token
    of_update = (left - fixed - CACHE_TO_SPARE * held) / (per_token + held)
    of_cache = (left - smallest.at_work) / max(1, need.kv_bytes_per_token) - CACHE_TO_SPARE
    fits, prompts = math.floor(min(of_update, of_cache)), need.longest - need.longest_completion
    if fits >= need.longest and flags and _is_possible(sizes, need, limit):
        return f"{told}. It does where that is left to the plan: without {' and '.join(flags)}."
    if fits >= need.longest:
        return f"{told} beside a KV cache of {need.cache_stands / GIB:.1f} GiB. Give it less with --kv-cache-gib."
    if fits > prompts:
        return f"{told}. {fits:,} tokens do: lower --max-completion-tokens to {fits - prompts:,}."
    return f"{told}, nor do its prompts of {prompts:,} tokens. Leave long prompts out, or take a smaller model."


def _is_possible(sizes: Sizes, need: Need, limit: int) -> bool:
    """Whether there is a plan where all is left to it."""
    with suppress(UserError):
        return bool(choose(sizes, need, limit, Asked("auto", 0, 0)))
    return False


def _flags(asked: Asked) -> list[str]:
    """What the user has decided, as it was said."""
    flags = [
        (asked.recompute != "auto", f"--recompute {asked.recompute}"),
        (asked.tokens_per_batch, f"--tokens-per-batch {asked.tokens_per_batch}"),
        (asked.kv_cache, f"--kv-cache-gib {asked.kv_cache / GIB:g}"),
    ]
    return [flag for given, flag in flags if given]


def keep_within(plan: Plan, device: torch.device) -> None:
    """PyTorch takes no more of a GPU than the plan's limit leaves it, from now on and whatever is asked for: of a whole
    card too, or CUDA would have no room for kernels that are loaded later.

    It counts a KV cache that was given back as if it were there, so until then it may take as much more.
    """
    own = plan.limit - plan.sizes.others - OF_CUDA_LATER
    hold_to(own + plan.kv_cache * plan.gives_cache_back, device)


def keep_within_now(plan: Plan, taken: int, device: torch.device) -> None:
    """The same once the engine stands, and a cache that it gives back is given back: what CUDA itself has grown by is
    among the bytes that are taken then, and most of what it will. PyTorch may take what is left in addition to what it
    counts as its own, and what was planned in any case."""
    left = plan.limit - taken - OF_CUDA_NOW
    rollout, update = plan.peaks
    planned = max(rollout, update + plan.kv_cache * plan.gives_cache_back) - plan.sizes.others
    hold_to(max(torch.cuda.memory_reserved(device) + left, planned), device)
