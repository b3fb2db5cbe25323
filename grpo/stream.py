"""Stream: prompts, or lessons, in a seeded order, an epoch after the other, with a cursor. Knows nothing of what they
are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

from grpo.seeds import mix_seed
from grpo.types import Prompt

Item = TypeVar("Item")


class Stream(Generic[Item]):
    """Items without end: each epoch is a permutation that depends on (seed, epoch) alone.

    `cursor` counts the items handed out; a stream built with the same seed and cursor goes on the same.
    """

    def __init__(self, items: Sequence[Item], seed: int, cursor: int = 0):
        self.items = items
        self.seed = seed
        self.cursor = cursor
        self._order = (-1, torch.empty(0))  # (epoch, its permutation)

    def epochs(self) -> float:
        """How often all items were handed out."""
        return self.cursor / len(self.items)

    def take(self, count: int) -> list[Item]:
        """The next `count` items."""
        chosen = self.peek(count)
        self.cursor += count
        return chosen

    def peek(self, count: int) -> list[Item]:
        """The same, which are not handed out yet."""
        return [self.items[self._at(self.cursor + i)] for i in range(count)]

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.items))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.items), generator=generator))
        return int(self._order[1][index])


PromptStream = Stream[Prompt]
