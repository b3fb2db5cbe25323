"""A mixture of experts in MXFP4, as gpt-oss comes: its weights against the format's formula and transformers' own
dequantisation, the model that is loaded of it, runs' exports, and files that are damaged."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_experts import experts_of, round_weights
from test_export import assert_same, opened
from tiny_models import (
    CPU,
    MIXTURES,
    build_policy,
    one_batch,
    random_blocks,
    randomise,
    reference_logprobs,
    write_checkpoint,
    write_mxfp4,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from grpo.checkpoint import Progress, save_checkpoint
from grpo.config import Config
from grpo.errors import UserError
from grpo.export.__main__ import main as export
from grpo.folder import Saved, write_config
from grpo.generators import reader
from grpo.policy import load_model
from grpo.policy.mxfp4 import dense_promises, dequantize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """gpt-oss as it is downloaded: in bf16, its experts in MXFP4."""
    path = tmp_path_factory.mktemp("mxfp4")
    return write_mxfp4(path, write_checkpoint(path / "dense", MIXTURES["gpt-oss"](), vary_norms=True))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def read_by_transformers(folder):
    how = {"quantization_config": transformers.Mxfp4Config(dequantize=True), "dtype": torch.float32}
    # Whatever dtype is asked for, it leaves the experts in bf16.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **how).eval().float()


def config_of(folder, base, **fields):
    return Config(model=str(folder), base=base, device="cpu", lora_rank=3, lora_alpha=6.0, **fields)


def test_every_level_at_every_scale_is_what_its_bits_say():
    """In float64: sign, two bits of exponent of bias 1, one of mantissa, times a power of two of bias 127."""
    codes = torch.arange(16)
    sign, exponent, mantissa = 1 - 2 * (codes >> 3), codes >> 1 & 3, (codes & 1).double() / 2
    levels = sign * torch.where(exponent == 0, mantissa, (1 + mantissa) * 2.0 ** (exponent - 1))
    byte, scale = torch.arange(256), torch.arange(255)
    of_bytes = torch.stack([levels[byte & 15], levels[byte >> 4]], dim=1).view(16, 1, 32)
    expected = of_bytes * 2.0 ** (scale.double() - 127)[:, None]  # [16 blocks, 255 scales, 32]
    blocks = byte.to(torch.uint8).view(16, 1, 1, 16).expand(16, 255, 1, 16)
    found = dequantize(blocks, scale.to(torch.uint8).view(1, 255, 1).expand(16, 255, 1)).mT.double()
    within = expected.abs() <= torch.finfo(torch.bfloat16).max
    assert within.float().mean() > 0.99
    assert torch.equal(found[within], expected[within])


@pytest.mark.parametrize("shape", [(3, 5, 1), (1, 1, 7), (2, 96, 3)], ids=str)
def test_weights_are_what_transformers_makes_of_them(shape):
    blocks, scales = random_blocks(shape, torch.Generator().manual_seed(0), (100, 150))
    assert torch.equal(dequantize(blocks, scales), convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16))


@pytest.mark.parametrize("base", ["float32", "bf16", "nf4"])
def test_the_model_is_that_of_transformers(base, folder, groups):
    """Its weights bit for bit, or as NF4 rounds them, and its log-probabilities."""
    config = config_of(folder, base)
    policy, theirs = build_policy(config), read_by_transformers(folder)
    held = experts_of(policy.model)
    assert len(held) == 2
    if base != "nf4":
        for name, experts in held.items():
            for weights in experts.maps():
                dense = getattr(theirs.get_submodule(name), weights.name.rpartition(".")[2])
                assert torch.equal(weights.base.float(), dense.mT.flatten(0, 1))
    else:
        round_weights(theirs, policy)
        assert not policy.store.dense
    batch = one_batch(groups, config)
    with torch.no_grad():
        expected, _ = reference_logprobs(theirs, groups, 1.0)
        torch.testing.assert_close(policy.logprobs(batch)[0][batch.mask].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("base", "adapted"),
    [
        ("bf16", False),
        pytest.param("bf16", True, marks=pytest.mark.slow),
        pytest.param("nf4", True, marks=pytest.mark.slow),
    ],
)
def test_what_is_merged_computes_what_was_trained(base, adapted, folder, groups, tmp_path):
    """As a dense checkpoint, which says of itself that it is one."""
    config = config_of(folder, base, expert_adapters=adapted)
    policy = build_policy(config)
    randomise(policy, size=0.2)
    (tmp_path / "run").mkdir()
    write_config(Saved(tmp_path / "run", "1", "/gone/toy.py", "", "toy", config, {}))
    save_checkpoint(tmp_path / "run", policy, Progress(run="1", step=5), reader(CPU)(), keep=3)
    to = tmp_path / "merged"
    assert export([str(tmp_path / "run"), "--to", str(to), "--merged", "--dtype", "float32"]) == 0
    assert "quantization_config" not in json.loads((to / "config.json").read_text())
    assert {tensor.dtype for tensor in load_file(to / "model.safetensors").values()} == {torch.float32}
    assert_same(policy, opened(to), groups, 1e-4)


@pytest.mark.parametrize("part", ["_blocks", "_scales"])
def test_half_of_a_weight_is_told(part, copy):
    weights = load_file(copy / "model.safetensors")
    weights.pop(f"model.layers.1.mlp.experts.down_proj{part}")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"down_proj_\w+ without model.layers.1.mlp.experts.down_proj{part}"):
        load_model(config_of(copy, "nf4"), CPU, 64)


def test_what_is_no_such_weight_is_told():
    blocks, scales = random_blocks((2, 4, 3), torch.Generator().manual_seed(0))
    for damaged in (
        {"x_blocks": blocks[..., :15], "x_scales": scales},
        {"x_blocks": blocks, "x_scales": scales[:, :3]},
        {"x_blocks": blocks.float(), "x_scales": scales},
        {"x_blocks": blocks.flatten(2), "x_scales": scales.flatten(1)},
    ):
        with pytest.raises(UserError, match="x is not in MXFP4 as its"):
            dense_promises(damaged)
    scales[1, 2, 0] = 255
    with pytest.raises(UserError, match="x has scales that are no numbers"):
        dense_promises({"x_blocks": blocks, "x_scales": scales})["x"].read()


def test_blocks_that_the_config_is_silent_of(copy):
    settings = json.loads((copy / "config.json").read_text())
    settings.pop("quantization_config")
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"is quantised, by the names of its weights \(.*_proj_blocks\)"):
        load_model(config_of(copy, "nf4"), CPU, 64)


def test_other_files_than_safetensors_are_told(copy):
    weights = load_file(copy / "model.safetensors")
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"is in MXFP4 and cannot be read: they are not in safetensors files"):
        load_model(config_of(copy, "nf4"), CPU, 64)
