"""When a rank ends, for whatever reason, all end soon, with its sentence, and nothing that was saved is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from several import ended, launch, run_ranks, told
from test_ranks import adapter, check_same_run, lines
from toy_task import SMALL, TASK

from grpo.run import main

pytestmark = pytest.mark.slow

STEPS = ["--steps", "6", "--save-every", "2", "--prompts-per-step", "3", "--learning-rate", "1e-4"]

# A reward that gets into trouble on rank 1 in the fourth step, as TROUBLE says; once, where there is a file to tell.
TROUBLE = """
import os, re, resource, signal, time
from pathlib import Path

def letters(completion):
    return len(set(completion)) / 10

def trouble(completions, trainer_state):
    kind = os.environ.get("TROUBLE", "")
    once = Path(os.environ.get("ONCE", "/dev/null/never"))
    if kind and trainer_state.global_step == 3 and not once.exists() and os.environ["ON"] == os.environ.get("ME", "0"):
        once.parent.is_dir() and once.touch()
        if kind == "raise":
            raise ValueError("the judge is out")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "stopped twice":
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        if kind == "hang":
            re.match("(a+)+$", "a" * 60 + "b")
        if kind == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return [0.0 for _ in completions]
"""


def write_trouble(folder):
    path = folder / "toy.py"
    path.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0, trouble: 1.0}", extra=TROUBLE))
    return str(path)


def saved(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith("step-"))


def resumed(folder, argv, size=2):
    codes, logs = run_ranks(size, folder, [*argv, "--resume", "run"])
    assert codes == [0] * size, logs
    return folder / "run"


@pytest.fixture(scope="module")
def untroubled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untroubled")
    codes, logs = run_ranks(2, folder, [write_trouble(folder), *SMALL, *STEPS, "--run-dir", "run"])
    assert codes == [0, 0], logs
    return folder / "run"


SENTENCES = {
    "raise": "raised ValueError (the judge is out)",
    "kill": "It ended without a word",
    "hang": "no result in 1 s",
    "full disk": "could not be written",
}


@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize("kind", ["raise", "kill", "hang"])
def test_a_rank_in_trouble_ends_all_with_its_sentence(kind, on, untroubled, tmp_path):
    argv = [write_trouble(tmp_path), *SMALL, *STEPS, "--reward-timeout", "1", "--max-reward-failures", "0"]
    processes = launch(2, tmp_path, [*argv, "--run-dir", "run"], TROUBLE=kind, ON=str(on))
    codes = ended(processes)
    assert 0 not in codes
    everything = told(tmp_path, 0) + told(tmp_path, 1)
    # Here rank 0 holds the store that ranks meet at, and takes it along; torchrun holds it itself.
    assert (
        SENTENCES[kind] if on or kind != "kill" else "the store that all ranks meet at does not answer"
    ) in everything
    if on == 1:  # rank 0 has told it, and saved the last whole step
        assert "Rank 1 (" in told(tmp_path, 0) and "has ended the run" in told(tmp_path, 0)
        assert saved(tmp_path / "run")[-1] == "step-000003"
    run = resumed(tmp_path, [])
    check_same_run(untroubled, run, step=6)
    assert adapter(untroubled, 6).keys() == adapter(run, 6).keys()


BOTH_FAIL = """
import os

def fails(completions, trainer_state):
    if trainer_state.global_step == 1:
        raise ValueError("no judge of " + os.environ["ME"])
    return [0.0 for _ in completions]
