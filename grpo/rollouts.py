"""Rollouts: the source of groups that GRPO learns from: completions that the policy samples, scored by rewards.

Knows nothing of losses or optimizers.

    prompts -> rollout -> audit -> score -> advantages

Rollout and audit are those of grpo/ahead.py: at once, or a step ahead. Scoring begins with the first group that is
finished (grpo/rewards/scoring.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from grpo.advantages import Estimator, assign_advantages
from grpo.ahead import AtOnce
from grpo.checkpoint import Progress
from grpo.clock import Clock
from grpo.config import Config
from grpo.evaluate import truncated_share
from grpo.exchange import Share, means, sums
from grpo.packing import has_advantage
from grpo.rewards import Scorer
from grpo.types import Group, sampled_tokens
from grpo.world import World


@dataclass
class Rollouts:
    """A `grpo.train.Source`: what the policy says to the next prompts, and what it earned."""

    config: Config
    world: World
    roll_out: AtOnce  # by its engine, of its stream, heard by its audit
    score: Scorer
    estimator: Estimator
    admits: Callable[[Group], bool]  # dynamic sampling: which groups are worth training on
    max_rollouts: int  # in one step
    trains: Callable[[Group], bool]  # whether a group has a part in the update
    teaches: Callable[[Group], bool] = has_advantage  # whether its rewards teach something

    def __call__(self, step: int, clock: Clock) -> tuple[list[Group], dict[str, float]]:
        """The scored groups of a step, and metrics: what they look like, how many were rolled out for them, and what
        rewards logged.

        Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) goes on until enough groups are worth training on.
        """
        config = self.config
        weights = {each.name: each.weight for each in self.score.rewards}
        groups: list[Group] = []
        scored: list[Group] = []
        told: dict[str, float] = {}
        failed: dict[str, float] = {}
        num_rolled_out = 0
        for _ in range(self.max_rollouts):
            with self.score.begun(step) as scoring:
                prompts = self.roll_out.stream.take(config.prompts_per_step - len(groups))
                share = Share(self.world, prompts, config.group_size * config.max_completion_tokens)
                own, read = self.roll_out(step, share, num_rolled_out, clock, scoring.begin)
                with clock("score"):
                    logged = scoring.finish(own)
            with clock("score"):  # those who are done first wait here for the others
                scored, of_ranks = share.exchange(own, (read, (len(own), logged), self.score.failed()))
            all_read, all_logged, all_failed = zip(*of_ranks, strict=True)
            told |= self.roll_out.audit.judge(list(all_read)) | means(all_logged)
            failed = sums([failed, *all_failed])
            num_rolled_out += len(scored)
            assign_advantages(scored, self.estimator, weights)
            groups += filter(self.admits, scored)
            if len(groups) == config.prompts_per_step:
                break
        # Nothing worth training on after all: the step shows what it last saw, and trains nothing.
        groups = groups or scored
        # Anew over all groups of the step: some estimators scale by its spread.
        assign_advantages(groups, self.estimator, weights)
        told |= failed | {"groups/rolled_out": num_rolled_out}
        told |= step_metrics(groups, num_rolled_out, self.trains, self.teaches) | self.roll_out.metrics(groups, clock)
        self.roll_out.begin(step + 1)
        return groups, told

    def check(self, update: dict[str, float], clock: Clock) -> None:
        """See grpo.train.Source: the log-probabilities that completions came with are the policy's."""
        self.roll_out.settle(update["mismatch/gap"], clock)

    def remember(self, progress: Progress) -> None:
        """See grpo.train.Source."""
        progress.cursor, progress.ahead = self.roll_out.stream.cursor, self.roll_out.state()
        progress.canary, progress.audit = self.roll_out.engine.canary.state(), self.roll_out.audit.state()

    def close(self) -> None:
        """See grpo.train.Source."""
        self.roll_out.close()


def step_metrics(
    groups: list[Group],
    num_rolled_out: float,
    trains: Callable[[Group], bool],
    teaches: Callable[[Group], bool] = has_advantage,
) -> dict[str, float]:
    """What the groups of a step look like, before any update. trains: whether a group is part of it. teaches: whether
    its rewards do."""
    rewards = torch.cat([group.rewards for group in groups])
    scored = rewards[~rewards.isnan()]
    parts: dict[str, list[Tensor]] = {}  # of a reward that names its parts not all groups may have all
    for name, part in chain.from_iterable(group.parts.items() for group in groups):
        parts.setdefault(name, []).append(part)
    return {
        "reward/mean": float(scored.mean()),
        "reward/std": float(scored.std(correction=min(1, len(scored) - 1))),
        **{f"reward/{name}": float(torch.cat(part).nanmean()) for name, part in parts.items()},
        "completion/length": sampled_tokens(groups) / len(rewards),
        "completion/truncated": truncated_share(groups),
        "groups/zero_variance": 1 - sum(map(teaches, groups)) / num_rolled_out,
        "groups/trained": sum(map(trains, groups)),
    }
