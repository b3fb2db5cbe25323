"""Models are read tensor by tensor as transformers reads them whole; those that cannot be read are told in a sentence
that names the folder and what is wrong with it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from grpo_kernels.nf4 import NF4
from safetensors.torch import load_file, save_file
from tiny_models import (
    CPU,
    FUSED,
    GENERIC,
    MIXTURES,
    NO_HEAD_SIZE,
    SIZES,
    build_policy,
    one_batch,
    reference_logprobs,
    write_checkpoint,
)

from grpo.config import Config
from grpo.errors import UserError
from grpo.policy import load_model, load_tokenizer
from grpo.policy.load import context_length
from grpo.policy.promises import Promise


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of a checkpoint, to be damaged."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "damaged")


def load(folder, base="float32", **more):
    return load_model(Config(model=str(folder), base=base, device="cpu", lora_rank=3), CPU, 64, **more)


def pickled(source, folder):
    """The same checkpoint in pytorch_model.bin, which is read whole, by transformers alone."""
    shutil.copytree(source, folder)
    weights = {}
    for file in folder.glob("*.safetensors*"):
        weights |= {} if file.suffix == ".json" else load_file(file)
        file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def tensors(loaded):
    """(name, tensor) of all that a loaded model holds; where two are one memory, that is part of the name."""
    model, found = loaded.model, {"head": loaded.model.head}
    found |= dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    for name, projection in loaded.store.projections.items():
        base, mirrors = projection.base, dict(enumerate(projection.mirrors))
        parts = {"packed": base.packed, "absmax": base.absmax} if isinstance(base, NF4) else {"base": base}
        found |= {f"{name}.{part}": tensor for part, tensor in (parts | mirrors | {"bias": projection.bias}).items()}
    owners = {}
    for name, tensor in found.items():
        if tensor is not None:
            owner = owners.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
            yield f"{name} in {owner}", tensor


def assert_same(ours, theirs):
    ours, theirs = dict(tensors(ours)), dict(tensors(theirs))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert not isinstance(tensor, Promise) and tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    ("base", "name"),
    [
        pytest.param(base, name, marks=[] if base == "nf4" else [pytest.mark.slow])
        for base in ("float32", "bf16", "nf4")
        for name in FUSED | GENERIC
    ],
)
def test_read_piece_by_piece_it_is_the_model_that_is_read_whole(base, name, checkpoint, tmp_path):
    notes = []
    ours = load(checkpoint(name), base, note=notes.append)
    assert [note[:7] for note in notes] == ["layers:"]
    theirs = load(pickled(checkpoint(name), tmp_path / "pickled"), base, note=notes.append)
    assert len(notes) == 3 and "read all at once" in notes[1] and "not in safetensors files" in notes[1]
    assert notes[2] == notes[0]
    assert type(ours.model) is type(theirs.model)
    assert_same(ours, theirs)
    assert (ours.stop_tokens, ours.conv1d) == (theirs.stop_tokens, theirs.conv1d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shards_and_another_dtype(dtype, checkpoint, tmp_path):
    kept = load(checkpoint("qwen3"))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"), dtype=dtype)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    ours = load(tmp_path / "shards")
    assert_same(ours, load(pickled(tmp_path / "shards", tmp_path / "pickled")))
    assert torch.equal(ours.store["1.down"].base, kept.store["1.down"].base.to(dtype).float())


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_in_the_checkpoint_too(equal, checkpoint, tmp_path):
    """Where the two differ they are not one, whatever the config says."""
    folder = shutil.copytree(checkpoint("qwen3"), tmp_path / "both")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (1 if equal else 2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    ours = load(folder)
    assert (ours.model.head is ours.model.embed.weight) == equal
    assert torch.equal(ours.model.head, weights["lm_head.weight"])
    assert_same(ours, load(pickled(folder, tmp_path / "pickled")))


def test_a_checkpoint_of_the_body_alone(checkpoint, tmp_path):
    """Its names lack the "model." that the model with a head has; the head is tied."""
    folder = shutil.copytree(checkpoint("qwen3"), tmp_path / "body")
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert_same(load(folder), load(checkpoint("qwen3")))


def test_experts_that_are_joined_on_reading(tmp_path):
    """transformers stacks the experts' weights, which the checkpoint has one by one."""
    settings = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    folder = write_checkpoint(tmp_path / "experts", settings)
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in load_file(folder / "model.safetensors")
    notes = []
    ours = load(folder, note=notes.append)
    assert [note[:7] for note in notes] == ["layers:"]
    assert_same(ours, load(pickled(folder, tmp_path / "pickled"), note=notes.append))


def test_a_router_that_is_a_linear_and_does_more(tmp_path):
    """It is tried to see what it computes, for which it has to be read."""
    more = dict(intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1, attention_chunk_size=128)
    folder = write_checkpoint(tmp_path / "router", transformers.Llama4TextConfig(**SIZES, **more))
    ours = load(folder)
    assert not any("router" in name for name in ours.store.projections)
    assert_same(ours, load(pickled(folder, tmp_path / "pickled")))


