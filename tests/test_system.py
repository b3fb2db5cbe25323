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


MACHINE = {"/proc/meminfo": "MemTotal: 64 kB\nMemAvailable:    4096 kB\n"}
IN_A_JOB = {"/proc/self/cgroup": "0::/slurm/job_7\n"}
IN_AN_OLD_JOB = {"/proc/self/cgroup": "4:cpu:/\n7:memory:/slurm/job_7\n"}
JOB = "/sys/fs/cgroup/slurm/job_7/memory"
OLD = "/sys/fs/cgroup/memory/slurm/job_7/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MACHINE, 4096 * 1024),
        ({**MACHINE, "/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "7\n"}, 4096 * 1024),
        ({**MACHINE, "/sys/fs/cgroup/memory.max": "3000000\n", "/sys/fs/cgroup/memory.current": "1000000\n"}, 2000000),
        ({"/sys/fs/cgroup/memory.max": "3000\n", "/sys/fs/cgroup/memory.current": "3001\n"}, 0),
        # Files that are cached make way.
        ({**IN_A_JOB, f"{JOB}.max": "3000", f"{JOB}.current": "2900",
          f"{JOB}.stat": "anon 1\nactive_file 300\ninactive_file 500\n"}, 900),
        # The group around it gives less.
        ({**IN_A_JOB, "/sys/fs/cgroup/slurm/memory.max": "2000", "/sys/fs/cgroup/slurm/memory.current": "500",
          f"{JOB}.max": "9000", f"{JOB}.current": "400"}, 1500),
        ({**MACHINE, **IN_AN_OLD_JOB, f"{OLD}.limit_in_bytes": "5000", f"{OLD}.usage_in_bytes": "4000",
          f"{OLD}.stat": "total_inactive_file 200\ninactive_file 9\n"}, 1200),
        ({**MACHINE, **IN_AN_OLD_JOB, f"{OLD}.limit_in_bytes": str(2**63 - 4096), f"{OLD}.usage_in_bytes": "4000"},
         4096 * 1024),
    ],
)  # fmt: skip
def test_free_memory_is_what_machine_container_and_job_leave(files, expected, monkeypatch):
    def read(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(system.Path, "read_text", read)
    assert system.free_memory() == expected


def test_free_memory_where_no_system_says_so_is_all_of_it(monkeypatch):
    monkeypatch.setattr(system.Path, "read_text", lambda path: "")
    assert system.free_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
