"""Models that cannot be read: each is told in a sentence that names the folder and what is wrong with it."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import CPU

from grpo.config import Config
from grpo.errors import UserError
from grpo.policy import load_model, load_tokenizer


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of a checkpoint, to be damaged."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "damaged")


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
