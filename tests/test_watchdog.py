"""A call that is late ends, whatever it does; a process that ends during a call leaves a sentence."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from grpo import watchdog
from grpo.errors import UserError
from grpo.folder import alone_in
from grpo.rewards import build_rewards

TIME = 0.05


def limit(seconds):
    return watchdog.Limit(seconds, "the time of a test", "Give it more time.")


def call(function, seconds=TIME, **arguments):
    return watchdog.watchdog().call(limit(seconds), "the call", function, arguments)


def endless():
    while True:
        pass


def wait():
    threading.Event().wait()


def sleep():
    time.sleep(1e6)


def match():
    re.fullmatch("(a+)+b", "a" * 60)


def catch():
    try:
        endless()
    except BaseException:
        return 1.0


def turn():
    try:
        endless()
    except BaseException as error:
        raise ValueError("mine") from error


def clean_up():
    try:
        endless()
    finally:
        return 1.0  # noqa: B012


def take_the_alarm():
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    endless()


@pytest.fixture
def alarm():
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("function", [endless, wait, sleep, match, catch, turn, clean_up, take_the_alarm])
def test_a_late_call_is_a_time_out_whatever_it_makes_of_it(function):
    with pytest.raises(TimeoutError, match=r"no result in 0.05 s, the time of a test"):
        call(function)


def test_a_call_in_time_gives_its_result_or_its_own_exception():
    dog = watchdog.watchdog()
    before = dict(dog.watches)  # a call that never returns, of another test's thread, is watched for good
    assert call(lambda a, b: (a, b), 60.0, a=1, b=2) == (1, 2)
    with pytest.raises(ZeroDivisionError):
        call(lambda: 1 / 0, 60.0)
    with pytest.raises(TimeoutError, match="mine"):
        call(lambda: (_ for _ in ()).throw(TimeoutError("mine")), 60.0)
    assert (dog.watches, len(dog.free)) == (before, len(set(dog.free)))


def test_calls_in_other_threads_are_interrupted_too():
    outcomes = []

    def thread(function):
        try:
            outcomes.append(call(function))
        except TimeoutError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=thread, args=(function,)) for function in (endless, catch, lambda: "in time")]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(outcomes) == ["in time", *["no result in 0.05 s, the time of a test"] * 2]


def test_a_watchdog_that_was_killed_is_replaced():
    first = watchdog.watchdog()
    first.child.kill()
    first.child.wait()
    with pytest.raises(TimeoutError):
        call(endless)
    assert watchdog.watchdog().child.pid != first.child.pid


def test_a_watchdog_that_cannot_run_is_told(monkeypatch):
    monkeypatch.setattr(watchdog, "_watchdog", None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    watchdog.watchdog().child.wait()
    with pytest.raises(UserError, match=r"it ended by itself, with exit code 1. .* --reward-timeout 0"):
        build_rewards({"grpo.rewards:exact_match": 1.0}, ["answer"], chat=False, timeout=60.0)
    monkeypatch.setattr(watchdog, "_watchdog", None)
    monkeypatch.setattr(sys, "executable", "/there/is/no/python")
    with pytest.raises(UserError, match="The process that watches how long rewards take cannot be started"):
        build_rewards({"grpo.rewards:exact_match": 1.0}, ["answer"], chat=False, timeout=60.0)


def test_long_texts_and_many_calls_have_room():
    dog = watchdog.watchdog()
    shown = [dog.show(None, limit(60.0), "\N{SNOWMAN}" * 5000) for _ in range(len(dog.free))]
    for watch in shown:
        dog.hide(watch)
    assert call(lambda: 5, 60.0) == 5


SCRIPT = """
import itertools, os, signal, sys, threading
from grpo import watchdog

watchdog.GRACE = 0.2

def catch_for_ever():
    while True:
        try:
            signal.pause()
        except BaseException:
            pass

def hold_the_interpreter():
    max(itertools.repeat(1))

def leave():
    os._exit(5)

def crash():
    os.kill(os.getpid(), signal.SIGKILL)

def come_back():
    return 1

def call(name):
    limit = watchdog.Limit({seconds}, "the limit", "Give it more time.")
    watchdog.watchdog().call(limit, "reward `%s` on row 7" % name, globals()[name], {{}})

watchdog.advise("Go on there.")
{body}
"""


def run_script(body, seconds=0.1):
    script = SCRIPT.format(body=body, seconds=seconds)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["catch_for_ever", "hold_the_interpreter"])
@pytest.mark.parametrize("body", ["call({name!r})", "threading.Thread(target=call, args=[{name!r}]).start()"])
def test_what_cannot_be_interrupted_is_ended_with_a_sentence(name, body):
    done = run_script(body.format(name=name))
    assert done.returncode == -signal.SIGKILL
    assert f"error: Reward `{name}` on row 7 gave no result in 0.1 s, the limit, and could not" in done.stderr
    assert done.stderr.endswith("Give it more time. Go on there.\n")


@pytest.mark.parametrize(("name", "code"), [("leave", 5), ("crash", -signal.SIGKILL)])
def test_a_process_that_ends_during_a_call_leaves_a_sentence(name, code):
    done = run_script(f"call({name!r})", seconds=60)
    assert done.returncode == code
    assert f"error: The run ended without a word during reward `{name}` on row 7: it called os._exit()" in done.stderr
    assert done.stderr.endswith("Go on there.\n")


def test_a_process_that_ends_between_calls_leaves_nothing():
    done = run_script("call('come_back'); leave()", seconds=60)  # it returns when the child process is gone too
    assert (done.returncode, done.stderr) == (5, "")


def test_a_forked_copy_that_outlives_the_run_does_not_keep_its_folder(tmp_path):
    is_there, says_so = os.pipe()
    with alone_in(tmp_path):
        copy = os.fork()
        if copy == 0:
            os.write(says_so, b"x")
            signal.pause()
        os.read(is_there, 1)
    try:
        with alone_in(tmp_path):
            pass
    finally:
        os.kill(copy, signal.SIGKILL)
        os.waitpid(copy, 0)


def test_a_forked_copy_writes_nothing_that_the_watchdog_reads():
    dog = watchdog.watchdog()
    watch = dog.show(None, limit(60.0), "the call")
    copy = os.fork()
    if copy == 0:
        dog.hide(watch)
        os._exit(0)
    assert os.waitpid(copy, 0)[1] == 0
    [texts] = watchdog._calls(dog.memory).values()
    assert texts == ["the call", "no result in 60 s, the time of a test", "Give it more time."]
    dog.hide(watch)
    assert watchdog._calls(dog.memory) == {}
