"""What a system lacks: the package is imported and trains where Python has neither fcntl nor fork, as on Windows.

The libraries of others know themselves what they do there, and are imported before anything is taken away.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_task import SMALL, TASK

from grpo import system

ROOT = Path(__file__).parents[1]

# What CPython's documentation marks as "Availability: Unix", as far as anybody may want it here.
TAKEN_AWAY = """
import errno, os, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGPIPE", "SIGKILL", "SIGALRM", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGTSTP",
             "SIGWINCH", "SIGRTMIN", "SIGRTMAX", "ITIMER_REAL", "setitimer", "getitimer", "alarm", "pthread_kill",
             "pthread_sigmask", "sigwait"):
    delattr(signal, name)
for name in ("fork", "register_at_fork", "getuid", "getgid", "killpg", "uname", "sched_getaffinity", "sysconf",
             "setsid", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_PATH", "waitstatus_to_exitcode", "mkfifo"):
    delattr(os, name)
"""
# What these import at their top; the standard library's own modules know which system they were built for.
BEFORE = "import asyncio, logging, multiprocessing, random, socket, subprocess, tempfile, tyro, rich.console\n"
HEAVY = "import datasets, matplotlib, peft, tensorboard, tokenizers, torch, transformers, transformers.cache_utils\n"
# Run inside of a confined process, which is refused before it is started; and what vLLM imports, which is for Linux.
OF_VLLM = [f"grpo.rollout.vllm_{name}" for name in ("adapter", "experts", "norms", "weights")]
OF_LINUX = ["grpo.rewards.confined", *OF_VLLM]


def on_windows(program, tmp_path, before=BEFORE):
    made = subprocess.run(
        [sys.executable, "-c", before + TAKEN_AWAY + program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return made.stdout


@pytest.mark.parametrize(
    "program",
    [
        "import grpo; grpo.Config(), grpo.Task",
        "import grpo.rewards; grpo.rewards.exact_match",
        "import grpo.doctor.__main__, grpo.chat.__main__, grpo.export.__main__, grpo.new",
    ],
)
def test_it_is_imported_without_what_only_some_systems_have(program, tmp_path):
    on_windows(program, tmp_path)


@pytest.mark.parametrize("words", [["grpo"], ["grpo", "run", "--help"], ["grpo", "chat", "--help"]])
def test_help_is_shown_there(words, tmp_path):
    start = f"import grpo.__main__; sys.argv = {words!r}\ntry:\n    grpo.__main__.main()\nexcept SystemExit: pass\n"
    assert "help" in on_windows(start, tmp_path)


@pytest.mark.slow
def test_every_module_is_imported_there(tmp_path):
    files = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "grpo").rglob("*.py"))]
    names = [".".join(file.parts).removesuffix(".__init__") for file in files]
    wanted = [name for name in names if name not in OF_LINUX]
    program = f"import importlib\nfor name in {wanted!r}:\n    importlib.import_module(name)\nprint('done')"
    assert "done" in on_windows(program, tmp_path, BEFORE + HEAVY)


@pytest.mark.slow
def test_a_run_trains_there_and_says_what_it_does_without(tmp_path):
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0, slow: 1.0}", extra=SLOW))
    flags = [*SMALL, "--steps", "1", "--run-dir", "run", "--reward-timeout", "0.3", "--max-reward-failures", "1"]
    told = on_windows(f"import grpo.run; assert grpo.run.main(['toy.py', *{flags!r}]) == 0", tmp_path, BEFORE + HEAVY)
    assert "a reward that takes too long is ended while it runs Python" in told
    assert "no locks for folders" in told
    assert "no result in 0.3 s" in told  # and what takes too long was ended
    assert (tmp_path / "run" / "checkpoints" / "step-000001" / "state.json").exists()


SLOW = """
turns = []

def slow(completion):
    turns.append(completion)
    while len(turns) > 60 and len(turns) % 8 == 0:  # not on what is tried before the run
        pass
    return 0.0
"""


def test_in_the_package_s_own_folder_a_sentence_says_what_is_wrong():
    made = subprocess.run(
        [sys.executable, "-S", "-m", "grpo.run", "--help"], cwd=ROOT / "grpo", capture_output=True, text=True
    )
    assert "Traceback" not in made.stderr and "error: In the package's own folder" in made.stderr


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"meminfo": "MemTotal: 64 kB\nMemAvailable:    4096 kB\n"}, 4096 * 1024),
        ({"meminfo": "MemAvailable: 4096 kB\n", "memory.max": "max\n", "memory.current": "7\n"}, 4096 * 1024),
        ({"meminfo": "MemAvailable: 4096 kB\n", "memory.max": "3000000\n", "memory.current": "1000000\n"}, 2000000),
        ({"meminfo": "MemAvailable: 4096 kB\n", "memory.max": "3000\n", "memory.current": "3001\n"}, 0),
        ({"memory.max": "3000\n", "memory.current": "1000\n"}, 2000),
    ],
)
def test_free_memory_is_what_machine_and_container_leave(files, expected, monkeypatch):
    def read(path):
        if path.name not in files:
            raise FileNotFoundError(path)
        return files[path.name]

    monkeypatch.setattr(system.Path, "read_text", read)
    assert system.free_memory() == expected


def test_free_memory_where_no_system_says_so_is_all_of_it(monkeypatch):
    monkeypatch.setattr(system.Path, "read_text", lambda path: "")
    assert system.free_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
