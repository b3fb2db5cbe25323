"""Live: a policy in memory, who samples from it, and what both are for. Knows nothing of training."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from grpo.build import build_evaluator
from grpo.checkpoint import load_trained
from grpo.config import Config
from grpo.guards import memory_in_words
from grpo.methods import build_examiner
from grpo.objectives import OBJECTIVES
from grpo.policy import Policy
from grpo.policy.allocator import let_loose
from grpo.questions import Questions
from grpo.rewards.staff import staffed
from grpo.rollout import Engine
from grpo.task import Task
from grpo.terminal import say, working
from grpo.threads import restored_threads
from grpo.world import ALONE, World


@dataclass
class Live:
    """What a training run leaves in memory, or what is loaded to be scored."""

    config: Config
    policy: Policy
    engine: Engine
    questions: Questions  # whose rewards are called in this process
    threads: int  # of the CPU, that it computes with
    checkpoint: Path | None  # whose adapter the policy has; None where that is no checkpoint's
    world: World = ALONE  # of the processes that share the work

    def take(self, checkpoint: Path) -> None:
        """Let the policy have the adapter of a checkpoint of its run.

        Raises:
            UserError: it is damaged.
        """
        if self.checkpoint != checkpoint:
            load_trained(checkpoint, self.policy, say)
            self.engine.take_up()
            self.checkpoint = checkpoint

    def score(self, task: Task) -> dict[str, float]:
        """The held-out scores, under eval/ names.

        Raises:
            UserError: a reward fails on too much, or memory runs out.
        """
        config, rewards = self.config, self.questions.rewards
        completions = len(self.questions.test) * config.eval_samples
        at_work = staffed(rewards, config.reward_workers, completions, None, say)
        with memory_in_words(config), restored_threads(), at_work as called:
            torch.set_num_threads(self.threads)
            with working("evaluation"):
                return _exam(task, config, replace(self.questions, rewards=called), self.policy, self.world)(
                    self.engine
                )

    def close(self) -> None:
        """Let go of what takes memory (`free_memory` gives it back). It is of no use afterwards."""
        self.engine.close()
        del self.engine, self.policy, self.questions


def _exam(
    task: Task, config: Config, questions: Questions, policy: Policy, world: World
) -> Callable[[Engine], dict[str, float]]:
    """Who gives the scores: rewards of what the policy says, or what it makes of given answers, or both."""
    asked = build_evaluator(task, config, questions, say, world=world)
    if not questions.lessons:
        return asked
    exam = build_examiner(config, questions, policy, OBJECTIVES[config.method](config), asked)
    return lambda engine: exam.scores(exam.answers(engine))


def free_memory() -> None:
    """Give back what nobody refers to any more: models are rings of references, which Python finds late."""
    gc.collect()
    if torch.cuda.is_available():
        let_loose()
        torch.cuda.empty_cache()
