"""From completions to rewards: call every reward function, check what it returned, add up with weights.

Knows nothing of how a function is called (`calling.py`) or of advantages. How rewards are called is decided
in `build_rewards`, so that `score` decides nothing. Axes: G completions of a group, S of all groups.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from importlib.metadata import entry_points
from numbers import Real
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo.errors import UserError, nearest
from grpo.rewards.calling import Samples, Start, is_async, starter, where
from grpo.types import Completion, Group, Prompt

ENTRY_POINTS = "grpo.rewards"
_ARRAYS = (np.ndarray, Tensor)
_LARGEST = torch.finfo(torch.float32).max
_TAKEN = ("mean", "std")  # `reward/mean` and `reward/std` are metrics of the weighted sum: see train.step_metrics


@dataclass(frozen=True)
class Reward:
    """A reward function, ready to be called. Its metric is `reward/<name>`."""

    name: str
    weight: float
    start: Start
    is_async: bool


def build_rewards(
    rewards: Mapping[Callable | str, float],
    columns: Iterable[str],
    chat: bool,
    *,
    probe: tuple[Prompt, str] | None = None,
    timeout: float | None = None,
) -> list[Reward]:
    """Reward functions and their weights, as a task file lists them -> rewards that `score` can call.

    columns  of the data set; a reward may name any of them as an argument
    chat     the task's prompts are chat messages, so TRL-style functions get chat-format completions
    probe    a prompt and its gold completion, on which a TRL-style function of a chat task is tried, to find
             out whether it reads chat messages or strings; without it, chat messages
    timeout  seconds that one call of a reward may take; None for no limit

    A string names an installed reward (entry-point group `grpo.rewards`) or `package.module:function`.
    """
    columns = list(columns)
    samples = probe and probe_samples(*probe)
    built = []
    for key, weight in rewards.items():
        function = resolve_reward(key) if isinstance(key, str) else key
        name = key.rpartition(":")[2] if isinstance(key, str) else _name_of(function)
        start = starter(name, function, columns, chat, samples, timeout)
        built.append(Reward(name, _checked_weight(name, weight), start, is_async(function)))
    _check_together(built)
    return built


def score(groups: list[Group], rewards: list[Reward]) -> dict[str, float]:
    """Fill `parts[name]` [G] and `rewards` [G] of each group; return what rewards told `log_metric`.

    parts    what each reward returned, float32, unweighted; NaN where it returned None
    rewards  the sum over the rewards of weight * part, a NaN part counting as 0. A completion to which no
             reward applies therefore gets 0; `preflight` refuses a task whose gold answers are like that.
    """
    samples = samples_of(groups)
    sizes = [len(group.completions) for group in groups]
    # All are started first, and those that wait are finished last: they wait while the others compute.
    finishes = {reward.name: reward.start(samples) for reward in rewards}
    returned = {each.name: finishes[each.name]() for each in sorted(rewards, key=attrgetter("is_async"))}
    for reward in rewards:
        part = _checked_values(reward.name, returned[reward.name], samples)  # [S]
        for group, part_of_group in zip(groups, part.split(sizes), strict=True):
            group.parts[reward.name] = part_of_group
    for group in groups:
        group.rewards = weighted_sum(group.parts, rewards)
    return samples.metrics


def weighted_sum(parts: dict[str, Tensor], rewards: list[Reward]) -> Tensor:
    """{reward name: [G]} -> [G]: the sum of weight * part, a NaN part counting as 0."""
    return torch.stack([reward.weight * parts[reward.name] for reward in rewards]).nansum(dim=0)


def samples_of(groups: list[Group]) -> Samples:
    """The groups' completions in one flat list, each beside its prompt."""
    return Samples(
        prompts=[group.prompt for group in groups for _ in group.completions],
        completions=[completion for group in groups for completion in group.completions],
    )


def probe_samples(prompt: Prompt, text: str) -> Samples:
    """A completion that nobody sampled, twice, because some functions compare the completions of a batch."""
    return samples_of([Group(prompt, [unsampled(text), unsampled(text)])])


def unsampled(text: str) -> Completion:
    """A completion with this text. Its tokens are the bytes and a stop: a length taken from them is sane."""
    tokens = [*text.encode(), 0]
    return Completion(tokens, [0.0] * len(tokens), text, finish="stop", policy_version=0)


