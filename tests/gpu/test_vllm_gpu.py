"""vLLM over the trainer's weights on a CUDA GPU, compiled and with CUDA graphs: the program, and the engine alone."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_run_gpu import train, write_checkpoint
from tiny_engines import contexts, rollout, z_of

from grpo.config import Config
from grpo.memory_of_run import at_work_of
from grpo.memory_trial import measure
from grpo.packing import lay_out_to_read
from grpo.policy import Policy
from grpo.policy.host_embedding import to_host
from grpo.policy.load import load_model
from grpo.rollout.vllm_memory import find_kv_memory
from grpo.types import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

QWEN3_0_6B = transformers.Qwen3Config(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
    max_position_embeddings=4096,
)


class NoText:
    """Random tokens have no text."""

    def decode(self, tokens, skip_special_tokens):
        return ""


def gap(engine, policy, seed):
    """Mean |log p of the sampler - log p of the policy| over 16 completions of at most 64 tokens. They must be drawn
    from the policy: then the mean of -log p is the entropy."""
    groups = rollout(engine, ask(seed), 4, seed)
    batch = lay_out_to_read(groups, policy.device)
    with torch.no_grad():
        logprobs, entropy = policy.logprobs(batch)
    assert abs(z_of((-logprobs - entropy)[batch.mask])) < 4
    return float((logprobs - batch.sampler_logprobs)[batch.mask].abs().mean())


def ask(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(i, "", torch.randint(100, 150000, (50 + 31 * i,), generator=generator).tolist(), {}) for i in range(4)
    ]


def change_adapter(policy, seed):
    """A large random adapter, as an optimizer step would leave it."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.store.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    policy.store.refresh()
    policy.version += 1


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_the_embedded_model_trains(base, tmp_path):
    train("embedded", base, tmp_path, engine="vllm")


@pytest.mark.parametrize(("base", "hosted"), [("bf16", False), ("nf4", False), ("nf4", True)])
def test_sampler_and_policy_agree_through_updates_and_sleep(base, hosted, tmp_path):
    """Captured graphs see the update; the weights outlive the release of the cache; the embedding may be the host's."""
    from grpo.rollout.vllm_engine import VllmEngine

    shape = {**QWEN3_0_6B.to_dict(), "tie_word_embeddings": not hosted}
    folder = write_checkpoint(transformers.Qwen3Config(**shape), tmp_path / "model")
    config = Config(
        model=str(folder), base=base, engine="vllm", prompts_per_step=4, group_size=4, max_completion_tokens=64,
        eval_prompts=4, kv_cache_gib=2.0,
    )  # fmt: skip
    policy = Policy(load_model(config, torch.device("cuda"), 256), config)
    assert (to_host(policy.model, 2**40) > 0) == hosted
    engine = VllmEngine(policy, NoText(), contexts(ask(0)), config, 256)
    try:
        fresh = gap(engine, policy, 1)
        change_adapter(policy, 1)
        moved = engine.sync()["sync/moved"]
        assert moved > 0.1
        allowed = max(0.03, 2 * fresh)
        assert fresh < 0.03 and gap(engine, policy, 2) < allowed
        held = torch.cuda.mem_get_info()[0]
        engine.release()
        assert torch.cuda.mem_get_info()[0] - held > 1.9 * 2**30
        assert gap(engine, policy, 3) < allowed
        engine.release()
        change_adapter(policy, 2)
        assert engine.sync()["sync/moved"] > 0.1
        assert gap(engine, policy, 4) < allowed
    finally:
        engine.close()


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_a_rollout_takes_no_more_than_was_measured_and_about_what_was_reckoned(base, tmp_path):
    from grpo.rollout.vllm_engine import VllmEngine

    folder = write_checkpoint(QWEN3_0_6B, tmp_path / "model")
    config = Config(
        model=str(folder), base=base, engine="vllm", prompts_per_step=16, group_size=4, max_completion_tokens=64,
        eval_prompts=4, kv_cache_gib=2.0,
    )  # fmt: skip
    policy = Policy(load_model(config, torch.device("cuda"), 256), config)
    reckoned = measure(policy, 256).read(4096)
    policy.model.treat(["keep"] * len(policy.model.layers))
    engine = VllmEngine(policy, NoText(), contexts(ask(0)), config, 256)
    try:
        plan = SimpleNamespace(need=SimpleNamespace(longest=256, read_at_once=4096), sequences=64)
        measured = at_work_of(engine, plan, list(range(100, 900)))
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        prompts = [Prompt(index, "", [3 + index, *range(500, 690)], {}) for index in range(16)]
        rollout(engine, prompts, 4, seed=1)
        taken = torch.cuda.max_memory_reserved() - before
        print(f"reckoned {reckoned / 2**20:.0f} MiB, measured {measured / 2**20:.0f}, taken {taken / 2**20:.0f}")
        assert 0 < taken <= measured + 2**25
        assert 0.9 * measured < reckoned < 1.8 * measured
    finally:
        engine.close()


def test_a_cache_is_taken_back_where_pytorch_holds_what_is_left_of_the_card():
    """Freed, and not given up: so it is after the largest batch that a card has room for."""
    from vllm.device_allocator.cumem import CuMemAllocator

    torch.cuda.empty_cache()
    allocator = CuMemAllocator.get_instance()
    with allocator.use_memory_pool(tag="kv_cache"):
        cache = torch.zeros(2**31, dtype=torch.uint8, device="cuda")
    llm = SimpleNamespace(sleep=lambda level: allocator.sleep(()), wake_up=allocator.wake_up)
    memory = find_kv_memory(llm, can_sleep=True)
    memory.release()  # while the zeros may still be written
    batch = torch.empty(torch.cuda.mem_get_info()[0] - 2**30, dtype=torch.uint8, device="cuda")
    del batch
    assert torch.cuda.mem_get_info()[0] < 2**31
    memory.restore()
    cache.fill_(3)
    assert cache[:: 2**16].eq(3).all()
