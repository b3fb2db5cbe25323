"""ReportSink: report.html in a run's folder, written again as the run goes. Knows nothing of how the page is made."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from grpo.record.sinks import Numbers, Sink
from grpo.report.page import write_report
from grpo.report.reading import Reading
from grpo.types import Group

REPORT = "report.html"
LEAST_SECONDS = 30.0  # between two
COST = 0.02  # of a run's time, at most
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ReportSink(Sink):
    """Writes when there are new held-out scores and now and then, as long as that takes a small share of the time."""

    def __init__(self, folder: Path, tell: Callable[[str], object]):
        self._folder, self._tell = folder, tell
        self._reading: Reading | None = None
        self._due = 0.0  # time.monotonic() from which it may be written

    def evaluation(self, step: int, scores: Numbers, groups: Sequence[Group] = ()) -> None:
        self._write_if_due()

    def step(self, step: int, metrics: Numbers) -> None:
        self._write_if_due()

    def close(self) -> None:
        self._write()

    def _write_if_due(self) -> None:
        if time.monotonic() >= self._due:
            self._write()

    def _write(self) -> None:
        began = time.monotonic()
        try:
            self._reading = self._reading or Reading(self._folder)
            write_report([self._reading], self._folder / REPORT)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise
            # A page is no reason to stop: it can be made again at any time.
            self._tell(f"note: {REPORT} is not written. {error}")
        took = time.monotonic() - began
        self._due = began + took + max(LEAST_SECONDS, took / COST)
