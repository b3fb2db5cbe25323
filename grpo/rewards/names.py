"""Names: a reward that is named instead of given, and what a reward is called. Knows nothing of how one is called.

"package.module:function"     what Python imports from here
"correctness"                 what an installed package offers under the entry-point group `grpo.rewards`; those
                              that ship are offered so too
"tags('plan', 'code')"        what a function that is named in one of these ways gives for these values: literals, and
                              names of rewards, as in "short_when_right(math)". One that ships is called without values
                              where none are written: "tags"
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from grpo.errors import UserError, nearest, user_code
from grpo.rewards.shipped import MAKERS, SHIPPED, hint_of
from grpo.rewards.values import shown

ENTRY_POINTS = "grpo.rewards"


def reward_of(key: Any) -> Callable:
    """The function that a task means by a key of its `rewards`.

    Raises:
        UserError: it names nothing that is here, or is neither a name nor a function.
    """
    function = resolve_reward(key) if isinstance(key, str) else key
    if not callable(function):
        told = f"`{key}` names {shown(function)}" if isinstance(key, str) else f"A reward of the task is {shown(key)}"
        raise UserError(
            f"{told}, which is no function. A reward is a function, the name of an installed one, or "
            "`package.module:function`."
        )
    return function


def name_of(key: Any) -> str:
    """What a reward of a task is called: the last part of its name, or the function's own.

    A function's own is what a decorator or the user has set; a partial object has else that of its function, and an
    object that is callable that of its class.

    Raises:
        UserError: that is no word.
    """
    if isinstance(key, str) and _is_made(key):
        return name_of(_made(key))
    if isinstance(key, str):
        return re.sub(r"[^\w-]+", "_", key.rpartition(":")[2].rpartition(".")[2])
    name = getattr(key, "__name__", None)
    if name is None and isinstance(key, partial):
        return name_of(key.func)
    name = type(key).__name__ if name is None else name
    if not (isinstance(name, str) and name.isidentifier()):
        raise UserError(f"A reward is called {name}. Its name is its metric's name: write it with `def`.")
    return name


def resolve_reward(name: str) -> Callable:
    """`package.module:function`, or the name under which an installed package offers a reward; or a call of one that
    makes a reward.

    Raises:
        UserError: there is no such thing here, or it cannot be imported or made.
    """
    if _is_made(name):
        return _made(name)
    module_name, colon, attribute = name.partition(":")
    if not colon:
        return _installed_reward(name)
    if not module_name or not attribute:
        raise UserError(f"Reward `{name}`: there must be a module before the colon and a function after it.")
    with user_code(
        lambda raised: (
            f"Reward `{name}`: importing {module_name} raised {raised}. The name before the colon must be a module "
            "that Python can import from here: check its spelling, mend it, or install its package."
        )
    ):
        module = importlib.import_module(module_name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            functions = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
            raise UserError(
                f"Reward `{name}`: {module_name} has no `{attribute}`.{nearest(attribute, functions)} "
                f"It has: {', '.join(functions) or 'no functions'}."
            )
        found = getattr(found, part)
    return found


def _is_made(name: str) -> bool:
    return "(" in name or name.strip() in MAKERS


def _made(spelled: str) -> Callable:
    """What a function gives for the values that are written behind its name."""
    name, bracket, behind = spelled.strip().partition("(")
    values, named = _values_of(spelled, behind) if bracket else ([], {})
    maker = getattr(importlib.import_module("grpo.rewards"), name) if name in MAKERS else resolve_reward(name)
    with user_code(lambda raised: f"Reward `{spelled}`: `{name}` raised {raised}. Mend the values behind it."):
        try:
            inspect.signature(maker).bind(*values, **named)
        except TypeError as error:
            raise UserError(
                f"Reward `{spelled}`: {error}. What stands in brackets behind a name is what it is called with to make "
                f"a reward; `python -m grpo.rewards {name}` shows what `{name}` takes."
            ) from error
        made = maker(*values, **named)
    if not callable(made):
        raise UserError(f"Reward `{spelled}` is {shown(made)}, which is no function: name it without the brackets.")
    return made


def _values_of(spelled: str, behind: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        call = ast.parse(f"f({behind}", mode="eval").body
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        values = [_value(each) for each in call.args]
        return values, {str(each.arg): _value(each.value) for each in call.keywords if each.arg or _no(each)}
    except (SyntaxError, ValueError, AssertionError, TypeError, RecursionError) as error:
        raise UserError(
            f"Reward `{spelled}` cannot be read. Behind a name stand values in brackets, as in Python: "
            "\"tags('plan', 'code')\", \"cosine(math, 1024)\"."
        ) from error


def _no(node: ast.AST) -> bool:
    raise ValueError(f"{ast.dump(node)} is no value")


def _value(node: ast.expr) -> Any:
    return resolve_reward(node.id) if isinstance(node, ast.Name) else ast.literal_eval(node)


def installed_rewards() -> dict[str, list[EntryPoint]]:
    """Who offers a reward under each name, by name: one each, unless two packages offer the same."""
    offered: dict[str, list[EntryPoint]] = {}
    shipped = (EntryPoint(name, f"grpo.rewards:{name}", ENTRY_POINTS) for name in SHIPPED)
    for point in (*entry_points(group=ENTRY_POINTS), *shipped):
        if point.value not in [other.value for other in offered.get(point.name, [])]:
            offered.setdefault(point.name, []).append(point)
    return dict(sorted(offered.items()))


def _installed_reward(name: str) -> Callable:
    installed = installed_rewards()
    if name not in installed:
        dotted = " Between module and function stands a colon." if "." in name else ""
        raise UserError(
            f"No installed package offers a reward `{name}`.{hint_of(name) or nearest(name, installed)}{dotted} "
            f"Installed: {', '.join(installed) or 'none'}. "
            "A reward of your own is named `package.module:function`."
        )
    if len(installed[name]) > 1:
        values = " and ".join(sorted(f"`{point.value}`" for point in installed[name]))
        raise UserError(f"Several installed packages offer a reward `{name}`: {values}. Name the one you mean so.")
    with user_code(lambda raised: f"Loading the installed reward `{name}` raised {raised}. Mend its package."):
        return installed[name][0].load()
