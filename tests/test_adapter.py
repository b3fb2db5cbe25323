"""Adapters that PEFT wrote compute here what they compute there, or are refused in a sentence and change nothing."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import build_policy, one_batch, randomise, reference_logprobs

from grpo.config import Config
from grpo.errors import UserError
from grpo.policy.adapter import SETTINGS, WEIGHTS, adapter_files, load_adapter


@pytest.fixture(scope="module")
def config(checkpoint):
    return Config(model=checkpoint("qwen3"), base="float32", device="cpu", lora_rank=4, lora_alpha=6.0)


@pytest.fixture(scope="module")
def policy(config):
    """A policy whose adapter is not nothing, whatever was loaded into it last."""
    policy = build_policy(config)
    randomise(policy)
    return policy


def written(config, folder, **fields):
    """PEFT's model with a random adapter that it has written."""
    torch.manual_seed(3)
    linears = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    defaults = dict(r=4, lora_alpha=12, target_modules=linears, task_type="CAUSAL_LM", init_lora_weights=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(**(defaults | fields))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model


def edit(folder, **fields):
    path = folder / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_equal(policy, theirs, groups):
    batch = one_batch(groups, policy.config)
    expected, _ = reference_logprobs(theirs, groups, 1.0)
    logprobs = policy.logprobs(batch)[0][batch.mask]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [
    {},
    dict(use_rslora=True),
    dict(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 1}),
    dict(alpha_pattern={"o_proj": 3.5, "q_proj": 40}),
    dict(use_rslora=True, rank_pattern={"v_proj": 3, "proj": 4}, alpha_pattern={r"model.layers.0.self_attn.k_proj": 1}),
    dict(r=2, rank_pattern={"q_proj": 4}),
    dict(target_modules=["q_proj", "v_proj"]),
    dict(target_modules=r"model\.layers\.\d\.mlp\..*_proj"),
    dict(target_modules=["q_proj", "o_proj"], layers_to_transform=[1]),
    dict(target_modules=["q_proj", "o_proj"], exclude_modules=["layers.0.self_attn.q_proj"]),
    dict(target_parameters=["mlp.gate_proj.weight"], target_modules=["q_proj"]),
    dict(lora_dropout=0.1, fan_in_fan_out=False, init_lora_weights="gaussian"),
], ids=str)  # fmt: skip
def test_what_peft_computes_is_computed_and_written_again(fields, config, policy, groups, tmp_path):
    theirs = written(config, tmp_path, **fields)
    without = load_adapter(policy, tmp_path)
    assert {*without} == {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, torch.nn.Linear)
        and "lora_" not in name
        and "base_layer" not in name
        and "head" not in name
    }
    assert_equal(policy, theirs, groups)

    again = tmp_path / "again"
    again.mkdir()
    for name, content in adapter_files(policy).items():
        (again / name).write_bytes(content)
    base = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    assert_equal(policy, peft.PeftModel.from_pretrained(base, again).eval(), groups)


def test_the_alpha_that_is_saved_is_the_trained_one_not_the_flags(config, policy, tmp_path):
    written(config, tmp_path, lora_alpha=12)
    load_adapter(policy, tmp_path)
    assert policy.config.lora_alpha == 6.0
    assert json.loads(adapter_files(policy)[SETTINGS])["lora_alpha"] == 12
    with policy.store.reference():
        assert json.loads(adapter_files(policy)[SETTINGS])["lora_alpha"] == 12
    assert policy.store.scale == 3


def refused(policy, folder):
    """What is said, once it is seen that nothing has changed."""
    before = [tensor.clone() for tensor in [*policy.store.parameters(), policy.store.scale]]
    with pytest.raises(UserError) as caught:
        load_adapter(policy, folder)
    for now, then in zip([*policy.store.parameters(), policy.store.scale], before, strict=True):
        assert torch.equal(now, then)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("fields", [
    dict(use_dora=True),
    dict(bias="all"),
    dict(bias="lora_only"),
    dict(lora_bias=True),
    dict(modules_to_save=["lm_head"]),
    dict(trainable_token_indices=[3, 4]),
    dict(layer_replication=[[0, 2], [1, 2]]),
    dict(alora_invocation_tokens=[5, 6]),
    dict(init_lora_weights="pissa"),
    dict(init_lora_weights="olora"),
], ids=str)  # fmt: skip
def test_what_cannot_be_computed_is_refused_by_its_name(fields, config, policy, tmp_path):
    written(config, tmp_path, **fields)
    assert next(iter(fields)) in refused(policy, tmp_path)


