"""What happens to a run from outside: signals, files that vanish or are refused, a folder taken twice, a fork."""

import json
import os
import pty
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy_task import SMALL, TASK

from grpo.config import Config
from grpo.errors import UserError
from grpo.folder import alone_in, list_checkpoints
from grpo.guards import files_in_words, how_to_go_on, stopped_by_signals, stops_gently, told_how_to_go_on
from grpo.run import main

# A reward that does something to the run in its third step. What the task is called with before: preflight, evaluation.
ACTS = """
import os, resource, shutil, signal
from pathlib import Path
FOLDER = {folder!r}
def acts(completions):
    path = Path(FOLDER, "metrics.jsonl")
    lines = path.read_text() if path.exists() else ""
    if "eval/" in lines and lines.count("reward/mean") == {step} and len(completions) == 8:
        {act}
    return [len(set(completion[0]["content"])) / 10 for completion in completions]
"""


@pytest.fixture
def run_that(tmp_path):
    """Run the toy task with a reward that acts in its third step, or another; returns (exit code, the run's folder)."""

    def run(act, *flags, step=2):
        folder = tmp_path / "run"
        extra = ACTS.format(folder=str(folder), act=act, step=step)
        path = tmp_path / "toy.py"
        path.write_text(
            TASK.format(rewards="{acts: 1.0, says: 1.0}", extra=extra.replace("{", "{{").replace("}", "}}"))
        )
        path.write_text(path.read_text().replace("{{", "{").replace("}}", "}"))
        return main([str(path), *SMALL, "--steps", "6", "--run-dir", str(folder), *flags]), folder

    return run


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open() if "reward/mean" in line]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(name, code, run_that, capsys):
    before = signal.getsignal(getattr(signal, name))
    ended, folder = run_that(f"os.kill(os.getpid(), signal.{name})")
    assert ended == code
    assert steps_of(folder) == [0, 1, 2]
    assert list_checkpoints(folder)[-1].name == "step-000003"
    assert f"python -m grpo.run --resume {folder}" in capsys.readouterr().out
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_second_signal_stops_at_once(run_that, capsys):
    ended, folder = run_that("[os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]", "--save-every", "1")
    assert ended == 143
    assert list_checkpoints(folder)[-1].name == "step-000002"
    assert "--resume" in capsys.readouterr().out


@pytest.mark.slow
def test_a_terminal_that_goes_away_stops_the_run_gently(tmp_path):
    """The process is the leader of a session on a terminal of its own, as in a shell over ssh."""
    path, folder = tmp_path / "toy.py", tmp_path / "run"
    path.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    ours, theirs = pty.openpty()
    take = "import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    argv = [str(path), *SMALL, "--steps", "5000", "--run-dir", str(folder)]
    code = f"{take}; import sys; from grpo.run import main; sys.exit(main({argv!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    seen = b""
    while b"3/5000" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    assert process.wait() == 129
    assert list_checkpoints(folder)[-1].name == f"step-{len(steps_of(folder)):06d}"


@pytest.mark.slow
def test_a_reader_that_goes_away_stops_the_run_gently(tmp_path):
    """`| head -1`: the step in which it is noticed is finished and saved, and standard error says how to go on."""
    path, folder = tmp_path / "toy.py", tmp_path / "run"
    path.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo.run", str(path), *SMALL, "--steps", "5000", "--run-dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while b"2/5000" not in process.stdout.readline():
        pass
    process.stdout.close()
    told = process.stderr.read().decode()
    assert process.wait() == 129
    assert list_checkpoints(folder)[-1].name == f"step-{len(steps_of(folder)):06d}"
    assert f"--resume {folder}" in told and "Traceback" not in told


def test_help_ends_quietly_where_its_reader_goes_away():
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo.run", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 128 + signal.SIGPIPE)


