"""Sink: whoever is told what happens in a run. Knows nothing of who they are.

The events of a run, in their order:

    resumed                              once, at the start of a run that goes on: what was recorded before
    stage, message                       what is being done now; a sentence for the user
    evaluation(step, scores, groups)     held-out scores after `step` updates, and the completions that they are of
    step(step, metrics)                  the numbers of a training step
    completions(step, groups, tokens)    its completions, and the tokens of some of them
    close                                once, also after an error
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo.types import Group

Numbers = Mapping[str, float]
Recorded = tuple[int, dict[str, float | None]]  # (step, the numbers of a line of metrics.jsonl)
TokenRecords = list[dict[str, Any]]  # of grpo/record/tokens.py


class Sink:
    """Hears everything and does nothing with it: a sink overrides what it is for.

    Steps count from 0: `step` is the number of updates behind the policy that sampled, in an evaluation too.
    """

    def resumed(self, recorded: Sequence[Recorded], start_step: int) -> None:
        """A run goes on from `start_step`; `recorded` is what stays of its metrics."""

    def stage(self, name: str) -> None:
        """What the run is doing now."""

    def message(self, text: str) -> None:
        """A sentence for whoever watches."""

    def evaluation(self, step: int, scores: Numbers, groups: Sequence[Group] = ()) -> None:
        """The held-out scores of the policy after `step` updates, under eval/ names, and what was scored."""

    def step(self, step: int, metrics: Numbers) -> None:
        """The numbers of one training step."""

    def completions(self, step: int, groups: Sequence[Group], tokens: TokenRecords) -> None:
        """What a step was trained on: its scored groups, and token by token what the update saw of some of them."""

    def close(self) -> None:
        """The run is over, or has failed."""


class HandsOn(Sink):
    """Hands what it hears on to another sink, by `_try`, which says what its errors mean."""

    _sink: Sink

    def resumed(self, recorded: Sequence[Recorded], start_step: int) -> None:
        self._try("resumed", recorded, start_step)

    def stage(self, name: str) -> None:
        self._try("stage", name)

    def message(self, text: str) -> None:
        self._try("message", text)

    def evaluation(self, step: int, scores: Numbers, groups: Sequence[Group] = ()) -> None:
        self._try("evaluation", step, scores, groups)

    def step(self, step: int, metrics: Numbers) -> None:
        self._try("step", step, metrics)

    def completions(self, step: int, groups: Sequence[Group], tokens: TokenRecords) -> None:
        self._try("completions", step, groups, tokens)

    def close(self) -> None:
        self._try("close")

    def _try(self, event: str, *told: Any) -> None:
        getattr(self._sink, event)(*told)


class Tolerated(HandsOn):
    """A sink that the run can do without: at its first error it is left out, and the user told once.

    For what belongs to others, a tracker's service say: a training run of a night is not stopped by it.
    """

    def __init__(self, name: str, sink: Sink, tell: Callable[[str], object]):
        self._name, self._sink, self._tell = name, sink, tell

    def _try(self, event: str, *told: Any) -> None:
        try:
            super()._try(event, *told)
        except Exception as error:  # of a library and a service of others
            self._sink = Sink()
            self._tell(f"note: {self._name} is not written any more: {type(error).__name__} ({error}).")
