"""Runs of several processes with --shard-base: the adapter of one process over the whole base, whatever ranks have to
do, and a base that goes on in another number of parts."""

import json
import os
import subprocess
import sys

import pytest
import torch
from fake_server import embedded_server
from several import ended, launch, run_ranks, told
from test_ranks import RATE, adapter, check_same_run, lines, write_task
from test_ranks_end import write_trouble
from toy_task import SMALL

from grpo.run import main

pytestmark = pytest.mark.slow

STEPS = ["--steps", "5", "--prompts-per-step", "3", "--learning-rate", str(RATE), "--threads", "1"]
TAUGHT = [
    "--engine",
    "none",
    "--eval-prompts",
    "4",
    "--eval-every",
    "4",
    "--save-every",
    "3",
    "--lora-rank",
    "4",
    *STEPS,
]
# A server samples each completion, and reads each token of its canary, by itself: over NF4 in twice the time.
SERVED = [*SMALL, *STEPS, "--max-completion-tokens", "4", "--eval-prompts", "2"]
SFT = ["--method", "sft", *TAUGHT]


def check_same_taught(one, other, step=5):
    """The adapter to 1e-6, the same answers, and scores and losses as the adapter has them."""
    expected, found = adapter(one, step), adapter(other, step)
    assert expected.keys() == found.keys()
    assert max(float(each.abs().max()) for name, each in expected.items() if "lora_B" in name) > step * RATE / 5
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert lines(one, "completions.jsonl") == lines(other, "completions.jsonl")
    for first, second in zip(lines(one, "metrics.jsonl"), lines(other, "metrics.jsonl"), strict=True):
        names = [name for name in first if not name.startswith(("time/", "speed/", "memory/"))]
        assert {n: second[n] for n in names} == pytest.approx({n: first[n] for n in names}, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (3, ["--base", "nf4", "--double-quant", "on", "--tokens-per-batch", "30", "--recompute", "layer"]),
        (3, ["--prompts-per-step", "1", "--recompute", "offload"]),
        (2, ["--base", "nf4"]),
    ],
    ids=["a batch for each answer", "two ranks with nothing to compute", "two ranks"],
)
def test_answers_teach_the_adapter_of_one_process(size, flags, tmp_path):
    argv = [write_task(tmp_path), *SFT, *flags]
    assert main([*argv, "--run-dir", str(tmp_path / "one")]) == 0
    codes, logs = run_ranks(size, tmp_path, [*argv, "--shard-base", "--run-dir", "run"], seconds=300)
    assert codes == [0] * size, logs
    assert f"the base in {size} parts" in logs[0] and logs[1:] == [""] * (size - 1)
    check_same_taught(tmp_path / "one", tmp_path / "run")


