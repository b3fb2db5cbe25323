"""System: what Python has on some operating systems only, each with what is done where it is missing.
Knows nothing of runs.

Windows has neither fcntl nor resource, no fork and few of the signals. Nothing is refused for want of them: what a run
does without is told, once, by `lacking`.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None

try:
    import resource
except ImportError:
    resource = None

# Whether a process can be given open files, and be ended together with all that it started.
HAS_FORK = hasattr(os, "fork")
_OPENS_FOLDERS = hasattr(os, "O_DIRECTORY")
# Control groups of Linux, as both versions have them: where, the limit, what is used, how counts of cached files begin.
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes on macOS, in KiB on Linux


def lacking() -> Iterator[str]:
    """What a run does without on this system, a sentence each."""
    if not HAS_FORK:
        yield (
            f"on this system ({sys.platform}) a reward that takes too long is ended while it runs Python, and not "
            "while it is inside of C code; rewards are called in the run's own process"
        )
    if not (fcntl and _OPENS_FOLDERS):
        yield "this system has no locks for folders, so nothing keeps a second process from training in the same one"


def free_memory() -> int:
    """Bytes of the machine's memory, or of what a container or a batch system gives, that nobody uses; files that are
    cached count as nobody's. All of it where the system does not say what is used."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**40
    with suppress(OSError, ValueError):
        [available] = re.findall(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        total = min(total, 1024 * int(available))
    return max(0, min([total, *(_left_of(kind, group) for kind in _GROUPS for group in _own_groups())]))


def _own_groups() -> list[Path]:
    """The control groups that this process is in, with those that they are in, as paths from their root."""
    names = [Path("/")]
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        names += [Path(line.split(":", 2)[2]) for line in lines if line.count(":") > 1]
    return sorted({each for name in names for each in (name, *name.parents)})


def _left_of(kind: tuple[str, str, str, str], group: Path) -> int:
    """Bytes that a control group may have yet; more than there is of anything where it has no limit."""
    root, limit, used, prefix = kind
    folder, left = Path(root) / group.relative_to("/"), 2**60
    with suppress(OSError, ValueError):  # no such file, or "max"
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
    with suppress(OSError, ValueError):
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        left += sum(int(counts.get(f"{prefix}{state}_file", 0)) for state in ("active", "inactive"))
    return left


def signals(*names: str) -> tuple[signal.Signals, ...]:
    """Those that there are."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


def in_forked_children(call: Callable[[], object]) -> None:
    """Let it be called in every copy of this process, before anything else."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)


def open_folder(path: str | os.PathLike[str]) -> int | None:
    """A descriptor of a folder; None where folders have none."""
    return os.open(path, os.O_RDONLY) if _OPENS_FOLDERS else None


def lock(descriptor: int) -> bool:
    """Lock what is open, for this process alone; whether nobody else had.

    Some network file systems have no locks: then nobody is kept out.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def is_unlocked(descriptor: int) -> bool:
    """Whether it is certain that nobody has locked what is open: not where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    unlock(descriptor)
    return True


def unlock(descriptor: int) -> None:
    """Let go of it, also for the copies of it that a process forked long ago may have."""
    with suppress(OSError, AttributeError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # pyright: ignore[reportOptionalMemberAccess]


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT  # pyright: ignore[reportOptionalMemberAccess]


# The most memory that this process has held, bytes; NaN where the system does not say.
peak_memory: Callable[[], float] = _peak_memory if resource else lambda: math.nan


def most_open_files() -> int | None:
    """How many files this process may have open; None where nobody counts."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else None


def limit_memory(size: int) -> None:
    """Let this process have no more bytes of data than that, where there is such a limit and no lower one."""
    with suppress(OSError, ValueError, AttributeError):
        kind = resource.RLIMIT_DATA  # pyright: ignore[reportOptionalMemberAccess]
        resource.setrlimit(kind, (size, resource.getrlimit(kind)[1]))  # pyright: ignore[reportOptionalMemberAccess]