@pytest.mark.parametrize("fields", [
    dict(init_lora_weights="corda"), dict(init_lora_weights="loftq"), dict(init_lora_weights="pissa_niter_4"),
    dict(use_qalora=True), dict(kasa_config={"beta": 1}), dict(of_the_next_version=1.5),
    dict(zero_means_much=0), dict(peft_type="LOHA"),
    dict(r=True), dict(r="4"), dict(r=0), dict(r=None), dict(lora_alpha="12"), dict(lora_alpha=float("nan")),
    dict(lora_alpha=0), dict(lora_alpha=1e300), dict(lora_alpha=10**400), dict(use_rslora="no"), dict(use_rslora=1),
    dict(rank_pattern=[2]), dict(rank_pattern={"q_proj": 2.0}), dict(rank_pattern={"(": 2}),
    dict(alpha_pattern={"q_proj": None}), dict(target_modules=None), dict(target_modules="("),
    dict(target_modules=[["q_proj"]]), dict(target_modules="(.*)*x"), dict(target_modules=".*" * 20 + "x"),
    dict(alpha_pattern={"(.|.)+x": 2}),
], ids=lambda fields: str(fields)[:60])  # fmt: skip
def test_fields_that_mean_something_else_or_are_damaged_are_refused_by_their_name(fields, config, policy, tmp_path):
    written(config, tmp_path)
    edit(tmp_path, **fields)
    assert next(iter(fields)) in refused(policy, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '"LORA"', "[" * 100_000, "\udcff"])
def test_damaged_settings(content, config, policy, tmp_path):
    written(config, tmp_path)
    (tmp_path / SETTINGS).write_bytes(content.encode(errors="surrogateescape"))
    assert "Choose another checkpoint" in refused(policy, tmp_path)


def test_damaged_tensors(config, policy, tmp_path):
    written(config, tmp_path)
    weights = tmp_path / WEIGHTS
    whole = weights.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2]):
        weights.write_bytes(content)
        assert "cannot be read" in refused(policy, tmp_path)
    weights.unlink()
    assert "cannot be read" in refused(policy, tmp_path)


def test_tensors_that_are_missing_too_many_not_finite_or_of_another_rank(config, policy, tmp_path):
    written(config, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def told_with(changed):
        save_file(changed, tmp_path / WEIGHTS)
        return refused(policy, tmp_path)

    lacking = {key: value for key, value in tensors.items() if key != name}
    assert f"lacks 1 of the tensors that this model needs by its {SETTINGS}, such as {name}" in told_with(lacking)
    assert "lacks 14 of the tensors" in told_with({k: v for k, v in tensors.items() if "layers.0" in k})
    assert "lacks 28 of the tensors" in told_with({})
    assert "has 1 tensors that go with no linear layer" in told_with(tensors | {"lm_head.weight": torch.ones(2)})
    assert "in 1 of its tensors, such as " + name in told_with(tensors | {name: tensors[name] / 0})
    assert f"{name} of shape [96, 3] where this model and the adapter's rank need [96, 4]" in told_with(
        tensors | {name: tensors[name][:, :3].contiguous()}
    )
    written(config, tmp_path, r=3)
    assert "is of rank 3, and --lora-rank is 4. Give --lora-rank 3." in refused(policy, tmp_path)


@pytest.mark.parametrize("within", ["base_model.model.model.language_model.", "base_model.model.language_model.model."])
def test_an_adapter_that_was_trained_within_a_model_that_sees(within, config, policy, groups, tmp_path):
    theirs = written(config, tmp_path)
    tensors = {name.replace("base_model.model.model.", within): tensor
               for name, tensor in load_file(tmp_path / WEIGHTS).items()}  # fmt: skip
    save_file(tensors, tmp_path / WEIGHTS)
    assert load_adapter(policy, tmp_path) == []
    assert_equal(policy, theirs, groups)
    save_file(tensors | {within + "vision.lora_A.weight": torch.ones(4, 4)}, tmp_path / WEIGHTS)
    assert "go with no linear layer of this model" in refused(policy, tmp_path)


def test_an_adapter_for_another_model(tiny_config, policy, tmp_path):
    deeper = build_policy(tiny_config("gpt2", lora_rank=4))
    for name, content in adapter_files(deeper).items():
        (tmp_path / name).write_bytes(content)
    assert "go with no linear layer of this model, such as base_model.model.transformer.h.0" in refused(
        policy, tmp_path
    )