def test_parts_change_no_bit(tmp_path):
    """Two ranks over a base in parts and over the whole base, with two optimizer steps a step."""
    argv = [write_task(tmp_path), *SFT, "--base", "bf16", "--mini-batches", "2", "--steps", "3"]
    for name, flags in (("whole", []), ("parts", ["--shard-base"])):
        codes, logs = run_ranks(2, tmp_path, [*argv, *flags, "--run-dir", name], seconds=300)
        assert codes == [0, 0], logs
    whole, parts = (adapter(tmp_path / name, 3) for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    for name in ("completions.jsonl", "held_out.jsonl"):
        assert lines(tmp_path / "whole", name) == lines(tmp_path / "parts", name)


def test_pairs_teach_the_adapter_of_one_process(tmp_path):
    """With passes of the reference policy."""

    def chat(number, answer):
        return [{"role": "user", "content": f"What is {number} + 2?"}, {"role": "assistant", "content": answer}]

    rows = [
        {"prompt": chat(n, "")[:1], "chosen": chat(n, f"It is {n + 2}.")[1:], "rejected": chat(n, "No idea.")[1:]}
        for n in range(9)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "--method",
        "dpo",
        "--data",
        str(tmp_path / "pairs.jsonl"),
        "--model",
        "embedded",
        "--base",
        "nf4",
        "--held-out",
        "2",
        *TAUGHT,
    ]
    assert main([*argv, "--run-dir", str(tmp_path / "one")]) == 0
    codes, logs = run_ranks(2, tmp_path, [*argv, "--shard-base", "--run-dir", "run"], seconds=300)
    assert codes == [0, 0], logs
    check_same_taught(tmp_path / "one", tmp_path / "run")


def test_a_run_goes_on_in_another_number_of_parts(tmp_path):
    """Two parts, the whole in one process, three parts; and held-out scores of it by two ranks."""
    argv = [write_task(tmp_path), *SFT, "--base", "nf4", "--shard-base", "--save-every", "1", "--run-dir"]
    assert main([*argv, str(tmp_path / "one")]) == 0
    codes, logs = run_ranks(2, tmp_path, [*argv, "run", "--steps", "2"], seconds=300)
    assert codes == [0, 0], logs
    assert main(["--resume", str(tmp_path / "run"), "--steps", "3"]) == 0
    codes, logs = run_ranks(3, tmp_path, ["--resume", "run", "--steps", "5"], seconds=300)
    assert codes == [0, 0, 0] and "the base in 3 parts" in logs[0], logs
    expected, found = adapter(tmp_path / "one"), adapter(tmp_path / "run")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    codes, logs = run_ranks(2, tmp_path, ["--eval", "run"], seconds=300)
    assert codes == [0, 0] and "the base in 2 parts" in logs[0], logs
    score = lines(tmp_path / "run", "metrics.jsonl")[-1]["eval/logprob"]
    assert f"{score:.3f}" in logs[0]


@pytest.fixture
def server(request):
    """A fake server of the embedded model over a base in float32, or another."""
    with embedded_server(getattr(request, "param", "float32")) as fake:
        yield fake


@pytest.mark.parametrize(
    ("server", "size", "rewards", "flags"),
    [
        ("nf4", 2, "{letters: 1.0, says: 1.0}", ["--base", "nf4", "--staleness", "1"]),
        ("float32", 3, "{seldom: 1.0, says: 1.0}", ["--kl-coef", "0.1", "--tokens-per-batch", "40"]),
    ],
    indirect=["server"],
    ids=["nf4", "ranks without a group"],
)
def test_rollouts_of_servers_train_the_adapter_of_one_process(server, size, rewards, flags, tmp_path):
    argv = [write_task(tmp_path, rewards), *SERVED, "--steps", "3", *flags]
    argv += ["--engine", "server", "--servers", server.url]
    assert main([*argv, "--run-dir", str(tmp_path / "one")]) == 0
    codes, logs = run_ranks(size, tmp_path, [*argv, "--shard-base", "--run-dir", "run"], seconds=400)
    assert codes == [0] * size, logs
    check_same_run(tmp_path / "one", tmp_path / "run", step=3)


@pytest.mark.parametrize(
    ("rank", "moment"),
    [(1, "grpo.policy.shards.Shards._gather:call:70"), (0, "grpo.policy.shards.Shards._come_back:return:9")],
    ids=["forward", "backward"],
)
def test_a_rank_that_is_killed_between_two_layers_ends_all(rank, moment, tmp_path):
    argv = [write_task(tmp_path), *SFT, "--shard-base", "--save-every", "1", "--run-dir", "run"]
    processes = launch(2, tmp_path, argv, KILL=f"{rank}:{moment}")
    codes = ended(processes, 120)
    assert codes[rank] == -9 and codes[1 - rank] == 2
    expected = "It ended without a word" if rank else "the store that all ranks meet at does not answer"
    assert expected in told(tmp_path, 1 - rank)


def test_a_hung_reward_over_parts_ends_all_and_torchrun_starts_again_by_itself(server, tmp_path):
    """torchrun --max-restarts goes on from the last checkpoint, to the adapter of ranks that nobody has troubled."""
    argv = [write_trouble(tmp_path), *SERVED, "--steps", "4", "--save-every", "2", "--reward-timeout", "1"]
    argv += ["--max-reward-failures", "0", "--shard-base", "--engine", "server", "--servers", server.url]
    codes, logs = run_ranks(2, tmp_path, [*argv, "--run-dir", "untroubled"], seconds=300)
    assert codes == [0, 0], logs
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    variables = os.environ | {"TROUBLE": "hang", "ON": "0", "ONCE": str(tmp_path / "once"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, "-m", "grpo.run", *argv]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no result in 1 s" in done.stderr
    [run] = (tmp_path / "runs").iterdir()
    assert len(lines(run, "starts.jsonl")) == 2
    check_same_run(tmp_path / "untroubled", run, step=4)


def test_who_samples_in_the_process_is_refused_before_anything_is_loaded(tmp_path):
    codes, logs = run_ranks(2, tmp_path, [write_task(tmp_path), *SMALL, *STEPS, "--shard-base", "--run-dir", "run"])
    assert codes == [2, 2]
    assert "--engine auto would sample from all of it" in logs[0] and "layers:" not in logs[0]
    assert not (tmp_path / "run").exists()
