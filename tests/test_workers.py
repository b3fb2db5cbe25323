"""Rewards in worker processes: what hangs is ended alone, what cannot go there stays, and the numbers are the same."""

import functools
import itertools
import json
import os
import pickle
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from toy_task import SMALL, TASK

from grpo.errors import UserError
from grpo.rewards import Scorer, build_rewards, reward, score
from grpo.rewards.failures import Tolerance
from grpo.rewards.samples import Logged
from grpo.rewards.staff import num_cores, placed, staffed
from grpo.rewards.values import fit_one
from grpo.rewards.worker import Order, Setup
from grpo.rewards.workers import Pool, Printed, Worker, portable
from grpo.run import main
from grpo.types import Completion, Group, Prompt

REWARDS = """
import itertools, os, random, re, signal, socket, sys, time

LIMIT = 1

def hangs(completion, folder):
    globals().get(completion, len)(folder)
    return float(len(completion))

def loop(folder):
    while True:
        pass

def sleep(folder):
    time.sleep(1e6)

def wait_for_socket(folder):
    ours, theirs = socket.socketpair()
    ours.recv(1)

def regex(folder):
    re.fullmatch("(a+)+b", "a" * 60)

def fork(folder):
    child = os.fork()
    if child == 0:
        signal.pause()
    with open(os.path.join(folder, "child"), "w") as file:
        file.write(str(child))
    os.waitpid(child, 0)

def memory(folder):
    held = []
    while True:
        held.append(bytes(2**26))

def leave(folder):
    os._exit(3)

def recursion(folder):
    return recursion(folder)

def crash(folder):
    os.kill(os.getpid(), signal.SIGSEGV)

def hold_the_interpreter(folder):
    max(itertools.repeat(1))

def catch_everything(folder):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            loop(folder)
        except BaseException:
            pass

def close_all(folder):
    os.closerange(0, 256)
    loop(folder)

def alarm(folder):
    signal.setitimer(signal.ITIMER_REAL, 0.01)

def exit_by_exception(folder):
    raise SystemExit(0)

def ctrl_c(folder):
    raise KeyboardInterrupt

class Own(Exception):
    def __reduce__(self):
        raise RuntimeError("cannot be pickled")

def own(folder):
    raise Own("mine")

def length(completion, answer):
    return {"length": len(completion), "answer": float(answer)}

def batch(prompts, completions, answer, log_metric, log_extra, **kwargs):
    log_extra("letters", list(map(len, completions)))
    log_metric("longest", max(map(len, completions)))
    return [float(len(completion)) / len(completions) for completion in completions]

def draws(completion):
    return random.random()

class Judge:
    def __init__(self, bonus):
        self.bonus = bonus

    def __call__(self, completion):
        return self.bonus + (len(completion) if completion else None or 0)

def where(completion):
    return float(os.getpid())

def shows(completion):
    print("seen", completion)
    os.system("echo from a process")
    return 1.0

def floods(completion):
    for _ in range(10):
        print("x" * 99_999)
        os.system("head -c 1000000 /dev/zero")
    return 1.0

def asks_for_what_is_there(completion, thing):
    return 1.0
"""
LIMIT = 0.5


