"""What is recognised, and that what only looks like it is not."""

import pytest
import torch
import transformers
from tiny_models import FUSED

from grpo.policy.form import Scores
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
    assert form.softcap == 5.0
    assert set(form.layers[0].norms) == {"before_attention", "after_attention", "before_mlp", "after_mlp"}


def test_a_window_that_no_sequence_reaches_is_none():
    assert recognise(fresh("mistral-window"), longest=9).layers[0].scores.window == 8
    assert recognise(fresh("mistral-window"), longest=8).layers[0].scores.window is None


def test_pairs_partial_rotation_and_joined_weights():
    glm = recognise(fresh("glm4"), longest=64).layers[0]
    assert glm.interleaved
    assert glm.linears["gate_up"] == ("mlp.gate_up_proj",)
    assert len(glm.linears["qkv"]) == 3
    assert not recognise(fresh("stablelm"), longest=64).layers[0].interleaved
    assert recognise(fresh("phi3"), longest=64).layers[0].linears["qkv"] == ("self_attn.qkv_proj",)


def test_norms_of_all_heads_together():
    assert set(recognise(fresh("olmo2"), longest=64).layers[0].norms) == {
        "after_attention", "after_mlp", "of_queries", "of_keys",
    }  # fmt: skip


def test_the_model_is_left_as_it_was():
    model = fresh("gemma2")
    attention = model.config._attn_implementation  # transformers' default, which is not the same in all versions
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        recognise(model, longest=64)
        torch.testing.assert_close(model(input_ids=tokens).logits, before, atol=0, rtol=0)
    assert model.config.sliding_window == 8
    assert model.config._attn_implementation == attention


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
    with pytest.raises(NotRecognisedError, match="its logits are more than a product"):
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
    ("SmolLM3Config", dict(num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0]), "layer 3 computes something else"),
    ("GPT2Config", {}, "not made of embed_tokens, layers, norm, rotary_emb"),
    ("MixtralConfig", dict(num_local_experts=2), "layer 0 has no linears mlp.gate_proj, mlp.up_proj"),
    ("CohereConfig", {}, "its last norm is of an unknown kind"),
])  # fmt: skip
def test_other_architectures_are_told_apart(kind, settings, reason):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    sizes |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0) | settings
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes)).eval()
    with pytest.raises(NotRecognisedError, match=reason):
        recognise(model, longest=64)
