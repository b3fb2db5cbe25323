"""Samples: what rewards are called with. Nothing of it is the run's own: what a reward changes, only it sees.

Knows nothing of signatures or of values that come back. Axis: S completions scored together, flat, in group order.
"""

from __future__ import annotations

import copy
import datetime
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any

from grpo.errors import WHAT_USER_CODE_RAISES

if TYPE_CHECKING:  # it comes with torch, which a worker process does without
    from grpo.types import Completion, Group, Prompt


@dataclass(frozen=True)
class TrainerState:
    """What a reward may know of the training, by the names that TRL's `trainer_state` has."""

    global_step: int = 0  # updates behind the policy that wrote the completions
    max_steps: int = 1  # of the run
    max_completion_tokens: int = 0  # that a completion may have at most; 0: not known


AT_THE_START = TrainerState()


@dataclass(frozen=True)
class Logged:
    """What rewards report: numbers through `log_metric`, something about each completion through `log_extra`."""

    metrics: dict[str, list[float]] = field(default_factory=dict)  # {name: numbers}
    extras: dict[str, dict[int, Any]] = field(default_factory=dict)  # {column: {place of a completion: value}}

    def add(self, other: Logged) -> None:
        """What another call has reported."""
        for name, values in other.metrics.items():
            self.metrics.setdefault(name, []).extend(values)
        for column, values in other.extras.items():
            self.extras.setdefault(column, {}).update(values)


@dataclass(frozen=True)
class Samples:
    """S completions, and beside each the prompt it answers."""

    prompts: list[Prompt]  # S
    completions: list[Completion]  # S
    group: list[int]  # S, which of the groups that are scored together each belongs to
    places: list[int]  # S, where each stands among all that are scored together
    state: TrainerState = AT_THE_START
    logged: Logged = field(default_factory=Logged)

    @property
    def metrics(self) -> dict[str, float]:
        """ "logged/<name>" -> the mean of what was logged under that name: it is never the name of a metric of ours.

        Sorted, because async rewards log in the order in which they are answered, and sums round.
        """
        logged = sorted(self.logged.metrics.items())
        return {f"logged/{name}": sum(sorted(values)) / len(values) for name, values in logged}


Source = Callable[[Samples], Any]  # where one argument comes from: new lists and copies with every call


def samples_of(groups: list[Group], state: TrainerState = AT_THE_START) -> Samples:
    """The groups' completions in one flat list, each beside its prompt."""
    completions = [completion for group in groups for completion in group.completions]
    return Samples(
        prompts=[group.prompt for group in groups for _ in group.completions],
        completions=completions,
        group=[number for number, group in enumerate(groups) for _ in group.completions],
        places=list(range(len(completions))),
        state=state,
    )


def only(samples: Samples, indices: Sequence[int]) -> Samples:
    """Some of the completions; what is logged is logged for all."""
    columns = ("prompts", "completions", "group", "places")
    return replace(samples, **{name: [getattr(samples, name)[index] for index in indices] for name in columns})


def group_size(samples: Samples) -> int:
    """Completions of a prompt, where all groups have the same number; else of the largest."""
    return max(Counter(samples.group).values())


def where(samples: Samples, scored: Sequence[int]) -> str:
    """Which completions, in words for an error: the row of the data set and how the text begins."""
    return where_one(samples, *scored) if len(scored) == 1 else where_batch(samples, scored)


def where_one(samples: Samples, index: int) -> str:
    """The same of one completion."""
    return f"row {samples.prompts[index].index}, completion {samples.completions[index].text[:80]!r}"


def where_batch(samples: Samples, scored: Sequence[int]) -> str:
    """The same of several."""
    rows = list(dict.fromkeys(samples.prompts[index].index for index in scored))
    listed = ", ".join(str(row) for row in rows[:4]) + ", ..." * (len(rows) > 4)
    return f"a batch of {len(scored)} completions (rows {listed})"


def column_source(column: str) -> Source:
    """A column of the data set. A row without it gives None, as the `datasets` library does."""
    return lambda samples: copies(prompt.fields.get(column) for prompt in samples.prompts)


def copies(values: Iterable[Any]) -> list[Any]:
    """Each value as nobody else has it. One that cannot be copied is passed as it is: `cannot_be_copied` says which."""
    values = list(values)
    different = {id(value): value for value in values}  # a group's completions have their row in common
    copiers = {key: _COPIERS.get(type(value), _copier)(value) for key, value in different.items()}
    return [copiers[id(value)]() for value in values]


