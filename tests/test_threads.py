"""How many threads a run computes with: asked for, kept, set by the user, or measured."""

import json

import pytest
import torch
from toy_task import SMALL, TASK

from grpo import threads
from grpo.run import main
from grpo.threads import candidates, choose, fastest, restored_threads


def no_step():
    raise AssertionError("nothing is to be measured")


@pytest.fixture
def unset(monkeypatch):
    """An environment that names no number of threads, and torch's own number as it is at the start."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with restored_threads():
        torch.set_num_threads(min((count for count in threads.usual() if count > 1), default=1))
        yield monkeypatch


def test_candidates_are_powers_of_two_and_all():
    assert [candidates(most) for most in (1, 2, 3, 4, 6, 64)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32, 64]]  # fmt: skip


@pytest.mark.parametrize(
    ("milliseconds", "count"),
    [
        ({1: 10, 2: 5, 4: 3}, 4),
        ({1: 10, 2: 100, 4: 400}, 1),
        ({1: 10, 2: 5, 4: 5}, 2),  # no gain: the fewer
        ({1: 10, 2: 9.5, 4: 9.2}, 1),  # noise is no gain
        ({1: 10, 2: 12, 4: 3}, 4),
    ],
)
def test_the_fastest_number_is_taken(milliseconds, count):
    """A clock that each step moves on by what it is said to take with torch's number of threads at that moment."""
    now = [0.0]

    def step():
        now[0] += milliseconds[torch.get_num_threads()] / 1000

    before = torch.get_num_threads()
    choice = fastest(list(milliseconds), step, lambda: now[0])
    assert choice.count == count
    assert f"{milliseconds[1]} ms with 1, " in choice.why and "--threads" in choice.why
    assert torch.get_num_threads() == before


def test_a_lucky_moment_decides_nothing():
    """Two threads on busy cores: now and then a step is as fast as on idle ones."""
    now, calls = [0.0], {1: 0, 2: 0}

    def step():
        count = torch.get_num_threads()
        calls[count] += 1
        now[0] += 0.030 if count == 1 else (0.010 if calls[2] % 3 == 0 else 0.300)

    assert fastest([1, 2], step, lambda: now[0]).count == 1


def test_a_slow_step_is_not_repeated_for_minutes():
    now, calls = [0.0], []

    def step():
        calls.append(1)
        now[0] += 20.0

    fastest([1, 2], step, lambda: now[0])
    assert len(calls) == 2 * threads.FEWEST_ROUNDS


def test_the_users_own_number_goes_before_measuring(unset):
    assert choose(3, 2, no_step).count == 3
    assert choose(0, 2, no_step).count == 2
    other = next(n for n in range(2, 100) if n not in threads.usual())
    torch.set_num_threads(other)
    assert (choose(0, 0, no_step).count, choose(0, 0, no_step).why) == (other, "what torch was set to before")
    unset.setenv("OMP_NUM_THREADS", "5")
    assert (choose(0, 0, no_step).count, choose(0, 0, no_step).why) == (other, "as OMP_NUM_THREADS says")


def threads_of(folder):
    last = max((folder / "checkpoints").glob("*/state.json"))
    return json.loads(last.read_text())["progress"]["threads"]


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    return [str(path), *SMALL, "--steps", "1", "--run-dir", str(tmp_path / "run")]


def test_a_run_measures_says_so_and_leaves_the_process_as_it_was(toy, tmp_path, unset, capsys):
    before = torch.get_num_threads()
    assert main([*toy, "--threads", "0"]) == 0
    chosen = threads_of(tmp_path / "run")
    assert 1 <= chosen <= before == torch.get_num_threads()
    told = "a step of the model takes" if before > 1 else "torch has no more"
    assert f"threads: {chosen} ({told}" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
def test_a_resumed_run_keeps_its_number(toy, tmp_path, unset, capsys):
    assert main([*toy, "--threads", "3"]) == 0
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "run"), "--threads", "0", "--steps", "2"]) == 0
    assert "threads: 3 (those that the run began with)" in capsys.readouterr().out
    assert threads_of(tmp_path / "run") == 3
    assert main(["--eval", str(tmp_path / "run"), "--threads", "0"]) == 0
    assert "threads: 3 (those that the run began with)" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["-1", "1000000"])
def test_numbers_that_cannot_be_are_told(toy, number, capsys):
    assert main([*toy, f"--threads={number}"]) == 2
    assert f"threads is {number}. Use" in capsys.readouterr().err
