"""Several hosts: the script of docs/scaling.md for Slurm, as it stands there, with two torchruns of this machine in the
place of two hosts."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from relay import free_port
from test_ranks import REWARDS, check_same_run, lines, write_task
from test_ranks_end import STEPS, write_trouble
from toy_task import SMALL

from grpo.run import main

pytestmark = pytest.mark.slow

# What a node's srun does, for both: it takes its own flag away and starts the rest.
SRUN = """#!/bin/bash
shift 2
"$@" & first=$!
(cd "$SECOND_HOST" && "$@") & second=$!
wait $first; one=$?
wait $second || exit $?
exit $one
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames two-nodes" ] && echo localhost && echo localhost
"""


def slurm_script():
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    [script] = [block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if "#SBATCH" in block]
    return script


def launched(folder, argv, more="", **variables):
    """The script, with a run and a port of its own."""
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "bin" / "torchrun").symlink_to(Path(sys.executable).with_name("torchrun"))
    script = slurm_script().replace("--nproc-per-node 8", f"--nproc-per-node 1 {more}")
    script = script.replace("tasks/gsm8k.py", argv[0]).replace("--prompts-per-step 128", " ".join(argv[1:]))
    slurm = dict(SLURM_NNODES="2", SLURM_JOB_ID="17", SLURM_JOB_NODELIST="two-nodes", SLURM_CPUS_PER_TASK="1",
                 SLURM_PROCID="0", SLURM_NTASKS="2", SLURM_LOCALID="0")  # fmt: skip
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    slurm |= dict(SECOND_HOST=".") | variables
    environment = os.environ | slurm | {"PATH": path, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    script = script.replace(":29500", f":{free_port()}")
    return subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)


def test_two_hosts_train_what_one_process_trains_and_go_on_after_one_was_killed(tmp_path):
    argv = [write_trouble(tmp_path), *SMALL, *STEPS]
    assert main([*argv, "--run-dir", str(tmp_path / "alone")]) == 0
    trouble = dict(TROUBLE="kill", ON="0", ONCE=str(tmp_path / "once"))
    done = launched(tmp_path, argv, "--max-restarts 1", **trouble)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tonight"
    check_same_run(tmp_path / "alone", run, step=6)
    assert len(lines(run, "starts.jsonl")) == 2


def test_a_torchrun_that_is_killed_leaves_neither_its_ranks_nor_the_other_host_waiting(tmp_path):
    """Torch's own would wait for 300 s for it, after ranks that had trained to their end for nobody."""
    argv = [write_trouble(tmp_path), *SMALL, *STEPS, "--steps", "100000", "--run-dir", "run", "--resume-or-start"]
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "17"]
    meeting += ["--rdzv-endpoint", f"localhost:{free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "grpo.run", *argv]
    hosts = []
    for name in ("first", "second"):
        with (tmp_path / name).open("w") as log:
            hosts.append(subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                          stdout=log, stderr=log))  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or '"reward/mean"' not in metrics.read_text():
        assert not any(host.poll() for host in hosts)
    hosts[1].kill()
    end = time.monotonic() + 60
    assert hosts[0].wait(60) == 1
    ranks = ["pgrep", "-f", f"grpo.run {argv[0]}"]
    while subprocess.run(ranks, capture_output=True, text=True).stdout:
        assert time.monotonic() < end
        time.sleep(0.2)
    told = "The launcher that has started it (torchrun) was killed or crashed: start it again on all hosts."
    both = (tmp_path / "first").read_text() + (tmp_path / "second").read_text()
    assert told in both or "the store that all ranks meet at does not answer" in both  # where that was the second's


def test_a_host_whose_task_file_is_another_is_told(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for folder, rewards in ((tmp_path, REWARDS), (other, "{letters: 2.0, says: 1.0}")):
        write_task(folder, rewards)
    done = launched(tmp_path, ["toy.py", *SMALL, "--steps", "1"], SECOND_HOST="other")
    assert done.returncode != 0
    assert "Rank 1 is not like the others: the task file's SHA-256 is" in done.stderr
    assert not (tmp_path / "runs").exists()
