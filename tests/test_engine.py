"""The torch engine against the policy and against transformers' own generation."""

import pytest
import torch
import transformers
from tiny_engines import Letters, batch_of, check_ends, contexts, prompts, rollout, surprise_z, tokens_of
from tiny_models import VOCABULARY, build_policy, randomise

from grpo.rollout import torch_engine
from grpo.rollout.sampling import sample_groups
from grpo.rollout.torch_engine import TorchEngine, draw
from grpo.seeds import mix_seed
from grpo.types import Request


def build_engine(config, seed=1):
    policy = build_policy(config)
    randomise(policy, seed)
    return policy, TorchEngine(policy, Letters(), contexts(prompts()), config.temperature)


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "mistral-window"])
def test_sampling_logprobs_are_the_policys(name, recompute, tiny_config):
    config = tiny_config(name, recompute=recompute, temperature=0.8, max_completion_tokens=23, mask_truncated=False)
    policy, engine = build_engine(config)
    batch = batch_of(rollout(engine, prompts(), 7, seed=11), config)
    logprobs, _ = policy.logprobs(batch)
    torch.testing.assert_close(logprobs, batch.sampler_logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_tokens_are_drawn_from_the_policy(name, tiny_config):
    config = tiny_config(name, temperature=0.8, max_completion_tokens=23, mask_truncated=False)
    policy, engine = build_engine(config)
    for seed in range(3):
        assert abs(surprise_z(rollout(engine, prompts(), 64, seed), policy, config)) < 4
    engine.temperature = 0.7
    assert surprise_z(rollout(engine, prompts(), 64, seed=0), policy, config) < -8


def test_completions_end_with_the_stop_token_or_at_the_limit(tiny_config):
    config = tiny_config(max_completion_tokens=40)
    _, engine = build_engine(config)
    check_ends(rollout(engine, prompts(), 16, seed=0), limit=40)


def test_the_same_seed_gives_the_same_groups_and_another_seed_others(tiny_config):
    _, engine = build_engine(tiny_config(max_completion_tokens=9))
    first, again, other = (tokens_of(rollout(engine, prompts(), 4, seed)) for seed in (5, 5, 6))
    assert first == again != other


def test_samples_follow_the_models_distribution(tiny_config):
    """First tokens of 4,000 completions against the exact probabilities: a chi-square test."""
    config = tiny_config(max_completion_tokens=1, temperature=0.5)
    _, engine = build_engine(config)
    [prompt] = prompts(1)
    counts = torch.zeros(VOCABULARY)
    for seed in range(8):
        [group] = rollout(engine, [prompt], 500, seed)
        counts += torch.bincount(torch.tensor([c.tokens[0] for c in group.completions]), minlength=VOCABULARY)
    scores = engine.logprobs([prompt.tokens] * VOCABULARY, [[token] for token in range(VOCABULARY)])
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
    engine = TorchEngine(policy, Letters(), contexts(prompts()), 1e-4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(config.model).eval()
    for group in rollout(engine, prompts(), 1, seed=0):
        tokens = torch.tensor([group.prompt.tokens])
        out = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12)
        assert group.completions[0].tokens == out[0, tokens.shape[1] :].tolist()


def test_scoring_given_completions_equals_the_policy(tiny_config):
    _, engine = build_engine(tiny_config())
    groups = rollout(engine, prompts(3), 1, seed=2)
    scores = engine.logprobs([g.prompt.tokens for g in groups], [g.completions[0].tokens for g in groups])
    for group, row in zip(groups, scores, strict=True):
        torch.testing.assert_close(
            torch.tensor(row), torch.tensor(group.completions[0].sampler_logprobs), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_completion_depends_on_its_seed_and_not_on_who_shares_the_batch(name, tiny_config, monkeypatch):
    _, engine = build_engine(tiny_config(name, max_completion_tokens=23))
    asked = [
        Request(prompt.tokens, mix_seed(row, member), 3 + 5 * member)
        for row, prompt in enumerate(prompts())
        for member in range(4)
    ]
    together = [completion.tokens for completion in engine.sample(asked)]
    assert [engine.sample([request])[0].tokens for request in asked] == together
    assert [completion.tokens for completion in engine.sample(asked[::-1])] == together[::-1]
    monkeypatch.setattr(torch_engine, "MAX_SEQUENCES", 3)
    assert [completion.tokens for completion in engine.sample(asked)] == together
    assert max(map(len, together[::4])) <= 3 < max(map(len, together[3::4])) <= 18


def test_a_drawn_token_is_the_one_whose_share_of_probability_holds_the_number():
    p = torch.tensor([[0.0, 0.25, 0.5, 0.0, 0.25]], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53])
    drawn = draw(p.log().expand(6, 5), uniform.double())
    assert drawn.tolist() == [1, 1, 2, 2, 4, 4]


def test_a_groups_members_and_rows_have_seeds_of_their_own(tiny_config):
    """Rows counted from where the last call ended give what one call gives."""
    _, engine = build_engine(tiny_config(max_completion_tokens=9))
    whole = tokens_of(sample_groups(engine, prompts(), 3, 9, seed=5))
    parts = [
        sample_groups(engine, prompts()[start : start + 2], 3, 9, 5, rows=range(start, 5)[:2]) for start in (0, 2, 4)
    ]
    assert tokens_of([group for part in parts for group in part]) == whole
    assert len(set(map(tuple, whole))) > 12  # of 15
