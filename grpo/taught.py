"""Taught: the source of groups that SFT and DPO learn from, and the held-out score of answers that are given.

Knows nothing of how answers are told to a model (grpo/lessons.py) or what is made of them (grpo/objectives.py).

    Taught              the next lessons, in a seeded order, an epoch after the other
    HeldOutAnswers      how likely the policy finds held-out answers; how often it prefers the better of two
    AskedToo            the same beside what the policy says to held-out prompts, where a task has rewards
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo.checkpoint import Progress
from grpo.clock import Clock
from grpo.evaluate import Z_95, Evaluator, interval, normal_interval
from grpo.objectives import Preference, preferred
from grpo.packing import BatchLimit, fill_whole, lay_out
from grpo.policy import Policy
from grpo.rollout import Engine
from grpo.rollout.idle import Idle
from grpo.stream import Stream
from grpo.types import Batch, Group, Prompt, sampled_tokens


@dataclass
class Taught:
    """A `grpo.train.Source`: answers that somebody gave."""

    stream: Stream[Group]
    count: int  # lessons of a step

    def __call__(self, step: int, clock: Clock) -> tuple[list[Group], dict[str, float]]:
        """See grpo.train.Source."""
        with clock("lessons"):
            groups = self.stream.take(self.count)
        answers = sum(len(group.completions) for group in groups)
        return groups, {
            "completion/length": sampled_tokens(groups) / answers,
            "groups/trained": len(groups),
            "lessons/epoch": self.stream.epochs(),
        }

    def check(self, update: dict[str, float], clock: Clock) -> None:
        """See grpo.train.Source: nobody sampled, so there is nothing to compare."""

    def remember(self, progress: Progress) -> None:
        """See grpo.train.Source."""
        progress.cursor = self.stream.cursor

    def close(self) -> None:
        """See grpo.train.Source."""


# ---- the held-out score

Read = Callable[[Policy, Batch], Tensor]  # -> of each answer of a batch what is asked of it, summed, [S]
Mark = Callable[[list[Group], list[Tensor]], None]  # groups, such sums of each [G] -> their rewards
Measure = Callable[[list[Group]], dict[str, float]]  # marked groups -> scores


@dataclass(frozen=True)
class HeldOutAnswers:
    """What the policy makes of held-out answers."""

    lessons: Sequence[Group]
    policy: Policy
    limit: BatchLimit
    read: Read
    mark: Mark
    measure: Measure

    @property
    def prompts(self) -> list[Prompt]:
        """What the score is of: prompts with their answers."""
        return [
            replace(group.prompt, tokens=[*group.prompt.tokens, *(t for c in group.completions for t in c.tokens)])
            for group in self.lessons
        ]

    def answers(self, engine: Engine, step: int = 0) -> list[Group]:
        """The held-out answers, each with what it is worth to the policy as its reward."""
        groups = [replace(group) for group in self.lessons]
        pieces = [(group, list(range(len(group.completions)))) for group in groups]
        sums = [
            self.read(self.policy, lay_out(row, lambda length: 1.0, self.policy.device, whole_groups=True))
            for row in fill_whole(pieces, self.limit.tokens)
        ]
        counts = [len(group.completions) for group in groups]
        self.mark(groups, list(torch.cat(sums).double().cpu().split(counts)))
        return groups

    def scores(self, groups: list[Group]) -> dict[str, float]:
        """Of these answers, which `answers` gave."""
        return self.measure(groups)


@dataclass(frozen=True)
class AskedToo:
    """What the policy says to held-out prompts, by a task's rewards, and what it makes of held-out answers."""

    asked: Evaluator
    given: HeldOutAnswers

    @property
    def prompts(self) -> list[Prompt]:
        """What the score is of."""
        return self.asked.prompts

    def answers(self, engine: Engine, step: int = 0) -> list[Group]:
        """See Evaluator.answers."""
        return self.asked.answers(engine, step)

    def scores(self, groups: list[Group]) -> dict[str, float]:
        """See Evaluator.scores; and of the answers that are given."""
        return self.asked.scores(groups) | self.given.scores(self.given.answers(Idle()))


# ---- of answers


def read_answers(policy: Policy, batch: Batch) -> Tensor:
    """log p of each answer, [S]."""
    return _per_answer(policy.read(batch)[0], batch)


def mark_answers(groups: list[Group], sums: list[Tensor]) -> None:
    """The reward of an answer is the mean log p of its tokens."""
    for group, logprobs in zip(groups, sums, strict=True):
        group.rewards = logprobs / _lengths(group)


def measure_likelihood(groups: list[Group]) -> dict[str, float]:
    """eval/logprob: the mean log p of the answers' tokens, with its 95% interval: that of a ratio of sums over
    answers (Cochran 1977, section 2.11). eval/loss: the same as a loss."""
    lengths = torch.cat([_lengths(group) for group in groups])
    logprobs = torch.cat([group.rewards for group in groups]) * lengths
    mean, n = float(logprobs.sum() / lengths.sum()), len(lengths)
    spread = float(((logprobs - mean * lengths) ** 2).sum()) / max(1, n - 1) / n
    half = Z_95 * math.sqrt(spread) / float(lengths.mean()) if n > 1 else math.nan
    return _named("eval/logprob", (mean, mean - half, mean + half)) | {"eval/loss": -mean}


# ---- of pairs


def read_pairs(policy: Policy, batch: Batch) -> Tensor:
    """log p of each answer less that of the reference policy, [S]."""
    return _per_answer(policy.read(batch)[0] - policy.reference_logprobs(batch), batch)


def mark_pairs(preference: Preference, groups: list[Group], sums: list[Tensor]) -> None:
    """Both answers of a pair have reward 1 where the better one has gained on the other, and a half where neither has;
    their implicit rewards are beside it."""
    lengths = torch.stack([_lengths(group) for group in groups])
    margins, chosen, rejected = preference.margins(torch.stack(sums), lengths)
    for group, margin, *both in zip(groups, margins, chosen, rejected, strict=True):
        group.rewards = preferred(margin).repeat(2)
        group.parts = {"implicit": preference.beta * torch.stack(both)}


def measure_preference(preference: Preference, groups: list[Group]) -> dict[str, float]:
    """eval/accuracy: the share of pairs whose better answer has gained on the other from the reference policy on,
    ties as a half; eval/margin: by how much, in implicit rewards; eval/loss: the mean loss of a pair."""
    rewards = torch.stack([group.parts["implicit"] for group in groups])
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        **_named("eval/accuracy", interval([float(group.rewards[0]) for group in groups])),
        **_named("eval/margin", normal_interval(margins.tolist())),
        "eval/loss": float(preference.form(margins / preference.beta).mean()),
    }


def _lengths(group: Group) -> Tensor:
    return torch.tensor([completion.num_sampled for completion in group.completions], dtype=torch.float64)


def _per_answer(values: Tensor, batch: Batch) -> Tensor:
    sums = torch.zeros(batch.num_sequences, device=values.device)
    return sums.index_add(0, batch.sequence, values * batch.mask)


def _named(name: str, estimate: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}/low", f"{name}/high"), estimate, strict=True))