"""


def test_of_two_that_fail_at_once_the_first_is_told(tmp_path):
    """By rank 0 as by the one that it was."""
    path = tmp_path / "toy.py"
    path.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0, fails: 1.0}", extra=BOTH_FAIL))
    argv = [str(path), *SMALL, *STEPS, "--max-reward-failures", "0", "--run-dir", "run"]
    codes, logs = run_ranks(2, tmp_path, argv)
    assert codes == [2, 2]
    [error] = [line for line in logs[0].splitlines() if line.startswith("error: ")]
    if "error: Rank 1 (" in logs[1]:
        assert error.startswith("error: Rank 1 (") and "no judge of 1" in error
    else:
        assert "no judge of 0" in error and "no judge of 1" not in error and "error: " not in logs[1]


def test_a_full_disk_on_rank_0_ends_all(untroubled, tmp_path):
    argv = [write_trouble(tmp_path), *SMALL, *STEPS, "--run-dir", "run"]
    codes, logs = run_ranks(2, tmp_path, argv, TROUBLE="full disk", ON="0")
    assert codes == [2, 2], logs
    assert SENTENCES["full disk"] in logs[0]
    assert "error:" not in logs[1]
    assert saved(tmp_path / "run") == ["step-000002"]
    check_same_run(untroubled, resumed(tmp_path, []), step=6)


def test_a_rank_that_is_stopped_or_cut_off_ends_all(untroubled, tmp_path):
    argv = [write_trouble(tmp_path), *SMALL, *STEPS, "--run-dir", "run"]
    processes = launch(2, tmp_path, argv, TROUBLE="stop", ON="1")
    processes[0].join(60)
    assert processes[0].exitcode == 2
    assert "Nothing was heard of it for 20 s" in told(tmp_path, 0)
    os.kill(processes[1].pid, signal.SIGCONT)
    assert ended(processes) == [2, 2]
    check_same_run(untroubled, resumed(tmp_path, []), step=6)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, [1]), (signal.SIGINT, [0, 1])])
def test_a_signal_lets_the_step_finish_and_saves_once(number, at, untroubled, tmp_path):
    """To all, or to one of them: all end alike."""
    argv = [write_trouble(tmp_path), *SMALL, *STEPS, "--save-every", "50", "--run-dir", "run"]
    processes = launch(2, tmp_path, argv)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or '"reward/mean"' not in metrics.read_text():
        assert processes[0].is_alive()
    for rank in at:
        os.kill(processes[rank].pid, number)
    assert ended(processes) == [128 + number] * 2
    [checkpoint] = saved(tmp_path / "run")
    assert "step-000001" <= checkpoint < "step-000006"
    assert told(tmp_path, 0).count("Stopping after this step") == (0 in at)
    check_same_run(untroubled, resumed(tmp_path, []), step=6)


def test_a_second_signal_to_one_rank_stops_all_at_once(tmp_path):
    argv = [write_trouble(tmp_path), *SMALL, *STEPS, "--run-dir", "run"]
    codes, logs = run_ranks(2, tmp_path, argv, TROUBLE="stopped twice", ON="1")
    assert codes == [143, 143], logs
    assert saved(tmp_path / "run")[-1] == "step-000003"
    assert "Stopped at once. Rank 1 (" in logs[0] and "It was stopped by signal 15. The last checkpoint is" in logs[0]


@pytest.mark.parametrize("size", [1, 3])
def test_a_run_of_two_ranks_goes_on_in_another_number(size, untroubled, tmp_path):
    shutil.copy(write_trouble(tmp_path), tmp_path / "copy.py")
    argv = [str(tmp_path / "toy.py"), *SMALL, *STEPS]
    codes, logs = run_ranks(2, tmp_path, [*argv, "--steps", "4", "--run-dir", "run"])
    assert codes == [0, 0], logs
    if size == 1:
        assert main(["--resume", str(tmp_path / "run"), "--steps", "6"]) == 0
    else:
        codes, logs = run_ranks(size, tmp_path, ["--resume", "run", "--steps", "6"])
        assert codes == [0] * size, logs
    check_same_run(untroubled, tmp_path / "run", step=6)
    states = [
        json.loads((run / "checkpoints/step-000006/state.json").read_text()) for run in (untroubled, tmp_path / "run")
    ]
    for name in ("step", "cursor", "version", "evaluated", "best_step", "first_scores", "threads"):
        assert states[0]["progress"][name] == states[1]["progress"][name]


# Rows of one rank that come only when there is a file: a network drive that hangs.
HANGS = """
import os, time
from pathlib import Path

def hang():
    while os.environ["ME"] == os.environ["ON"] and not Path("back").exists():
        time.sleep(0.05)
"""


def write_hanging(folder):
    path = folder / "toy.py"
    text = TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=HANGS)
    path.write_text(text.replace("    numbers = ", "    hang()\n    numbers = "))
    return str(path)


def launch_until_it_is_told(folder, on):
    """Two ranks, once one has said that the other reads its rows still."""
    argv = [write_hanging(folder), *SMALL, "--steps", "2", "--run-dir", "run"]
    processes = launch(2, folder, argv, ON=str(on), LONG="0.2")
    log = folder / f"rank-{1 - on}.log"
    while not log.exists() or "is reading rows" not in log.read_text():
        assert all(process.is_alive() for process in processes)
    return processes


@pytest.mark.parametrize("on", [0, 1])
def test_who_is_waited_for_long_is_told_once_and_waited_for(on, tmp_path):
    processes = launch_until_it_is_told(tmp_path, on)
    (tmp_path / "back").touch()
    assert ended(processes) == [0, 0]
    [line] = [line for line in told(tmp_path, 1 - on).splitlines() if "is reading rows" in line]
    assert line.startswith(f"note: rank {1 - on} has waited for others for 0 s: rank {on} (")
    assert "is reading rows" not in told(tmp_path, on)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, [0]), (signal.SIGTERM, [1]), (signal.SIGINT, [0, 1])])
def test_a_signal_ends_all_while_one_is_waited_for(number, at, tmp_path):
    """To who waits, to who hangs, and to both."""
    processes = launch_until_it_is_told(tmp_path, 1)
    for rank in at:
        os.kill(processes[rank].pid, number)
    assert ended(processes) == [128 + number] * 2
    assert "Stopped at once." in told(tmp_path, 0) and "Traceback" not in told(tmp_path, 0) + told(tmp_path, 1)


def test_prompts_that_differ_between_ranks_are_refused(tmp_path):
    path = tmp_path / "toy.py"
    text = TASK.format(rewards="{says: 1.0}", extra="").replace("range(8) if", "range(first, 8 + first) if")
    path.write_text(text.replace("import random", "import random, os\nfirst = int(os.environ['ME'])"))
    codes, logs = run_ranks(2, tmp_path, [str(path), *SMALL, *STEPS, "--run-dir", "run"])
    assert codes == [2, 2]
    assert "The prompts of ranks 1 are not those of rank 0" in logs[0]
    assert not (tmp_path / "run").exists()


def test_torchrun_starts_again_and_goes_on_by_itself(untroubled, tmp_path):
    argv = [write_trouble(tmp_path), *SMALL, *STEPS]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    variables = os.environ | {"TROUBLE": "kill", "ON": "0", "ONCE": str(tmp_path / "once")}
    command = [sys.executable, *torchrun, "-m", "grpo.run", *argv]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs").iterdir()
    assert len(lines(run, "starts.jsonl")) == 2
    check_same_run(untroubled, run, step=6)
