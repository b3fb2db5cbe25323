"""What a command says before it trains or scores."""

import re

import pytest
import torch
from toy_task import SMALL, TASK

from grpo.build import check_torch
from grpo.errors import UserError
from grpo.run import main

FIRST_LINES = """model: embedded \\(the tiny one .*, base weights in float32, on cpu
adapter: LoRA of rank 4, [\\d,]+ trainable parameters
engine: PyTorch
task: toy \\(.*toy.py\\)
plan: 1 steps of 2 prompts x 4 completions of at most 7 tokens; 4 held-out prompts x 2 every 4 steps; a checkpoint
run folder: {folder}
"""


@pytest.fixture
def toy(tmp_path):
    def write(config):
        path = tmp_path / "toy.py"
        text = TASK.format(rewards="{letters: 1.0, says: 1.0}", extra="")
        path.write_text(text.replace('Config(model="org/does-not-exist")', config))
        return str(path)

    return write


@pytest.mark.parametrize(
    "config", ['Config(model="org/does-not-exist")', 'Config(model="embedded", base="float32", device="cpu")']
)
def test_the_first_lines_say_what_is_trained_whatever_is_missing(toy, config, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([toy(config), *SMALL, "--device", "cpu", "--steps", "1", "--run-dir", str(folder)]) == 0
    out = capsys.readouterr().out
    before_training = out[: out.index("held-out after 0 steps")]
    lines = FIRST_LINES.format(folder=re.escape(str(folder))).splitlines()
    assert re.search(".*\n".join(lines), before_training)
    assert "8 training and 4 held-out rows" in before_training
    assert "threads: 1 (as --threads says)" in before_training
    capsys.readouterr()
    assert main(["--eval", str(folder)]) == 0
    assert re.search(".*\n".join(lines[:3]), capsys.readouterr().out)


@pytest.mark.parametrize(
    "change",
    ["torch.set_default_dtype(torch.bfloat16)", 'torch.set_default_device("meta")', "torch.set_grad_enabled(False)"],
)
def test_what_a_task_file_changes_for_everybody_is_told_before_a_model_is_made(change):
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        exec(change)
        with pytest.raises(UserError) as caught:
            check_torch()
    finally:
        torch.set_default_dtype(dtype), torch.set_default_device(None), torch.set_grad_enabled(grad)
    assert change in str(caught.value)
    check_torch()


def test_a_log_file_gets_no_spinner(toy, tmp_path, capsys):
    assert main([toy("Config()"), *SMALL, "--check", "--run-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out and "preflight of" not in out
