"""The canary over vLLM: silent while engine and policy are one model, loud when anything is not the policy's."""

import pytest
import torch
from tiny_engines import batch_of, learn, prompts, rollout
from tiny_models import VOCABULARY

from grpo.errors import UserError
from grpo.loss import build_loss
from grpo.rollout import canary, vllm_compat
from grpo.types import Prompt


@pytest.fixture(scope="module")
def long_prompts():
    """Longer than vLLM's blocks, 128 tokens on a CPU: only whole blocks are kept in the prefix cache."""
    generator = torch.Generator().manual_seed(4)
    return [
        Prompt(i, "", torch.randint(3, VOCABULARY, (n,), generator=generator).tolist(), {})
        for i, n in enumerate((135, 131))
    ]


@pytest.fixture(scope="module")
def opened(open_engine, vllm_config, long_prompts):
    return open_engine(vllm_config("qwen3", learning_rate=1e-4, temperature=0.9), long_prompts)


@pytest.fixture
def honest(opened):
    """Policy and engine in agreement."""
    policy, engine = opened
    learn(policy, 1)
    engine.take_up()
    engine.canary.check()
    return policy, engine


def test_silent_over_fifty_honest_updates(honest):
    policy, engine = honest
    for step in range(50):
        groups = rollout(engine, prompts(2), 4, seed=step)
        batch = batch_of(groups, policy.config)
        batch.advantages = torch.where(batch.mask, torch.randn(1), batch.advantages)
        policy.update([[batch]], build_loss(policy.config), 1e-4)
        measured = engine.sync()
        assert measured["sync/gap"] < 1e-5
        assert measured["sync/moved"] > 0
    assert policy.version >= 50


def test_a_stale_prefix_cache_is_caught_and_a_sync_drops_it(honest, long_prompts):
    policy, engine = honest
    learn(policy, 2)
    with pytest.raises(UserError, match="is not the policy"):
        engine.canary.check()
    assert engine.sync()["sync/moved"] > 1e-3


def test_only_the_prompts_in_the_cache_are_stale(honest):
    """What the last test found is the cache alone: prompts that fill no block are scored by the new weights."""
    policy, engine = honest
    learn(policy, 3)
    groups = rollout(engine, prompts(), 2, seed=0)
    batch = batch_of(groups, policy.config)
    torch.testing.assert_close(batch.sampler_logprobs, policy.logprobs(batch)[0], atol=1e-4, rtol=0)


def layers_of(engine):
    return vllm_compat.inner_model(engine.llm).model.layers


@pytest.mark.parametrize("part", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
def test_one_projection_that_is_not_updated_trips_it(part, honest):
    policy, engine = honest
    layer = layers_of(engine)[1]
    linear = getattr(layer.self_attn if hasattr(layer.self_attn, part) else layer.mlp, part)
    lent = linear.lora_b[0].data
    linear.lora_b[0].data = lent.clone()
    try:
        engine.sync()  # a copy is as good until the policy moves
        learn(policy, 4)
        with pytest.raises(UserError, match="is not the policy"):
            engine.sync()
    finally:
        linear.lora_b[0].data = lent


def test_a_wrong_scale_trips_it(honest):
    _, engine = honest
    scale = layers_of(engine)[0].mlp.down_proj.lora_scale
    lent = scale.data
    scale.data = lent * 0.5
    try:
        with pytest.raises(UserError, match="is not the policy"):
            engine.sync()
    finally:
        scale.data = lent


def test_an_engine_that_stands_still_within_the_bound_trips_it(honest, monkeypatch):
    """Updates too small for the gap, as most are in bf16, and every factor in vLLM a copy that nobody refreshes."""
    policy, engine = honest
    monkeypatch.setattr(engine.canary, "noise", 0.02)
    monkeypatch.setattr(canary, "GAP_GROWTH", 100)
    factors = [
        factor
        for layer in layers_of(engine)
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
        for factor in (linear.lora_a, *linear.lora_b)
    ]
    lent = [factor.data for factor in factors]
    for factor in factors:
        factor.data = factor.data.clone()
    try:
        with pytest.raises(UserError, match="stood still"):
            for _ in range(200):
                with torch.no_grad():
                    policy.store.parameters()[0].add_(1e-3)
                policy.version += 1
                engine.sync()
    finally:
        for factor, data in zip(factors, lent, strict=True):
            factor.data = data
