"""Threads: how many of the CPU's a run computes with. Knows nothing of models: it is given some work to time.

Threads that wait for each other are fast on idle cores and many times slower than one thread on busy ones, and nobody
says beforehand how busy they are. So it is measured. Sums depend, in their last bits, on how they are split between
threads: a resumed run keeps its number, and two runs that are to be equal must be given the same.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# The user's own word, which libraries read when they are loaded.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
ROUNDS = 7  # of every number in turn, so that a busy moment meets them all
FEWEST_ROUNDS = 3
LONGEST = 3.0  # seconds, after which no further round begins
GAIN = 0.9  # more threads are taken where they need less than this share of the time: noise is to choose the fewer


@dataclass(frozen=True)
class Choice:
    """So many threads, and why in words."""

    count: int
    why: str


def choose(asked: int, kept: int, work: Callable[[], object]) -> Choice:
    """The number that was asked for or that a resumed run began with, if any (0: none), else the one that the user has
    set, else the fastest. work: a little of what the threads are for; it runs several times."""
    now = torch.get_num_threads()
    variable = next((name for name in VARIABLES if os.environ.get(name)), None)
    if asked:
        return Choice(asked, "as --threads says")
    if kept > 0:
        return Choice(kept, "those that the run began with")
    if variable:
        return Choice(now, f"as {variable} says")
    if now not in usual():
        return Choice(now, "what torch was set to before")
    return fastest(candidates(now), work)


def fastest(counts: list[int], work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Choice:
    """The number of threads, of these in rising order, that `work` is fastest with by the clock, in seconds. Leaves
    torch's own number as it was."""
    if len(counts) == 1:
        return Choice(counts[0], "torch has no more")
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    with restored_threads():
        start = clock()
        while len(seconds[1]) < FEWEST_ROUNDS or (len(seconds[1]) < ROUNDS and clock() - start < LONGEST):
            for count in counts:
                seconds[count].append(_timed(count, work, clock))
    # Without the first round, in which memory is taken and threads are made. The median and not the best: on busy cores
    # now and then a try is lucky.
    typical = {count: statistics.median(times[1:]) for count, times in seconds.items()}
    told = ", ".join(f"{1000 * typical[count]:.0f} ms with {count}" for count in counts)
    return Choice(_fewest_that_gain(typical), f"a step of the model takes {told}; --threads N decides otherwise")


def candidates(most: int) -> list[int]:
    """Powers of two up to `most`, and that."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def usual() -> set[int]:
    """The numbers that torch begins with where nobody has told it another: the logical cores or the physical ones."""
    cores = os.cpu_count() or 1
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return {cores, ours, max(1, cores // 2), max(1, ours // 2)}


@contextmanager
def restored_threads() -> Iterator[None]:
    """What is set inside does not hold outside: a run leaves the process as it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fewest_that_gain(typical: dict[int, float]) -> int:
    best, *more = typical
    for count in more:
        best = count if typical[count] < GAIN * typical[best] else best
    return best


def _timed(count: int, work: Callable[[], object], clock: Callable[[], float]) -> float:
    torch.set_num_threads(count)
    start = clock()
    work()
    return clock() - start
