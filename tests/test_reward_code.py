"""`code` on the tests that data sets have, and the sandbox on programs that try to get out of it."""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from grpo.rewards import code, code_share
from grpo.rewards.coding import program_of, same_output
from grpo.rewards.sandbox import Limits, protections, run_python

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
SUM = "```python\nprint(sum(map(int, input().split())))\n```"

TESTS = [
    (ADD, "assert add(1, 2) == 3\nassert add(2, 2) == 4", None, 1),
    (ADD, "assert add(1, 2) == 3\nassert add(2, 2) == 5", None, 0.5),
    (ADD, "x = 3\nassert add(1, 2) == x", None, 1),
    (ADD, "import nothing_of_this_name\nassert add(1, 2) == 3", None, 0.5),
    (ADD, ["assert add(1, 2) == 3", "assert add(2, 2) == 5"], None, 0.5),
    (ADD, "def check(candidate):\n    assert candidate(1, 2) == 3", "add", 1),
    (ADD, "def check(candidate):\n    assert candidate(1, 2) == 4", "add", 0),
    (ADD, "def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)", "add", 1),
    (ADD, "def test_a():\n    assert add(1, 1) == 2\ndef test_b():\n    assert add(1, 1) == 3", None, 0.5),
    (ADD, "from unittest import *\nclass T(TestCase):\n  def test(s):\n    s.assertEqual(add(1, 1), 2)", None, 1),
    (ADD, {"inputs": [[1, 2], [3, 4]], "outputs": [3, 8], "fn_name": "add"}, None, 0.5),
    (ADD, {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"}, None, 1),
    (ADD, {"inputs": ["1\n2"], "outputs": ["3"], "fn_name": "add"}, None, 1),
    (ADD, [{"input": "[1]\n[2]", "output": "[1, 2]", "testtype": "functional", "fn_name": "add"}], None, 1),
    (ADD.replace("add", "other"), {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}, None, 0),
    ("class Solution:\n  def f(s, a): return a, 1", {"inputs": [[2]], "outputs": [[2, 1]], "fn_name": "f"}, None, 1),
    (SUM, {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "8\n"]}, None, 0.5),
    (SUM, [{"input": "1 2", "output": "3", "testtype": "stdin"}], "add", 1),
    (SUM, {"language": "python", "test_cases": [{"input": "1 2", "output": "3"}]}, None, 1),
    (SUM, json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]}), None, 1),
    (ADD, ("assert add(1, 2) == 3",), None, 1),
    (ADD, np.array(["assert add(1, 2) == 3"]), None, 1),
    (SUM, {"inputs": np.array(["1 2"]), "outputs": ("3",)}, None, 1),
    (SUM, {"input": [["1 2"]], "output": [["3"]]}, None, 1),
    (ADD + "\nor\n```python\nadd = max\n```", "assert add(1, 2) == 2", None, 1),
    (ADD + "\nwhich prints\n```\n3\n```", "assert add(1, 2) == 3", None, 1),
    (ADD.removesuffix("\n```"), "assert add(1, 2) == 3", None, 1),
    ("<think>" + ADD + "</think>```py\nadd = max\n```", "assert add(1, 2) == 2", None, 1),
    (ADD.replace("\n```", "\nif __name__ == '__main__':\n    input('a? ')\n```"), "assert add(1, 2) == 3", None, 1),
    ("if __name__ == '__main__':\n    print(input())", {"inputs": ["a"], "outputs": ["a"]}, None, 1),
    ("I cannot do that.", "assert True", None, 0),
    ("", "assert True", None, 0),
    ("```python\ndef add(a, b:\n```", "assert True", None, 0),
    ("import os\nos._exit(0)", "assert add(1, 2) == 3", None, 0),
    ("exit(0)", "assert add(1, 2) == 3", None, 0),
    ("import os\nos.write(REPORT, b'[true]')\nos._exit(0)", "assert add(1, 2) == 3", None, 0),
    ("raise ValueError", "assert True", None, 0),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'", "assert P(1) == P(1)", None, 1),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "tests", "entry_point", "share"), TESTS)
def test_programs_are_tested_as_data_sets_say(completion, tests, entry_point, share):
    assert code_share(completion, tests, entry_point) == share
    assert code(completion, tests, entry_point) == float(share == 1)


@pytest.mark.parametrize(
    "tests", ["", "add(1, 2) is 3?", None, [], {}, {"inputs": [1], "outputs": []}, 3, "[1, 2]", [{"input": 1}]]
)
def test_tests_that_are_none_are_an_error(tests):
    with pytest.raises(ValueError, match="tests"):
        code(ADD, tests)


def test_the_program_is_the_last_python_block():
    assert program_of("```python\na\n```\n```python\nb\n```\n```text\nc\n```") == "b"
    assert program_of("```\na = 1\n```") == "a = 1"
    assert program_of("a = 1") == "a = 1"
    assert program_of("It is easy.") is None


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1\n2\n", "1\n2", True),
        ("1 \n2\n\n", "1\n2", True),
        ("1 2", "1\n2", True),
        ("0.3333333", "0.33333333", True),
        ("1e3", "1000", True),
        ("1000000001", "1000000002", False),
        ("yes", "YES", False),
        ("12", "1 2", False),
        ("", "1", False),
        ("nan", "1", False),
    ],
)
def test_outputs_are_compared_by_line_and_by_word(printed, expected, same):
    assert same_output(printed, expected) is same


