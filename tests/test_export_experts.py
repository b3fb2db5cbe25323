"""A mixture of experts that was trained opens elsewhere and computes there what was trained: as an adapter, and merged;
with adapters on the experts and without, over NF4 too. And a whole run of one, as a user makes it."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_export import assert_same, opened
from test_run import metrics_of
from tiny_models import CPU, MIXTURES, build_policy, randomise, write_checkpoint
from toy_task import SMALL, TASK
from transformers import AutoConfig

from grpo.chat.trained import Asked, open_trained
from grpo.checkpoint import Progress, save_checkpoint
from grpo.embedded import MODEL_DIR
from grpo.export.__main__ import main as export
from grpo.folder import Saved, write_config
from grpo.generators import reader
from grpo.run import main as run

CASES = [
    ("qwen3-moe", "float32", True),
    ("olmoe", "nf4", True),
    pytest.param("qwen3-moe", "nf4", False, marks=pytest.mark.slow),
    *(
        pytest.param(name, base, True, marks=pytest.mark.slow)
        for name in MIXTURES
        for base in ("float32", "nf4")
        if (name, base) not in (("qwen3-moe", "float32"), ("olmoe", "nf4"))
    ),
]


@pytest.mark.parametrize(("name", "base", "adapted"), CASES)
def test_what_is_exported_computes_what_was_trained(name, base, adapted, tiny_config, groups, tmp_path, capsys):
    config = tiny_config(name, base=base, expert_adapters=adapted)
    policy = build_policy(config)
    randomise(policy, size=0.2)
    (tmp_path / "run").mkdir()
    write_config(Saved(tmp_path / "run", "1", "/gone/toy.py", "", "toy", config, {}))
    save_checkpoint(tmp_path / "run", policy, Progress(run="1", step=5), reader(CPU)(), keep=3)

    assert export([str(tmp_path / "run"), "--to", str(tmp_path / "adapter")]) == 0
    assert ("weights of experts" in capsys.readouterr().out) == adapted
    assert export([str(tmp_path / "run"), "--to", str(tmp_path / "merged"), "--merged", "--dtype", "float32"]) == 0
    assert ("dequantised" in capsys.readouterr().out) == (base == "nf4")
    assert_same(policy, opened(tmp_path / "merged"), groups, 1e-5 if base == "float32" else 1e-4)
    files = (Path(config.model), tmp_path / "merged")
    own, merged = (set(load_file(folder / "model.safetensors")) for folder in files)
    assert own == merged  # experts are named as the checkpoint names them
    if base == "float32":
        theirs = peft.PeftModel.from_pretrained(opened(config.model), tmp_path / "adapter").eval()
        assert_same(policy, theirs, groups)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """name of an architecture -> folder of a tiny model of it that has the embedded model's tokenizer."""

    def folder(name):
        path = tmp_path_factory.mktemp(name)
        settings = MIXTURES[name]()
        for field in ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id"):
            setattr(settings, field, getattr(AutoConfig.from_pretrained(MODEL_DIR), field))
        write_checkpoint(path, settings)
        for file in MODEL_DIR.iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                shutil.copy(file, path / file.name)
        return str(path)

    return folder


def written_at(folder, step):
    """The adapter and the optimizer's state of a run after a step."""
    checkpoint = folder / "checkpoints" / f"step-{step:06}"
    return load_file(checkpoint / "adapter_model.safetensors"), load_file(checkpoint / "optimizer.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-moe", "olmoe"])
def test_a_whole_run_resumed_bit_for_bit_and_exported(name, speaking, tmp_path, capsys):
    model = speaking(name)
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    flags = ["--model", model, "--base", "float32", "--expert-adapters", "--eval-every", "0", "--save-every", "2"]
    argv = [str(tmp_path / "toy.py"), *SMALL, *flags]
    assert run([*argv, "--steps", "4", "--run-dir", str(tmp_path / "whole")]) == 0
    assert run([*argv, "--steps", "4", "--run-dir", str(tmp_path / "resumed")]) == 0
    resumed = tmp_path / "resumed"
    assert run(["--resume", str(resumed / "checkpoints" / "step-000002")]) == 0
    assert metrics_of(resumed) == metrics_of(tmp_path / "whole")
    for ours, theirs in zip(written_at(resumed, 4), written_at(tmp_path / "whole", 4), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(".experts." in key and tensor.any() for key, tensor in written_at(resumed, 4)[0].items())

    capsys.readouterr()
    assert export([str(resumed), "--to", str(tmp_path / "adapter")]) == 0
    assert export([str(resumed), "--to", str(tmp_path / "merged"), "--merged", "--dtype", "float32"]) == 0
    assert "4 weights of experts" in capsys.readouterr().out
    opened_by_peft = peft.PeftModel.from_pretrained(opened(model), tmp_path / "adapter").eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = opened(tmp_path / "merged")(tokens).logits
        torch.testing.assert_close(ours, opened_by_peft(tokens).logits, atol=1e-5, rtol=1e-5)
        assert (ours - opened(model)(tokens).logits).abs().max() > 1e-3
    trained = open_trained(Asked(str(tmp_path / "adapter")), lambda told: None)
    assert trained.policy.store.experts
