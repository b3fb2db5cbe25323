"""Python that the completion wrote, against unit tests or cases of input and output.

Knows nothing of how a program is confined: it runs in grpo/rewards/sandbox.py. Outputs are compared here, where the
program cannot reach; assertions run beside it, in its own process, and a program may be written to deceive them
(docs/sandbox.md says how).
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from grpo.rewards.sandbox import Limits, run_python
from grpo.rewards.stated import visible

_FENCED = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_PYTHON = ("python", "py", "python3")
_LONGEST_PROGRAM = 100_000  # characters
_MOST_SECONDS = 30.0  # for all cases of one completion together; those that are left have failed
_ENOUGH = Limits()
_IMPORTED = "program"  # the name of a program whose functions are called: what it does when it is run is not done


def code(completion: str, tests: object, entry_point: object = None) -> float:
    r"""1.0 if the completion's Python passes all tests, else 0. It runs in a sandbox (docs/sandbox.md).

    The program is the last ```python block, else the last block, else the whole text if it is Python.

    tests        Python with `assert`, functions test_..., or unittest classes; or a list of assertions (MBPP); or
                 `check` (HumanEval, with entry_point, the function's name); or cases: {"inputs": [...], "outputs":
                 [...]}, with "fn_name" where a function is called (APPS, TACO, LiveCodeBench), or a list of {"input",
                 "output"}; or one of these as JSON text
    entry_point  the name of the function that `check` is given

    A case has 6 seconds and all together 30, 1 GiB of memory. A ValueError if the tests are none.

    Range: 0 or 1.

    >>> code("```python\ndef add(a, b):\n    return a + b\n```", "assert add(24, 48) == 72")
    1.0
    """
    passed = list(_results(completion, tests, entry_point, stop_early=True))
    return float(all(passed))


def code_share(completion: str, tests: object, entry_point: object = None) -> float:
    r"""The share of the tests that the completion's Python passes; else as `code`.

    Range: 0 to 1.

    >>> code_share("print(int(input()) * 2)", [{"input": "2", "output": "4"}, {"input": "a", "output": "?"}])
    0.5
    """
    passed = list(_results(completion, tests, entry_point, stop_early=False))
    return sum(passed) / len(passed)


def program_of(completion: str) -> str | None:
    r"""The Python of a completion; None where there is none.

    >>> program_of("So:\n```python\nx = 1\n```\nDone."), program_of("I cannot.")
    ('x = 1', None)
    """
    text = visible(completion)
    blocks = [(language.lower(), block) for language, block in _FENCED.findall(text)]
    python = [block for language, block in blocks if language in _PYTHON]
    if python or blocks:
        return python[-1] if python else blocks[-1][1]
    return text if text.strip() and _is_python(text) else None


def _is_python(text: str) -> bool:
    if len(text) > _LONGEST_PROGRAM:
        return False
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


# ---- the tests


@dataclass(frozen=True)
class Assertions:
    """Python that runs behind the program, in its process."""

    text: str


@dataclass(frozen=True)
class Cases:
    """What a program reads and has to print; or, with `function`, what a call is given and has to return."""

    inputs: list[Any]
    outputs: list[Any]
    function: str | None


def tests_of(tests: object, entry_point: object = None) -> Assertions | Cases:
    """The tests of a row, from any of the forms that data sets have.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(tests, str):
        text = tests.strip()
        if text.startswith(("{", "[")) and (loaded := _json(text)) is not None:
            return tests_of(loaded, entry_point)
        if text and _is_python(text):
            calls_check = "def check(" in text and entry_point and f"check({entry_point})" not in text
            return Assertions(f"{text}\n\ncheck({entry_point})\n" if calls_check else text)
    tests = _listed(tests)
    if isinstance(tests, dict):
        tests = {key: _listed(value) for key, value in tests.items()}
        if "test_cases" in tests:  # Open-R1's verification_info
            return tests_of(tests["test_cases"], tests.get("fn_name") or entry_point)
        inputs, outputs = (tests.get(name, tests.get(f"{name}s")) for name in ("input", "output"))
        if isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0:
            return Cases(inputs, outputs, tests.get("fn_name") or None)
    if isinstance(tests, list) and tests:
        if all(isinstance(test, str) for test in tests) and _is_python("\n".join(tests)):
            return Assertions("\n".join(tests))
        if all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
            named = next((test["fn_name"] for test in tests if test.get("fn_name")), entry_point)
            function = str(named) if named and tests[0].get("testtype") != "stdin" else None
            return Cases([test["input"] for test in tests], [test["output"] for test in tests], function)
    raise ValueError(
        f"the tests {tests!r:.80} are none: they are Python with assertions, a list of assertions, or cases with "
        "inputs and outputs"
    )


def _listed(value: Any) -> Any:
    """A tuple or an array, which some readers give for a list, as a list."""
    is_array = hasattr(value, "tolist") and getattr(value, "ndim", 0)
    return list(value) if isinstance(value, tuple) else value.tolist() if is_array else value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ---- running them


def _results(completion: str, tests: object, entry_point: object, stop_early: bool) -> Iterator[bool]:
    """Whether each test passes, in order; with stop_early up to the first that does not."""
    known = tests_of(tests, entry_point)
    program = program_of(completion)
    if program is None or not _is_python(program):
        yield False
    elif isinstance(known, Assertions):
        yield from _of_assertions(program, known)
    else:
        run = _print_case if known.function is None else _call_case(known.function)
        yield from _of_cases(program, known, run, stop_early)


def _of_cases(program: str, cases: Cases, run: Callable[..., bool], stop_early: bool) -> Iterator[bool]:
    end = time.monotonic() + _MOST_SECONDS
    for given, expected in zip(cases.inputs, cases.outputs, strict=True):
        left = end - time.monotonic()
        passes = left > 0 and run(program, given, expected, replace(_ENOUGH, seconds=min(left, _ENOUGH.seconds)))
        yield passes
        if stop_early and not passes:
            return


def _print_case(program: str, given: Any, expected: Any, limits: Limits) -> bool:
    outcome = run_python(program, _lines(given), limits)
    return outcome.returned == 0 and same_output(outcome.output, _lines(expected))


def _lines(value: Any) -> str:
    """A text as it is; a list of lines, as some data sets have it, as one text."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def same_output(printed: str, expected: str) -> bool:
    r"""Whether a program printed what it should: line by line without white space at the ends, or, word by word, the
    same words and numbers of the same value (to 1e-6 where one has a decimal point).

    >>> same_output("1 2\n", "1 2"), same_output("0.50", "0.5"), same_output("12", "1 2")
    (True, True, False)
    """
    mine, right = ([line.strip() for line in text.strip().splitlines()] for text in (printed, expected))
    if mine == right:
        return True
    one, other = printed.split(), expected.split()
    return len(one) == len(other) and all(map(_same_word, one, other))


def _same_word(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        mine, right = Decimal(one), Decimal(other)
        near = Decimal("1e-6") * max(1, abs(right)) if "." in one + other else 0
        return abs(mine - right) <= near
    except InvalidOperation:
        return False


_CALL = """
import json as _json, os as _os
_given = _json.loads({given!r})
_known = globals()
_called = _known.get({name!r})
if _called is None and "Solution" in _known:
    _called = getattr(_known["Solution"](), {name!r})
_returned = _called(*_given)
_os.write(REPORT, _json.dumps(_returned, default=lambda value: list(value)).encode())
"""


def _call_case(name: str) -> Callable[..., bool]:
    def call_case(program: str, given: Any, expected: Any, limits: Limits) -> bool:
        arguments = _values(given) if isinstance(given, str) else given
        arguments = arguments if isinstance(arguments, list) else [arguments]
        right = _json(expected) if isinstance(expected, str) and _json(expected) is not None else expected
        outcome = run_python(program + _CALL.format(given=json.dumps(arguments), name=name), "", limits, _IMPORTED)
        returned = _json(outcome.report)
        if outcome.returned != 0 or not outcome.report:
            return False
        return _same_value(returned, right) or (
            isinstance(right, list) and len(right) == 1 and _same_value(returned, right[0])
        )

    return call_case


def _values(text: str) -> list[Any]:
    """Arguments as LiveCodeBench writes them: one a line, each in JSON."""
    return [value if (value := _json(line)) is not None else line for line in text.splitlines()]


def _same_value(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        numbers = all(isinstance(value, int | float) for value in (one, other))
        return numbers and abs(one - other) <= 1e-6 * max(1.0, abs(other))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_value, one, other))
    return type(one) is type(other) and one == other


_ASSERT = """
def _run_tests(tests, mark):
    import ast, json, os, types, unittest
    namespace, results = globals(), []
    def attempt(function):
        try:
            function()
        except BaseException:
            return False
        return True
    before = set(namespace)
    tree = ast.parse(tests)
    for statement in tree.body:
        compiled = compile(ast.Module([statement], []), "tests.py", "exec")
        passed = attempt(lambda: exec(compiled, namespace))
        if isinstance(statement, (ast.Assert, ast.Expr)) or not passed:
            results.append(passed)
    for name in [name for name in namespace if name not in before]:
        value = namespace[name]
        if isinstance(value, types.FunctionType) and name.startswith("test"):
            results.append(attempt(value))
        elif isinstance(value, type) and value.__module__.partition(".")[0] == "unittest":
            continue  # imported; to some versions of Python its FunctionTestCase is a test, which fails
        elif isinstance(value, type) and issubclass(value, unittest.TestCase):
            for case in unittest.defaultTestLoader.loadTestsFromTestCase(value):
                outcome = unittest.TestResult()
                case.run(outcome)
                results.append(outcome.wasSuccessful())
    os.write(REPORT, (mark + json.dumps(results)).encode())
_run_tests({tests!r}, {mark!r})
"""


def _of_assertions(program: str, tests: Assertions) -> Iterator[bool]:
    """Whether each assertion holds; one failure where the program does not come to an end, or says nothing of them."""
    mark = secrets.token_hex(16)  # a program cannot write results without having looked for it
    outcome = run_python(program + _ASSERT.format(tests=tests.text, mark=mark), "", _ENOUGH, _IMPORTED)
    results = _json(outcome.report.removeprefix(mark)) if outcome.report.startswith(mark) else None
    yield from results if isinstance(results, list) and results else [False]