@pytest.fixture(scope="module")
def bring(tmp_path_factory):
    """The module of rewards, as it lies beside a task file."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "brought_rewards.py").write_text(REWARDS)
    sys.path.insert(0, str(folder))
    import brought_rewards

    yield brought_rewards
    sys.path.remove(str(folder))


def group_of(*texts, index=7, **fields):
    completions = [Completion([1], [0.0], text, "stop", 0) for text in texts]
    return Group(Prompt(index, "?", [1], {"answer": 5, **fields}), completions)


def build(*functions, columns=("answer",), timeout=60.0, **arguments):
    return build_rewards(dict.fromkeys(functions, 1.0), columns, chat=False, timeout=timeout, **arguments)


def scored(rewards, groups, asked=2, log=None):
    """In so many workers: (what score gave, the tolerance, what was noted)."""
    notes, tolerance = [], Tolerance(1.0)
    with staffed(rewards, asked, 64, log, notes.append) as with_workers:
        metrics = score(groups, with_workers, tolerance)
    return metrics, tolerance, notes


HANGS = {
    "loop": "TimeoutError (no result in 0.5 s",
    "sleep": "TimeoutError",
    "wait_for_socket": "TimeoutError",
    "regex": "TimeoutError",
    "fork": "TimeoutError",
    "memory": "MemoryError",
    "leave": "ended its process (exit code 3)",
    "recursion": "RecursionError",
    "crash": "ended its process (SIGSEGV)",
    "hold_the_interpreter": "TimeoutError",
    "catch_everything": "TimeoutError",
    "close_all": "ended its process|TimeoutError",
    "exit_by_exception": "SystemExit",
    "ctrl_c": "KeyboardInterrupt",
    "own": "Own (mine)",
}


@pytest.mark.parametrize("kinds", [list(HANGS)[:8], pytest.param(list(HANGS)[8:], marks=pytest.mark.slow)])
def test_whatever_hangs_is_missing_and_the_rest_is_scored(kinds, bring, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.rewards.staff.memory_of_one", lambda: 1 << 29)
    (tmp_path / "child").write_text("0")
    texts = list(itertools.chain.from_iterable((name, "fine") for name in kinds))
    group = group_of(*texts, "alarm", "fine", "fine", folder=str(tmp_path))
    _, tolerance, notes = scored(build(bring.hangs, columns=["folder"], timeout=LIMIT), [group])
    assert notes == ["reward `hangs` is called in 2 worker processes"]
    why = group.failed["hangs"]
    assert sorted(why) == [2 * place for place in range(len(kinds))]
    for place, name in enumerate(kinds):
        assert any(word in why[2 * place] for word in HANGS[name].split("|")), (name, why[2 * place])
    assert group.rewards[1::2].tolist() == [4.0] * (len(kinds) + 1)
    assert tolerance.counted() == {"reward/hangs/failed": len(kinds)}
    child = int((tmp_path / "child").read_text())
    if child and Path(f"/proc/{child}").exists():  # what a late call has started is ended with it
        assert Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def test_the_numbers_are_those_of_the_runs_own_process(bring):
    def groups():
        return [group_of("a", "abc"), group_of("", "ab", "abcd", index=9)]

    def rewards():
        bound = functools.partial(bring.length, answer=2)
        bound.__name__ = "bound"
        return build(bring.length, bring.batch, bring.Judge(0.5), bound)

    here, there = groups(), groups()
    metrics = score(here, rewards())
    assert scored(rewards(), there, asked=3)[0] == metrics == {"logged/longest": 4.0}
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.rewards, other.rewards)
        assert one.extra == other.extra != {}
        assert {name: part.tolist() for name, part in one.parts.items()} == {
            name: part.tolist() for name, part in other.parts.items()
        }


def test_what_draws_at_random_draws_the_same_in_any_number_of_workers(bring):
    paid = []
    for asked in (1, 3):
        group = group_of(*"abcdefgh")
        scored(build(bring.draws), [group], asked)
        paid.append(group.rewards.tolist())
    assert paid[0] == paid[1]
    assert len(set(paid[0])) == 8


def closure():
    def inside(completion):
        return 1.0

    return inside


def test_what_cannot_go_to_a_worker_stays_and_says_why(bring):
    in_main = functools.partial(bring.where)
    in_main.__name__, in_main.__module__ = "in_main", "__main__"
    loose = lambda completion: 1.0  # noqa: E731
    loose.__name__ = "loose"
    inside = closure()

    async def later(completion):
        return float(os.getpid())

    stays = reward(workers=0)(functools.partial(bring.where))
    stays.__name__ = "stays"
    fields = {"thing": threading.Lock()}
    rewards = build(
        bring.where, loose, inside, in_main, later, stays, bring.asks_for_what_is_there,
        columns=["answer", "thing"], probe=(group_of("a", **fields).prompt, "a"),
    )  # fmt: skip
    group = group_of("a", "b", **fields)
    _, _, notes = scored(rewards, [group], asked=1)
    assert group.failed == {}
    assert (group.parts["where"] != float(os.getpid())).all()
    assert group.parts["stays"].tolist() == group.parts["in_main"].tolist() == group.parts["later"].tolist()
    told = "\n".join(notes)
    assert "`loose` is called in the run's own process: it is made inside of a function: define it at the top" in told
    assert "`inside` is called in the run's own process" in told
    assert "`in_main` is called in the run's own process: it is defined in the script that was started" in told
    assert "its argument `thing` cannot be sent to another: TypeError" in told
    assert "`stays`" not in told and "`later`" not in told
    assert notes[-1] == "reward `where` is called in 1 worker process"


def test_slow_ones_go_to_workers_unasked_and_fast_ones_stay(bring):
    rewards = build(bring.where, bring.draws, bring.Judge(1.0), bring.length)
    rewards[1].pace.seconds.append(0.1)  # x 64 in a step
    rewards[2].pace.seconds.append(1e-5)
    rewards[3].pace.seconds.extend([20.0, 1e-5, 1e-5])  # its first call loads something
    for asked, moved in ((-1, {"draws"}), (0, set()), (1, {"where", "draws", "Judge", "length"})):
        notes = scored(rewards, [group_of("a")], asked)[2]
        assert {name for note in notes for name in re.findall("`(.*)` is called in . worker", note)} == moved
    # A resumed run calls them where it did before, whatever is measured now.
    before = {"where": "elsewhere", "draws": "here"}
    with staffed(rewards, -1, 64, None, print, before) as resumed:
        assert placed(resumed) == {"where": "elsewhere", "draws": "here", "Judge": "here", "length": "here"}
    big = bring.Judge(1.0)
    big.model = bytes(2 << 20)
    [heavy] = build(big)
    heavy.pace.seconds.append(0.1)
    assert "it holds 2 MiB, which each worker would hold too" in scored([heavy], [group_of("a")], -1)[2][0]
    assert "worker process" in scored([heavy], [group_of("a")], 1)[2][0]
    reward(workers=1)(big)
    assert "in 1 worker process" in scored(build(big), [group_of("a")], -1)[2][0]


@pytest.mark.slow
def test_what_took_too_long_here_is_called_in_workers_from_then_on(bring, tmp_path):
    stays = reward(workers=0)(functools.partial(bring.hangs))
    stays.__name__ = "stays"
    for asked, moved in ((-1, {"hangs"}), (0, set())):
        inside = closure()
        rewards = build(bring.hangs, stays, inside, bring.where, columns=["folder"], timeout=LIMIT)
        notes, tolerance = [], Tolerance(1.0)
        with staffed(rewards, asked, 64, None, notes.append) as staff:
            assert set(staff.placed.values()) == {"here"}
            scorer = Scorer(staff, tolerance, move=staff.move)
            groups = [group_of("fine", "sleep", folder=str(tmp_path)) for _ in range(3)]
            for group in groups:
                scorer([group])
            assert {name for name, where in staff.placed.items() if where == "elsewhere"} == moved
        for group in groups:
            assert group.rewards.nan_to_num(-1).tolist()[1] == -1
            assert "no result in 0.5 s" in group.failed["hangs"][1] and "no result in 0.5 s" in group.failed["stays"][1]
        assert [note for note in notes if "took too long" not in note] == [
            f"reward `{name}` is called in {max(2, min(8, num_cores() - 1))} worker processes" for name in sorted(moved)
        ]
    # What cannot go there stays, and says why; what raises a TimeoutError of its own was not late.
    [late] = build(closure_that(lambda: time.sleep(60)), timeout=LIMIT)
    [own] = build(closure_that(lambda: (_ for _ in ()).throw(TimeoutError("of its own"))), timeout=LIMIT)
    for built, told in ((late, ["it is made inside of a function"]), (own, [])):
        notes = []
        with staffed([built], -1, 64, None, notes.append) as staff:
            tolerance = Tolerance(1.0)
            for _ in range(2):
                Scorer(staff, tolerance, move=staff.move)([group_of("a")])
        assert [words for words in told if words in notes[0]] == told and len(notes) == len(told)


def closure_that(acts):
    def inside(completion):
        acts()
        return 1.0

    return inside


def test_so_many_workers_call_it_as_it_says(bring):
    bring.where.__dict__.pop("__grpo_reward__", None)
    reward(workers=1)(bring.where)
    group = group_of(*"abcdefgh")
    _, _, notes = scored(build(bring.where), [group], 3)
    del bring.where.__dict__["__grpo_reward__"]
    assert notes == ["reward `where` is called in 1 worker process"]
    assert not group.failed


def test_what_they_print_is_in_the_log(bring, tmp_path, capfd):
    log = tmp_path / "rewards.log"
    scored(build(bring.shows), [group_of("a", "b")], asked=1, log=log)
    assert log.read_text().splitlines() == ["seen a", "from a process", "seen b", "from a process"] or sorted(
        log.read_text().split()
    ) == sorted("seen a from a process seen b from a process".split())
    assert capfd.readouterr() == ("", "")


def test_what_they_print_is_bounded_also_what_they_have_started(bring, tmp_path):
    log, setup = (
        tmp_path / "rewards.log",
        Setup({"floods": portable(bring.floods)}, {}, os.getcwd(), 1 << 31, os.getpid()),
    )
    printed = Printed(log, most=100_000)
    worker = Worker(setup, printed)
    order = Order("floods", fit_one, 1, pickle.dumps((Logged(), {"completion": "a"})), 0)
    assert worker.ask(order, 60).scores == [1.0]
    worker.end()
    assert log.stat().st_size == 100_000
    worker = Worker(setup, Printed(tmp_path / "no folder" / "log"))
    assert worker.ask(order, 60).scores == [1.0]
    worker.end()


def test_a_worker_scores_by_the_file_as_it_was_when_the_run_began(tmp_path, monkeypatch):
    text = "import os\ndef mine(completion):\n    return os._exit(1) if completion == 'leave' else 1.0\n"
    (tmp_path / "edited_rewards.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import edited_rewards

    group = group_of("a", "leave", "b", "c")
    with staffed(build(edited_rewards.mine), 1, 64, None, print) as rewards:
        (tmp_path / "edited_rewards.py").write_text("def mine(completion):\n    return 5.0\n")
        score([group], rewards, Tolerance(1.0))
    assert group.rewards.nan_to_num(9).tolist() == [1.0, 9.0, 1.0, 1.0]


def test_a_task_that_cannot_be_imported_again_stays_or_is_told(tmp_path, monkeypatch):
    (tmp_path / "once_rewards.py").write_text(
        "import os\nif os.environ.get('ONCE'): raise RuntimeError('again')\ndef mine(completion):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("ONCE", raising=False)
    import once_rewards

    monkeypatch.setenv("ONCE", "1")
    _, _, notes = scored(build(once_rewards.mine), [group_of("a")], 1)
    assert "a worker that imports it gets RuntimeError (again)" in notes[0]
    with pytest.raises(UserError, match=r"No worker process for the rewards can be started.*--reward-workers 0"):
        monkeypatch.setattr(sys, "executable", "/bin/false")
        scored(build(once_rewards.mine), [group_of("a")], 1)


def test_when_the_pool_is_closed_its_processes_are_gone(bring):
    pool = Pool(2, Setup({"where": portable(bring.where)}, {}, os.getcwd(), 1 << 31, os.getpid()))
    [worker] = pool.workers
    assert worker.is_alive()
    pool.close()
    assert not worker.is_alive()


def test_a_scoring_that_fails_calls_nothing_more(bring, tmp_path):
    group = group_of(*["leave"] * 40, folder=str(tmp_path))
    with staffed(build(bring.hangs, columns=["folder"]), 1, 64, None, print) as rewards:
        with pytest.raises(UserError, match="ended its process"):
            score([group], rewards, Tolerance(0.0))
        # The next scoring is not behind what is left of that one.
        fine = group_of("fine", folder=str(tmp_path))
        score([fine], rewards, Tolerance(0.0))
    assert fine.rewards.tolist() == [4.0]


LIVES = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import brought_rewards
from grpo.rewards.worker import Setup
from grpo.rewards.workers import Pool, portable
pool = Pool(1, Setup({"where": portable(brought_rewards.where)}, {}, os.getcwd(), 1 << 31, os.getpid()))
print(next(iter(pool.workers)).process.pid, flush=True)
signal.pause()
"""


