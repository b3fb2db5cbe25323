"""Kept: what a reward must not change for everybody else is as it was after each of its calls, and what it prints is
in a file. Knows nothing of rewards.

    kept()        after one call: working directory, environment, signal handlers and timer, the standard streams, and
                  of torch the default dtype and device, gradients and threads
    Log           a file that is printed into, made when there is something to print
    Held          the same before there is one
    printed_to    inside, what Python prints goes there

Comes without torch, because worker processes run it too. The generators of random numbers are kept for a whole scoring
(grpo/rewards/draws.py).
"""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from grpo.system import signals

LARGEST_LOG = 256 << 20  # bytes that one process writes: a night of a reward that prints everything
LARGEST_HELD = 1 << 20  # characters that are printed before there is a file
LONGEST_BEGUN = 1 << 20  # characters of a line without an end that are kept waiting for it
# What programs set handlers for. To ask for all of them takes longer than many a reward.
_CAUGHT = signals(*(f"SIG{name}" for name in "INT TERM HUP QUIT ALRM CHLD USR1 USR2 PIPE TSTP WINCH".split()))
_ENVIRONMENT: Any = os.environb if os.supports_bytes_environ else os.environ


@contextmanager
def kept() -> Iterator[None]:
    """Inside runs what may change these things; afterwards they are as before."""
    before = [read() for read, _ in _THINGS]
    try:
        yield
    finally:
        for (read, restore), value in zip(_THINGS, before, strict=True):
            if read() != value:
                restore(value)


def _folder() -> str:
    with suppress(FileNotFoundError):  # somebody has removed it
        return os.getcwd()
    return ""


def _go_back(folder: str) -> None:
    with suppress(OSError):
        os.chdir(folder)


def _environment() -> dict[Any, Any]:
    return dict(getattr(_ENVIRONMENT, "_data", _ENVIRONMENT))  # as it is stored, where that can be had: a copy decodes


def _set_environment(before: dict[Any, Any]) -> None:
    for name in _ENVIRONMENT.keys() - before.keys():
        del _ENVIRONMENT[name]
    _ENVIRONMENT.update(before)


def _handlers() -> list[Any]:
    return [signal.getsignal(number) for number in _CAUGHT]


def _set_handlers(before: list[Any]) -> None:
    """Those that are not ours by now: a first Ctrl-C changes what a second one does."""
    is_main = threading.current_thread() is threading.main_thread()  # Python has them set there alone
    for number, handler in zip(_CAUGHT, before, strict=True):
        now = signal.getsignal(number)
        is_ours = str(getattr(now, "__module__", "")).startswith("grpo.")
        if is_main and now != handler and handler is not None and not is_ours:
            signal.signal(number, handler)


def _streams() -> tuple[Any, ...]:
    return sys.stdin, sys.stdout, sys.stderr


def _set_streams(before: tuple[Any, ...]) -> None:
    sys.stdin, sys.stdout, sys.stderr = before


def _of_torch() -> tuple[Any, ...]:
    torch = sys.modules.get("torch")
    if torch is None:
        return ()
    return torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_num_threads()


def _set_torch(before: tuple[Any, ...]) -> None:
    import torch

    # A reward may have imported it; then what it is like after an import is right.
    dtype, device, grad, threads = before or (torch.float32, torch.device("cpu"), True, torch.get_num_threads())
    torch.set_default_dtype(dtype)
    torch.set_default_device(None if device.type == "cpu" else device)
    torch.set_grad_enabled(grad)
    torch.set_num_threads(threads)


_THINGS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (_folder, _go_back),
    (_environment, _set_environment),
    (_handlers, _set_handlers),
    *(
        [(lambda: signal.getitimer(signal.ITIMER_REAL), lambda before: signal.setitimer(signal.ITIMER_REAL, *before))]
        if hasattr(signal, "getitimer")  # Windows has none
        else []
    ),
    (_streams, _set_streams),
    (socket.getdefaulttimeout, socket.setdefaulttimeout),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (_of_torch, _set_torch),
)


class Log(io.TextIOBase):
    """Takes whatever is printed, a thread's lines whole; a disk that is full is no reason for a reward to fail."""

    encoding = "utf-8"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(self, path: Path):
        self._path = path
        self._left = LARGEST_LOG
        self._begun: dict[int, str] = {}  # by thread: a line that has no end yet

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        # `print` writes a line in pieces, between which other threads print.
        thread = threading.get_ident()
        lines, newline, begun = (self._begun.pop(thread, "") + text).rpartition("\n")
        if len(begun) > LONGEST_BEGUN:
            lines, newline, begun = lines + newline + begun, "", ""
        if begun:
            self._begun[thread] = begun
        self._append(lines + newline)
        return len(text)

    def flush(self) -> None:
        """What has no end of line yet, too."""
        while self._begun:
            self._append(self._begun.popitem()[1])

    def _append(self, text: str) -> None:
        encoded = text.encode(errors="backslashreplace")[: self._left]
        self._left -= len(encoded)
        if encoded:
            with suppress(OSError), self._path.open("ab") as file:
                file.write(encoded)


class Held(io.StringIO):
    """Takes whatever is printed before there is a file for it; of much, the last."""

    def write(self, text: str) -> int:
        if self.tell() > LARGEST_HELD:
            end = self.getvalue()[-LARGEST_HELD // 2 :]
            self.seek(0)
            self.truncate()
            super().write(end)
        return super().write(text[-LARGEST_HELD:])

    def close(self) -> None:
        """Whoever calls `sys.stdout.close()` is done; what he has printed is shown yet."""


@contextmanager
def printed_to(log: io.TextIOBase) -> Iterator[None]:
    """Inside, what Python prints goes to the log."""
    with redirect_stdout(log), redirect_stderr(log):
        try:
            yield
        finally:
            log.flush()
