"""The memory plan of a run: what is asked for, what is there, and what of the plan is done at once.
Knows how to measure a policy and an engine; what fits is arithmetic (grpo/memory.py).

plan_memory(...)      before there is an engine: by trial
settle_memory(...)    once the engine stands: by what it takes
parkable()            what may be pinned of the host's memory
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch

from grpo import memory, memory_trial, system
from grpo.config import Config
from grpo.errors import UserError
from grpo.memory import Asked, Need, Plan
from grpo.policy import Policy
from grpo.policy.allocator import allowed
from grpo.policy.cache import kv_bytes_per_token
from grpo.policy.fused import FusedModel
from grpo.policy.host_embedding import to_host
from grpo.policy.optimizer import STATE_BYTES, beside_pages, has_pages, page_state
from grpo.rollout import Engine
from grpo.rollout.vllm_compat import why_not
from grpo.types import Request

# Bytes of a logit that vLLM draws from: 16 bits, and as often as three times in float32.
LOGIT_BYTES = 14


def plan_memory(
    config: Config, policy: Policy, longest: int, batch_before: int, room: int, note: Callable[[str], object]
) -> Plan | None:
    """What fits a GPU's memory, by trial on a few tokens, before there is an engine; None on a CPU, whose memory is
    shared with everything else. batch_before: tokens of a resumed run's batches; 0: a new run. room: bytes of the
    host's memory that may be pinned.

    Raises:
        UserError: nothing fits.
    """
    if policy.device.type != "cuda":
        if config.memory_gib:
            note("note: --memory-gib is of a GPU's memory, and the policy is on a CPU: nothing is kept to it.")
        return None
    limit = allowed(policy.device)
    if config.memory_gib:
        limit = min(limit, int(config.memory_gib * memory.GIB))
        room -= host_embedding(policy, room, note)  # which the trial, too, has no place for
    sizes = memory_trial.measure(policy, longest, memory.usable_of(limit) if config.memory_gib else 0)
    need, asked = _need(config, policy, longest, batch_before, room), _asked(config)
    plan = None
    with suppress(UserError):
        plan = memory.foresee(sizes, need, limit, asked)
    if (plan is None or plan.is_short(asked)) and (size := host_embedding(policy, room, note)):
        sizes, plan = replace(sizes, weights=sizes.weights - size), None
        need = replace(need, parkable=room - size)
    plan = plan or memory.foresee(sizes, need, limit, asked)
    if plan.sizes.double_quantised:
        policy.store.double_quantize()
        torch.cuda.empty_cache()
    policy.head_rows = plan.sizes.head_rows or None
    memory.keep_within(plan, policy.device)
    return plan


def host_embedding(policy: Policy, room: int, note: Callable[[str], object]) -> int:
    """The bytes of a GPU that are free with the embedding in the host's memory, where so many may be pinned; 0 where it
    stays. `note` is told."""
    size = to_host(policy.model, room)
    if size:
        torch.cuda.empty_cache()
        note(f"The embedding, {size / memory.GIB:.2f} GiB, is in the host's memory, from where the GPU reads its rows.")
    return size


def settle_memory(
    plan: Plan, config: Config, policy: Policy, engine: Engine, words: list[int], note: Callable[[str], object]
) -> Plan:
    """The plan once more, now that it can be measured what the engine takes, and the policy's layers as it has them, as
    its optimizer has, which is without its state. words: tokens such as prompts have. `note` is told.

    Raises:
        UserError: the engine takes so much that nothing fits any more.
    """
    at_work = at_work_of(engine, plan, words) if plan.need.read_at_once else None
    engine.release()
    held = 0 if plan.gives_cache_back else plan.kv_cache
    taken = memory_trial.taken(policy.device)
    own = taken - plan.sizes.others - plan.sizes.weights - plan.sizes.adapter - held
    need = replace(
        plan.need,
        engine_bytes=max(0, own),
        at_work=at_work,
        cache_stands=plan.kv_cache,
        gives_cache_back=(plan.gives_cache_back,),
    )
    plan = memory.settle(plan.sizes, need, plan.limit, _asked(config))
    policy.model.treat(plan.treatments)
    if plan.need.paged:
        page_state(policy.optimizer)
    policy.head_rows = plan.sizes.head_rows or None
    memory.keep_within_now(plan, taken, policy.device)
    note(plan.table())
    return plan


def at_work_of(engine: Engine, plan: Plan, words: list[int]) -> int:
    """Bytes that an engine takes beside its cache when it reads as many tokens of prompts as it does at once, and when
    it draws for as many sequences; what is drawn is of no use. Its kernels are loaded behind this, so that what they
    take of the GPU can be seen. PyTorch's peaks are counted anew from here on."""
    length = max(1, min(plan.need.longest - 1, plan.need.read_at_once))
    long_ones = min(plan.sequences, math.ceil(plan.need.read_at_once / length))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    for count, tokens in ((long_ones, length), (plan.sequences, 1)):
        # Every long prompt another one, or they would be read once.
        prompts = [random.Random(index).choices(words, k=tokens) for index in range(count)]
        engine.sample([Request(prompt, seed=index, max_tokens=1) for index, prompt in enumerate(prompts)])
    return torch.cuda.max_memory_reserved() - before


def _need(config: Config, policy: Policy, longest: int, batch_before: int, room: int) -> Need:
    # With vLLM's settings, which few runs need.
    from grpo.rollout.vllm_engine import MAX_BATCHED_TOKENS, sequences_at_once

    with_vllm = config.engine == "vllm" or (config.engine == "auto" and suits_vllm(config, policy))
    shares = isinstance(policy.model, FusedModel)
    of_group = longest + (config.group_size - 1) * config.max_completion_tokens  # its prompt is there once
    per_token = kv_bytes_per_token(policy.source, policy.store.compute_dtype)
    copied = 0 if shares else sum(p.numel() for p in policy.model.parameters()) * policy.store.compute_dtype.itemsize
    return Need(
        longest=longest,
        longest_completion=config.max_completion_tokens,
        tokens_per_step=math.ceil(config.prompts_per_step / config.mini_batches) * of_group,
        sequences=sequences_at_once(config),
        kv_bytes_per_token=0 if config.engine in ("server", "none") else per_token,
        bytes_per_parameter=STATE_BYTES[config.optimizer],
        gives_cache_back=(True,) if not with_vllm else (False, True) if config.release_kv_cache else (False,),
        engine_bytes=memory.ENGINE_BYTES + copied if with_vllm else 0,
        batch_before=batch_before,
        parkable=room,
        may_page=config.page_optimizer == "auto" and has_pages(policy.device),
        paged=config.page_optimizer == "on",
        beside_pages=beside_pages(policy.optimizer),
        read_at_once=min(MAX_BATCHED_TOKENS, sequences_at_once(config) * longest) if with_vllm else 0,
        logits=LOGIT_BYTES * policy.model.head.shape[0] if with_vllm else 0,
    )


def parkable() -> int:
    """Bytes of the host's memory that layers may take: half of what is free, of each process of this host as much;
    rounded down to a power of two, that what else runs there decides nothing as a rule."""
    half = system.free_memory() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 1 << max(0, half.bit_length() - 1)


def _asked(config: Config) -> Asked:
    return Asked(config.recompute, config.tokens_per_batch, int(config.kv_cache_gib * memory.GIB))


def suits_vllm(config: Config, policy: Policy) -> bool:
    """Whether vLLM is the better engine."""
    return not why_not(config, policy.device)
