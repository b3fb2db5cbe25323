"""Fitting: a batch that memory does not hold is computed in halves. Knows nothing of models or losses.

    fit(work, batch)    what `work` gives of the batch, or of each of its parts where memory runs out over the whole

A part's share of the loss is its own, and its gradient is added only when its backward pass is complete, so the step's
result is that of whole batches but for the rounding of sums. From then on batches are no larger than the largest part.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from grpo.errors import is_out_of_memory
from grpo.packing import BatchLimit, halve
from grpo.types import Batch

Result = TypeVar("Result")


class Fitting:
    """Runs the passes of a run over its batches."""

    def __init__(self, limit: BatchLimit, tell: Callable[[str], object] = print):
        """limit: of the batches that are laid out, lowered here. tell: hears of it."""
        self.limit = limit
        self.tell = tell
        self.cut: Callable[[Batch], list[Batch]] = _whole
        self._num_split = 0

    def __call__(self, work: Callable[[Batch], Result], batch: Batch) -> list[Result]:
        """What `work` gives of a batch, or of its parts in order.

        Raises:
            MemoryError, RuntimeError: it runs out of memory over a single completion.
        """
        waiting, done = self.cut(batch), []
        while waiting:
            with self._halving(waiting):
                done.append(work(waiting[0]))
                del waiting[0]
        return done

    def restore(self, state: list[int]) -> None:
        """Go on with the limit of the run that is resumed: BatchLimit.state."""
        self.limit.restore(state)
        if self.limit.tokens < self.limit.asked:
            self.cut = self._cut

    def count(self) -> int:
        """How many batches had to be split since this was last asked."""
        count, self._num_split = self._num_split, 0
        return count

    @contextmanager
    def _halving(self, waiting: list[Batch]) -> Iterator[None]:
        """Inside, memory that runs out puts two halves in place of the first of the batches that wait, and parts no
        larger than these in place of the others."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, and not the only one
            halves = self._halves(waiting[0], error)
            waiting[:] = halves + [part for batch in waiting[1:] for part in self._cut(batch)]

    def _halves(self, batch: Batch, error: Exception) -> list[Batch]:
        if not is_out_of_memory(error):
            raise error
        forget(error)
        halves = halve(batch)
        if len(halves) == 1:
            raise error
        size, largest = len(batch.tokens), max(len(half.tokens) for half in halves)
        self.limit.lower(largest)
        self.cut = self._cut  # those of this step were laid out before this was known
        self._num_split += 1
        self.tell(
            f"note: the memory did not hold a batch of {size:,} tokens. It is split in two, which changes nothing but "
            f"the rounding of sums; from now on batches have at most {self.limit.tokens:,} tokens. The next run is "
            f"spared the attempt by --tokens-per-batch {self.limit.tokens}."
        )
        return halves

    def _cut(self, batch: Batch) -> list[Batch]:
        """The batch in parts that are no larger than is known to be too large, where it can be divided."""
        halves = halve(batch) if len(batch.tokens) > self.limit.tokens else [batch]
        return halves if len(halves) == 1 else [part for half in halves for part in self._cut(half)]


def _whole(batch: Batch) -> list[Batch]:
    """Before memory ever ran out, batches are as they were laid out."""
    return [batch]


def forget(error: BaseException | None) -> None:
    """Free what a failed pass holds: the frames of its traceback keep every tensor that they name."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    torch.cuda.empty_cache()  # what is left of it in pieces may be too small for anything
