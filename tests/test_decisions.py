"""The step reads like its description: how many decisions are taken in the code that one training step runs.

"Decisions" are `if` statements, conditional expressions, `except` clauses, `and` and `or`, the filters of
comprehensions, cases of a `match`, and arithmetic that takes a branch: a product with a comparison, or a place in a
display that one chooses. The functions that a step calls are found by running steps and watching; the rollout engine
and the kernels are not counted. Helpers that only word an error message are not called in a step, so they are not
counted either.
"""

import ast
import os
import sys
import threading
from pathlib import Path

from toy_task import SMALL, TASK

import grpo
from grpo.rollouts import Rollouts
from grpo.run import main
from grpo.train import train

PACKAGE = Path(grpo.__file__).parent
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
        steps_begun += code is Rollouts.__call__.__code__
        if steps_begun == 1 or code is train.__code__:
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
                found[f"{path.relative_to(PACKAGE)}:{node.name}"] = sum(map(decisions_at, ast.walk(node)))
    return found


def decisions_at(node):
    """How many decisions this one node of a syntax tree is."""
    match node:
        case ast.If() | ast.IfExp() | ast.ExceptHandler() | ast.match_case():
            return 1
        case ast.BoolOp(values=values):
            return len(values) - 1
        case ast.comprehension(ifs=filters):
            return len(filters)
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            return isinstance(left, ast.Compare) + isinstance(right, ast.Compare)
        case ast.Subscript(value=ast.Tuple() | ast.List() | ast.Dict(), slice=ast.Compare()):
            return 1
    return 0


def test_every_kind_of_decision_is_counted():
    code = """
def f(x, y):
    if x: return 1
    z = 1 if y else 2
    w = x or y and z
    try: pass
    except ValueError: pass
    a = [i for i in x if i if y]
    b = 3 * (x > y) + ("p", "q")[x > 1]
    match x:
        case 1: pass
        case 2: pass
    return x + y * z
"""
    assert sum(map(decisions_at, ast.walk(ast.parse(code)))) == 1 + 1 + 2 + 1 + 2 + 2 + 2


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
        "rollouts.py:__call__",
        "policy/policy.py:update",
        "loss.py:clipped",
        "packing.py:fill",
    ):
        assert expected in counted
    few = {name: count for name, count in counted.items() if count}
    assert sum(few.values()) <= 50, f"{sum(few.values())}: " + ", ".join(f"{n} {c}" for n, c in few.items())


def test_the_loop_fits_on_a_few_screens():
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 200
