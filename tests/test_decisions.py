"""The step reads like its description: how many decisions are taken in the code that one training step runs.

"Decisions" are `if` statements, conditional expressions and `except` clauses. The functions that a step calls are found
by running steps and watching; the rollout engine and the kernels are not counted. Helpers that only word an error
message are not called in a step, so they are not counted either.
"""

import ast
import os
import sys
import threading
from pathlib import Path

from toy_task import SMALL, TASK

import grpo.train
from grpo.run import main

PACKAGE = Path(grpo.train.__file__).parent
COUNTED = f"{PACKAGE}{os.sep}"
NOT_COUNTED = tuple(f"{COUNTED}{folder}{os.sep}" for folder in ("rollout", "embedded"))


def functions_run_by_a_step(argv):
    """{(file, first line)} of `train` and of every function of the package that its first step runs."""
    seen = set()
    steps_begun = 0

    def watch(frame, event, argument):
        nonlocal steps_begun
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(COUNTED) or code.co_filename.startswith(NOT_COUNTED):
            return
        steps_begun += code is grpo.train.sample.__code__
        if steps_begun == 1 or code is grpo.train.train.__code__:
            seen.add((Path(code.co_filename), code.co_firstlineno))

    sys.setprofile(watch)
    threading.setprofile(watch)
    try:
        assert main(argv) == 0
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return seen


def decisions_of(path, lines):
    """{function: decisions} for the functions of a file that start at these lines, nested functions apart."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first in lines:
                found[f"{path.relative_to(PACKAGE)}:{node.name}"] = sum(
                    isinstance(inner, ast.If | ast.IfExp | ast.ExceptHandler) for inner in ast.walk(node)
                )
    return found


def test_a_step_takes_few_decisions(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    # No evaluation and no checkpoint in the first step, which is the one that is watched.
    flags = [*SMALL, "--steps", "2", "--eval-every", "0", "--save-every", "50", "--run-dir", str(tmp_path / "run")]
    functions = functions_run_by_a_step([str(path), *flags])
    counted = {}
    for file in {file for file, _ in functions}:
        counted |= decisions_of(file, {line for other, line in functions if other == file})
    for expected in (
        "train.py:train",
        "train.py:sample",
        "policy/policy.py:update",
        "loss.py:clipped",
        "packing.py:fill",
    ):
        assert expected in counted
    few = {name: count for name, count in counted.items() if count}
    assert sum(few.values()) <= 19, f"{sum(few.values())}: " + ", ".join(f"{n} {c}" for n, c in few.items())


def test_the_loop_fits_on_a_few_screens():
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 200
