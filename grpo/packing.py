"""Groups -> batches of at most so many tokens; alone in laying out tensors. Knows nothing of models.

    build_packer(config)       what one token's loss is multiplied by and who counts, chosen once above the loop
    pack(groups)               one list of batches for each optimizer step; groups without a gradient are counted only
    halve(batch)               the same completions in two batches, for a machine whose memory does not hold the one
    lay_out_longest(...)       the largest batch that can come, of no completion that anybody wrote

A group's prompt is laid out once and shared by its completions. A group that does not fit into one batch is
split between batches, each with its own copy of the prompt, which changes the cost and not the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, cycle, islice
from math import ceil

import torch
from grpo_kernels.layout import GroupLayout
from torch import Tensor

from grpo.config import Config
from grpo.errors import UserError
from grpo.types import Batch, Completion, Group, Prompt
from grpo.world import ALONE, World

# Where neither the user nor a plan of the memory says how many. More gain nothing.
TOKENS_PER_BATCH = 16384


@dataclass(frozen=True)
class Totals:
    """The counts of one optimizer step that a loss is normalised by; completions without a score are not in them, nor
    truncated ones if they are masked."""

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
    return bool((group.advantages.nan_to_num() != 0).any())


def any_group(group: Group) -> bool:
    """Terms of the loss that do not compare the rewards of a group, KL, entropy and values, have a gradient on all."""
    return True


def counts_all(completion: Completion) -> bool:
    """Every completion has a part in the loss."""
    return True


def counts_finished(completion: Completion) -> bool:
    """Truncated completions have none: "overlong filtering" of DAPO, section 3.4."""
    return completion.finish == "stop"


class BatchLimit:
    """The most tokens of a batch: what was asked for, or less where memory did not hold that (grpo/fitting.py)."""

    def __init__(self, asked: int):
        self.asked = self.tokens = asked

    def lower(self, tokens: int) -> None:
        """No batch is larger from now on."""
        self.tokens = min(self.tokens, tokens)

    def state(self) -> list[int]:
        """What a resumed run must know to lay out the batches of the uninterrupted one."""
        return [self.asked, self.tokens]

    def restore(self, state: list[int]) -> None:
        """The inverse of `state`. Where another number is asked for by now, memory is asked again."""
        if state[:1] == [self.asked]:
            self.lower(state[1])


Piece = tuple[Group, list[int]]  # a group and which of its completions
Fill = Callable[[list[Piece], int], list[list[Piece]]]  # pieces, tokens per batch -> the pieces of each batch
Part = Callable[[list[Piece]], list[Piece]]  # the pieces of an optimizer step -> those of a rank


@dataclass(frozen=True)
class Packer:
    """The choices of packing, made once for a run."""

    normalizer: Normalizer
    has_gradient: Callable[[Group], bool]  # without one a group would be forward and backward passes for nothing
    counts: Callable[[Completion], bool]
    mini_batches: int
    limit: BatchLimit
    max_completion_tokens: int
    device: torch.device
    share: Part
    fill: Fill
    whole_groups: bool = False  # the loss looks at the completions of a group together

    def __call__(self, groups: list[Group]) -> list[list[Batch]]:
        """The batches of each optimizer step of one epoch; a step whose groups all have equal rewards is empty.

        Groups are dealt out to the optimizer steps in turn. Counts are those of the whole step, batches this rank's.
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
            lay_out(rows, lambda length: self.normalizer(length, totals), self.device, self.whole_groups)
            for rows in self.fill(self.share(trained), self.limit.tokens)
        ]

    def _members(self, group: Group) -> list[int]:
        """Which completions of a group have a part in the loss, by their indices in it: all that have a score."""
        scored = (~group.advantages.isnan()).nonzero().flatten().tolist()
        return [index for index in scored if self.counts(group.completions[index])]


def batch_limit(config: Config) -> BatchLimit:
    """How large batches may be at first."""
    return BatchLimit(config.tokens_per_batch or TOKENS_PER_BATCH)


