"""Prompts, a tokenizer of sorts, and what an engine wrote: what the tests of engines share. No test is here."""

import torch
from tiny_models import VOCABULARY, one_batch, randomise

from grpo.rollout.sampling import sample_groups
from grpo.types import Prompt


class Letters:
    """A tokenizer of sorts: each token is a letter."""

    def decode(self, tokens, skip_special_tokens):
        return "".join(chr(ord("a") + token % 26) for token in tokens)


def prompts(count=5):
    """Random prompts of odd and unequal lengths, one token among them."""
    generator = torch.Generator().manual_seed(3)
    lengths = [4, 9, 1, 17, 6][:count]
    return [
        Prompt(i, "", torch.randint(3, VOCABULARY, (n,), generator=generator).tolist(), {})
        for i, n in enumerate(lengths)
    ]


def contexts(asked):
    """The tokens of prompts."""
    return [prompt.tokens for prompt in asked]


def rollout(engine, asked, group_size, seed, max_tokens=None):
    """A group of completions for each prompt."""
    return sample_groups(engine, asked, group_size, max_tokens or engine.policy.config.max_completion_tokens, seed)


def batch_of(groups, config):
    """The groups as the policy reads them."""
    for group in groups:
        group.advantages = torch.ones(len(group.completions))
    return one_batch(groups, config)


def tokens_of(groups):
    """The tokens of every completion."""
    return [completion.tokens for group in groups for completion in group.completions]


def check_ends(groups, limit):
    """Some completions stopped by themselves and some at the limit; tokens, log-probabilities and text say which."""
    completions = [completion for group in groups for completion in group.completions]
    stopped = [completion for completion in completions if completion.finish == "stop"]
    assert 0 < len(stopped) < len(completions)
    for completion in completions:
        ends_with_stop = completion.tokens[-1] == 2
        assert ends_with_stop == (completion.finish == "stop")
        assert 2 not in completion.tokens[:-1]
        assert len(completion.tokens) == len(completion.sampler_logprobs) <= limit
        assert ends_with_stop or len(completion.tokens) == limit
        assert completion.text == Letters().decode(completion.tokens[: -1 if ends_with_stop else None], True)


def surprise_z(groups, policy, config):
    """How far -log p of what was sampled is from the entropy on average, in standard errors: a standard normal number
    where the tokens were drawn from the policy, whatever the log-probabilities that came with them."""
    batch = batch_of(groups, config)
    with torch.no_grad():
        logprobs, entropy = policy.logprobs(batch)
    return z_of((-logprobs - entropy)[batch.mask])


def z_of(excess):
    """The mean of independent numbers [n] of mean 0, in standard errors."""
    return float(excess.double().mean() / (excess.double().std() / len(excess) ** 0.5))


def learn(policy, seed, size=0.1):
    """Another random adapter and version, as an optimizer step would leave them; engines are not told."""
    randomise(policy, seed, size)
    policy.version += 1
