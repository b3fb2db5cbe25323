"""Runs a Python program that nobody has read, in a process that may do little. Knows nothing of completions and tests.

What it stops and what it does not is in docs/sandbox.md. `confined.py` is the part that runs inside: it takes its own
rights away before it reads the program. Here are the process, its clean environment, its time, and its end.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

_CONFINED = Path(__file__).with_name("confined.py")
NOT_TRIED = "the program was not run, and is neither right nor wrong."
_MOST_OUTPUT = 1 << 20  # characters that are read of what it wrote
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}


@dataclass(frozen=True)
class Limits:
    """What one program may use. Every value is an upper bound; the machine's own lower ones hold too."""

    seconds: float = 6.0  # of the clock, and as many of CPU
    memory_mib: int = 1024  # of address space, so of each process
    files_mib: int = 16  # of a file; of all of them where its folder is in memory
    processes: int = 16  # and threads


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it said."""

    returned: int | None  # its exit code, negative for a signal; None where its time was over
    output: str  # standard output, the first million characters
    errors: str  # standard error
    report: str  # what it wrote to the file descriptor REPORT, which it finds as a global name
    in_force: dict[str, bool]  # which of the kernel's protections it ran under


def run_python(program: str, stdin: str = "", limits: Limits | None = None, name: str = "__main__") -> Outcome:
    """Run a program with this on its standard input, in an empty folder of its own that is gone afterwards.

    `name` is its `__name__`: what stands behind `if __name__ == "__main__":` runs or does not.

    Raises:
        OSError: the sandbox does not come up here, or there is no room for its folder: the program was not tried.
    """
    limits = limits or Limits()
    if sys.platform != "linux":
        raise OSError(f"Programs are confined by means of Linux, and this is {sys.platform}: {NOT_TRIED}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="grpo-", ignore_cleanup_errors=True))
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(6)]
        source, given, output, errors, report, status = files
        for file, text in ((source, program), (given, stdin)):
            file.write(text.encode(errors="surrogatepass" if file is given else "replace"))
            file.seek(0)
        returned = _run(_command(folder, (source, report, status), limits, name), folder, files, limits.seconds)
        in_force = _read(status)
        if not in_force:
            why = _read(errors).strip()[-300:] or "its interpreter did not start in time"
            raise OSError(f"The sandbox did not come up ({why}): {NOT_TRIED}")
        return Outcome(returned, _read(output), _read(errors), _read(report), json.loads(in_force))


@cache
def protections() -> dict[str, bool]:
    """Which of the kernel's protections a program runs under on this machine."""
    return run_python("pass").in_force


def _command(folder: str, files: tuple[IO[bytes], ...], limits: Limits, name: str) -> list[str]:
    source, report, status = files
    settings = {
        "parent": os.getpid(),
        "folder": folder,
        "program": source.fileno(),
        "report": report.fileno(),
        "status": status.fileno(),
        "seconds": max(1, math.ceil(limits.seconds)),
        "memory_mib": limits.memory_mib,
        "files_mib": limits.files_mib,
        "processes": limits.processes,
        "name": name,
    }
    return [sys.executable, "-I", "-B", str(_CONFINED), json.dumps(settings)]


def _run(command: list[str], folder: str, files: Sequence[IO[bytes]], seconds: float) -> int | None:
    """Its exit code; None where its time was over. When this returns, its process group is gone."""
    source, given, output, errors, report, status = files
    process = subprocess.Popen(
        command,
        stdin=given,
        stdout=output,
        stderr=errors,
        cwd=folder,
        env=_ENVIRONMENT | {"HOME": folder, "TMPDIR": folder},
        pass_fds=(source.fileno(), report.fileno(), status.fileno()),
        start_new_session=True,
    )
    try:
        return process.wait(seconds + _START)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


_START = 3.0  # seconds that the interpreter may take to start, where others use the machine too


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(_MOST_OUTPUT).decode(errors="replace")