def cannot_be_copied(value: Any) -> bool:
    """Every reward gets this value itself, and sees what another one has done to it."""
    return type(value) not in _COPIERS and _copier(value).func is _same


def _copier(value: Any) -> partial[Any]:
    """What gives a copy with every call, or the value itself where it cannot be copied."""
    # Pickled once and unpickled for each, because that takes a tenth of the time of deepcopy.
    for build in (_unpickler, partial(partial, copy.deepcopy)):
        with suppress(*WHAT_USER_CODE_RAISES):  # how a value is copied is its class's own code
            copier = build(value)
            copier()
            return copier
    return partial(_same, value)


def _unpickler(value: Any) -> partial[Any]:
    return partial(pickle.loads, pickle.dumps(value, pickle.HIGHEST_PROTOCOL))


def _same(value: Any) -> Any:
    return value


# Nobody can change these, so all may hold the same one. Exact types: a subclass may have attributes.
_IMMUTABLE = (str, int, float, bool, NoneType, bytes, complex, Decimal, Fraction, datetime.date, datetime.datetime)
_COPIERS = {kind: partial(partial, _same) for kind in _IMMUTABLE}


_LONGEST_EXTRA = 20_000  # characters of one value


def _log_metric(logged: dict[str, list[float]], name: str, value: float) -> None:
    if not (isinstance(name, str) and name.isprintable() and name.strip()):
        raise ValueError(f"log_metric was given the name {name!r:.80}: it must be text of one line")
    logged.setdefault(name, []).append(float(value))


def _log_extra(extras: dict[str, dict[int, Any]], places: list[int], column: str, values: Iterable[Any]) -> None:
    """As TRL has it: a value for each completion of the call."""
    values = list(values)
    if len(values) != len(places):
        raise ValueError(f"log_extra was given {len(values)} values for {column!r:.80}, and {len(places)} are scored")
    for place, value in zip(places, values, strict=True):
        _log_extra_of_one(extras, place, column, value)


def _log_extra_of_one(extras: dict[str, dict[int, Any]], place: int, column: str, value: Any) -> None:
    if not (isinstance(column, str) and column.isprintable() and column.strip()):
        raise ValueError(f"log_extra was given the name {column!r:.80}: it must be text of one line")
    extras.setdefault(column, {})[place] = _for_a_record(value)


def _for_a_record(value: Any) -> Any:
    """A number or a text, whatever it is."""
    value = value.item() if hasattr(type(value), "item") and getattr(value, "ndim", 0) == 0 else value
    if value is None or type(value) in (bool, int):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else None
    return str(value)[:_LONGEST_EXTRA]


AS_VERL = "solution_str"  # what a `compute_score` of verl calls the completion

OF_ONE_COMPLETION: dict[str, Source] = {
    "prompt": lambda samples: [prompt.text for prompt in samples.prompts],
    "completion": lambda samples: [completion.text for completion in samples.completions],
    "completion_ids": lambda samples: [list(completion.tokens) for completion in samples.completions],
}
_OF_A_BATCH: dict[str, Source] = {
    "completion_ids": OF_ONE_COMPLETION["completion_ids"],
    "trainer_state": lambda samples: samples.state,
    "log_metric": lambda samples: partial(_log_metric, samples.logged.metrics),
    "log_extra": lambda samples: partial(_log_extra, samples.logged.extras, samples.places),
}
# Passed only to those who name them: what is called **kwargs gets columns.
NAMED_BY_ONE: dict[str, Source] = {
    AS_VERL: OF_ONE_COMPLETION["completion"],
    "trainer_state": lambda samples: [samples.state for _ in samples.completions],
    "log_metric": lambda samples: [partial(_log_metric, samples.logged.metrics) for _ in samples.completions],
    "log_extra": lambda samples: [partial(_log_extra_of_one, samples.logged.extras, at) for at in samples.places],
    "group_size": lambda samples: [group_size(samples) for _ in samples.completions],
}
NAMED_BY_A_BATCH: dict[str, Source] = {"group_size": group_size}
OF_TEXTS: dict[str, Source] = {
    **_OF_A_BATCH,
    "prompts": OF_ONE_COMPLETION["prompt"],
    "completions": OF_ONE_COMPLETION["completion"],
}
OF_CHATS: dict[str, Source] = {
    **_OF_A_BATCH,
    "prompts": lambda samples: copies(prompt.messages for prompt in samples.prompts),
    "completions": lambda samples: [
        [{"role": "assistant", "content": completion.text}] for completion in samples.completions
    ],
}
ARGUMENT_NAMES = {*OF_ONE_COMPLETION, *OF_TEXTS}  # what a column cannot be called
