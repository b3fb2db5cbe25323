"""The program on a CUDA GPU: the embedded model and a large shape with random weights, in bf16 and NF4."""

import json
import math
import shutil

import pytest
import torch
import transformers
from toy_task import TASK

from grpo.embedded import MODEL_DIR
from grpo.run import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

QWEN2_5_1_5B = transformers.Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    rope_theta=1e6,
    tie_word_embeddings=True,
)


def train(model, base, folder, device="cuda", engine="torch", flags=(), largest_gap=0.1):
    """Three steps of the toy task, whose rewards differ whatever the model writes; the metrics of each. largest_gap: of
    bases in 16 and 4 bits."""
    task = folder / "toy.py"
    task.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    what = [str(task), "--model", str(model), "--base", base, "--device", device, "--engine", engine]
    small = ["--steps", "3", "--eval-prompts", "6", "--eval-samples", "4", "--max-completion-tokens", "96"]
    argv = [*what, *small, "--no-mask-truncated", "--learning-rate", "1e-3", "--run-dir", str(folder / "run"), *flags]
    assert main(argv) == 0
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/mean" in line]
    assert len(steps) == 3
    for step in steps:
        assert all(value is None or math.isfinite(value) for value in step.values())
        assert step["mismatch/gap"] < (1e-3 if base == "float32" else largest_gap)
        assert step["optim/grad_norm"] > 0
        assert step["sync/moved"] > 0
    return steps


def write_checkpoint(config, folder, device="cuda"):
    """Random weights in this shape, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL_DIR / name, folder / name)
    return folder


@pytest.mark.parametrize("base", ["float32", "bf16", "nf4"])
def test_the_embedded_model_trains(base, tmp_path):
    train("embedded", base, tmp_path)


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_qwen2_5_1_5b_with_random_weights_runs(base, tmp_path):
    steps = train(write_checkpoint(QWEN2_5_1_5B, tmp_path / "model"), base, tmp_path)
    assert steps[-1]["memory/peak_gib"] < 40
