"""What is exported opens elsewhere and computes there what was trained, or is refused in a sentence."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from bnb_reference import BLOCK, dequantize_4bit
from safetensors.torch import load_file
from test_run import files_of_at_most
from tiny_models import CPU, VOCABULARY, build_policy, one_batch, randomise, reference_logprobs

from grpo.checkpoint import Progress, save_checkpoint
from grpo.config import Config
from grpo.export.__main__ import main
from grpo.folder import Saved, list_checkpoints, write_config
from grpo.generators import reader
from grpo.policy.adapter import SETTINGS, WEIGHTS, adapter_files

SMALL = Config(device="cpu", lora_rank=3, lora_alpha=6.0)
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma"]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, checkpoint):
    """(architecture, base) -> a run's folder with a trained policy, and the policy; made once."""
    made = {}

    def run(name, base="float32"):
        if (name, base) not in made:
            config = replace(SMALL, model=checkpoint(name), base=base)
            policy = build_policy(config)
            randomise(policy, size=0.2)
            folder = tmp_path_factory.mktemp(name) / "run"
            folder.mkdir()
            write_config(Saved(folder, "1", "/gone/toy.py", "", "toy", config, {}))
            save_checkpoint(folder, policy, Progress(run="1", step=5), reader(CPU)(), keep=3)
            made[name, base] = folder, policy
        return made[name, base]

    return run


def opened(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


def assert_same(policy, theirs, groups, tolerance=1e-5):
    batch = one_batch(groups, policy.config)
    expected, _ = reference_logprobs(theirs, groups, 1.0)
    logprobs = policy.logprobs(batch)[0][batch.mask]
    torch.testing.assert_close(logprobs.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapter_opens_in_peft_and_computes_the_same(name, run_of, checkpoint, groups, tmp_path):
    run, policy = run_of(name)
    assert main([str(run), "--to", str(tmp_path / "out")]) == 0
    theirs = peft.PeftModel.from_pretrained(opened(checkpoint(name)), tmp_path / "out").eval()
    assert_same(policy, theirs, groups)


@pytest.mark.parametrize("name", [*FAMILIES, "gpt2", "gemma3-sees"])
def test_the_merged_model_opens_in_transformers_and_computes_the_same(name, run_of, groups, tmp_path):
    run, policy = run_of(name)
    assert main([str(run), "--to", str(tmp_path / "out"), "--merged", "--dtype", "float32"]) == 0
    assert_same(policy, opened(tmp_path / "out"), groups)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_merged_weights_are_rounded_once(name, run_of, tmp_path):
    run, _ = run_of(name)
    for dtype in ("float32", "auto"):
        assert main([str(run), "--to", str(tmp_path / dtype), "--merged", "--dtype", dtype]) == 0
    whole, rounded = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "auto"))
    assert whole.keys() == rounded.keys()
    for key, weight in whole.items():
        assert rounded[key].dtype == torch.bfloat16
        assert torch.equal(rounded[key], weight.bfloat16()), key
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", [*FAMILIES, "gpt2", "gemma3-sees"])
def test_over_a_base_in_4_bits_the_dequantised_one_is_merged_with(name, run_of, checkpoint, groups, tmp_path, capsys):
    run, policy = run_of(name, "nf4")
    assert main([str(run), "--to", str(tmp_path / "out"), "--merged", "--dtype", "float32"]) == 0
    assert "dequantised" in capsys.readouterr().out
    assert_same(policy, opened(tmp_path / "out"), groups, 1e-4)


