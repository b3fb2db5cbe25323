"""vLLM inside of several ranks: each has a default process group of its own, and samples its share from its own
policy."""

import os
import signal

import pytest
from several import ended, launch, run_ranks, told
from test_ranks import lines, write_task
from test_ranks_end import saved, write_trouble
from toy_task import SMALL

pytestmark = pytest.mark.slow


def test_two_ranks_sample_by_vllm_and_train_one_adapter(tmp_path):
    argv = [write_task(tmp_path), *SMALL, "--steps", "3", "--prompts-per-step", "3", "--engine", "vllm"]
    # As torchrun says it: torch's own rendezvous would look for vLLM's store at the launcher's.
    codes, logs = run_ranks(2, tmp_path, [*argv, "--run-dir", "run"], seconds=400, TORCHELASTIC_RUN_ID="tonight")
    assert codes == [0, 0], logs
    assert "vLLM, in this process" in logs[0]
    run = tmp_path / "run"
    assert [line["step"] for line in lines(run, "metrics.jsonl") if "reward/mean" in line] == [0, 1, 2]
    rows = {(line["step"], line["group"], line["member"]) for line in lines(run, "completions.jsonl")}
    assert len(rows) == 3 * 3 * 4


def test_a_rank_that_is_killed_ends_the_other_whose_engine_is_vllm(tmp_path):
    argv = [write_trouble(tmp_path), *SMALL, "--steps", "6", "--prompts-per-step", "3", "--engine", "vllm"]
    codes, logs = run_ranks(2, tmp_path, [*argv, "--run-dir", "run"], seconds=400, TROUBLE="kill", ON="1")
    assert codes == [2, -9], logs
    assert "Rank 1 (" in logs[0] and "It ended without a word" in logs[0]
    assert saved(tmp_path / "run")[-1] == "step-000003"  # all that was whole


def test_a_rank_that_is_stopped_ends_the_other_whose_engine_is_vllm(tmp_path):
    argv = [write_trouble(tmp_path), *SMALL, "--steps", "6", "--prompts-per-step", "3", "--engine", "vllm"]
    processes = launch(2, tmp_path, [*argv, "--run-dir", "run"], TROUBLE="stop", ON="1")
    processes[0].join(400)
    os.kill(processes[1].pid, signal.SIGCONT)
    assert ended(processes) == [2, 2], told(tmp_path, 0)
    assert "Nothing was heard of it for 20 s" in told(tmp_path, 0)
    assert saved(tmp_path / "run")[-1] == "step-000003"
