"""A reward changes nothing for anybody else: neither the process, nor what others draw at random, nor the screen."""

import asyncio
import os
import random
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo.errors import Stopped
from grpo.generators import reader
from grpo.guards import stops_gently
from grpo.rewards import build_rewards, kept, score
from grpo.rewards.draws import Draws, apart
from grpo.rewards.failures import Tolerance
from grpo.rewards.kept import LARGEST_HELD, Held, Log, printed_to
from grpo.rewards.scoring import Scorer
from grpo.types import Completion, Group, Prompt

read = reader(torch.device("cpu"))


def group_of(*texts):
    return Group(Prompt(7, "?", [1], {}), [Completion([1], [0.0], text, "stop", 0) for text in texts])


def scorer(*rewards, log, timeout=60.0, draws=None):
    built = build_rewards(dict.fromkeys(rewards, 1.0), [], chat=False, timeout=timeout)
    return Scorer(built, Tolerance(1.0), partial(apart, draws or Draws(read), Log(log)))


def process():
    return {
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "socket": socket.getdefaulttimeout(),
        "recursion": sys.getrecursionlimit(),
        "made": (torch.zeros(1).dtype, torch.zeros(1).device, torch.is_grad_enabled(), torch.get_num_threads()),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
    }


CHANGES = {
    "chdir": lambda: os.chdir("/"),
    "environment": lambda: (os.environ.update(GRPO_NEW="1", HOME="/nowhere"), os.environ.pop("PATH")),
    "handlers": lambda: [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
    "alarm": lambda: (signal.signal(signal.SIGALRM, lambda *given: 1 / 0), signal.alarm(100)),
    "streams": lambda: [setattr(sys, name, None) for name in ("stdin", "stdout", "stderr")],
    "socket": lambda: socket.setdefaulttimeout(1.0),
    "recursion": lambda: sys.setrecursionlimit(5000),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
    "gradients": lambda: torch.set_grad_enabled(False),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "generators": lambda: (random.seed(1), np.random.seed(1), torch.manual_seed(1), random.random(), torch.rand(3)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["plain", "late", "fails", "async"])
def test_everything_is_as_before(name, kind, tmp_path):
    def plain(completion):
        CHANGES[name]()
        return 1.0

    def fails(completion):
        CHANGES[name]()
        raise ValueError

    def late(completion):
        CHANGES[name]()
        while True:
            pass

    async def asynchronous(completion):
        # Python refuses the first two outside of its main thread, and the others are a thread's own.
        if name not in ("handlers", "alarm", "device", "gradients"):
            CHANGES[name]()
        return 1.0

    reward = {"plain": plain, "fails": fails, "late": late, "async": asynchronous}[kind]
    call = scorer(reward, log=tmp_path / "log", timeout=0.05 if kind == "late" else 60.0)
    before = process()
    call([group_of("a")])
    assert process() == before


def test_a_call_finds_what_the_one_before_it_found(tmp_path):
    seen = []

    def changes(completion):
        seen.append((os.getcwd(), os.environ.get("GRPO_NEW"), torch.get_default_dtype()))
        for change in ("chdir", "environment", "dtype"):
            CHANGES[change]()
        return 1.0

    score([group_of("a", "b")], build_rewards({changes: 1.0}, [], chat=False))
    assert seen == [(os.getcwd(), None, torch.float32)] * 2


def test_a_second_ctrl_c_stops_at_once_also_where_the_first_came_during_a_reward(tmp_path):
    run = SimpleNamespace(stop_requested=False)

    def asks(completion):
        signal.raise_signal(signal.SIGINT)
        return 1.0

    with stops_gently(run, lambda told: None):
        scorer(asks, log=tmp_path / "log")([group_of("a")], 0)
        assert run.stop_requested
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)


def test_rewards_draw_from_generators_of_their_own(tmp_path):
    def draws(completion):
        return random.random() + float(np.random.rand()) + float(torch.rand(()))

    def seeds(completion):
        random.seed(5)
        return 0.0

    def paid(others, *rewards):
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        call, got = scorer(*rewards, log=tmp_path / "log"), []
        for _ in range(3):
            group = group_of("a", "b")
            call([group], 0)
            got += group.parts["draws"].tolist()
            others()
        return got

    alone = paid(lambda: None, draws)
    assert len(set(alone)) == 6
    assert paid(lambda: (random.random(), torch.rand(5), np.random.seed(8)), draws) == alone
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert alone == pytest.approx([draws("a") for _ in range(6)])  # what they drew before they had their own
    assert len({round(each, 6) for each in paid(lambda: None, draws, seeds)}) == 6  # of three generators one is seeded


def test_what_was_drawn_before_an_error_does_not_count(tmp_path):
    def draws(completion):
        return random.random() if completion else 1 / 0

    generators = Draws(read)
    state = generators.state.python
    call = Scorer(
        build_rewards({draws: 1.0}, [], chat=False), Tolerance(0.0), partial(apart, generators, Log(tmp_path / "log"))
    )
    with pytest.raises(Exception, match="division by zero"):
        call([group_of("a", "")])
    assert generators.state.python == state
    call([group_of("a")])
    assert generators.state.python != state


def test_what_rewards_print_goes_to_a_file_and_not_to_the_screen(tmp_path, capfd):
    log = tmp_path / "rewards.log"

    def prints(completion):
        print("seen", completion)
        print("\ud800 half a letter", file=sys.stderr)
        return 1.0

    async def prints_later(completion):
        await asyncio.sleep(0)
        print("later")
        return 1.0

    def silent(completion):
        return 1.0

    scorer(silent, log=log)([group_of("a")], 0)
    assert not log.exists()
    scorer(prints, prints_later, log=log)([group_of("a", "b")], 0)
    text = log.read_text()
    for words in ("seen a\n", "seen b\n", "\\ud800 half a letter", "later\n"):
        assert words in text
    assert capfd.readouterr() == ("", "")
    print("again on the screen")
    assert capfd.readouterr().out == "again on the screen\n"


def test_before_there_is_a_file_the_last_of_what_is_printed_is_held():
    held = Held()
    with printed_to(held):
        for number in range(300_000):
            print("line", number)
    assert held.getvalue().endswith("line 299998\nline 299999\n")
    assert LARGEST_HELD / 2 <= len(held.getvalue()) <= 2 * LARGEST_HELD


@pytest.mark.parametrize("log", [Held, lambda: Log(Path("/nowhere/log"))])
def test_a_reward_that_closes_the_output_does_not_end_the_run(log):
    into = log()
    with printed_to(into):
        print("before")
        sys.stdout.close()
        print("after", flush=True)
    with printed_to(into):
        print("in the next call")
    assert log is not Held or into.getvalue() == "before\nafter\nin the next call\n"


def test_lines_of_threads_stay_whole(tmp_path):
    path = tmp_path / "rewards.log"
    log, turns = Log(path), threading.Barrier(2)

    def prints(word):
        for _ in range(3):
            log.write(word)
            turns.wait()
            log.write("\n")
            turns.wait()

    threads = [threading.Thread(target=prints, args=(word,)) for word in ("one", "two")]
    with printed_to(log):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("no end", end="")
        print(" yet", end="", flush=True)
    assert sorted(path.read_text().splitlines()) == ["no end yet", *["one"] * 3, *["two"] * 3]


def test_a_log_that_cannot_be_written_fails_no_reward(tmp_path, monkeypatch):
    def prints(completion):
        print("seen", completion)
        return 1.0

    group = group_of("a")
    scorer(prints, log=tmp_path / "gone" / "rewards.log")([group])
    assert group.rewards.tolist() == [1.0]
    monkeypatch.setattr(kept, "LARGEST_LOG", 10)
    scorer(prints, log=tmp_path / "rewards.log")([group_of("abc", "def")], 0)
    assert (tmp_path / "rewards.log").read_bytes() == b"seen abc\nse"[:10]


def test_every_failure_is_in_the_log(tmp_path):
    def fails(completion):
        raise ValueError(f"not {completion}")

    log, told = Log(tmp_path / "rewards.log"), []
    score([group_of("a", "b")], build_rewards({fails: 1.0}, [], chat=False), Tolerance(1.0, told.append, log.write))
    text = (tmp_path / "rewards.log").read_text()
    assert len(told) == 1
    assert text.count("Traceback") == 2
    assert "ValueError: not b" in text
