"""Stream: prompts in a seeded order, an epoch after the other, with a cursor. Knows nothing of what they ask."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo.seeds import mix_seed
from grpo.types import Prompt


class PromptStream:
    """Prompts without end: each epoch is a permutation that depends on (seed, epoch) alone.

    `cursor` counts the prompts handed out; a stream built with the same seed and cursor goes on the same.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, cursor: int = 0):
        self.prompts = prompts
        self.seed = seed
        self.cursor = cursor
        self._order = (-1, torch.empty(0))  # (epoch, its permutation)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        chosen = [self.prompts[self._at(self.cursor + i)] for i in range(count)]
        self.cursor += count
        return chosen

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.prompts))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.prompts), generator=generator))
        return int(self._order[1][index])