@pytest.mark.slow
def test_nohup_means_it(run_that):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ended, folder = run_that("os.kill(os.getpid(), signal.SIGHUP)")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ended == 0
    assert len(steps_of(folder)) == 6


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_a_run_starts_over_in_its_folder(tmp_path, run_that, capsys):
    ended, folder = run_that("raise KeyboardInterrupt", "--save-every", "100", step=0)
    assert ended == 130
    assert not list_checkpoints(folder)
    written = (folder / "metrics.jsonl").read_text()
    assert written
    task = tmp_path / "toy.py"
    task.write_text(task.read_text().replace("raise KeyboardInterrupt", "pass"))
    again = [str(task), *SMALL, "--steps", "2", "--run-dir", str(folder), "--resume-or-start"]
    assert main(again) == 0
    assert "starts over" in capsys.readouterr().out
    assert (folder / "left-1" / "metrics.jsonl").read_text() == written
    assert steps_of(folder) == [0, 1]
    again[again.index("--steps") + 1] = "3"
    assert main(again) == 0  # the same command goes on
    assert steps_of(folder) == [0, 1, 2]


def test_resume_or_start_starts(tmp_path):
    path, folder = tmp_path / "toy.py", tmp_path / "run"
    path.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    folder.mkdir()  # empty: a scheduler made it
    assert main([str(path), *SMALL, "--steps", "1", "--run-dir", str(folder), "--resume-or-start"]) == 0
    assert steps_of(folder) == [0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "told"),
    [
        ("shutil.rmtree(FOLDER)", ["is gone"]),
        ("os.rename(FOLDER + '/checkpoints', FOLDER + '/away'); open(FOLDER + '/checkpoints', 'w').close()",
         ["File exists", "start over in the same folder"]),
    ],
    ids=["folder gone", "a file in its place"],
)  # fmt: skip
def test_files_that_are_taken_away_are_told(act, told, run_that, capsys):
    ended, _ = run_that(act, "--save-every", "1")
    error = capsys.readouterr().err
    assert ended == 2
    # But for that of a reward that ends the run.
    assert "Traceback" not in error.replace("The first of this step:\nTraceback", "")
    for words in told:
        assert words in error, error


@pytest.mark.slow
def test_too_many_open_files_are_told_and_what_is_saved_goes_on(tmp_path, run_that, capsys):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    act = f"free = os.dup(0); os.close(free); resource.setrlimit(resource.RLIMIT_NOFILE, (free, {limits[1]}))"
    try:
        ended, folder = run_that(act, "--save-every", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    error = capsys.readouterr().err
    assert ended == 2
    assert "too many files open" in error
    assert f"`python -m grpo.run --resume {folder}`" in error
    task = tmp_path / "toy.py"
    task.write_text(task.read_text().replace("resource.setrlimit", "print"))
    assert main([str(task), "--resume", str(folder)]) == 0
    assert len(steps_of(folder)) == 6


def test_what_the_system_refuses_is_told_with_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for error, words in (
        (PermissionError(13, "Permission denied", "metrics.jsonl"), "Permission denied (metrics.jsonl)"),
        (OSError(30, "Read-only file system"), "Read-only file system"),
        (OSError(28, "No space left on device"), "more room"),
        (OSError(116, "Stale file handle"), "Stale file handle"),
    ):
        with pytest.raises(UserError) as caught, files_in_words(tmp_path):
            raise error
        assert words in str(caught.value)
        assert str(caught.value).count("--resume") == 1


def test_whatever_goes_wrong_ends_with_the_command_that_goes_on(tmp_path):
    folder = tmp_path / "a folder"
    (folder / "checkpoints" / "step-000002").mkdir(parents=True)
    command = f"`python -m grpo.run --resume '{folder}'`"
    with pytest.raises(UserError, match="Mend it"), told_how_to_go_on(folder):
        raise UserError("Mend it.")
    assert command in how_to_go_on(folder)
    with pytest.raises(ZeroDivisionError) as caught, told_how_to_go_on(folder):
        _ = 1 / 0
    assert command in caught.value.__notes__[-1]


def test_a_forked_child_does_not_keep_the_run_s_lock(tmp_path):
    """A reward's process pool outlives the run in the worst case."""
    (read, write), (heard, say) = os.pipe(), os.pipe()
    with alone_in(tmp_path):
        with pytest.raises(UserError, match="Another process"), alone_in(tmp_path):
            pass
    if not (dies := os.fork()):
        held = alone_in(tmp_path)
        held.__enter__()
        if not os.fork():
            os.close(write)
            os.write(say, b"!")
            os.read(read, 1)  # lives on until the test is done
            os._exit(0)
        os._exit(0)  # without another word, as after a kill
    assert os.waitpid(dies, 0)[1] == 0
    assert os.read(heard, 1) == b"!"
    with alone_in(tmp_path):
        pass
    os.close(write)


def status_of_child(act):
    """How a forked child ends (os.waitstatus_to_exitcode) after `act`, which a process inside of a run does."""
    run = SimpleNamespace(stop_requested=False)
    with stopped_by_signals(), stops_gently(run, print):
        if not (child := os.fork()):
            act()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


EXITS = """
import os
from grpo.guards import no_happy_exit
with no_happy_exit():
    if (child := os.fork()) == 0:
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
{where}os._exit({status})
"""


@pytest.mark.parametrize(("where", "status", "code"), [("    ", 0, 2), ("    ", 5, 5), ("", 0, 0)])
def test_an_exit_that_would_be_a_success_is_none_inside_of_a_run(where, status, code):
    script = EXITS.format(where=where, status=status)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "0\n")
    assert ("error: Something that the run calls has ended it by os._exit(0)." in done.stderr) == (code == 2)


