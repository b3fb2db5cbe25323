"""transformers' own layers over packed sequences compute what they compute one by one, or are not run so."""

from functools import partial

import pytest
import torch
import transformers
from test_policy import assert_same_gradient
from tiny_models import CPU, NO_HEAD_SIZE, build_policy, one_batch, randomise, write_checkpoint

from grpo.config import Config
from grpo.policy import load_model
from grpo.policy.generic import last_hidden
from grpo.policy.packed_attention import LAYOUT, NAME, NotPackedError, find

CASES = ["qwen3-moe", "gpt-oss", "deepseek-v2"]  # plain; windows and sinks; values smaller than keys
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("olmoe", "qwen2-moe", "mixtral", "starcoder2", "gpt2")]


def numbers_of(policy, batch):
    """Log-probabilities, and the gradient of every factor."""
    for parameter in policy.store.parameters():
        parameter.grad = None
    logprobs, entropies = policy.logprobs(batch, differentiable_entropy=True)
    weights = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(2))
    (weights * logprobs + 0.1 * weights.flip(0) * entropies).sum().backward()
    return logprobs.detach(), [parameter.grad for parameter in policy.store.parameters()]


@pytest.mark.parametrize("treatment", ["keep", "recompute"])
@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_packed_is_one_by_one(name, treatment, tiny_config, groups):
    config = tiny_config(name, expert_adapters=True)
    policy = build_policy(config)
    randomise(policy, size=0.2)
    batch, model = one_batch(groups, config), policy.model
    assert model.packed
    model.treat([treatment] * len(model.layers))
    logprobs, gradients = numbers_of(policy, batch)
    model._run = model._one_by_one
    expected, expected_gradients = numbers_of(policy, batch)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_same_gradient(ours, theirs)


def test_a_prompt_is_read_once(tiny_config, groups):
    config = tiny_config("qwen3-moe")
    policy = build_policy(config)
    batch, rows = one_batch(groups, config), []
    policy.model.experts[0].register_forward_pre_hook(lambda _, handed: rows.append(len(handed[0])))
    policy.logprobs(batch)
    assert rows == [len(batch.tokens)]


def plain(settings):
    """A Hugging Face model of this configuration, and what is needed to find its way."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval().requires_grad_(False)
    return model, (model, model.model, len(model.model.layers), partial(last_hidden, model))


def moe(**fields):
    return transformers.Qwen3MoeConfig(
        **NO_HEAD_SIZE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, **fields
    )


def test_a_model_computes_what_it_did_where_nothing_is_packed():
    model, asked = plain(moe())
    tokens = torch.arange(3, 33).view(3, 10)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    before = model(tokens, attention_mask=mask).logits
    find(*asked)
    assert model.config._attn_implementation.startswith(NAME)
    assert torch.equal(model(tokens, attention_mask=mask).logits, before)


def mix_tokens(model, monkeypatch):
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: forward(x) + 0.1 * x.cumsum(1))


def say_no_window(model, monkeypatch):
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 64


def say_chunks(model, monkeypatch):
    model.config.layer_types = ["full_attention", "chunked_attention"]


def add_a_convolution(model, monkeypatch):
    model.model.layers[0].mlp.conv = torch.nn.Conv1d(1, 1, 3)


def say_more(model, monkeypatch):
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a, **n: forward(*a, slope=torch.ones(1), **n))


def hand_nothing_down(model, monkeypatch):
    """As Nemotron's layers."""
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    monkeypatch.setattr(
        attention, "forward", lambda *a, **n: forward(*a, **{k: v for k, v in n.items() if k != LAYOUT})
    )


@pytest.mark.parametrize(("change", "why"), [
    (hand_nothing_down, "^its layers do not hand down"),
    (mix_tokens, "computes something else|see each other"),
    (say_no_window, "does not say its window"),
    (say_chunks, "layers of chunked_attention"),
    (add_a_convolution, "convolution"),
    (say_more, "is told slope"),
])  # fmt: skip
def test_what_meets_elsewhere_than_in_attention_is_not_packed(change, why, monkeypatch):
    model, asked = plain(moe())
    before = model.config._attn_implementation
    change(model, monkeypatch)
    with pytest.raises(NotPackedError, match=why):
        find(*asked)
    assert model.config._attn_implementation == before


def test_the_line_says_which_way_it_went(tiny_config, tmp_path):
    notes = []
    load_model(tiny_config("olmoe"), CPU, 64, note=notes.append)
    write_checkpoint(tmp_path, transformers.Lfm2Config(**NO_HEAD_SIZE, layer_types=["conv", "full_attention"]))
    config = Config(model=str(tmp_path), base="float32", device="cpu", lora_rank=3)
    load_model(config, CPU, 64, note=notes.append)
    packed, one_by_one = notes
    assert "a linear at a time, over packed sequences; slower than fused layers (" in packed
    assert "a linear at a time, a sequence at a time, as it has a convolution; slower than fused" in one_by_one