def test_the_text_of_a_larger_model(tmp_path):
    """Its weights have other names there, and those of the part that sees are left out."""
    sees = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64)
    layers = dict(layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2, linear_num_key_heads=2)
    heads = dict(linear_key_head_dim=16, linear_value_head_dim=16)
    settings = transformers.Qwen3_5Config(text_config=SIZES | layers | heads, vision_config=sees)
    model = transformers.Qwen3_5ForConditionalGeneration(settings)
    model.save_pretrained(tmp_path / "larger")
    assert any(".visual." in name for name in load_file(tmp_path / "larger/model.safetensors"))
    ours = load(tmp_path / "larger")
    text = model.model.language_model.layers[1].mlp.down_proj.weight
    assert torch.equal(ours.store["model.layers.1.mlp.down_proj"].base, text)
    assert_same(ours, load(pickled(tmp_path / "larger", tmp_path / "pickled")))


def test_a_model_that_changes_weights_on_loading_is_read_whole(tmp_path):
    settings = transformers.RecurrentGemmaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        attention_window_size=8, block_types=["recurrent", "attention"], eos_token_id=2,
    )  # fmt: skip
    folder, notes = write_checkpoint(tmp_path, settings), []
    load(folder, note=notes.append)
    assert len(notes) == 2 and "RecurrentGemmaForCausalLM changes them on loading" in notes[0]


@pytest.mark.parametrize("damaged", [
    dict(embedding_multiplier=math.nan), dict(embedding_multiplier=math.inf), dict(embedding_multiplier=0.0),
    dict(embedding_multiplier=1e300),
    dict(residual_multiplier=math.nan), dict(attention_multiplier=math.nan),
    dict(logits_scaling=0.0), dict(logits_scaling=math.nan), dict(logits_scaling=math.inf),
])  # fmt: skip
def test_a_multiplier_that_leaves_no_probabilities_is_refused(damaged, tmp_path):
    folder = write_checkpoint(tmp_path, transformers.GraniteConfig(**NO_HEAD_SIZE, **damaged))
    with pytest.raises(UserError, match=r"GraniteForCausalLM (gives logits that .*config\.json is damaged|is nan\.)"):
        load(folder)


@pytest.mark.parametrize(("change", "told"), [
    (dict(sliding_window=0), "sliding_window in the config.json of Cohere2ForCausalLM is 0. Get"),
    (dict(sliding_window=-3), "sliding_window in the config.json of Cohere2ForCausalLM is -3. Get"),
    (dict(sliding_window=None), r"does not run as its config.json describes it \(ValueError: .*sliding_window"),
    (dict(layer_types=["chunked_attention", "full_attention"]), r"does not run as .* \(KeyError: 'chunked_attention'"),
])  # fmt: skip
def test_windows_that_there_cannot_be_are_refused(change, told, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("cohere2"), tmp_path / "changed")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=told):
        load(folder)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_progress_ends_with_all_that_is_read(name, checkpoint):
    told = []
    load(checkpoint(name), progressed=lambda done, total: told.append(done / total))
    assert told == sorted(told) and 0 < told[0] < 0.5 and told[-2:] == [1, 1]


def error_of(folder):
    with pytest.raises(UserError) as caught:
        load_model(Config(model=str(folder), base="float32", device="cpu", lora_rank=3), CPU, 64)
    assert str(folder) in str(caught.value)
    assert "the hub" not in str(caught.value)
    return str(caught.value)


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_damaged_weights(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], b"garbage, garbage, garbage"):
        weights.write_bytes(content)
        assert "cannot be loaded (SafetensorError" in error_of(folder)
    weights.unlink()
    assert "cannot be loaded (OSError" in error_of(folder)
    (folder / "pytorch_model.bin").write_bytes(b"garbage, garbage, garbage")
    assert "cannot be loaded (UnpicklingError" in error_of(folder)


