"""The nouns: Prompt, Request, Completion, Group, Batch. Plain data, no behaviour beyond what is derived from it.

Axes used everywhere:
    B prompts in a step    G completions of a group    P prompt tokens    T completion tokens
    N packed tokens        S packed sequences          V vocabulary       D hidden size

Three conventions:
1. A per-token array is aligned with the token it describes: logprobs[i] = log p(tokens[i] | tokens[:i]).
   The shift by one happens once, in `Policy.logprobs`.
2. A field is written once, by the function named after it: `score` fills `parts` and `rewards`,
   `assign_advantages` fills `advantages`.
3. What belongs to a completion is a field of it, never a parallel list.
"""

from __future__ import annotations

if __name__ == "types":  # not asked for: Python looks for its own module of that name
    raise SystemExit("error: In the package's own folder its files hide Python's modules. Run the command elsewhere.")

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from grpo_kernels.layout import GroupLayout
from torch import Tensor

Message = dict[str, Any]  # {"role": "user", "content": "..."}, and what else a chat template reads, such as tool_calls


@dataclass(frozen=True)
class Prompt:
    """One row of the data set, ready to be sampled from.

    `fields` is the row itself; rewards receive its columns by name.
    `messages` is None for a task whose prompt is plain text.
    """

    index: int
    text: str
    tokens: list[int]  # [P]
    fields: dict[str, Any]
    messages: list[Message] | None = None


@dataclass(frozen=True)
class Request:
    """What an engine is asked for: to go on after `context`. The seed alone decides what is drawn."""

    context: list[int]  # [P] tokens
    seed: int  # 63 bits
    max_tokens: int


class Span(NamedTuple):
    """Tokens start <= t < end of a completion."""

    start: int
    end: int


@dataclass
class Completion:
    """What came after a prompt: what the engine sampled and, between turns of a conversation, what others wrote.

    `tokens` includes the stop token, so the policy is trained to stop; `text` does not show it.
    `sampler_logprobs` are those of the distribution sampled from, i.e. at the sampling temperature; 0 where others
    wrote.
    """

    tokens: list[int]  # [T]
    sampler_logprobs: list[float]  # [T]
    text: str
    finish: Literal["stop", "length"]
    policy_version: int
    seed: int = 0  # of the request that it answers
    others: tuple[Span, ...] = ()  # in order and apart: a tool's or a user's words, which are read and never trained on

    @property
    def mask(self) -> list[bool]:
        """[T], True = sampled by the policy."""
        mask = [True] * len(self.tokens)
        for start, end in self.others:
            mask[start:end] = [False] * (end - start)
        return mask

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return len(self.tokens) - sum(end - start for start, end in self.others)


@dataclass
class Group:
    """The G completions of one prompt and what they earned.

    `parts[name]` holds what each reward returned, unweighted; NaN where the reward does not apply, and where it failed.
    `failed[name]` says where and why it failed. A completion that a reward with a weight failed on has no score: its
    reward and its advantage are NaN, and it has no part in the statistics of its group, nor in the loss.
    """

    prompt: Prompt
    completions: list[Completion]  # G
    parts: dict[str, Tensor] = field(default_factory=dict)  # {reward name: [G]}
    failed: dict[str, dict[int, str]] = field(default_factory=dict)  # {reward name: {index of a completion: why}}
    extra: dict[str, dict[int, Any]] = field(default_factory=dict)  # {column: {index of a completion: told}}
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))  # [G], the weighted sum of the parts
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # [G]


@dataclass
class Batch:
    """Groups packed without padding, all prompts first, then all completions: what one forward and backward pass eats.

    A prompt is there once and shared by its group's completions. `weights` carries the loss normalisation: the
    loss of an optimizer step is sum(weights * token_loss) over all of its batches. One denominator for the whole
    step, so splitting into batches changes nothing.
    """

    layout: GroupLayout  # the lengths of prompts and completions
    tokens: Tensor  # [N] int64
    positions: Tensor  # [N] int64, index in its own prompt + completion
    previous: Tensor  # [N] int64, the packed index of the token before; a completion's first follows its prompt
    sequence: Tensor  # [N] int64, which of the S completions a token belongs to; 0 on prompts
    mask: Tensor  # [N] bool, True = sampled by the policy
    sampler_logprobs: Tensor  # [N] float32, 0 where not sampled
    advantages: Tensor  # [N] float32, 0 where not sampled
    weights: Tensor  # [N] float32, 0 where the token has no part in the loss
    # Filled by the passes that the loss asks for before its optimizer steps; empty otherwise.
    old_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))  # [N] float32, policy that sampled
    reference_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))  # [N] float32
    in_top: Tensor = field(default_factory=lambda: torch.empty(0))  # [N] bool, of the share of highest entropy
    likelihood_weights: Tensor = field(default_factory=lambda: torch.empty(0))  # [N] float32, of chosen answers
    old_values: Tensor = field(default_factory=lambda: torch.empty(0))  # [N] float32, before the rollout's first step
    returns: Tensor = field(default_factory=lambda: torch.empty(0))  # [N] float32, what the value head is taught
    token_advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # [N] float32, by these values
    values: Tensor = field(default_factory=lambda: torch.empty(0))  # [N] float32, of the update's pass, with gradient
    whole_groups: bool = False  # the loss looks at the completions of a group together: they stay in one batch

    @property
    def num_sequences(self) -> int:
        """S, the number of completions."""
        return sum(map(len, self.layout.completion_lengths))


def sampled_tokens(groups: list[Group]) -> int:
    """How many tokens the policy sampled in these groups."""
    return sum(completion.num_sampled for group in groups for completion in group.completions)
