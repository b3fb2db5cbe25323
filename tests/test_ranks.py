"""Several processes train what one trains: the same adapter from the same completions, whoever sampled and computed
which part, and a run goes on in another number of them."""

import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from several import run_ranks
from toy_task import SMALL, TASK

from grpo.run import main

REWARDS, SELDOM = "{letters: 1.0, says: 1.0}", "{seldom: 1.0, says: 1.0}"
# Of what Adam divides by its own size a difference in the last bit of the gradient is a part of the learning rate.
RATE = 1e-4
STEPS = ["--steps", "5", "--prompts-per-step", "3", "--learning-rate", str(RATE)]

# No draws: a reward that draws at random draws others on each rank.
LETTERS = '''
def letters(completion):
    return len(set(completion)) / 10

def seldom(completion, answer):
    """Equal for all but some rows, whose groups alone are trained on."""
    return len(set(completion)) / 10 * (int(answer) % 3 == 0)
'''


def write_task(folder, rewards=REWARDS):
    path = folder / "toy.py"
    path.write_text(TASK.format(rewards=rewards, extra=LETTERS))
    return str(path)


def adapter(folder, step=5):
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "adapter_model.safetensors")


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def check_same_run(one, other, step=5, rounded=0.0):
    """The adapter to 1e-6, every completion to the letter, every number that follows from them.

    rounded: the share of the adapter's numbers that may have moved otherwise, by two steps of Adam at most.
    """
    expected, found = adapter(one, step), adapter(other, step)
    assert expected.keys() == found.keys()
    moved = max(float(tensor.abs().max()) for name, tensor in expected.items() if "lora_B" in name)
    assert moved > step * RATE / 5  # there was something to learn
    apart = torch.cat([(found[name] - tensor).abs().flatten() for name, tensor in expected.items()])
    assert (apart > 1e-6).sum() <= rounded * len(apart) and apart.max() <= 2 * RATE
    completions = [lines(each, "completions.jsonl") for each in (one, other)]
    assert completions[0] == completions[1]
    assert lines(one, "prompts.jsonl") == lines(other, "prompts.jsonl")
    assert lines(one, "held_out.jsonl") == lines(other, "held_out.jsonl")
    for first, second in zip(lines(one, "metrics.jsonl"), lines(other, "metrics.jsonl"), strict=True):
        names = [n for n in first if not n.startswith(("time/", "speed/", "memory/", "sync/", "mismatch/"))]
        # The loss is a sum of terms of size 1 that cancel.
        assert {n: second[n] for n in names} == pytest.approx(
            {n: first[n] for n in names}, rel=1e-5, abs=1e-6, nan_ok=True
        )


CASES = {
    "three groups of which two ranks have one and two": [],
    "gdpo": ["--advantage", "gdpo"],
    "small batches": ["--tokens-per-batch", "40", "--normalization", "grpo"],
}
USUAL = ("three groups of which two ranks have one and two", REWARDS)  # a test of the first stage has it
# Some number of these adapters has a gradient of nothing but rounding, whose sign Adam makes a step of: 1 to 3 of
# 23,040 after the first step. Later a token at the threshold of the entropies, or another completion, may follow.
ROUNDED = 1e-3
OF_ONE_STEP = {
    "two optimizer steps, epochs": ["--mini-batches", "2", "--epochs", "2"],
    "lite_ppo, dynamic sampling": ["--advantage", "lite_ppo", "--dynamic-sampling", "--max-refills", "2"],
    "kl, entropies of the step": ["--kl-coef", "0.1", "--top-entropy", "0.3", "--entropy-coef", "0.01"],
}


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    """A run of the toy task in one process."""
    folder = tmp_path_factory.mktemp("one")
    assert main([write_task(folder), *SMALL, *STEPS, "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_the_adapter_of_one_process(size, of_one, tmp_path):
    codes, logs = run_ranks(size, tmp_path, [write_task(tmp_path), *SMALL, *STEPS, "--run-dir", "run"])
    assert codes == [0] * size, logs
    check_same_run(of_one, tmp_path / "run")
    assert logs[1:] == [""] * (size - 1)  # rank 0 speaks for all


@pytest.mark.slow
@pytest.mark.parametrize(("case", "rewards"), [each for each in product(CASES, (REWARDS, SELDOM)) if each != USUAL])
def test_whatever_is_asked_for_ranks_train_the_adapter_of_one_process(case, rewards, tmp_path):
    argv = [write_task(tmp_path, rewards), *SMALL, *STEPS, *CASES[case], "--steps", "3"]
    assert main([*argv, "--run-dir", str(tmp_path / "one")]) == 0
    for size in (2, 3):
        codes, logs = run_ranks(size, tmp_path, [*argv, "--run-dir", f"run-{size}"])
        assert codes == [0] * size, logs
        check_same_run(tmp_path / "one", tmp_path / f"run-{size}", step=3)


@pytest.mark.slow
@pytest.mark.parametrize("rewards", [REWARDS, SELDOM], ids=["all", "few groups with a gradient"])
@pytest.mark.parametrize("case", OF_ONE_STEP)
def test_a_step_of_ranks_is_that_of_one_process(case, rewards, tmp_path):
    argv = [write_task(tmp_path, rewards), *SMALL, *STEPS, *OF_ONE_STEP[case], "--steps", "1"]
    assert main([*argv, "--run-dir", str(tmp_path / "one")]) == 0
    for size in (2, 3):
        codes, logs = run_ranks(size, tmp_path, [*argv, "--run-dir", f"run-{size}"])
        assert codes == [0] * size, logs
        check_same_run(tmp_path / "one", tmp_path / f"run-{size}", step=1, rounded=ROUNDED)
