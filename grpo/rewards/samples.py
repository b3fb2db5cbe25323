"""Samples: what rewards are called with. Nothing of it is the run's own: what a reward changes, only it sees.

Knows nothing of signatures or of values that come back. Axis: S completions scored together, flat, in group order.
"""

from __future__ import annotations

import copy
import datetime
import pickle
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
class Samples:
    """S completions, and beside each the prompt it answers.

    `logged` collects what rewards report through `log_metric`.
    """

    prompts: list[Prompt]  # S
    completions: list[Completion]  # S
    group: list[int]  # S, which of the groups that are scored together each belongs to
    logged: dict[str, list[float]] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """ "logged/<name>" -> the mean of what was logged under that name: it is never the name of a metric of ours."""
        return {f"logged/{name}": sum(values) / len(values) for name, values in self.logged.items()}


Source = Callable[[Samples], Any]  # where one argument comes from: new lists and copies with every call


def samples_of(groups: list[Group]) -> Samples:
    """The groups' completions in one flat list, each beside its prompt."""
    return Samples(
        prompts=[group.prompt for group in groups for _ in group.completions],
        completions=[completion for group in groups for completion in group.completions],
        group=[number for number, group in enumerate(groups) for _ in group.completions],
    )


def only(samples: Samples, indices: Sequence[int]) -> Samples:
    """Some of the completions; what is logged is logged for all."""
    picked = {name: [getattr(samples, name)[i] for i in indices] for name in ("prompts", "completions", "group")}
    return replace(samples, **picked)


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


def _log_metric(logged: dict[str, list[float]], name: str, value: float) -> None:
    if not (isinstance(name, str) and name.isprintable() and name.strip()):
        raise ValueError(f"log_metric was given the name {name!r:.80}: it must be text of one line")
    logged.setdefault(name, []).append(float(value))


def _log_extra(column: str, values: list[Any]) -> None:
    """Accepted, as TRL's rewards may call it, and ignored: completions.jsonl has no extra columns."""


OF_ONE_COMPLETION: dict[str, Source] = {
    "prompt": lambda samples: [prompt.text for prompt in samples.prompts],
    "completion": lambda samples: [completion.text for completion in samples.completions],
    "completion_ids": lambda samples: [list(completion.tokens) for completion in samples.completions],
}
_OF_A_BATCH: dict[str, Source] = {
    "completion_ids": OF_ONE_COMPLETION["completion_ids"],
    "trainer_state": lambda samples: None,
    "log_metric": lambda samples: partial(_log_metric, samples.logged),
    "log_extra": lambda samples: _log_extra,
}
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