def resolve_reward(name: str) -> Callable:
    """`package.module:function`, or the name under which an installed package offers a reward."""
    module_name, colon, attribute = name.partition(":")
    if not colon:
        return _installed_reward(name)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module may raise anything
        raise UserError(
            f"Reward `{name}`: importing {module_name} failed ({type(error).__name__}: {error}). The name before "
            "the colon must be a module that Python can import from here: check its spelling, mend it, or install its "
            "package."
        ) from error
    if attribute not in vars(module):
        functions = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise UserError(
            f"Reward `{name}`: {module_name} has no `{attribute}`.{nearest(attribute, functions)} "
            f"It has: {', '.join(functions) or 'no functions'}."
        )
    return vars(module)[attribute]


def _installed_reward(name: str) -> Callable:
    installed = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in installed:
        raise UserError(
            f"No installed package offers a reward `{name}`.{nearest(name, installed)} "
            f"Installed: {', '.join(sorted(installed)) or 'none'}. "
            "A reward of your own is named `package.module:function`."
        )
    return installed[name].load()


def _name_of(function: Callable) -> str:
    # A partial object has no name of its own, and an object that is callable only that of its class.
    function = getattr(function, "func", function)
    name = getattr(function, "__name__", type(function).__name__)
    if not name.isidentifier():
        raise UserError(f"A reward is called {name}. Its name is its metric's name: write it with `def`.")
    return name


def _checked_weight(name: str, weight: Any) -> float:
    # A comparison, because float() of a large integer raises; NaN compares false.
    if isinstance(weight, bool) or not (_is_number(weight) and abs(weight) <= _LARGEST):
        raise UserError(
            f"Reward `{name}` has the weight {_shown(weight)}. A weight is a finite number that float32 can hold, "
            "like 1.0."
        )
    return float(weight)


def _check_together(rewards: list[Reward]) -> None:
    if not any(reward.weight for reward in rewards):
        raise UserError("No reward of the task has a weight other than 0: there is nothing to learn from.")
    names = [reward.name for reward in rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"Two rewards are called `{twice[0]}`. The name is the metric's name: rename one.")
    taken = [name for name in names if name in _TAKEN]
    if taken:
        raise UserError(
            f"A reward is called `{taken[0]}`, but the metric reward/{taken[0]} is that of the sum of all rewards. "
            "Rename the function."
        )


def _checked_values(name: str, returned: Any, samples: Samples) -> Tensor:
    """What a reward returned, as [S] float32 with NaN for None; an error unless it is S numbers."""
    num_samples = len(samples.completions)
    # An array without axes is no list, and its len() raises.
    is_list = isinstance(returned, (list, tuple)) or (isinstance(returned, _ARRAYS) and returned.ndim > 0)
    if not (is_list and len(returned) == num_samples):
        raise UserError(
            f"Reward `{name}` returned {_describe(returned)} for {where(samples, slice(None))}. A function "
            f"of `completions` returns a list with one number (or None) for each, here {num_samples}."
        )
    wrong = next((index for index, value in enumerate(returned) if not _is_score(value)), None)
    if wrong is not None:
        raise UserError(
            f"Reward `{name}` returned {_describe(returned[wrong])} for "
            f"{where(samples, slice(wrong, wrong + 1))}. A reward is a finite number, or None where it does "
            "not apply."
        )
    part = torch.full((num_samples,), torch.nan)
    applies = [index for index, value in enumerate(returned) if value is not None]
    part[applies] = torch.tensor([float(returned[index]) for index in applies])
    return part


def _is_score(value: Any) -> bool:
    return value is None or (_is_number(value) and bool(abs(value) <= _LARGEST))  # NaN compares false


def _is_number(value: Any) -> bool:
    return isinstance(value, (Real, np.bool_)) or (isinstance(value, _ARRAYS) and value.ndim == 0)


def _describe(returned: Any) -> str:
    has_length = isinstance(returned, Sized) and not (isinstance(returned, _ARRAYS) and returned.ndim == 0)
    length = f" of length {len(returned)}" if has_length else ""
    return f"{_shown(returned)} ({type(returned).__name__}{length})"


def _shown(value: Any) -> str:
    try:
        return repr(value)[:60]
    except Exception:  # Python refuses to write integers of many thousand digits, and an object may raise anything
        return "something that cannot be shown"