def sharded(folder):
    """The shards of a checkpoint that was one file, in order."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100kB")
    return sorted(Path(folder).glob("*.safetensors"))


def test_a_shard_that_is_cut_short_or_missing(folder):
    *_, shard, _ = sharded(folder)
    shard.write_bytes(shard.read_bytes()[:-8])
    assert f"cannot be loaded (SafetensorError: {shard.name}: " in error_of(folder)
    shard.unlink()
    assert f"cannot be loaded (FileNotFoundError: {shard.name}: " in error_of(folder)


def test_a_tensor_that_is_in_two_shards(folder):
    first, *_, last = sharded(folder)
    twice = "model.embed_tokens.weight"
    save_file(load_file(last) | {twice: load_file(first)[twice]}, last, {"format": "pt"})
    message = error_of(folder)
    assert f"The checkpoint's {twice} is in two of its files, {first.name} and {last.name}" in message


def test_an_index_that_is_damaged(folder):
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    assert "cannot be loaded (JSONDecodeError" in error_of(folder)


def test_a_damaged_config(folder):
    (folder / "config.json").write_text("{")
    assert "cannot be loaded (OSError" in error_of(folder)


def test_weights_that_are_missing(folder):
    configure(folder, num_hidden_layers=3)
    message = error_of(folder)
    assert "lacks 13 of the weights" in message
    assert "model.layers.2.input_layernorm.weight" in message


def test_weights_that_are_too_many(folder):
    """More layers, or more in a layer, than the config asks for: transformers leaves them out without a word."""
    configure(folder, num_hidden_layers=1)
    message = error_of(folder)
    assert "has 13 weights that its config.json does not ask for" in message
    assert "such as model.layers.1.input_layernorm.weight" in message
    configure(folder, num_hidden_layers=2, attention_bias=False)
    assert "has 8 weights that its config.json does not ask for" in error_of(folder)


@pytest.mark.parametrize("more", ["qweight", "weight_packed", "weight_scale_inv"])
def test_a_quantised_checkpoint_whose_config_is_silent(more, folder):
    """GPTQ's and AWQ's weights have other names; an FP8 weight has its own, and a scale that must not be left out."""
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    value = weights.pop(name) if more != "weight_scale_inv" else weights[name].to(torch.float8_e4m3fn)
    weights |= {f"{name.removesuffix('weight')}{more}": torch.ones(2, 2)} | ({name: value} if "scale" in more else {})
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert f"is quantised, by the names of its weights (model.layers.0.mlp.up_proj.{more})" in error_of(folder)


def test_what_a_checkpoint_keeps_besides_its_layers_is_no_fault(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["model.layers.1.self_attn.masked_bias"] = torch.ones(1)
    weights["model.vision_tower.layers.0.mlp.up_proj.weight"] = torch.ones(2, 2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load_model(Config(model=str(folder), base="float32", device="cpu", lora_rank=3), CPU, 64)


def test_a_folder_with_an_adapter_in_it(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "holds a model and, by its adapter_config.json, an adapter too" in error_of(folder)
    (folder / "config.json").unlink()
    assert "holds an adapter, not a model. Give its model as --model" in error_of(folder)
    with pytest.raises(UserError, match="holds an adapter, not a model"):
        load_tokenizer(str(folder))


def test_one_weight_that_is_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "lacks 1 of the weights that its config.json asks for, such as model.layers.1.mlp" in error_of(folder)


def test_weights_of_other_sizes(folder):
    configure(folder, intermediate_size=128)
    assert "model.layers.0.mlp.down_proj.weight is [64, 96] where the config asks for [64, 128]" in error_of(folder)


def test_an_architecture_that_goes_past_its_linears(tmp_path):
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"MambaForCausalLM cannot be trained: .* Use another model"):
        load_model(Config(model=str(tmp_path), base="float32", device="cpu", lora_rank=3), CPU, 64)


@pytest.mark.parametrize(("name", "told"), [("qwen2", "has no tokenizer"), ("llama", "cannot be loaded")])
def test_a_model_without_a_tokenizer(name, told, checkpoint):
    with pytest.raises(UserError, match=told):
        load_tokenizer(checkpoint(name))


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(folder):
    configure(folder, model_type="strange", auto_map={"AutoConfig": "strange.Strange"})
    (folder / "strange.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    assert "code of its own" in error_of(folder)
    assert not (folder / "ran").exists()


def test_a_kind_that_transformers_knows_is_its_own_class_whatever_code_comes_along(tmp_path, groups):
    """config.json as DeepSeek-V2-Lite has it, but for sizes: with names of classes in files beside it."""
    write_checkpoint(tmp_path, MIXTURES["deepseek-v2"]())
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["rope_parameters"]
    settings |= dict(
        auto_map={
            "AutoConfig": "configuration_deepseek.DeepseekV2Config",
            "AutoModel": "modeling_deepseek.DeepseekV2Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
        },
        moe_layer_freq=1, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0,
        aux_loss_alpha=0.001, seq_aux=True, ep_size=1, pretraining_tp=1, q_lora_rank=None, rope_theta=10000,
        rope_scaling=dict(
            beta_fast=32, beta_slow=1, factor=4, mscale=0.707, mscale_all_dim=0.707, type="yarn",
            original_max_position_embeddings=64,
        ),
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for file in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (tmp_path / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = Config(model=str(tmp_path), base="float32", device="cpu", lora_rank=3)
    policy = build_policy(config)
    assert type(policy.model.model) is transformers.DeepseekV2ForCausalLM
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False).eval()
    assert theirs.config.rope_parameters["rope_type"] == "yarn"
    batch = one_batch(groups, config)
    with torch.no_grad():
        expected, _ = reference_logprobs(theirs, groups, 1.0)
        torch.testing.assert_close(policy.logprobs(batch)[0][batch.mask].double(), expected, atol=1e-5, rtol=1e-5)
    assert context_length(str(tmp_path), config) == 256
    assert not (tmp_path / "ran").exists()
