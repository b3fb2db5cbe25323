"""Seeds: every random choice of a run follows from its seed and from what is drawn. Knows nothing of what it is for.

Deriving seeds, instead of carrying generators' states along, makes any step repeatable on its own.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What is drawn; the first part of every mix, so that the seeds of different purposes never meet."""

    ROLLOUT = 1  # (run seed, step), then (that, row of the step, member of the group): completions that are trained on
    ORDER = 2  # (run seed), then (that, epoch): the order in which prompts come
    EVALUATION = 3  # (run seed), then (that, row, sample): held-out completions
    CANARY = 4  # then (that, row, sample): the completions that engine and policy are compared on
    AUDIT = 5  # (run seed, step): what breaks ties when sampled tokens are ranked


GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64, Steele et al. 2014


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers."""
    mixed = GOLDEN
    for part in parts:  # the finaliser of splitmix64 after each part
        mixed = (mixed ^ (part & 0xFFFFFFFFFFFFFFFF)) * FIRST & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ (mixed >> 27)) * SECOND & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1


def uniforms(seeds: list[int], count: int) -> NDArray[np.float64]:
    """The first `count` numbers of each seed's own stream, [len(seeds), count] in [0, 1): splitmix64."""
    state = np.array(seeds, dtype=np.uint64)[:, None] + np.uint64(GOLDEN) * np.arange(1, count + 1, dtype=np.uint64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(FIRST)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(SECOND)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
