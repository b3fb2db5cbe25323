"""Checkpoints that bitsandbytes quantised, against bitsandbytes' own dequantisation and transformers' own model."""

import json
import shutil
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from bitsandbytes.nn import Params4bit
from bnb_reference import dequantize_4bit, dequantize_linears
from grpo_kernels.nf4 import nf4_dequantize
from tiny_models import CPU, SIZES, build_policy, one_batch, reference_logprobs, write_checkpoint
from transformers.pytorch_utils import Conv1D

from grpo.config import Config
from grpo.errors import UserError
from grpo.loss import build_loss
from grpo.policy import load_model
from grpo.policy.fused import FusedModel
from grpo.policy.generic import GenericModel
from grpo.policy.linears import read_nf4


def quantize(source, folder, dtype=torch.float32, **settings):
    """The checkpoint in NF4, as transformers and bitsandbytes write it."""
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=dtype, device_map="cpu"
    )
    model.save_pretrained(folder)
    return str(folder)


def config_of(folder, **overrides):
    return Config(**(dict(model=folder, base="nf4", device="cpu", lora_rank=3, lora_alpha=6.0) | overrides))


def load(config):
    return load_model(config, CPU, 64)


def read_by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()


def dequantized(weight):
    """What bitsandbytes makes of a quantised weight, in the dtype that it was quantised from."""
    return dequantize_4bit(weight.data, weight.quant_state)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def name(request):
    return request.param


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def double_quant(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(name, double_quant, checkpoint, tmp_path_factory):
    return quantize(checkpoint(name), tmp_path_factory.mktemp("nf4"), bnb_4bit_use_double_quant=double_quant)


def test_packed_bytes_and_dequantised_weights_are_bitsandbytes_own(quantized, double_quant):
    theirs = read_by_transformers(quantized)
    projections = load(config_of(quantized)).store.projections.values()
    for projection in projections:
        weights = [theirs.get_submodule(part).weight for part in projection.names]
        assert torch.equal(projection.base.packed, torch.cat([weight.data.flatten() for weight in weights]))
        expected = torch.cat([dequantized(weight) for weight in weights])
        assert torch.equal(nf4_dequantize(projection.base, torch.float32), expected)
    alone = [projection.base for projection in projections if len(projection.names) == 1]
    assert all((base.nested_absmax is not None) == double_quant for base in alone)


@pytest.mark.parametrize("base", ["nf4", "float32"])
def test_logprobs_are_those_of_transformers_with_dequantised_weights(base, quantized, groups):
    config = config_of(quantized, base=base)
    policy = build_policy(config)
    theirs = read_by_transformers(quantized)
    dequantize_linears(theirs)
    batch = one_batch(groups, config)
    logprobs = policy.logprobs(batch)[0][batch.mask]
    expected, _ = reference_logprobs(theirs, groups, 1.0)
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("base", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_dense_base_is_the_dequantised_weight(base, dtype, checkpoint, tmp_path):
    folder = quantize(checkpoint("llama"), tmp_path, bnb_4bit_use_double_quant=True)
    theirs = read_by_transformers(folder)
    for projection in load(config_of(folder, base=base)).store.projections.values():
        expected = torch.cat([dequantized(theirs.get_submodule(part).weight) for part in projection.names])
        assert torch.equal(projection.base, expected.to(dtype))


@pytest.mark.parametrize("stored", ["bf16", "single"])
def test_double_quant_is_bitsandbytes_own(stored, name, checkpoint, tmp_path):
    """Of linears that are joined, as of one that holds them all; whether they are quantised here or were before."""
    plain = read_by_transformers(checkpoint(name))
    folder = checkpoint(name) if stored == "bf16" else quantize(checkpoint(name), tmp_path)
    once = load(config_of(folder)).store
    store = load(config_of(folder, double_quant="on")).store
    spared = sum(p.base.nbytes for p in once.projections.values()) - sum(
        p.base.nbytes for p in store.projections.values()
    )
    assert spared == once.spared_by_double_quant > 0 and store.spared_by_double_quant == 0
    for projection in store.projections.values():
        linears = [plain.get_submodule(part) for part in projection.names]
        weights = [each.weight.T if isinstance(each, Conv1D) else each.weight for each in linears]
        packed, state = bnb.quantize_4bit(torch.cat(weights).detach(), quant_type="nf4", compress_statistics=True)
        assert torch.equal(projection.base.packed, packed.flatten())
        assert torch.equal(nf4_dequantize(projection.base, torch.float32), dequantize_4bit(packed, state))


def test_a_checkpoint_quantised_from_bf16(checkpoint, tmp_path):
    folder = quantize(checkpoint("qwen3"), tmp_path, torch.bfloat16, bnb_4bit_use_double_quant=True)
    theirs = read_by_transformers(folder)
    loaded = load(config_of(folder))
    assert isinstance(loaded.model, FusedModel)
    for projection in loaded.store.projections.values():
        expected = torch.cat([dequantized(theirs.get_submodule(part).weight) for part in projection.names])
        assert expected.dtype == torch.bfloat16
        assert torch.equal(nf4_dequantize(projection.base, torch.bfloat16), expected)


def test_what_the_checkpoint_left_dense_is_quantised_like_any_other(checkpoint, tmp_path):
    left = "model.layers.1.self_attn.k_proj"
    folder = quantize(checkpoint("llama"), tmp_path, llm_int8_skip_modules=[left, "lm_head"])
    theirs = read_by_transformers(folder)
    loaded = load(config_of(folder))
    assert isinstance(loaded.model, FusedModel)
    projection = loaded.store["1.qkv"]
    q, k, v = (theirs.get_submodule(part).weight for part in projection.names)
    assert left in projection.names and k.dtype == torch.float32
    k_quantized = dequantize_4bit(*bnb.quantize_4bit(k.data, quant_type="nf4", blocksize=64))
    expected = torch.cat([dequantized(q), k_quantized, dequantized(v)])
    assert torch.equal(nf4_dequantize(projection.base, torch.float32), expected)
    [dense] = [p.base for p in load(config_of(folder, base="float32")).store.projections.values() if left in p.names]
    assert torch.equal(dense, torch.cat([dequantized(q), k.data, dequantized(v)]))


def test_a_head_in_4_bits_becomes_dense(checkpoint, tmp_path, groups):
    folder = quantize(checkpoint("mistral"), tmp_path, llm_int8_skip_modules=["none"])
    theirs = read_by_transformers(folder)
    config = config_of(folder)
    policy = build_policy(config)
    assert isinstance(policy.model, FusedModel)
    assert torch.equal(policy.model.head, dequantized(theirs.lm_head.weight))
    batch = one_batch(groups, config)
    dequantize_linears(theirs)
    expected, _ = reference_logprobs(theirs, groups, 1.0)
    torch.testing.assert_close(policy.logprobs(batch)[0][batch.mask].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_layer_that_computes_something_else_is_still_told_apart(checkpoint, tmp_path):
    folder = quantize(checkpoint("starcoder2"), tmp_path, bnb_4bit_use_double_quant=True)
    assert isinstance(load(config_of(folder)).model, GenericModel)


def test_an_update_moves_the_adapter_over_such_a_base(checkpoint, tmp_path, groups):
    config = config_of(quantize(checkpoint("qwen2"), tmp_path, bnb_4bit_use_double_quant=True))
    policy = build_policy(config)
    metrics = policy.update([[one_batch(groups, config)]], build_loss(config), config.learning_rate)
    assert metrics["optim/grad_norm"] > 0
    assert all(b.abs().max() > 0 for _, _, b in policy.store.factors())


def test_levels_of_the_scales_that_were_computed_elsewhere_are_kept():
    """The 8-bit codes of the scales mean what the checkpoint says, to the last bit."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    state.state2.code = torch.nextafter(state.state2.code, torch.tensor(2.0))
    expected = dequantize_4bit(packed, state)
    base = read_nf4(Params4bit(packed, quant_state=state))
    assert base.nested_absmax is None
    assert torch.equal(nf4_dequantize(base, torch.float32), expected)


def test_bytes_kept_under_another_dtype():
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, quant_storage=torch.bfloat16)
    base = read_nf4(Params4bit(packed, quant_state=state))
    assert torch.equal(nf4_dequantize(base, torch.float32), dequantize_4bit(packed, state))


# ---- what cannot be read


def test_blocks_of_another_size():
    packed, state = bnb.quantize_4bit(torch.randn(4, 128), quant_type="nf4", blocksize=128)
    with pytest.raises(UserError, match="blocks of 128 values"):
        read_nf4(Params4bit(packed, quant_state=state))


def test_blocks_that_span_rows_of_linears_to_be_joined(tmp_path):
    settings = transformers.Qwen2Config(**(SIZES | {"hidden_size": 96, "head_dim": 24}))
    folder = quantize(write_checkpoint(tmp_path / "dense", settings), tmp_path / "nf4")
    with pytest.raises(UserError, match="Use --base bf16"):
        load(config_of(folder))
    assert isinstance(load(config_of(folder, base="bf16")).model, FusedModel)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq"),
        ({"quant_method": "awq", "bits": 4}, "quantised by awq"),
        ({"quant_method": "fp8"}, "quantised by fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "to 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "to FP4"),
    ],
)
def test_other_quantisations_are_told_what_is_allowed(settings, words, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "other")
    edit_settings(folder, settings)
    with pytest.raises(UserError, match=f"{words}. Use one that is not quantised"):
        load(config_of(str(folder)))


def test_a_package_that_is_missing_is_told_with_its_command(checkpoint, tmp_path, monkeypatch):
    folder = quantize(checkpoint("llama"), tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load(config_of(folder))


def test_a_weight_that_is_not_quantised_though_the_config_says_so(checkpoint, tmp_path):
    folder = quantize(checkpoint("llama"), tmp_path, llm_int8_skip_modules=["up_proj", "lm_head"])
    settings = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    edit_settings(Path(folder), settings | {"llm_int8_skip_modules": ["lm_head"]})
    with pytest.raises(UserError, match="up_proj is not in 4 bits"):
        load(config_of(folder))


def edit_settings(folder, quantization):
    """Another quantization_config in a checkpoint's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
