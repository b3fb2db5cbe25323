"""What is recognised, and that what only looks like it is not."""

import math

import pytest
import torch
import transformers
from tiny_models import FUSED

from grpo.policy.form import Scores
from grpo.policy.head import Logits
from grpo.policy.recognition import NotRecognisedError, recognise


def fresh(name, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = FUSED[name]()
    for key, value in settings.items():
        setattr(config, key, value)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def test_gemma_3_looks_back_near_and_far_and_turns_by_two_bases():
    form = recognise(fresh("gemma3"), longest=64)
    assert [layer.scores.window for layer in form.layers] == [8, 8, None]
    assert [layer.rotary for layer in form.layers] == ["sliding_attention", "sliding_attention", "full_attention"]
    assert {norm.kind for norm in form.layers[0].norms.values()} == {"rms of 1 + weight"}
    assert form.layers[0] is form.layers[1]  # one trial for both


def test_gemma_2_caps_scores_and_logits():
    form = recognise(fresh("gemma2"), longest=64)
    assert [layer.scores for layer in form.layers] == [Scores(23**-0.5, 8, 3.0), Scores(23**-0.5, None, 3.0)]
    assert form.logits == Logits(1.0, 5.0)
    assert set(form.layers[0].norms) == {"before_attention", "after_attention", "before_mlp", "after_mlp"}


def test_a_window_that_no_sequence_reaches_is_none():
    assert recognise(fresh("mistral-window"), longest=9).layers[0].scores.window == 8
    assert recognise(fresh("mistral-window"), longest=8).layers[0].scores.window is None


def test_pairs_partial_rotation_and_joined_weights():
    glm = recognise(fresh("glm4"), longest=64).layers[0]
    assert (glm.rotation, glm.angles) == ("pairs", "halves")
    assert glm.linears["gate_up"] == ("mlp.gate_up_proj",)
    assert len(glm.linears["qkv"]) == 3
    assert recognise(fresh("stablelm"), longest=64).layers[0].rotation == "halves"
    assert recognise(fresh("phi3"), longest=64).layers[0].linears["qkv"] == ("self_attn.qkv_proj",)


def test_norms_of_all_heads_together():
    assert set(recognise(fresh("olmo2"), longest=64).layers[0].norms) == {
        "after_attention", "after_mlp", "of_queries", "of_keys",
    }  # fmt: skip


def test_some_layers_turn_nothing():
    assert [layer.rotation for layer in recognise(fresh("smollm3"), longest=64).layers] == ["halves", "none"]
    cohere = recognise(fresh("cohere2"), longest=64).layers
    assert [(layer.rotation, layer.scores.window) for layer in cohere] == [("pairs", 8), ("none", None)]
    assert {layer.angles for layer in cohere} == {"pairs"}
    exaone = recognise(fresh("exaone4"), longest=64).layers
    assert [layer.rotation for layer in exaone] == ["halves", "none"]
    assert {"of_query_heads", "of_key_heads"} < set(exaone[1].norms)


@pytest.mark.parametrize("name", ["cohere", "cohere2", "stablelm-parallel"])
def test_both_blocks_of_a_layer_may_read_the_same(name):
    form = recognise(fresh(name), longest=64)
    assert {place for layer in form.layers for place in layer.norms} == {"before_both"}
    assert {norm.kind for layer in form.layers for norm in layer.norms.values()} == {"layer"}
    assert form.logits == Logits(1.0 if name == "stablelm-parallel" else 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multipliers_are_found_wherever_they_are(dtype):
    form = recognise(fresh("granite", dtype), longest=64)
    assert form.embedding == pytest.approx(3.0, rel=1e-12)
    assert form.logits.factor == pytest.approx(0.5, rel=1e-12)
    assert {(layer.share, layer.scores.scale) for layer in form.layers} == {(0.5, 0.3)}


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere2"])
def test_the_model_is_left_as_it_was(name):
    model = fresh(name)
    window = getattr(model.config, "sliding_window", None)
    attention = model.config._attn_implementation  # transformers' default, which is not the same in all versions
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        recognise(model, longest=64)
        torch.testing.assert_close(model(input_ids=tokens).logits, before, atol=0, rtol=0)
    assert getattr(model.config, "sliding_window", None) == window
    assert model.config._attn_implementation == attention
    assert not any("forward" in vars(module) for module in model.modules())


def change_mlp(layer):
    forward = layer.mlp.forward.__func__
    layer.mlp.__class__ = type("Louder", (type(layer.mlp),), {"forward": lambda self, x: 1.05 * forward(self, x)})


def change_attention(layer):
    layer.self_attn.scaling *= 1.01


def add_weight(layer):
    layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(4))


def drop_norm(layer):
    layer.pre_feedforward_layernorm = torch.nn.Identity()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_mlp, "layer 1 computes something else"),
        (add_weight, "layer 1 has .*self_attn"),
        (drop_norm, "layer 1 has .*which no known layer has together"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_computes_something_else_is_told(change, reason, dtype):
    model = fresh("gemma2", dtype)
    change(model.model.layers[1])
    with pytest.raises(NotRecognisedError, match=reason):
        recognise(model, longest=64)


def test_a_changed_scale_is_read_where_it_stands():
    model = fresh("gemma2")
    change_attention(model.model.layers[1])
    assert recognise(model, longest=64).layers[1].scores.scale == 1.01 * 23**-0.5


def test_a_cap_that_transformers_leaves_out_is_told():
    with pytest.raises(NotRecognisedError, match="computes something else"):
        recognise(fresh("gemma3", attn_logit_softcapping=50.0), longest=64)


def test_a_frame_that_computes_something_else_is_told():
    model = fresh("gemma2")
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: 1.01 * head(x)
    with pytest.raises(NotRecognisedError, match="its head is no plain product"):
        recognise(model, longest=64)


def test_code_that_cannot_be_tried_is_no_reason_not_to_train():
    model = fresh("gemma2")

    def strict(self, hidden_states, cache_position, **rest):
        raise AssertionError("never so far")

    layer = model.model.layers[0]
    layer.__class__ = type("Strict", (type(layer),), {"forward": strict})
    with pytest.raises(NotRecognisedError, match="layer 0 alone raises TypeError: "):
        recognise(model, longest=64)
    tokens = {"forward": lambda self, input_ids, **rest: [][0]}
    model.model.__class__ = type("Broken", (type(model.model),), tokens)
    with pytest.raises(NotRecognisedError, match="only looks on in its place raises IndexError"):
        recognise(model, longest=64)


def test_attention_to_what_is_to_come_is_told():
    model = fresh("gemma3", use_bidirectional_attention=True)
    with pytest.raises(NotRecognisedError, match="attends to something else than the past"):
        recognise(model, longest=64)


@pytest.mark.parametrize("kind, settings, reason", [
    ("GPT2Config", {}, "not made of embed_tokens, layers, norm, rotary_emb"),
    ("MixtralConfig", dict(num_local_experts=2), "layer 0 has no linears mlp.gate_proj, mlp.up_proj"),
    ("OlmoConfig", {}, "its last norm is of an unknown kind"),
    ("CohereConfig", dict(use_qk_norm=True), "self_attn.q_norm of layer 0 is of an unknown kind"),
    ("GraniteConfig", dict(logits_scaling=-2.0), "its logits are more than its head's products"),
    ("GraniteConfig", dict(embedding_multiplier=math.nan), "handed something else than its embedding times a number"),
    ("GraniteConfig", dict(embedding_multiplier=1e300), r"its embedding is multiplied by 1e\+300"),
    ("GraniteConfig", dict(residual_multiplier=math.nan), "layer 0 computes something else"),
    ("GraniteConfig", dict(residual_multiplier=0.0), "layer 0 adds nothing to what it reads"),
])  # fmt: skip
def test_other_architectures_are_told_apart(kind, settings, reason):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    sizes |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0) | settings
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes)).eval()
    with pytest.raises(NotRecognisedError, match=reason):
        recognise(model, longest=64)
