"""The memory plan and the methods: a step has the tokens that were planned for, and a cache is for who samples."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_memory import NEED, SIZES

from grpo import memory, memory_of_run
from grpo.build import build_policy
from grpo.config import Config
from grpo.errors import UserError
from grpo.memory import GIB, Asked, choose, foresee
from grpo.memory_of_run import LOGIT_BYTES, _need, settle_memory
from grpo.methods import planned_for
from grpo.packing import PACKERS, batch_limit, lay_out_longest, lay_out_longest_pairs
from grpo.policy import load_tokenizer
from grpo.policy.optimizer import beside_pages
from grpo.types import Completion, Group, Prompt
from grpo.world import ALONE

CPU = torch.device("cpu")
PROMPT, ANSWER = 7, 11  # tokens of the longest
ANSWERS = {"sft": 1, "dpo": 2, "grpo": 4}


def of_method(method, **more):
    """A Config, and what memory is planned for."""
    config = Config(
        model="embedded", method=method, engine="torch" if method == "grpo" else "none", prompts_per_step=3,
        group_size=4, max_completion_tokens=ANSWER, max_grad_norm=1.0, **more,
    )  # fmt: skip
    lessons = None if method == "grpo" else SimpleNamespace(longest_completion=ANSWER)
    return config, planned_for(
        config, SimpleNamespace(lessons=lessons, held_out=lessons, max_completion_tokens=ANSWER, test=[])
    )


def longest_step(config, method):
    """Groups of a step whose prompts and answers are all as long as the longest."""
    for row in range(config.prompts_per_step):
        answers = [Completion([5 + row] * ANSWER, [0.0] * ANSWER, "", "stop", 0) for _ in range(ANSWERS[method])]
        group = Group(Prompt(row, "", [row] * PROMPT, {}), answers)
        group.advantages = torch.tensor([1.0, -1.0] * 2)[: len(answers)]
        yield group


@pytest.mark.parametrize("method", ["grpo", "sft", "dpo"])
def test_a_step_has_as_many_tokens_as_were_planned(method, tiny_config):
    config, planned = of_method(method)
    policy = build_policy(tiny_config(), load_tokenizer("embedded"), PROMPT + ANSWER)
    need = _need(planned, policy, PROMPT + ANSWER, 0, GIB)
    [batches] = PACKERS[method](config, CPU, batch_limit(config), ALONE)(list(longest_step(config, method)))
    assert sum(len(batch.tokens) for batch in batches) == need.tokens_per_step
    # and what is tried before the first step is the largest batch that can come
    lay_out = lay_out_longest_pairs if method == "dpo" else lay_out_longest
    tried = lay_out(planned, batch_limit(replace(planned, tokens_per_batch=10**6)), PROMPT, [1, 2], CPU)
    assert len(tried.tokens) == need.tokens_per_step


@pytest.mark.parametrize("engine, has_cache", [("none", False), ("torch", True)])
def test_a_cache_is_planned_for_who_samples(engine, has_cache, tiny_config):
    config = tiny_config(method="sft", engine=engine)
    policy = build_policy(config, load_tokenizer("embedded"), 32)
    need = _need(config, policy, 32, 0, GIB)
    assert bool(need.kv_bytes_per_token) == has_cache
    assert need.read_at_once == need.logits == 0  # of vLLM alone it is known


@pytest.mark.parametrize(("asked", "sequences"), [(0, 512), (100, 100), (600, 512)])
def test_vllms_work_is_planned_for(asked, sequences, tiny_config):
    config = tiny_config(engine="vllm", eval_prompts=200, eval_samples=4, max_num_seqs=asked)
    policy = build_policy(config, load_tokenizer("embedded"), 32)
    need = _need(config, policy, 32, 0, GIB)
    assert (need.sequences, need.read_at_once) == (sequences, min(4096, 32 * sequences))
    assert need.logits == LOGIT_BYTES * len(policy.model.head)


def test_no_more_held_out_prompts_are_planned_for_than_there_are():
    questions = SimpleNamespace(lessons=None, held_out=None, test=range(20))
    assert planned_for(Config(eval_prompts=128), questions).eval_prompts == 20
    assert planned_for(Config(eval_prompts=8), questions).eval_prompts == 8
    assert planned_for(Config(eval_prompts=8), SimpleNamespace(**vars(questions) | {"test": []})).eval_prompts == 1


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    ("mode", "may_page", "paged"), [("auto", True, False), ("on", False, True), ("off", False, False)]
)
def test_the_optimizer_is_planned_in_pages_as_asked(mode, may_page, paged, there, tiny_config, monkeypatch):
    """By itself only where such pages are to be had."""
    config = tiny_config(optimizer="adamw8bit", page_optimizer=mode)
    policy = build_policy(config, load_tokenizer("embedded"), 32)
    monkeypatch.setattr(memory_of_run, "has_pages", lambda device: there)
    need = _need(config, policy, 32, 0, GIB)
    assert (need.may_page, need.paged) == (may_page and there, paged)
    assert need.bytes_per_parameter == 2 and 0 < need.beside_pages == beside_pages(policy.optimizer)


def all_that_is_left(engine_bytes):
    """What is needed by a run of so many and such long sequences that the cache takes all that is left."""
    return replace(NEED, longest=4096, longest_completion=2048, sequences=4096, engine_bytes=engine_bytes)


@pytest.mark.parametrize("gives_cache_back", [True, False])
def test_an_engine_that_takes_a_little_more_than_expected_is_no_reason_to_stop(gives_cache_back, monkeypatch):
    """Where the cache was made of all that was left, nothing is left of it for the engine."""
    need = replace(all_that_is_left(GIB), gives_cache_back=(gives_cache_back,))
    plan = foresee(SIZES, need, 24 * GIB, Asked("auto", 0, 0))
    held = 0 if gives_cache_back else plan.kv_cache
    standing = SIZES.others + SIZES.weights + SIZES.adapter
    monkeypatch.setattr(memory_of_run.memory_trial, "taken", lambda device: standing + held + GIB + GIB // 8)
    policy = SimpleNamespace(device=torch.device("cuda"), model=SimpleNamespace(treat=lambda treatments: None))
    monkeypatch.setattr(memory, "keep_within_now", lambda *given: None)
    told = []
    settled = settle_memory(plan, Config(), policy, SimpleNamespace(release=lambda: None), [], told.append)
    assert settled.kv_cache == plan.kv_cache and max(settled.peaks) <= 24 * GIB
    assert settled.peaks[1] <= 24 * GIB * (1 - memory.SPARE_SHARE) - memory.SPARE_BYTES
    assert "engine beside its cache" in told[0]


def test_an_engine_that_leaves_an_update_no_memory_is_told_with_its_cache():
    need = replace(all_that_is_left(GIB), gives_cache_back=(True,), cache_stands=20 * GIB)
    with pytest.raises(UserError, match=r"24\.0 GiB beside a KV cache of 20\.0 GiB\. Give it less with --kv-cache-gib"):
        choose(SIZES, need, 24 * GIB, Asked("auto", 0, 0))


@pytest.mark.parametrize(("free", "ranks", "expected"), [(20, 1, 8), (20, 2, 4), (16, 1, 8), (15.9, 1, 4), (250, 8, 8)])
def test_half_of_the_hosts_free_memory_may_be_taken(free, ranks, expected, monkeypatch):
    monkeypatch.setattr(memory_of_run.system, "free_memory", lambda: int(free * GIB))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert memory_of_run.parkable() == expected * GIB