def build_likelihood_packer(
    config: Config, device: torch.device, limit: BatchLimit | None = None, world: World = ALONE
) -> Packer:
    """Of answers that are taught: the token mean over the step, of all of them."""
    every = dict(normalizer=NORMALIZERS["dapo"], has_gradient=any_group, counts=counts_all)
    return replace(build_packer(config, device, limit, world), **every)


def build_pair_packer(
    config: Config, device: torch.device, limit: BatchLimit | None = None, world: World = ALONE
) -> Packer:
    """Of pairs: the mean over the step's pairs, each of which stays in one batch.

    Raises:
        UserError: a term is asked for whose mean nobody takes over several processes.
    """
    if world.size > 1 and config.sft_coef:
        raise UserError(
            f"sft_coef is {config.sft_coef}, whose mean over the chosen answers is that of one process, and there are "
            f"{world.size}. Use one process, or sft_coef 0."
        )
    every = dict(normalizer=NORMALIZERS["grpo"], has_gradient=any_group, counts=counts_all)
    whole = dict(share=part_of(share_of_whole, world), fill=fill_whole, whole_groups=True)
    return replace(build_packer(config, device, limit, world), **every, **whole)


def build_packer(config: Config, device: torch.device, limit: BatchLimit | None = None, world: World = ALONE) -> Packer:
    """The Packer that a configuration asks for. limit: of the policy that runs the batches, which may lower it."""
    return Packer(
        normalizer=NORMALIZERS[config.normalization],
        has_gradient=any_group if config.kl_coef or config.entropy_coef or config.has_values else has_advantage,
        counts=counts_finished if config.mask_truncated else counts_all,
        mini_batches=config.mini_batches,
        limit=limit or batch_limit(config),
        max_completion_tokens=config.max_completion_tokens,
        device=device,
        share=part_of(share_of, world),
        fill=fill,
    )


# By what teaches (`Config.method`).
PACKERS = {"grpo": build_packer, "sft": build_likelihood_packer, "dpo": build_pair_packer}


def part_of(share: Callable[..., list[Piece]], world: World) -> Part:
    """The part of a rank, by what shares pieces out."""
    return partial(share, rank=world.rank, size=world.size) if world.size > 1 else everything


def everything(pieces: list[Piece]) -> list[Piece]:
    """In a single process."""
    return pieces


