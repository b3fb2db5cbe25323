"""Retries: calls of a reward that failed are made again after a wait, all of a scoring together.

Knows nothing of where they run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

from grpo.rewards.calling import Finish, Outcome, Start
from grpo.rewards.samples import Samples, only
from grpo.rewards.values import Missing

LONGEST_WAIT = 60.0  # seconds


def retrying(start: Start, retries: int, backoff: float) -> Start:
    """The same reward, which has `retries` more tries; backoff: seconds before the first, twice as many before each
    further one."""
    return partial(_start, start, retries, backoff)


def _start(start: Start, retries: int, backoff: float, samples: Samples) -> Finish:
    return partial(_finish, start, retries, backoff, samples, start(samples))


def _finish(start: Start, retries: int, backoff: float, samples: Samples, finish: Finish) -> Iterator[Outcome]:
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
        finish = partial(_as_before, failed, start(only(samples, failed)))
    yield from finish()


def _as_before(indices: Sequence[int], finish: Finish) -> Iterator[Outcome]:
    """What a call says of some completions, by their indices among all."""
    for members, scores in finish():
        yield [indices[member] for member in members], scores
