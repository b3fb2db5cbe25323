"""Seeds: every random choice of a run follows from its seed and from what is drawn. Knows nothing of what it is for.

Deriving seeds, instead of carrying generators' states along, makes any step repeatable on its own.
"""

from __future__ import annotations

from enum import IntEnum


class Purpose(IntEnum):
    """What is drawn; the first part of every mix, so that the seeds of different purposes never meet."""

    ROLLOUT = 1  # (run seed, step, attempt) of the completions that are trained on
    ORDER = 2  # (run seed), then (that, epoch), of the order in which prompts come
    EVALUATION = 3  # (run seed) of the held-out completions


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers."""
    mixed = 0x9E3779B97F4A7C15
    for part in parts:  # the finaliser of splitmix64 (Steele et al. 2014) after each part
        mixed = (mixed ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1