def share_of(pieces: list[Piece], rank: int, size: int) -> list[Piece]:
    """The part of pieces that a rank computes: in their order, from one completion to another, as many tokens as the
    parts of others but for half a completion. A group that is cut has its prompt in both parts."""
    total = sum(len(group.prompt.tokens) + sum(_lengths(group, members)) for group, members in pieces)
    mine: list[Piece] = []
    end = 0
    for group, members in pieces:
        end += len(group.prompt.tokens)
        middles = []  # twice, to stay in whole numbers
        for length in _lengths(group, members):
            middles.append(2 * end + length)
            end += length
        kept = [member for member, middle in zip(members, middles, strict=True) if middle * size // (2 * total) == rank]
        mine += [(group, kept)] if kept else []
    return mine


def share_of_whole(pieces: list[Piece], rank: int, size: int) -> list[Piece]:
    """The same where no group may be cut: as many tokens as others but for half a group."""
    sizes = [len(group.prompt.tokens) + sum(_lengths(group, members)) for group, members in pieces]
    ends = accumulate(sizes)
    middles = [2 * end - size_ for end, size_ in zip(ends, sizes, strict=True)]
    return [piece for piece, middle in zip(pieces, middles, strict=True) if middle * size // (2 * sum(sizes)) == rank]


def _lengths(group: Group, members: list[int]) -> list[int]:
    return [len(group.completions[member].tokens) for member in members]


def fill(pieces: list[Piece], tokens_per_batch: int) -> list[list[Piece]]:
    """Pieces -> rows of pieces, each of at most `tokens_per_batch` packed tokens where one completion fits at all.

    Greedy, in order; a group that does not fit goes on in the next batch with its prompt again.
    """
    rows: list[list[Piece]] = []
    left = 0  # tokens of the last row; there is none yet, and no prompt is so short
    for group, members in pieces:
        prompt = len(group.prompt.tokens)
        for index, member in enumerate(members):
            length = len(group.completions[member].tokens)
            if index > 0 and length <= left:
                rows[-1][-1][1].append(member)
                left -= length
            elif prompt + length <= left:
                rows[-1].append((group, [member]))
                left -= prompt + length
            else:
                rows.append([(group, [member])])
                left = tokens_per_batch - prompt - length
    return rows


def fill_whole(pieces: list[Piece], tokens_per_batch: int) -> list[list[Piece]]:
    """The same with every group in one batch, in its order; one that is larger than a batch has one to itself."""
    rows: list[list[Piece]] = []
    left = 0
    for group, members in pieces:
        size = len(group.prompt.tokens) + sum(len(group.completions[member].tokens) for member in members)
        if size > left or not rows:
            rows.append([])
            left = tokens_per_batch
        rows[-1].append((group, members))
        left -= size
    return rows


def lay_out(
    pieces: list[Piece], weight: Callable[[int], float], device: torch.device, whole_groups: bool = False
) -> Batch:
    """One batch of these pieces. weight: sampled tokens of a completion -> loss weight of each of them. whole_groups:
    the loss looks at the completions of a group together."""
    layout = GroupLayout.of(
        [len(group.prompt.tokens) for group, _ in pieces],
        [[len(group.completions[member].tokens) for member in members] for group, members in pieces],
        device,
    )
    tokens = [token for group, _ in pieces for token in group.prompt.tokens]
    # The columns of completions only; the prompts' part is added below.
    sampler_logprobs: list[float] = []
    advantages: list[float] = []
    weights: list[float] = []
    mask: list[bool] = []
    for group, members in pieces:
        for member in members:
            completion = group.completions[member]
            tokens += completion.tokens
            sampler_logprobs += completion.sampler_logprobs
            advantage, share = float(group.advantages[member]), weight(completion.num_sampled)
            advantages += [advantage * sampled for sampled in completion.mask]
            weights += [share * sampled for sampled in completion.mask]
            mask += completion.mask

    def column(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor([0] * (len(tokens) - len(values)) + values, dtype=dtype, device=device)

    return Batch(
        layout=layout,
        **_links(layout),
        tokens=column(tokens, torch.int64),
        mask=column(mask, torch.bool),
        sampler_logprobs=column(sampler_logprobs, torch.float32),
        advantages=column(advantages, torch.float32),
        weights=column(weights, torch.float32),
        whole_groups=whole_groups,
    )


def _links(layout: GroupLayout) -> dict[str, Tensor]:
    """The columns of a batch that follow from its layout alone, by their names."""
    previous = [max(index - 1, 0) for index in range(layout.num_prompt_tokens)]
    sequence = [0] * layout.num_prompt_tokens
    num_sequences = 0
    for lengths, end in zip(layout.completion_lengths, accumulate(layout.prompt_lengths), strict=True):
        for length in lengths:
            start = len(previous)
            previous += [end - 1, *range(start, start + length - 1)]
            sequence += [num_sequences] * length
            num_sequences += 1
    device = layout.segments.device
    return {
        "positions": layout.positions(),
        "previous": torch.tensor(previous, dtype=torch.int64, device=device),
        "sequence": torch.tensor(sequence, dtype=torch.int64, device=device),
    }


def halve(batch: Batch) -> list[Batch]:
    """The completions of a batch in two batches, in their order: cut between two of its groups, where the larger half
    is smallest. A single group is cut between two completions, and both halves have its prompt; a single completion
    stays whole, and so does a single group that the loss looks at together.

    What the loss has stored goes along, and what it sums over a sequence it finds whole.
    """
    layout = batch.layout
    prompts, groups = list(layout.prompt_lengths), list(layout.completion_lengths)
    if batch.num_sequences == 1 or (batch.whole_groups and len(groups) == 1):
        return [batch]
    if len(groups) > 1:
        cut = _middle([prompt + sum(group) for prompt, group in zip(prompts, groups, strict=True)])
        first, second = (prompts[:cut], groups[:cut]), (prompts[cut:], groups[cut:])
    else:
        cut = _middle(groups[0])
        first, second = (prompts, [groups[0][:cut]]), (prompts, [groups[0][cut:]])
    ends = (layout.num_prompt_tokens - sum(second[0]), layout.num_tokens - sum(map(sum, second[1])))
    return [_part(batch, *first, 0, layout.num_prompt_tokens), _part(batch, *second, *ends)]


def _middle(lengths: Sequence[int]) -> int:
    """How many of two lengths or more the first half has, so that the larger half is smallest."""
    ends = list(accumulate(lengths))
    return min(range(1, len(lengths)), key=lambda cut: max(ends[cut - 1], ends[-1] - ends[cut - 1]))


def _part(
    batch: Batch,
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    first_prompt: int,
    first_completion: int,
) -> Batch:
    """Of a batch the prompts and completions of these lengths, from these tokens on."""
    layout = GroupLayout.of(prompt_lengths, completion_lengths, batch.tokens.device)
    prompts = slice(first_prompt, first_prompt + layout.num_prompt_tokens)
    completions = slice(first_completion, first_completion + layout.num_tokens - layout.num_prompt_tokens)
    columns = {
        name: torch.cat([column[prompts], column[completions]])
        for name, column in vars(batch).items()
        if isinstance(column, Tensor)
    }
    return replace(batch, layout=layout, **(columns | _links(layout)))


def lay_out_to_read(groups: list[Group], device: torch.device) -> Batch:
    """One batch of all completions of these groups, for their log-probabilities alone: no part of any loss."""
    unscored = [replace(group, advantages=torch.zeros(len(group.completions))) for group in groups]
    return lay_out([(group, list(range(len(group.completions)))) for group in unscored], lambda length: 0.0, device)


def lay_out_longest(
    config: Config, limit: BatchLimit, longest_prompt: int, text: list[int], device: torch.device
) -> Batch:
    """The largest batch that can come: the longest prompts with the longest completions, the last of them cut where
    they would be too many; or a single one, where that alone is more than the limit.

    text: tokens [P] of anything, which are repeated to these lengths.
    """

    def written(length: int) -> list[int]:
        return list(islice(cycle(text), length))

    prompt = Prompt(0, "", written(longest_prompt), {})
    left = max(limit.tokens, longest_prompt + config.max_completion_tokens)
    pieces: list[Piece] = []
    for _ in range(ceil(config.prompts_per_step / config.mini_batches)):
        left -= longest_prompt
        lengths = [config.max_completion_tokens] * min(config.group_size, max(0, left) // config.max_completion_tokens)
        left -= sum(lengths)
        if left > 0 and len(lengths) < config.group_size:
            lengths.append(left)
            left = 0
        if not lengths:
            break
        group = Group(prompt, [Completion(written(n), [0.0] * n, "", "stop", 0) for n in lengths])
        group.advantages = torch.ones(len(lengths))
        pieces.append((group, list(range(len(lengths)))))
    return lay_out(pieces, lambda length: 1.0, device)


def lay_out_longest_pairs(
    config: Config, limit: BatchLimit, longest_prompt: int, text: list[int], device: torch.device
) -> Batch:
    """The same of pairs: as many of the longest as the limit holds, or one."""
    count = max(1, limit.tokens // (longest_prompt + 2 * config.max_completion_tokens))
    most = min(count, ceil(config.prompts_per_step / config.mini_batches))
    words = list(islice(cycle(text), max(longest_prompt, config.max_completion_tokens)))
    answer = words[: config.max_completion_tokens]
    pair = [Completion(answer, [0.0] * len(answer), "", "stop", 0) for _ in range(2)]
    group = Group(Prompt(0, "", words[:longest_prompt], {}), pair, advantages=torch.tensor([1.0, -1.0]))
    return lay_out([(group, [0, 1])] * most, lambda length: 1.0, device, whole_groups=True)


def _count_tokens(pieces: list[Piece]) -> int:
    return sum(group.completions[member].num_sampled for group, members in pieces for member in members)
