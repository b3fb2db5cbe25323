"""Retries: calls of a reward that failed are made again after a wait, all of a scoring together.

Knows nothing of where they run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from grpo.rewards.calling import Finish, Further, Outcome, Start, joined
from grpo.rewards.samples import Samples, only
from grpo.rewards.values import Missing

LONGEST_WAIT = 60.0  # seconds


def retrying(start: Start, retries: int, backoff: float) -> Further:
    """Of a reward that has `retries` more tries; backoff: seconds before the first, twice as many before each further
    one."""
    return partial(_further, start, retries, backoff)


def _further(start: Start, retries: int, backoff: float, samples: Samples, finish: Finish) -> Finish:
    return Finish(partial(_finish, start, retries, backoff, samples, finish), finish.cancel)


def _finish(start: Start, retries: int, backoff: float, samples: Samples, finish: Finish) -> Iterator[Outcome]:
    try:
        for number in range(retries):
            failed: list[int] = []
            for members, scores in finish():
                if any(isinstance(score, Missing) for score in scores):
                    failed += members
                else:
                    yield members, scores
            if not failed:
                return
            time.sleep(min(LONGEST_WAIT, backoff * 2**number))
            finish = joined([(failed, start(only(samples, failed)))])
        yield from finish()
    finally:
        finish.cancel()
