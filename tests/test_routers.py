"""Choices of experts: those of engine and policy are told apart, and counted as transformers' own routers count."""

import pytest
import torch
from test_policy import reference_model
from tiny_engines import Letters, contexts, learn, prompts, rollout
from tiny_models import build_policy, one_batch, randomise

from grpo.rollout.routers import build_routers, nothing_to_choose, tells_nothing
from grpo.rollout.torch_engine import TorchEngine


def build_engine(config):
    policy = build_policy(config)
    return policy, TorchEngine(policy, Letters(), contexts(prompts(3)), 1.0)


def jolted(model, size=0.3):
    """The same model with other routers."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def chosen_by(model, tokens):
    """By transformers alone: the set of experts of each token and layer."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    return [[set(row.topk(model.config.num_experts_per_tok).indices.tolist()) for row in layer] for layer in logits]


@pytest.mark.parametrize("name", ["qwen3-moe", pytest.param("olmoe", marks=pytest.mark.slow)])
def test_other_choices_of_the_engine_are_counted(name, tiny_config):
    config = tiny_config(name)
    policy, engine = build_engine(config)
    other, their_engine = build_engine(config)
    jolted(other.model.model)
    asked = contexts(prompts(3))
    completions = [group.completions for group in rollout(engine, prompts(3), 2, seed=0, max_tokens=9)]
    routers = build_routers(policy, their_engine.choices, asked, completions)
    model, theirs = reference_model(config), reference_model(config)
    jolted(theirs)
    differ = total = 0
    for context, some in list(zip(asked, completions, strict=True))[:2]:
        tokens = context + some[0].tokens[:-1]
        for ours, others in zip(chosen_by(model, tokens), chosen_by(theirs, tokens), strict=True):
            differ += sum(len(there - here) for here, there in zip(ours, others, strict=True))
            total += sum(map(len, ours))
    assert differ > 10
    assert routers() == {"sync/rerouted": pytest.approx(differ / total)}
    assert build_routers(policy, engine.choices, asked, completions)() == {"sync/rerouted": 0.0}
    assert build_routers(policy, tells_nothing, asked, completions)() == {}


def test_every_sync_says_it_where_there_are_experts(tiny_config):
    policy, engine = build_engine(tiny_config("qwen3-moe"))
    learn(policy, 2)
    assert engine.sync()["sync/rerouted"] == 0.0
    _, without = build_engine(tiny_config("qwen3"))
    assert without.canary.routers is nothing_to_choose and "sync/rerouted" not in without.sync()


@pytest.mark.parametrize("name", ["deepseek-v2", "gpt-oss"])
def test_the_policy_s_choices_are_the_same_packed_and_one_by_one(name, tiny_config, groups):
    policy = build_policy(tiny_config(name))
    randomise(policy, size=0.2)
    batch, model = one_batch(groups, policy.config), policy.model
    packed = model.choices(batch)
    model._run = model._one_by_one
    chosen = model.choices(batch)
    assert torch.equal(packed.sort(-1).values, chosen.sort(-1).values)
    assert len(packed) == len(batch.tokens) and len(packed.unique()) > 3
