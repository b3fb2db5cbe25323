"""The torch engine against the policy and against transformers' own generation."""

import pytest
import torch
import transformers
from tiny_engines import Letters, batch_of, check_ends, prompts, surprise_z, tokens_of
from tiny_models import VOCABULARY, build_policy, randomise

from grpo.errors import UserError
from grpo.rollout.canary import Canary
from grpo.rollout.torch_engine import TorchEngine


def build_engine(config, seed=1):
    policy = build_policy(config)
    randomise(policy, seed)
    return policy, TorchEngine(policy, Letters(), prompts(), config.max_completion_tokens, config.temperature)


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "mistral-window"])
def test_sampling_logprobs_are_the_policys(name, recompute, tiny_config):
    config = tiny_config(name, recompute=recompute, temperature=0.8, max_completion_tokens=23, mask_truncated=False)
    policy, engine = build_engine(config)
    batch = batch_of(engine.rollout(prompts(), 7, seed=11), config)
    logprobs, _ = policy.score(batch)
    torch.testing.assert_close(logprobs, batch.sampler_logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_tokens_are_drawn_from_the_policy(name, tiny_config):
    config = tiny_config(name, temperature=0.8, max_completion_tokens=23, mask_truncated=False)
    policy, engine = build_engine(config)
    for seed in range(3):
        assert abs(surprise_z(engine.rollout(prompts(), 64, seed), policy, config)) < 4
    engine.temperature = 0.7
    assert surprise_z(engine.rollout(prompts(), 64, seed=0), policy, config) < -8


def test_completions_end_with_the_stop_token_or_at_the_limit(tiny_config):
    config = tiny_config(max_completion_tokens=40)
    _, engine = build_engine(config)
    check_ends(engine.rollout(prompts(), 16, seed=0), limit=40)


def test_the_same_seed_gives_the_same_groups_and_another_seed_others(tiny_config):
    _, engine = build_engine(tiny_config(max_completion_tokens=9))
    first, again, other = (tokens_of(engine.rollout(prompts(), 4, seed)) for seed in (5, 5, 6))
    assert first == again != other


def test_samples_follow_the_models_distribution(tiny_config):
    """First tokens of 4,000 completions against the exact probabilities: a chi-square test."""
    config = tiny_config(max_completion_tokens=1, temperature=0.5)
    _, engine = build_engine(config)
    [prompt] = prompts(1)
    counts = torch.zeros(VOCABULARY)
    for seed in range(8):
        [group] = engine.rollout([prompt], 500, seed)
        counts += torch.bincount(torch.tensor([c.tokens[0] for c in group.completions]), minlength=VOCABULARY)
    scores = engine.score([prompt.tokens] * VOCABULARY, [[token] for token in range(VOCABULARY)])
    expected = torch.tensor(scores).squeeze(1).exp() * 4000
    likely = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[likely].sum()
    freedom = int(likely.sum())
    assert freedom > 5
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_almost_greedy_tokens_are_those_of_transformers(name, tiny_config):
    config = tiny_config(name, temperature=1e-4, max_completion_tokens=12)
    policy = build_policy(config)
    engine = TorchEngine(policy, Letters(), prompts(), 12, 1e-4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(config.model).eval()
    for group in engine.rollout(prompts(), 1, seed=0):
        tokens = torch.tensor([group.prompt.tokens])
        out = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12)
        assert group.completions[0].tokens == out[0, tokens.shape[1] :].tolist()


def test_scoring_given_completions_equals_the_policy(tiny_config):
    _, engine = build_engine(tiny_config())
    groups = engine.rollout(prompts(3), 1, seed=2)
    scores = engine.score([g.prompt.tokens for g in groups], [g.completions[0].tokens for g in groups])
    for group, row in zip(groups, scores, strict=True):
        torch.testing.assert_close(
            torch.tensor(row), torch.tensor(group.completions[0].sampler_logprobs), atol=1e-5, rtol=1e-5
        )


def test_the_canary_is_silent_over_honest_updates_and_sees_them(tiny_config):
    policy, engine = build_engine(tiny_config())
    for seed in range(2, 12):
        randomise(policy, seed)
        measured = engine.sync()
        assert measured["sync/gap"] < 1e-5
        assert measured["sync/moved"] > 1e-3


def test_the_canary_trips_when_the_engine_has_other_weights(tiny_config):
    policy, engine = build_engine(tiny_config())
    _, stale = build_engine(tiny_config())
    engine.canary.score = stale.score
    engine.sync()
    randomise(policy, 3)
    with pytest.raises(UserError, match="is not the policy"):
        engine.sync()


def test_the_canary_refuses_an_engine_that_is_another_model_from_the_start(tiny_config):
    policy, engine = build_engine(tiny_config())
    other, _ = build_engine(tiny_config(), seed=2)
    completions = tokens_of(engine.rollout(prompts(2), 1, seed=0))
    Canary(policy, engine.score, prompts(2), completions)
    with pytest.raises(UserError, match="before any update"):
        Canary(other, engine.score, prompts(2), completions)


def test_the_canary_trips_when_the_engine_stands_still_within_the_bound(tiny_config):
    """An update too small for the gap, as most are in bf16: only the lack of movement gives the engine away."""
    policy, engine = build_engine(tiny_config())
    _, stale = build_engine(tiny_config())
    engine.canary.bound = 0.1
    with torch.no_grad():
        policy.store.parameters()[0].add_(3e-4)
    assert engine.sync()["sync/moved"] < 0.01
    engine.canary.score = stale.score
    engine.canary.engine_before = torch.tensor(
        [p for row in stale.score(engine.canary.prompts, engine.canary.completions) for p in row]
    )
    with torch.no_grad():
        policy.store.parameters()[0].add_(1e-3)
    with pytest.raises(UserError, match="stood still"):
        engine.sync()
