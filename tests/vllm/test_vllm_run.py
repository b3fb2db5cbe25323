"""Whole runs with `--engine vllm` on the embedded default: they learn what others learn, and they resume."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from toy_task import SMALL, TASK

from grpo.metrics import TIMING_PREFIXES
from grpo.run import main

GSM8K = Path(__file__).parents[2] / "tasks" / "gsm8k.py"

STEPS, LAST = 30, 10
# Of the mean reward, at most 4: four seeds of the torch engine reached 3.81 to 3.87, two of vLLM 3.75 and 3.87.
SPREAD = 0.25


def start(engine, folder):
    """The real command, in a process with one thread, so that two of them have a core each."""
    flags = ["--engine", engine, "--steps", str(STEPS), "--eval-every", "0", "--eval-prompts", "16", "--seed", "0"]
    command = [sys.executable, "-m", "grpo.run", str(GSM8K), *flags, "--run-dir", str(folder)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
                            stdout=subprocess.DEVNULL)  # fmt: skip


def steps_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward/mean" in line]


def test_thirty_steps_reach_the_reward_that_the_torch_engine_reaches(tmp_path):
    processes = [start(engine, tmp_path / engine) for engine in ("vllm", "torch")]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    steps, theirs = steps_of(tmp_path / "vllm"), steps_of(tmp_path / "torch")
    first, last, other = (
        sum(step["reward/mean"] for step in part) / len(part) for part in (steps[:3], steps[-LAST:], theirs[-LAST:])
    )
    assert last > first + 1.0
    assert abs(last - other) < SPREAD
    for step in steps:
        assert step["sync/gap"] < 1e-5
        assert step["sync/moved"] > 0
        assert "time/sync" in step
        assert abs(step["mismatch/kl"]) < 1e-6


def metrics_of(folder):
    return [{k: v for k, v in step.items() if not k.startswith(TIMING_PREFIXES)} for step in steps_of(folder)]


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    """Six steps in one go, and again from the checkpoint after three: bit for bit the same."""
    task, whole, resumed = tmp_path / "toy.py", tmp_path / "whole", tmp_path / "resumed"
    task.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    flags = [*SMALL, "--engine", "vllm", "--steps", "6", "--eval-every", "6", "--keep", "9"]
    assert main([str(task), *flags, "--run-dir", str(whole)]) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-000006")
    assert main(["--resume", str(resumed)]) == 0
    assert metrics_of(resumed) == metrics_of(whole)
    assert (resumed / "completions.jsonl").read_text() == (whole / "completions.jsonl").read_text()
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(folder / "checkpoints" / "step-000006" / name) for folder in (resumed, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
