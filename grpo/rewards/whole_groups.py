"""Whole groups: a function of the batch that counts on groups of --group-size, where a scoring has other ones.

Knows nothing of where calls run. A reward that ranks within groups may say `reshape(-1, 8)`. In training, and in what
is tried before it, all groups have that size; those of a held-out score have --eval-samples. Where such a call raises
it is made once more, each group filled up with its own completions; what is said of those that were added is left out.
(A function that names `group_size` as an argument is told the number, and needs none of this.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, groupby, islice

from grpo.rewards.calling import Finish, Further, Outcome, Start
from grpo.rewards.samples import Samples, only
from grpo.rewards.values import Missing


def in_whole_groups(start: Start, size: int) -> Further:
    """Of a function of the batch, which may count on groups of this size."""
    return partial(_further, start, size)


def _further(start: Start, size: int, samples: Samples, finish: Finish) -> Finish:
    return Finish(partial(_finish, start, size, samples, finish), finish.cancel)


def _finish(start: Start, size: int, samples: Samples, finish: Finish) -> Iterator[Outcome]:
    for members, scores in finish():
        filled = _filled(samples, members, size)
        if all(isinstance(score, Missing) for score in scores) and len(filled) > len(members):
            again = dict(zip(filled, _scores(start, only(samples, filled)), strict=True))
            second = [again[member] for member in members]
            if not any(isinstance(score, Missing) for score in second):
                yield members, second
                continue
        yield members, scores


def _filled(samples: Samples, members: Sequence[int], size: int) -> list[int]:
    """These completions, with some of each group once more until it is whole."""
    filled: list[int] = []
    for _, own in groupby(members, key=samples.group.__getitem__):
        group = list(own)
        filled += islice(cycle(group), -(-len(group) // size) * size)
    return filled


def _scores(start: Start, samples: Samples) -> list:
    scores: list = [None] * len(samples.completions)
    for members, of_call in start(samples)():
        for member, score in zip(members, of_call, strict=True):
            scores[member] = score
    return scores