def test_what_is_dequantised_is_what_bitsandbytes_makes_of_it(run_of, checkpoint, tmp_path):
    from bitsandbytes import functional

    run, policy = run_of("qwen3", "nf4")
    assert main([str(run), "--to", str(tmp_path / "out"), "--merged", "--dtype", "float32"]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    own = load_file(Path(checkpoint("qwen3")) / "model.safetensors")
    for name, a, b in policy.store.factors():
        packed, state = functional.quantize_4bit(own[f"{name}.weight"], quant_type="nf4", blocksize=BLOCK)
        expected = dequantize_4bit(packed, state) + policy.store.alpha / policy.store.rank * b @ a
        torch.testing.assert_close(merged[f"{name}.weight"], expected, atol=1e-6, rtol=1e-6)


def test_over_a_base_in_4_bits_the_original_can_be_merged_with(run_of, checkpoint, tmp_path, capsys):
    run, policy = run_of("qwen3", "nf4")
    assert main([str(run), "--to", str(tmp_path / "out"), "--merged", "--onto", "original", "--dtype", "float32"]) == 0
    assert "its own weights" in capsys.readouterr().out
    merged = load_file(tmp_path / "out" / "model.safetensors")
    own = load_file(Path(checkpoint("qwen3")) / "model.safetensors")
    for name, a, b in policy.store.factors():
        expected = own[f"{name}.weight"] + policy.store.alpha / policy.store.rank * b @ a
        torch.testing.assert_close(merged[f"{name}.weight"], expected, atol=1e-6, rtol=1e-6)


def test_a_checkpoint_in_4_bits_is_merged_dequantised(checkpoint, groups, tmp_path):
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.uint8,
    )  # fmt: skip
    in_4_bits = opened(checkpoint("qwen3"), quantization_config=settings, device_map="cpu")
    in_4_bits.save_pretrained(tmp_path / "4bit")
    policy = build_policy(replace(SMALL, model=str(tmp_path / "4bit"), base="nf4"))
    randomise(policy, size=0.2)
    (tmp_path / "adapter").mkdir()
    for name, content in adapter_files(policy).items():
        (tmp_path / "adapter" / name).write_bytes(content)
    assert main([str(tmp_path / "adapter"), "--to", str(tmp_path / "out"), "--merged", "--dtype", "float32"]) == 0
    theirs = opened(tmp_path / "out")
    assert not any("absmax" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert_same(policy, theirs, groups, 1e-4)


def test_a_large_model_is_written_in_shards(run_of, groups, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.export.merged.SHARD_BYTES", 60_000)
    run, policy = run_of("qwen2")
    assert main([str(run), "--to", str(tmp_path / "out"), "--merged", "--dtype", "float32"]) == 0
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 65_000 for path in shards)
    assert_same(policy, opened(tmp_path / "out"), groups)


def test_an_adapter_of_peft_is_merged_with_its_scales(checkpoint, tmp_path):
    base = opened(checkpoint("qwen3"))
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 3.5},
        target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    assert main([str(tmp_path / "adapter"), "--to", str(tmp_path / "out"), "--merged", "--dtype", "float32"]) == 0
    tokens = torch.arange(3, VOCABULARY)[None]
    torch.testing.assert_close(opened(tmp_path / "out")(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_the_whole_run_of_a_model_with_a_tokenizer(trained, tmp_path, capsys):
    for flags in ([], ["--merged"]):
        out = tmp_path / f"out{len(flags)}"
        assert main([str(trained), "--to", str(out), *flags]) == 0
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert tokenizer.chat_template and tokenizer("2 + 2")["input_ids"]
        assert f"from_pretrained({json.dumps(str(out))})" in (out / "README.md").read_text()
        assert transformers.GenerationConfig.from_pretrained(out).eos_token_id is not None


@pytest.mark.parametrize(("which", "step"), [("last", 4), ("step-000002", 2), ("best", None)])
def test_a_checkpoint_is_chosen(which, step, trained, tmp_path):
    assert main([str(trained), "--to", str(tmp_path / "out"), "--checkpoint", which]) == 0
    written = (tmp_path / "out" / WEIGHTS).read_bytes()
    steps = {int(path.name[5:]): (path / WEIGHTS).read_bytes() for path in list_checkpoints(trained)}
    assert written in steps.values()
    assert step is None or written == steps[step]


def told_of(capsys, *flags):
    assert main([*map(str, flags)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.rstrip().endswith((".", "DIR.")), told
    return told


def test_what_cannot_be_exported_is_told(trained, toy_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert "There is no folder" in told_of(capsys, tmp_path / "nothing", "--to", out)
    assert "Say what to export" in told_of(capsys, trained)
    assert "has those of steps 2, 4" in told_of(capsys, trained, "--to", out, "--checkpoint", "3")
    assert "is one checkpoint already" in told_of(
        capsys, list_checkpoints(trained)[0], "--to", out, "--checkpoint", "last"
    )
    assert "are of --merged" in told_of(capsys, trained, "--to", out, "--dtype", "bf16")
    assert "Did you mean `--merged`" in told_of(capsys, trained, "--to", out, "--merge")
    assert "is not there" in told_of(capsys, trained, "--to", out, "--merged", "--model", "/not/there")
    tmp_path.joinpath("empty").mkdir()
    assert "neither a run's folder nor an adapter's" in told_of(capsys, tmp_path / "empty", "--to", out)
    with (list_checkpoints(toy_run)[-1] / WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    assert "damaged" in told_of(capsys, toy_run, "--to", out, "--checkpoint", "last")
    assert not out.exists()


def test_another_model_s_weights_are_refused_and_nothing_is_left(run_of, checkpoint, tmp_path, capsys):
    run, _ = run_of("qwen3")
    out = tmp_path / "out"
    assert "Give the --model" in told_of(capsys, run, "--to", out, "--merged", "--model", checkpoint("gpt2"))
    assert not out.exists()


def test_a_folder_with_something_in_it_is_left_as_it_is(trained, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert "is not written over" in told_of(capsys, trained, "--to", tmp_path)
    assert "is a file" in told_of(capsys, trained, "--to", tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert main([str(trained), "--to", str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / SETTINGS).exists()


@pytest.mark.parametrize("flags", [[], ["--merged"], ["--gguf"]], ids=str)
def test_a_disk_that_is_full_is_told_and_nothing_is_left(flags, trained, tmp_path, capsys):
    out = tmp_path / "out"
    with files_of_at_most(30_000):
        told = told_of(capsys, trained, "--to", out, *flags)
    assert "too large" in told or "could not be written" in told
    assert not out.exists()


def test_a_signal_stops_it_and_nothing_is_left(trained, tmp_path):
    """The converter that is run asks for the export to be stopped, and waits."""
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    flags = ["--merged", "--gguf", "--llama-cpp", str(tmp_path)]
    assert main([str(trained), "--to", str(tmp_path / "out"), *flags]) == 143
    assert not (tmp_path / "out").exists()


def test_the_text_of_a_model_that_sees_is_a_gguf_of_the_text_s_names(run_of, tmp_path):
    gguf = pytest.importorskip("gguf")
    run, policy = run_of("gemma3-sees")
    assert main([str(run), "--to", str(tmp_path / "out"), "--gguf"]) == 0
    read = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    written = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read.tensors}
    factors = {name: (a, b) for name, a, b in policy.store.factors()}
    a, b = next(pair for name, pair in factors.items() if name.endswith("layers.1.mlp.down_proj"))
    assert len(written) == 2 * len(factors)
    assert torch.equal(written["blk.1.ffn_down.weight.lora_a"], a)
    assert torch.equal(written["blk.1.ffn_down.weight.lora_b"], b)