# ---- the sandbox


def test_a_program_sees_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("API_KEY", "secret of the parent")
    seen = run_python("import os; print(dict(os.environ))")
    assert "HOME" in seen.output
    assert "API_KEY" not in seen.output


def test_its_folder_is_empty_at_first_and_gone_afterwards():
    program = "import os; print(os.listdir('.')); open('a', 'w'); os.mkdir('b'); os.chmod('b', 0); print(os.getcwd())"
    listed, folder = run_python(program).output.splitlines()
    assert listed == "[]"
    assert folder.startswith(os.path.realpath(tempfile.gettempdir()))
    assert not Path(folder).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)",
        "import re; re.match(r'(a+)+$', 'a' * 64 + 'b')",
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "import socket; a, b = socket.socketpair(); a.recv(1)",
    ],
)
def test_what_never_ends_is_ended(program):
    assert run_python(program, limits=Limits(seconds=0.3)).returned != 0


@pytest.mark.parametrize(
    "program",
    [
        "a = 'a' * (2 << 30)",
        "a = []\nwhile True: a.append('a' * (1 << 20))",
        "open('a', 'wb').write(b'a' * (64 << 20))",
        "print('a' * (64 << 20))",
        "def f(): f()\nf()",
        "import os; os._exit(3)",
        "import ctypes; ctypes.string_at(0)",
        "1 / 0",
    ],
)
def test_what_takes_too_much_or_breaks_ends_with_an_error(program):
    outcome = run_python(program, limits=Limits(seconds=30, memory_mib=256))
    assert outcome.returned not in (0, None)
    assert len(outcome.output) <= 1 << 20


def confined_processes(mark: int) -> list[int]:
    """The processes that run a program with this limit of memory, which nobody else has."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended since
        if b"confined.py" in command and f'"memory_mib": {mark}'.encode() in command:
            found.append(int(folder.name))
    return found


def test_what_a_program_starts_ends_with_it():
    if not protections().get("processes"):
        pytest.skip("this kernel gives no PID namespace")
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nprint('started')"
    outcome = run_python(program, limits=Limits(memory_mib=901))
    assert outcome.output == "started\n"
    assert confined_processes(901) == []


def test_a_program_ends_with_a_parent_that_is_killed(tmp_path):
    inside = "import time; time.sleep(60)"
    asks = f"run_python({inside!r}, limits=Limits(seconds=50, memory_mib=902))"
    command = [sys.executable, "-c", f"from grpo.rewards.sandbox import Limits, run_python; {asks}"]
    parent = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)})
    while not (running := confined_processes(902)):
        assert parent.poll() is None
    handles = [os.pidfd_open(process) for process in running]
    parent.kill()
    parent.wait()
    for handle in handles:
        assert select.select([handle], [], [], 20)[0], "it goes on without its parent"
        os.close(handle)


def test_there_is_no_network():
    if not protections().get("network"):
        pytest.skip("this kernel gives no network namespace")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run_python(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)")
    assert outcome.returned == 1
    assert "Error" in outcome.errors


def test_other_files_can_be_neither_read_nor_written(tmp_path):
    if not protections().get("files"):
        pytest.skip("this kernel has no Landlock")
    (tmp_path / "secret").write_text("secret of the parent")
    for program in (
        f"print(open({str(tmp_path / 'secret')!r}).read())",
        f"import os; print(os.listdir({str(tmp_path)!r}))",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "import os; print(open(f'/proc/{os.getppid()}/environ').read())",
        "print(open('/etc/passwd').read())",
        f"import os; os.symlink({str(tmp_path / 'secret')!r}, 'link'); print(open('link').read())",
    ):
        outcome = run_python(program)
        assert outcome.returned == 1, program
        assert "secret" not in outcome.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret"]


def test_a_sandbox_that_does_not_come_up_is_an_error_and_never_a_wrong_program(monkeypatch, tmp_path):
    monkeypatch.setattr("grpo.rewards.sandbox._CONFINED", tmp_path / "absent.py")
    with pytest.raises(OSError, match=r"did not come up .*absent.py.* neither right nor wrong"):
        code(ADD, "assert add(1, 2) == 3")


def test_a_program_cannot_say_that_the_sandbox_did_not_come_up():
    program = (
        "import os\nfor fd in range(3, 64):\n    try:\n        os.ftruncate(fd, 0)\n    except OSError:\n        pass"
    )
    assert run_python(program).returned == 0


def test_what_programs_need_is_there():
    program = (
        "import numpy, decimal, sqlite3, threading, tempfile, random, datetime, zoneinfo\n"
        "t = threading.Thread(target=print, args=(numpy.arange(3).sum(),)); t.start(); t.join()\n"
        "tempfile.TemporaryFile().write(b'a'); open('/dev/null', 'w').write('a')\n"
        "print(random.SystemRandom().random() < 1)\n"
    )
    assert run_python(program).output.split() == ["3", "True"]
