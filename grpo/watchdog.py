"""Watchdog: ends a call that takes too long, whatever it does. Knows only calls and sentences, not what is called.

A call may loop in Python, wait, or hold the interpreter in C (a regular expression, a power of large integers); it may
catch every exception, and libraries like math_verify take SIGALRM for themselves. So it is watched from outside: a
child process (this file, run as a script, without anything else of the package) reads in shared memory what is being
called and by when it must be over, and

    when the time is up    sends SIGNAL, again every second, whose handler raises TimeIsUp in the thread of the late
                           call; that ends Python, waiting and regular expressions, and the run ends by its own sentence
    after GRACE more       writes the sentence itself and kills the process, because nothing else ends a call that still
                           runs then; what the last checkpoint holds is there
    when the process dies  writes what was being called: after os._exit() or a crash nobody else can say it

Where there is no such child (Windows), a thread raises TimeIsUp: C code and what catches everything are not ended.
A call costs a few writes to memory, no system call. Copies of the process that a reward forks are not watched.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

GRACE = 5.0  # seconds that a late call gets to end by an exception
# Of the real-time signals, which nobody uses by default; where there are none (macOS), the second for users.
SIGNAL = signal.SIGRTMAX - 1 if hasattr(signal, "SIGRTMAX") else getattr(signal, "SIGUSR2", 0)
HAS_FORK = hasattr(os, "fork")  # and what comes with it: a child that is given open files
_TICK = 0.1  # seconds between two looks
_BETWEEN_SIGNALS = 1.0  # seconds, so that a call can clean up

# The shared memory: a page with advice, then a page for each call that is under way at the same time.
_PAGE, _NUM_CALLS = 2048, 64
_MOST_CHARACTERS = 160  # of each of a call's three texts, of 4 bytes at most
_CALL = struct.Struct("dI")  # monotonic time by when it must be over, 0 for no call; bytes of its texts
_TEXT = struct.Struct("I")  # bytes of the advice


class TimeIsUp(BaseException):
    """Raised inside of a late call. No Exception, because a call may turn any of those into a result."""


@dataclass(frozen=True)
class Limit:
    """The time that calls of a kind may take.

    name    what sets it, in words
    remedy  what to do about a call that nothing interrupts, a sentence
    """

    seconds: float
    name: str
    remedy: str

    @property
    def exceeded(self) -> str:
        """What a late call gave, in words."""
        return f"no result in {self.seconds:g} s, {self.name}"


class Watch:
    """A call that is watched: where it runs, and by when it must be over."""

    def __init__(self, thread: int | None, limit: Limit, offset: int):
        self.thread = thread  # where TimeIsUp is raised; None: nowhere
        self.seconds = limit.seconds
        self.deadline = time.monotonic() + limit.seconds
        self.offset = offset  # of its page
        self.is_over = False
        self.has_rung = False


class Watchdog:
    """The child process, and what we tell it.

    Raises:
        OSError: the child cannot be started.
    """

    def __init__(self, advice: str) -> None:
        self.pid = os.getpid()
        takes_signals = HAS_FORK and self._take_signals()
        with tempfile.TemporaryFile() as file:
            file.truncate(_PAGE * (1 + _NUM_CALLS))
            self.memory = mmap.mmap(file.fileno(), 0)
            self.advise(advice)
            self.child = _child(file.fileno(), self.pid, takes_signals) if HAS_FORK else None
        self.free = [_PAGE * (1 + number) for number in range(_NUM_CALLS)]
        self.watches: dict[int, Watch] = {}  # by offset
        if not takes_signals:
            threading.Thread(target=self._ring_for_ever, name="grpo-watchdog", daemon=True).start()

    def call(self, limit: Limit, what: str, function: Callable, arguments: dict[str, Any]) -> Any:
        """function(**arguments), which must be back in time; `what` it is, in words.

        Raises:
            TimeoutError: it was not, whatever it made of the exception.
        """
        watch = self.show(threading.get_ident(), limit, what)
        returned = None
        try:
            try:
                with suppress(TimeIsUp):
                    returned = function(**arguments)
            finally:
                watch.is_over = True
                _take_breath()
        finally:
            self.hide(watch)
            if watch.has_rung:
                raise TimeoutError(limit.exceeded)
        return returned

    def show(self, thread: int | None, limit: Limit, what: str) -> Watch:
        """Watch a call that begins now, until it is hidden."""
        watch = Watch(thread, limit, self.free.pop())
        texts = (part.replace("\0", " ")[:_MOST_CHARACTERS] for part in (what, limit.exceeded, limit.remedy))
        text = "\0".join(texts).encode(errors="replace")
        # The text before the time, which makes it count.
        self.memory[watch.offset + _CALL.size : watch.offset + _CALL.size + len(text)] = text
        _CALL.pack_into(self.memory, watch.offset, watch.deadline, len(text))
        self.watches[watch.offset] = watch
        return watch

    def beat(self, watch: Watch) -> None:
        """It is not late yet: count its seconds from now."""
        watch.deadline = time.monotonic() + watch.seconds
        struct.pack_into("d", self.memory, watch.offset, watch.deadline)

    def hide(self, watch: Watch) -> None:
        """The call is over."""
        struct.pack_into("d", self.memory, watch.offset, 0.0)
        del self.watches[watch.offset]
        self.free.append(watch.offset)

    def advise(self, text: str) -> None:
        """What the child adds to its sentences."""
        encoded = text.encode(errors="replace")[: _PAGE - _TEXT.size]
        self.memory[_TEXT.size : _TEXT.size + len(encoded)] = encoded
        _TEXT.pack_into(self.memory, 0, len(encoded))

    def is_alive(self) -> bool:
        """The child is there."""
        return self.child is None or self.child.poll() is None

    def close(self) -> None:
        """End the child."""
        if self.child and os.getpid() == self.pid:
            self.child.kill()
            self.child.wait()

    def _take_signals(self) -> bool:
        # Python handles signals in its main thread, and has them set there alone.
        if threading.current_thread() is not threading.main_thread():
            return False
        signal.signal(
            SIGNAL, lambda number, frame: _watchdog and _watchdog._ring()
        )  # that of now, not this one for ever
        return True

    def _ring_for_ever(self) -> None:
        while True:
            time.sleep(_BETWEEN_SIGNALS)
            self._ring()

    def _ring(self) -> None:
        """Raise TimeIsUp in the thread of every late call, this one last."""
        late_here = False
        for watch in list(self.watches.values()):
            if watch.thread is None or watch.is_over or time.monotonic() < watch.deadline:
                continue
            watch.has_rung = True
            if watch.thread == threading.get_ident():
                late_here = True
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(watch.thread), ctypes.py_object(TimeIsUp))
        if late_here:
            raise TimeIsUp


def _child(descriptor: int, parent: int, takes_signals: bool) -> subprocess.Popen:
    """This file as a process of its own, beside `parent`, with the memory of that descriptor."""
    given = map(str, (descriptor, parent, GRACE, int(takes_signals)))
    command = [sys.executable, "-I", "-S", __file__, *given]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[descriptor])


def _take_breath() -> None:
    """Where an exception that was raised from another thread comes in at the latest: Python looks when it enters."""


# ---- one watchdog for the process

_watchdog: Watchdog | None = None
_advice = ""


def watchdog() -> Watchdog:
    """That of this process, started when it is first asked for.

    Raises:
        OSError: it cannot be started, or ended by itself. One that was killed is replaced.
    """
    return _watchdog if _watchdog and _watchdog.is_alive() else _start_watchdog()


def _start_watchdog() -> Watchdog:
    global _watchdog
    if _watchdog is not None and _watchdog.child and (code := _watchdog.child.returncode) >= 0:
        raise OSError(f"it ended by itself, with exit code {code}")
    _watchdog = Watchdog(_advice)
    atexit.register(_watchdog.close)
    return _watchdog


def advise(text: str) -> None:
    """What to do when a call has ended the whole process, such as how to go on with the run."""
    global _advice
    _advice = text
    if _watchdog is not None:
        _watchdog.advise(text)


def _forget() -> None:
    """In a forked copy: neither watched, nor able to write into what the child process reads."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.memory = mmap.mmap(-1, len(_watchdog.memory))
    _watchdog = None


