"""vLLM inside of several ranks: each has a default process group of its own, and samples its share from its own
policy."""

import pytest
from several import run_ranks
from test_ranks import lines, write_task
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
