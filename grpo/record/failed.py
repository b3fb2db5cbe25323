"""Completions that rewards failed on: what the end of a run says of them, from the numbers of its steps.

Knows nothing of rewards beyond their names.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

_BEFORE, _AFTER = "reward/", "/failed"


class Failed:
    """Watches the steps of a run."""

    def __init__(self) -> None:
        self._steps = 0  # seen
        self._completions: Counter[str] = Counter()  # by the metric
        self._in_steps: Counter[str] = Counter()

    def seen(self, metrics: Mapping[str, Any]) -> None:
        """A step's numbers."""
        self._steps += "reward/mean" in metrics  # what goes on has read its held-out scores too
        for name in fnmatch.filter(metrics, f"{_BEFORE}*{_AFTER}"):
            self._completions[name] += int(metrics[name])
            self._in_steps[name] += 1

    def warnings(self) -> Iterator[str]:
        """What the end of the run should say."""
        for name, count in self._completions.items():
            yield (
                f"`{name.removeprefix(_BEFORE).removesuffix(_AFTER)}` failed on {count:,} completions, in "
                f"{self._in_steps[name]:,} of the {self._steps:,} steps. They were left out of their groups and of the "
                "loss; completions.jsonl says why."
            )