def raises(number, times):
    return lambda: [os.kill(os.getpid(), number) for _ in range(times)]


def test_a_forked_child_dies_of_the_signal_that_pools_end_their_processes_with():
    assert status_of_child(raises(signal.SIGTERM, 1)) == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_forked_child_lets_the_step_finish_when_the_run_is_to_stop(number):
    assert status_of_child(raises(number, 1)) == 0


def test_a_forked_child_heeds_the_second_signal():
    def second_interrupt():
        with pytest.raises(KeyboardInterrupt):
            raises(signal.SIGINT, 2)()

    assert status_of_child(second_interrupt) == 0
    assert status_of_child(raises(signal.SIGHUP, 2)) == -signal.SIGHUP


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (dict(temperature=1e-40), "temperature is 1e-40. Use 0.0001 or more."),
        (dict(lora_alpha=1e300), "lora_alpha is 1e+300"),
        (dict(lora_alpha=1e-300), "lora_alpha is 1e-300"),
        (dict(learning_rate=1e30), "learning_rate is 1e+30. Use at most 1,000."),
        (dict(clip_high=1e300), "clip_high is 1e+300"),
        (dict(prompts_per_step=10**9), "prompts_per_step is 1000000000"),
        (dict(prompts_per_step=10**5, group_size=10**5), "completions a step"),
        (dict(steps=10**12), "steps is"),
        (dict(steps=10**5000), "a number of 5000 digits"),
        (dict(data="a\0b"), "NUL"),
        (dict(model=""), "model is ''. Give a name, a folder, or embedded."),
    ],
)
def test_numbers_beyond_the_machine_are_refused(values, told):
    with pytest.raises(UserError) as caught:
        Config(**values)
    assert told in str(caught.value)


def test_paths_of_the_run_that_cannot_be(tmp_path, capsys):
    path = tmp_path / "toy.py"
    path.write_text(TASK.format(rewards="{says: 1.0}", extra=""))
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", Path("/proc/run"), tmp_path / ("x" * 300)):
        assert main([str(path), *SMALL, "--run-dir", str(place)]) == 2
        error = capsys.readouterr().err
        assert "Choose another --run-dir" in error or "File name too long" in error
