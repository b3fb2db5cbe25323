"""Theirs: a sink of the user's own, which a run is told to from Python. Knows nothing of what it does.

It may raise Stop, to end the run after the step that it is in. Whatever else it raises leaves it out and ends nothing.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.errors import WHAT_USER_CODE_RAISES, UserError, in_words
from grpo.record.sinks import HandsOn, Sink


class Stop(Exception):
    """Raised by a sink: the run ends after its step and is saved, as by Ctrl-C."""


class Theirs(HandsOn):
    """Hands on what it hears. tell: is told what goes wrong. stop: asks the run to stop."""

    def __init__(self, sink: Sink, tell: Callable[[str], object], stop: Callable[[], object]):
        self._sink, self._name, self._tell, self._stop = sink, type(sink).__name__, tell, stop

    def _try(self, event: str, *told: Any) -> None:
        try:
            super()._try(event, *told)
        except Stop as asked:
            self._stop()
            self._tell(f"note: {self._name} asks the run to stop after this step{f': {asked}' if str(asked) else ''}.")
        except WHAT_USER_CODE_RAISES as error:
            self._sink = Sink()  # first: it would be told of its own end
            line = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(line.filename).name} line {line.lineno}"
            self._tell(
                f"note: the sink {self._name} is left out from now on: {event} raised {in_words(error)}, {where}."
            )


def check_sinks(sinks: Any) -> list[Sink]:
    """What was given as sinks.

    Raises:
        UserError: something of it is none.
    """
    several = [sinks] if isinstance(sinks, Sink) else sinks
    if not isinstance(several, list | tuple):
        raise UserError(f"sinks is {sinks!r:.200}. It must be a list of sinks: instances of a class of grpo.Sink.")
    for sink in several:
        if not isinstance(sink, Sink):
            made = f" Make one of it: {sink.__name__}()." if isinstance(sink, type) and issubclass(sink, Sink) else ""
            raise UserError(
                f"Among the sinks is {sink!r:.200}, which is none.{made} A sink is an instance of a class of grpo.Sink "
                "that overrides what it wants to hear, such as `def step(self, step, metrics)`."
            )
    return list(several)
