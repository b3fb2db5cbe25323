"""Groups -> batches of at most so many tokens; alone in laying out tensors. Knows nothing of models.

    build_packer(config)       what one token's loss is multiplied by and who counts, chosen once above the loop
    pack(groups)               one list of batches for each optimizer step; groups without a gradient are counted only

A group's prompt is laid out once and shared by its completions. A group that does not fit into one batch is
split between batches, each with its own copy of the prompt, which changes the cost and not the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from grpo_kernels.layout import GroupLayout
from torch import Tensor

from grpo.config import Config
from grpo.types import Batch, Completion, Group

# Where neither the user nor a plan of the memory says how many. More gain nothing.
TOKENS_PER_BATCH = 16384


@dataclass(frozen=True)
class Totals:
    """The counts of one optimizer step that a loss is normalised by; truncated completions are not in them if
    they are masked."""

    sampled_tokens: int  # of all groups, those of equal rewards included
    trained_tokens: int  # of the groups that carry gradient
    sequences: int  # completions of all groups
    max_completion_tokens: int


Normalizer = Callable[[int, Totals], float]  # (sampled tokens of the sequence, totals) -> weight of each of its tokens

NORMALIZERS: dict[str, Normalizer] = {
    # Token mean over the step: Yu et al. 2025 (DAPO), arXiv 2503.14476, equation 8.
    "dapo": lambda length, totals: 1 / totals.sampled_tokens,
    # Mean over each sequence, then over sequences: Shao et al. 2024 (GRPO), arXiv 2402.03300, equation 3.
    "grpo": lambda length, totals: 1 / (length * totals.sequences),
    # Token mean over the groups that are trained on. TRL's loss of this name divides by all tokens of a local batch.
    "bnpo": lambda length, totals: 1 / totals.trained_tokens,
    # Sum over tokens by a constant length: Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783, section 3.2.
    "dr_grpo": lambda length, totals: 1 / (totals.sequences * totals.max_completion_tokens),
}


def has_advantage(group: Group) -> bool:
    """Whether some completion did better than another, so that there is something to learn from the rewards."""
    return bool((group.advantages != 0).any())


def any_group(group: Group) -> bool:
    """Terms of the loss that do not ask for the advantage, KL and entropy, have a gradient on every group."""
    return True


def counts_all(completion: Completion) -> bool:
    """Every completion has a part in the loss."""
    return True


def counts_finished(completion: Completion) -> bool:
    """Truncated completions have none: "overlong filtering" of DAPO, section 3.4."""
    return completion.finish == "stop"


@dataclass(frozen=True)
class Packer:
    """The choices of packing, made once for a run."""

    normalizer: Normalizer
    has_gradient: Callable[[Group], bool]  # without one a group would be forward and backward passes for nothing
    counts: Callable[[Completion], bool]
    mini_batches: int
    tokens_per_batch: int
    max_completion_tokens: int
    device: torch.device

    def __call__(self, groups: list[Group]) -> list[list[Batch]]:
        """The batches of each optimizer step of one epoch; a step whose groups all have equal rewards is empty.

        Groups are dealt out to the optimizer steps in turn.
        """
        return [self._optimizer_step(groups[start :: self.mini_batches]) for start in range(self.mini_batches)]

    def trains(self, group: Group) -> bool:
        """Whether a group is in any batch: it has a gradient, and not all of its completions are masked."""
        return self.has_gradient(group) and bool(self._members(group))

    def _optimizer_step(self, groups: list[Group]) -> list[Batch]:
        pieces = [(group, self._members(group)) for group in groups]
        trained = [(group, members) for group, members in pieces if self.trains(group)]
        totals = Totals(
            sampled_tokens=_count_tokens(pieces),
            trained_tokens=_count_tokens(trained),
            sequences=sum(len(members) for _, members in pieces),
            max_completion_tokens=self.max_completion_tokens,
        )
        return [
            lay_out(rows, lambda length: self.normalizer(length, totals), self.device)
            for rows in fill(trained, self.tokens_per_batch)
        ]

    def _members(self, group: Group) -> list[int]:
        """Which completions of a group have a part in the loss, by their indices in it."""
        return [index for index, completion in enumerate(group.completions) if self.counts(completion)]


def build_packer(config: Config, device: torch.device) -> Packer:
    """The Packer that a configuration asks for."""
    return Packer(
        normalizer=NORMALIZERS[config.normalization],
        has_gradient=any_group if config.kl_coef or config.entropy_coef else has_advantage,
        counts=counts_finished if config.mask_truncated else counts_all,
        mini_batches=config.mini_batches,
        tokens_per_batch=config.tokens_per_batch or TOKENS_PER_BATCH,
        max_completion_tokens=config.max_completion_tokens,
        device=device,
    )


Piece = tuple[Group, list[int]]  # a group and which of its completions


def fill(pieces: list[Piece], tokens_per_batch: int) -> list[list[Piece]]:
    """Pieces -> rows of pieces, each of at most `tokens_per_batch` packed tokens where one completion fits at all.

    Greedy, in order; a group that does not fit goes on in the next batch with its prompt again.
    """
    rows: list[list[Piece]] = []
    left = 0
    for group, members in pieces:
        prompt = len(group.prompt.tokens)
        for index, member in enumerate(members):
            length = len(group.completions[member].tokens)
            if index > 0 and length <= left:
                rows[-1][-1][1].append(member)
                left -= length
            elif rows and prompt + length <= left:
                rows[-1].append((group, [member]))
                left -= prompt + length
            else:
                rows.append([(group, [member])])
                left = tokens_per_batch - prompt - length
    return rows


def lay_out(pieces: list[Piece], weight: Callable[[int], float], device: torch.device) -> Batch:
    """One batch of these pieces. weight: sampled tokens of a completion -> loss weight of each of them."""
    layout = GroupLayout.of(
        [len(group.prompt.tokens) for group, _ in pieces],
        [[len(group.completions[member].tokens) for member in members] for group, members in pieces],
        device,
    )
    tokens = [token for group, _ in pieces for token in group.prompt.tokens]
    previous = [max(index - 1, 0) for index in range(len(tokens))]
    ends_of_prompts = [end - 1 for end in accumulate(layout.prompt_lengths)]
    # The columns of sampled tokens only; the prompts' part is added below.
    sequence: list[int] = []
    sampler_logprobs: list[float] = []
    advantages: list[float] = []
    weights: list[float] = []
    mask: list[bool] = []
    num_sequences = 0
    for (group, members), end_of_prompt in zip(pieces, ends_of_prompts, strict=True):
        for member in members:
            completion = group.completions[member]
            start, length = len(tokens), len(completion.tokens)
            tokens += completion.tokens
            previous += [end_of_prompt, *range(start, start + length - 1)]
            sequence += [num_sequences] * length
            sampler_logprobs += completion.sampler_logprobs
            advantage, share = float(group.advantages[member]), weight(completion.num_sampled)
            advantages += [advantage * sampled for sampled in completion.mask]
            weights += [share * sampled for sampled in completion.mask]
            mask += completion.mask
            num_sequences += 1

    def column(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor([0] * (len(tokens) - len(values)) + values, dtype=dtype, device=device)

    return Batch(
        layout=layout,
        tokens=column(tokens, torch.int64),
        positions=layout.positions(),
        previous=column(previous, torch.int64),
        sequence=column(sequence, torch.int64),
        mask=column(mask, torch.bool),
        sampler_logprobs=column(sampler_logprobs, torch.float32),
        advantages=column(advantages, torch.float32),
        weights=column(weights, torch.float32),
    )


def lay_out_to_read(groups: list[Group], device: torch.device) -> Batch:
    """One batch of all completions of these groups, for their log-probabilities alone: no part of any loss."""
    unscored = [replace(group, advantages=torch.zeros(len(group.completions))) for group in groups]
    return lay_out([(group, list(range(len(group.completions)))) for group in unscored], lambda length: 0.0, device)


def _count_tokens(pieces: list[Piece]) -> int:
    return sum(group.completions[member].num_sampled for group, members in pieces for member in members)