def test_workers_do_not_outlive_a_run_that_is_killed(bring):
    run = subprocess.Popen(
        [sys.executable, "-c", LIVES, str(Path(bring.__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    worker = int(run.stdout.readline())
    descriptor = os.pidfd_open(worker)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert select.select([descriptor], [], [], 60)[0]  # readable when the process is gone
    os.close(descriptor)


RUN = """
import time
def slow(completion, answer):
    if completion.startswith("<") and len(set(completion)) % 5 == 0:
        while True:
            pass
    return float(len(completion)) / 10
"""


def steps_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = ("time/", "speed/", "memory/")
    return [
        {key: value for key, value in line.items() if not key.startswith(timing)}
        for line in lines
        if "reward/mean" in line
    ]


@pytest.mark.slow
def test_a_run_with_hung_rewards_in_workers_ends_well_and_is_resumed_bit_for_bit(tmp_path, capsys):
    path = tmp_path / "toy.py"
    path.write_text(TASK.format(rewards="{letters: 1.0, slow: 1.0, says: 1.0}", extra=RUN))
    flags = [*SMALL, "--save-every", "2", "--reward-workers", "2", "--reward-timeout", "0.3"]
    flags += ["--max-reward-failures", "0.9"]
    for name, steps in (("whole", "4"), ("part", "2")):
        assert main([str(path), *flags, "--steps", steps, "--run-dir", str(tmp_path / name)]) == 0
    assert main(["--resume", str(tmp_path / "part"), "--steps", "4"]) == 0
    whole, part = steps_of(tmp_path / "whole"), steps_of(tmp_path / "part")
    assert whole == part
    assert sum(line.get("reward/slow/failed", 0) for line in whole) > 0
    out = capsys.readouterr().out
    assert "reward `letters` is called in 2 worker processes" in out
    assert "warning: `slow` failed on" in out


@pytest.mark.slow
def test_a_run_in_workers_is_the_run_in_its_own_process(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(
        TASK.format(
            rewards="{length: 1.0, says: 1.0}", extra="def length(completion):\n    return len(completion) / 10"
        )
    )
    for asked in ("0", "2"):
        flags = [*SMALL, "--steps", "3", "--reward-workers", asked, "--run-dir", str(tmp_path / asked)]
        assert main([str(path), *flags]) == 0
    assert steps_of(tmp_path / "0") == steps_of(tmp_path / "2")
