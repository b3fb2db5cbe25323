"""grpo.chat as somebody meets it who sits at a terminal: a pseudo-terminal, keys, and what is shown on it then."""

import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from fcntl import ioctl

import pytest
from test_chat import strong  # noqa: F401  # a fixture

LONGEST = 90.0  # seconds that anything may take here


class Terminal:
    """A program on a terminal of so many columns."""

    def __init__(self, command, columns, **environment):
        process, self.descriptor = pty.fork()
        if not process:
            os.execve(
                sys.executable, [sys.executable, *command], {**os.environ, "TERM": "xterm-256color", **environment}
            )
        self.process, self.shown = process, ""
        ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def until(self, pattern):
        """Wait until this is shown; all that was shown before and with it."""
        end = time.monotonic() + LONGEST
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self.descriptor], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{pattern!r} never came: {self.shown[-2000:]!r}"
            try:
                read = os.read(self.descriptor, 65536)
            except OSError:  # it is gone
                read = b""
            assert read, f"it ended before {pattern!r}: {self.shown[-2000:]!r}"
            self.shown += read.decode(errors="replace")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, keys):
        os.write(self.descriptor, keys.encode())

    def interrupt(self):
        """Ctrl-C once a key is shown and the next one is waited for: a signal before that would wait for it too."""
        self.type("x")
        self.until("x")
        end = time.monotonic() + LONGEST
        while self.state() != "S":  # between showing a key and waiting for another, readline looks for no signal
            assert time.monotonic() < end, "it never waited for a key"
            os.sched_yield()
        self.type("\x03")

    def state(self):
        """R, S, D ...: what its main thread does now (proc(5))."""
        with open(f"/proc/{self.process}/task/{self.process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]

    def end(self):
        """The exit code, when it has ended."""
        while True:
            try:
                if not os.read(self.descriptor, 65536):
                    break
            except OSError:
                break
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        os.close(self.descriptor)
        return code


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "")


def sentences(text):
    """What was told, wherever its lines were broken: a path in it has another length on each machine."""
    return " ".join(plain(text).split())


def chat(folder, columns=120, *flags, **environment):
    command = ["-m", "grpo.chat", str(folder), "--max-completion-tokens", "24", "--temperature", "0", *flags]
    return Terminal(command, columns, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", **environment)


@pytest.mark.slow
def test_a_first_conversation(strong):  # noqa: F811
    there = chat(strong)
    greeting = sentences(there.until(r"> $"))
    assert "/temperature X" in greeting and "Temperature 0, at most 24 tokens" in greeting
    there.type("What is 3 + 4?\r")
    first = plain(there.until(r"tokens, (?:stopped by itself|cut off).*\][\s\S]*> $"))
    assert re.search(r"base.*trained", first)  # side by side on a wide terminal
    there.type("/temprature 1\r")
    assert "There is no /temprature here." in sentences(there.until(r"> $"))
    there.type("/temperature 0.7\r")
    assert "temperature 0.7" in sentences(there.until(r"> $"))
    there.type("\x1b[A\x1b[A\x1b[A\r")  # the prompt of before, by the arrow
    assert "What is 3 + 4?" in plain(there.until(r"tokens, (?:stopped by itself|cut off).*\][\s\S]*> $"))
    there.interrupt()
    assert "Ctrl-C again, or /quit" in sentences(there.until(r"> $"))
    there.type("/quit\r")
    assert there.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("way, code", [("end of input", 0), ("two interrupts", 130)])
def test_the_ways_out_of_it_on_a_narrow_terminal_without_colours(way, code, strong):  # noqa: F811
    there = chat(strong, 80, NO_COLOR="1")
    there.until(r"> $")
    there.type("2 + 2?\r")
    shown = there.until(r"tokens, (?:stopped by itself|cut off).*\][\s\S]*> $")
    assert not re.search(r"\x1b\[(?:3|4|9|10)[0-9]*m", shown)  # no colour
    assert re.search(r"^base:$.*^trained:$", plain(shown), re.S | re.M)  # one below the other
    if way == "end of input":
        there.type("\x04")
    else:
        there.interrupt()
        there.until(r"> $")  # two signals at once would be one
        there.interrupt()
    assert there.end() == code


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_it(strong):  # noqa: F811
    there = chat(strong)
    there.until(r"> $")
    os.close(there.descriptor)
    assert os.waitstatus_to_exitcode(os.waitpid(there.process, 0)[1]) in (0, 2, 129, -signal.SIGHUP)
