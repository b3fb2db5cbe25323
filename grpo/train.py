"""The loop, and nothing that the loop calls.

    prompts -> rollout -> score -> advantages -> pack -> update -> sync -> record        (a step)
                                                         then evaluate and save, when due

Every choice (engine, loss, advantage rule, precision) was made when the `Run` was built (grpo/build.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from grpo.advantages import Rule, assign_advantages
from grpo.checkpoint import Progress, save_checkpoint
from grpo.config import Config
from grpo.evaluate import Evaluator, truncated_share
from grpo.generators import Generators
from grpo.packing import Packer, has_gradient
from grpo.policy import Policy
from grpo.record import Recorder
from grpo.rewards import Reward, score
from grpo.rollout import Engine
from grpo.seeds import Purpose, mix_seed
from grpo.stream import PromptStream
from grpo.types import Group


@dataclass
class Run:
    """The objects that the loop calls, and how far it is."""

    config: Config
    folder: Path
    policy: Policy
    engine: Engine
    stream: PromptStream
    rewards: list[Reward]
    rule: Rule
    pack: Packer
    evaluator: Evaluator
    recorder: Recorder
    memory_peak: Callable[[], float]  # GiB
    admits: Callable[[Group], bool]  # dynamic sampling: which groups are worth training on
    max_rollouts: int  # in one step
    generators_now: Callable[[], Generators]
    generators: Generators  # as they were when `progress` was
    progress: Progress = field(default_factory=Progress)
    stop_requested: bool = False
    saved: tuple[int, int] = (0, -1)  # (steps done, of them at the last held-out score), as the last checkpoint has it


def train(run: Run) -> None:
    """Train from where the run is to its last step, or until somebody asks it to stop."""
    config = run.config
    weights = {reward.name: reward.weight for reward in run.rewards}
    finish_step(run)  # the score before training, or one that the run was stopped in

    for step in range(run.progress.step, config.steps):
        clock = Clock()
        groups, rolled_out = sample(run, step, clock)
        assign_advantages(groups, run.rule, weights)
        with clock("update"):
            run.engine.release()
            update = run.policy.update(run.pack(groups), step)
        with clock("sync"):
            sync = run.engine.sync()
        metrics = rolled_out | step_metrics(groups, rolled_out["groups/rolled_out"], run.pack.trains) | update | sync
        run.recorder.step(step, metrics | clock.metrics(groups) | {"memory/peak_gib": run.memory_peak()})
        run.recorder.completions(step, groups)

        run.progress.step, run.progress.cursor = step + 1, run.stream.cursor
        run.progress.version = run.policy.version
        remember_place(run)
        finish_step(run)
        if run.stop_requested:
            break


def sample(run: Run, step: int, clock: Clock) -> tuple[list[Group], dict[str, float]]:
    """The scored groups of a step, and metrics: how many were rolled out for them, and what rewards logged.

    Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) goes on until enough groups are worth training on.
    """
    wanted, groups, scored, logged = run.config.prompts_per_step, [], [], {}
    num_rolled_out = 0
    for attempt in range(run.max_rollouts):
        with clock("rollout"):
            prompts = run.stream.take(wanted - len(groups))
            scored = run.engine.rollout(
                prompts, run.config.group_size, mix_seed(Purpose.ROLLOUT, run.config.seed, step, attempt)
            )
        with clock("score"):
            logged = score(scored, run.rewards)
        num_rolled_out += len(scored)
        groups += filter(run.admits, scored)
        if len(groups) == wanted:
            break
    # Nothing worth training on after all: the step shows what it last saw, and trains nothing.
    return groups or scored, logged | {"groups/rolled_out": num_rolled_out}


def step_metrics(groups: list[Group], num_rolled_out: float, trains: Callable[[Group], bool]) -> dict[str, float]:
    """What the groups of a step look like, before any update. trains: whether a group is part of it."""
    rewards = torch.cat([group.rewards for group in groups])
    parts = {f"reward/{name}": torch.cat([g.parts[name] for g in groups]).nanmean() for name in groups[0].parts}
    lengths = [len(completion.tokens) for group in groups for completion in group.completions]
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        **{name: float(mean) for name, mean in parts.items()},
        "completion/length": sum(lengths) / len(lengths),
        "completion/truncated": truncated_share(groups),
        "groups/zero_variance": 1 - sum(map(has_gradient, groups)) / num_rolled_out,
        "groups/trained": sum(map(trains, groups)),
    }


def finish_step(run: Run) -> None:
    """After so many steps: evaluate and save, each if it is due and not done yet."""
    done, config = run.progress.step, run.config
    eval_every = config.eval_every or config.steps + 1
    if run.progress.evaluated < done and (done % eval_every == 0 or done == config.steps):
        evaluate(run)
    if is_unsaved(run) and (done % config.save_every == 0 or done in (config.steps, run.progress.best_step)):
        save(run)


def evaluate(run: Run) -> None:
    """Score the policy on the held-out prompts and remember whether it is the best so far."""
    scores = run.evaluator(run.engine)
    progress = run.progress
    run.recorder.evaluation(progress.step, scores)
    progress.first_scores = progress.first_scores or scores
    progress.last_scores, progress.evaluated = scores, progress.step
    if scores["eval/pass@1"] > progress.best:
        progress.best, progress.best_step = scores["eval/pass@1"], progress.step
    remember_place(run)


def remember_place(run: Run) -> None:
    """What a checkpoint of `progress` needs of the world around it, before anything moves on."""
    run.generators = run.generators_now()
    run.progress.position = run.recorder.position()


def is_unsaved(run: Run) -> bool:
    """There is a step, or a held-out score after one, that the last checkpoint does not have."""
    return run.progress.step > 0 and run.saved != (run.progress.step, run.progress.evaluated)


def save(run: Run) -> None:
    """Write a checkpoint of the run as it was after its last whole step, also when the next one has failed."""
    run.recorder.sync()
    save_checkpoint(run.folder, run.policy, run.progress, run.generators, run.config.keep)
    run.saved = (run.progress.step, run.progress.evaluated)


class Clock:
    """Seconds of each stage of a step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def metrics(self, groups: list[Group]) -> dict[str, float]:
        """time/<stage> in seconds, and sampled tokens a second of the whole step and of the rollout alone."""
        total = time.perf_counter() - self.start
        tokens = sum(len(completion.tokens) for group in groups for completion in group.completions)
        return {
            **{f"time/{stage}": seconds for stage, seconds in self.seconds.items()},
            "time/step": total,
            "speed/tokens_per_second": tokens / total,
            "speed/rollout_tokens_per_second": tokens / self.seconds["rollout"],
        }