if HAS_FORK:
    os.register_at_fork(after_in_child=_forget)


# ---- the child process


# (offset of its page, monotonic time by when it must be over) -> what it is, what it gave if late, what to do then
Calls = dict[tuple[int, float], list[str]]


def _watch(descriptor: int, parent: int, grace: float, sends_signals: bool) -> None:
    """Look at the calls of the parent until it is gone."""
    memory = mmap.mmap(descriptor, 0)
    excused: dict[tuple[int, float], float] = {}  # seconds that do not count
    found_late: dict[tuple[int, float], float] = {}  # when, of the seconds that count
    rung: dict[tuple[int, float], float] = {}  # when it was last interrupted
    looked = time.monotonic()
    while True:
        parent_lives, calls, now = os.getppid() == parent, _calls(memory), time.monotonic()
        if not parent_lives:
            _tell_the_end(memory, calls)
            return
        # While both are stopped (Ctrl-Z), or it alone (a debugger), or the machine is too busy, no call computes.
        paused = now - looked > 1.0 or (bool(calls) and _is_stopped(parent))
        excused = {call: excused.get(call, 0.0) + (now - looked) * paused for call in calls}
        rung = {call: when for call, when in rung.items() if call in calls}
        found_late = {call: when for call, when in found_late.items() if call in calls}
        for call, texts in calls.items():
            clock = now - excused[call]
            if clock < call[1]:
                continue
            # From when we have seen it, for we may have been the one that was late.
            if clock > found_late.setdefault(call, clock) + grace:
                _end(memory, parent, *texts)
                return
            if sends_signals and now > rung.get(call, 0.0) + _BETWEEN_SIGNALS:
                rung[call] = now
                os.kill(parent, SIGNAL)
        looked = now
        time.sleep(_TICK)


