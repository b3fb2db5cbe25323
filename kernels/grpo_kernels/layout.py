"""GroupLayout: where the prompts and completions of a packed batch lie. Knows nothing of attention or Triton.

Axes: N packed tokens, the first P those of prompts; S gathered keys (see attention.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

# Keys are gathered where that makes at most this many of each on average, from measurements on an H100:
# LOG.md, "2026-11-21 group_attention over gathered keys: works, 0.66x and 0.92x".
MOST_COPIES = 3.0


@dataclass(frozen=True)
class Gathered:
    """The keys that each prompt and completion meets, one list after the other: a prompt its own, a completion its
    prompt's and its own, an empty completion none."""

    keys: Tensor  # [S] int32, packed tokens
    starts: Tensor  # [prompts + completions + 1] int32, where each list starts, and S
    copies: Tensor  # [S] int32, the indices in `keys` of the first token, of the second, ...
    copy_starts: Tensor  # [N + 1] int32, where each token's indices start in `copies`, and S
    longest: int  # list

    @staticmethod
    def of(
        prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], device: torch.device | str
    ) -> "Gathered":
        """The keys of a layout of prompts, each with the lengths of its completions."""
        prompt_starts = list(accumulate(prompt_lengths, initial=0))
        pieces = list(zip(prompt_starts, prompt_lengths, strict=False))  # (first token, tokens)
        lengths = list(prompt_lengths)
        start = prompt_starts[-1]
        for prompt, group in enumerate(completion_lengths):
            for length in filter(None, group):
                pieces += [(prompt_starts[prompt], prompt_lengths[prompt]), (start, length)]
                start += length
            lengths += [prompt_lengths[prompt] + length if length else 0 for length in group]
        first, size = torch.tensor(pieces).t()
        offset = first - (size.cumsum(0) - size)
        keys = offset.repeat_interleave(size) + torch.arange(sum(lengths))
        counts = torch.bincount(keys, minlength=start)
        return Gathered(
            keys.int().to(device),
            _starts(lengths, device),
            keys.argsort(stable=True).int().to(device),
            torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int().to(device),
            max(lengths),
        )


@dataclass(frozen=True)
class GroupLayout:
    """Where prompts and completions lie in the packed tokens: all prompts first, then the completions, group by group.

    Build it with `GroupLayout.of`. A prompt without completions is a plain sequence, so packed causal attention is the
    layout with no completions at all.
    """

    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[tuple[int, ...], ...]  # of each prompt's group
    segments: Tensor  # [prompts + completions + 1] int32, where each prompt and completion starts, and N
    prompts: Tensor  # [prompts + 1] int32, where each prompt starts, and P
    groups: Tensor  # [prompts + 1] int32, where each group's completions start, counted from P, and N - P
    longest: tuple[int, int, int]  # tokens of the longest prompt or completion, group of completions, and prompt
    gathered: Gathered | None  # None where the two ways are one (no completions), or keys would be copied too often

    @staticmethod
    def of(
        prompt_lengths: Sequence[int],
        completion_lengths: Sequence[Sequence[int]] | None = None,
        device: torch.device | str = "cpu",
        most_copies: float = MOST_COPIES,
    ) -> "GroupLayout":
        """The layout of prompts, each with the lengths of its completions, in tokens.

        most_copies: of each key on average, where they are gathered; beyond that attention is merged.
        Raises ValueError if the two do not have the same length, or a prompt has no token.
        """
        completions = [()] * len(prompt_lengths) if completion_lengths is None else completion_lengths
        if len(completions) != len(prompt_lengths):
            raise ValueError(
                f"{len(prompt_lengths)} prompts and {len(completions)} groups of completions; give one group a prompt."
            )
        if any(length < 1 for length in prompt_lengths):
            raise ValueError(
                f"prompt lengths are {list(prompt_lengths)}; a completion needs a prompt of 1 token or more."
            )
        in_order = [*prompt_lengths, *(length for group in completions for length in group)]
        group_lengths = [sum(group) for group in completions]
        met = zip(prompt_lengths, completions, strict=True)
        num_gathered = sum(in_order) + sum(prompt * sum(map(bool, group)) for prompt, group in met)
        gathers = sum(in_order) < num_gathered <= most_copies * sum(in_order)
        return GroupLayout(
            tuple(prompt_lengths),
            tuple(tuple(group) for group in completions),
            _starts(in_order, device),
            _starts(prompt_lengths, device),
            _starts(group_lengths, device),
            (max([0, *in_order]), max([0, *group_lengths]), max([0, *prompt_lengths])),
            Gathered.of(prompt_lengths, completions, device) if gathers else None,
        )

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.prompt_lengths)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + sum(map(sum, self.completion_lengths))

    @cached_property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with one of its completions."""
        with_longest = zip(self.prompt_lengths, self.completion_lengths, strict=True)
        return max([0, *(prompt + max([0, *group]) for prompt, group in with_longest)])

    @cached_property
    def spans(self) -> Tensor:
        """[prompts + completions, 6] int32. Of each: its first token and number of tokens; the same of the prompt that
        it goes on after, if it is a completion; and of all completions after it, if it is a prompt."""
        rows, readers = [], []
        first, prompt = self.num_prompt_tokens, 0
        for prompt_length, group in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            rows.append((prompt, prompt_length, 0, 0, first, sum(group)))
            for length in group:
                readers.append((first, length, prompt, prompt_length, 0, 0))
                first += length
            prompt += prompt_length
        return torch.tensor(rows + readers, dtype=torch.int32, device=self.segments.device)

    @cached_property
    def positions_of_tokens(self) -> Tensor:
        """`positions`, [N] int32, made once."""
        return self.positions().int()

    def positions(self) -> Tensor:
        """[N] int64: a token's index in its sequence. A completion goes on where its prompt ends."""
        starts = [0] * len(self.prompt_lengths)
        lengths = list(self.prompt_lengths)
        for prompt_length, group in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            starts += [prompt_length] * len(group)
            lengths += group
        device = self.segments.device
        first = torch.tensor(starts, dtype=torch.int64, device=device) - self.segments[:-1]
        repeated = first.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=device))
        return repeated + torch.arange(self.num_tokens, device=device)


def _starts(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
