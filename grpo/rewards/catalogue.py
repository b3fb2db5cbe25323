"""Catalogue: every reward at hand, with what can be said of it: signature, range, source, an example with its score.

Knows nothing of terminals or of runs. A reward's docstring says it all: its first paragraph, a line `Range: 0 or 1.`,
and an example as in an interpreter (`>>> my_reward("72", "72")`), which is run here.

installed()        what ships with this package, and what other packages offer under the entry point `grpo.rewards`
of_module(name)    the rewards of a module, or of a Python file
makers()           functions that ship and give a reward: `tags("think", "answer")`
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import grpo.rewards
from grpo.errors import UserError, in_words, user_code
from grpo.rewards.here import living_watchdog
from grpo.rewards.names import installed_rewards
from grpo.rewards.samples import AS_VERL
from grpo.rewards.shipped import MAKERS
from grpo.watchdog import Limit

_SEEN_IN = {"completion", "completions", AS_VERL}  # arguments that a reward has at least one of
_RANGE = re.compile(r"^[ \t]*Range:[ \t]*(.+?)\.?[ \t]*$", re.M)
_LONGEST_DEFAULT = 30  # characters
_EXAMPLE_SECONDS = 10.0


@dataclass(frozen=True)
class Listed:
    """One reward at hand. What it does not say of itself is an empty text.

    key       by which a task names it
    source    who offers it
    function  None where it cannot be loaded: then `summary` says why
    example   a call, and what it gave just now
    """

    key: str
    source: str
    function: Callable | None
    signature: str
    range: str
    summary: str
    example: str


def installed() -> list[Listed]:
    """What installed packages offer, by name; a name that two of them offer stands twice."""
    return [_offered(point) for points in installed_rewards().values() for point in points]


def makers() -> list[Listed]:
    """What ships and gives a reward where a task calls it."""
    functions = {name: getattr(grpo.rewards, name) for name in MAKERS}
    return [listed(name, "ships with grpo", function) for name, function in functions.items()]


def of_module(name: str) -> dict[str, Callable]:
    """name -> reward: the public functions of a module that see a completion, in their order. The module is one that
    Python can import from here, or a Python file.

    Raises:
        UserError: there is none, it fails, or it has no reward.
    """
    module = _imported(name)
    own = [(key, value) for key, value in vars(module).items() if key[0] != "_" and callable(value)]
    found = {key: value for key, value in own if not inspect.isclass(value) and _is_reward(value)}
    mine = {key: value for key, value in found.items() if getattr(grpo.rewards, key, None) is not value}
    if not mine:  # those that ship are at hand already
        raise UserError(
            f"{name} has no reward: no public function of its own names `completion` or `completions`. It has: "
            f"{', '.join(key for key, _ in own) or 'no functions'}."
        )
    return mine


def listed(key: str, source: str, function: Callable) -> Listed:
    """What a reward says of itself."""
    text = inspect.getdoc(function) or ""
    summary = " ".join(text.partition("\n\n")[0].split())
    stated = _RANGE.search(text)
    return Listed(key, source, function, _signature(function), stated[1] if stated else "", summary, _tried(function))


def _offered(point: EntryPoint) -> Listed:
    ships = point.value.startswith("grpo.rewards:")
    of_package = f"package {point.dist.name} {point.dist.version}" if point.dist else point.value
    source = "ships with grpo" if ships else of_package
    try:
        with user_code(lambda raised: f"cannot be loaded: it raised {raised}"):
            function = point.load()
            return listed(point.name, source, function)
    except UserError as error:
        return Listed(point.name, source, None, "", "", str(error), "")


# ---- modules


def _imported(name: str) -> Any:
    path = Path(name)
    is_file = path.suffix == ".py" or "/" in name
    if is_file and not path.is_file():
        raise UserError(f"There is no file {name}. --module takes a Python file, or a module that Python can import.")
    with user_code(lambda raised: f"Importing {name} raised {raised}. --module takes a Python file or a module."):
        if not is_file:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", path.stem), path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)
        sys.path.append(str(path.resolve().parent))  # for what lies beside it
        spec.loader.exec_module(module)
        return module


def _is_reward(function: Any) -> bool:
    try:
        return bool(_SEEN_IN & inspect.signature(function).parameters.keys())
    except (TypeError, ValueError):
        return False


# ---- what a function says of itself


def _signature(function: Callable) -> str:
    try:
        written = inspect.signature(function)
    except (TypeError, ValueError):
        return "(?)"
    bare = [_bare(each) for each in written.parameters.values()]
    return str(written.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _bare(parameter: inspect.Parameter) -> inspect.Parameter:
    """Without its annotation, and a long default as `...`."""
    default = parameter.default if len(repr(parameter.default)) <= _LONGEST_DEFAULT else Ellipsis
    return parameter.replace(annotation=inspect.Parameter.empty, default=default)


def _tried(function: Callable) -> str:
    """The first example of the docstring that gives something, and what it gave just now; empty where there is none."""
    try:
        examples = doctest.DocTestParser().get_examples(inspect.getdoc(function) or "")
    except ValueError as error:  # of its layout
        return f"its example cannot be read: {error}"
    names = dict(getattr(function, "__globals__", {}))
    limit = Limit(_EXAMPLE_SECONDS, "which an example may take", "Mend the example in its docstring.")
    for example in examples:
        try:
            call = {"source": example.source, "names": names, "gives": bool(example.want)}
            given = living_watchdog().call(limit, "the example of a reward", _run, call)
        except Exception as error:
            return f"{_in_a_line(example.source)} raised {in_words(error)}"
        if example.want:
            return f"{_in_a_line(example.source)} is {given}"
    return ""


def _run(source: str, names: dict[str, Any], gives: bool) -> str:
    if gives:
        return repr(eval(source, names))
    exec(source, names)
    return ""


def _in_a_line(source: str) -> str:
    return " ".join(source.split())