def _calls(memory: mmap.mmap) -> Calls:
    """The calls that are under way."""
    calls: Calls = {}
    for offset in range(_PAGE, _PAGE * (1 + _NUM_CALLS), _PAGE):
        deadline, length = _CALL.unpack_from(memory, offset)
        if deadline:
            text = memory[offset + _CALL.size : offset + _CALL.size + length]
            calls[offset, deadline] = text.decode(errors="replace").split("\0")
    return calls


def _is_stopped(process: int) -> bool:
    """By a signal, or by a debugger. Where the system does not say it (macOS), it is not."""
    with suppress(OSError), open(f"/proc/{process}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    return False


def _tell_the_end(memory: mmap.mmap, calls: Calls) -> None:
    """The process is gone: if a call was under way, say so."""
    for what, *_ in calls.values():
        _say(
            memory,
            f"The run ended without a word during {what}: it called os._exit() or crashed Python, or the process was "
            "killed from outside, as the system does when memory runs out.",
        )


def _end(memory: mmap.mmap, parent: int, what: str, exceeded: str, remedy: str) -> None:
    """Say what is late, and end the process. From the end of this no `finally` of it runs."""
    _say(
        memory,
        f"{what[:1].upper()}{what[1:]} gave {exceeded}, and could not be interrupted, so the run was ended. {remedy}",
    )
    with suppress(ProcessLookupError):
        os.kill(parent, signal.SIGKILL)


def _say(memory: mmap.mmap, sentence: str) -> None:
    (length,) = _TEXT.unpack_from(memory)
    advice = memory[_TEXT.size : _TEXT.size + length].decode(errors="replace")
    with suppress(OSError):  # nobody may be there to read it
        # On a line of its own: a progress bar may stand in this one.
        os.write(2, f"\nerror: {sentence} {advice}".rstrip().encode(errors="replace") + b"\n")


if __name__ == "__main__":
    # What ends the run from the keyboard or by its group leaves us to see how it ends; we end with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    _watch(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "1")
