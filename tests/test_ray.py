"""On a local Ray cluster of two workers: the run is that of one process, and a failure is told in its own words."""

import json
import os
import signal
import subprocess
import sys

import pytest
from test_ranks import STEPS, check_same_run, write_task
from toy_task import SMALL, TASK

from grpo.ray import lost, main, what_they_say
from grpo.ray_worker import Ended
from grpo.run import main as run

pytestmark = pytest.mark.slow

ONE_FAILS = """
import os
from pathlib import Path

def is_first(path):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

def one_fails(completions, trainer_state):
    if trainer_state.global_step == 3 and is_first(Path(__file__).with_name("claimed")):
        raise ValueError("the judge is out")
    return [len(set(completion)) / 10 for completion in completions]
"""


def test_what_all_processes_say_is_one_sentence():
    """The first that somebody has; a process that was killed has none."""
    words = "Rank 1 (host) has ended the run: It ended."
    assert what_they_say([Ended(2, ""), Ended(-9, words), Ended(2, "Another.")]) == words
    assert what_they_say([Ended(-9, ""), Ended(0, "")]) == "The processes ended with exit codes -9, 0."


def test_what_ray_has_lost_is_told_in_a_line():
    error = RuntimeError("Ray's own words.\nTraceback (most recent call last):")
    assert lost(error).sentence.endswith("ended the others. RuntimeError (Ray's own words.).")
    error.worker_failures = {1: OSError("The actor died\nunexpectedly")}
    code, told = lost(error)
    assert code == 1 and told.endswith("rank 1: OSError (The actor died).") and "\n" not in told


@pytest.mark.parametrize(
    "argv",
    [
        ["--workers", "0", "-m", "grpo.run"],
        ["--workers", "2", "-m"],
        ["--workers", "1", "--max-restarts", "-1", "-m", "grpo.run"],
    ],
)
def test_what_makes_no_sense_is_refused(argv, capsys):
    assert main(argv) == 2
    assert "give 1 or more" in capsys.readouterr().err


MOMENTS = {"Ray starts": "Started a local Ray instance", "the run trains": "3/100000"}  # what is said by then


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_driver_with_a_sentence(number, moment, tmp_path):
    """Ray, which would take both for itself, ends with 1 or 15 and no word, or with a trace where a thread waits."""
    pytest.importorskip("ray.train.torch")
    command = [sys.executable, "-m", "grpo.ray", "--workers", "1", "-m", "grpo.run", write_task(tmp_path), *SMALL]
    there = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    there["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        [*command, "--steps", "100000", "--run-dir", "run"], cwd=tmp_path, env=os.environ | there, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as started:  # fmt: skip
        assert started.stdout is not None
        assert any(MOMENTS[moment] in line for line in started.stdout)
        started.send_signal(number)
        said = started.stdout.read()
    assert started.returncode == 128 + number and said.count("Stopped. --resume goes on") == 1
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def cluster():
    """Its processes find the package where this one does."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.train.torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def test_two_workers_train_what_one_process_trains_and_go_on(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [write_task(tmp_path), *SMALL, *STEPS, "--eval-every", "3"]
    assert run([*argv, "--run-dir", "alone"]) == 0
    on_ray = ["--workers", "2", "-m", "grpo.run"]
    assert main([*on_ray, *argv, "--steps", "3", "--run-dir", "run"]) == 0
    assert main([*on_ray, "--resume", "run", "--steps", "5"]) == 0
    check_same_run(tmp_path / "alone", tmp_path / "run")
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2


def test_a_reward_that_fails_in_one_process_is_told_by_the_driver(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task = tmp_path / "toy.py"
    task.write_text(TASK.format(rewards="{one_fails: 1.0}", extra=ONE_FAILS).replace('("says", 1.0)', "None"))
    argv = [str(task), *SMALL, *STEPS, "--max-reward-failures", "0", "--run-dir", "run", "--resume-or-start"]
    assert main(["--workers", "2", "-m", "grpo.run", *argv]) == 2
    [told] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "raised ValueError (the judge is out)" in told
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-000003"]
    # The same once more, in a run that is started again by itself: from there on nothing fails.
    (tmp_path / "claimed").unlink()
    assert main(["--workers", "2", "--max-restarts", "1", "-m", "grpo.run", *argv]) == 0
    [again] = [line for line in capsys.readouterr().out.splitlines() if "started again" in line]
    assert "raised ValueError (the judge is out)" in again and again.endswith("(restart 1 of at most 1).")
    assert (checkpoints / "step-000005").is_dir()
    assert len((tmp_path / "run" / "starts.jsonl").read_text().splitlines()) == 3
