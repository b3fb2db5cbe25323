"""The loop, and nothing that the loop calls.

    prompts -> rollout -> audit -> score -> advantages -> pack -> update -> sync -> record        (a step)
                                                         then evaluate and save, when due

Every choice (engine, loss, estimator, precision) was made when the `Run` was built (grpo/build.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from grpo.advantages import Estimator, assign_advantages
from grpo.checkpoint import Progress, save_checkpoint
from grpo.clock import Clock
from grpo.config import Config
from grpo.evaluate import Evaluator, headline, truncated_share
from grpo.generators import Generators
from grpo.loss import Loss
from grpo.packing import Packer, has_advantage
from grpo.policy import Policy
from grpo.policy.optimizer import learning_rate
from grpo.record import Recorder
from grpo.rewards import Scorer
from grpo.rollout import Engine
from grpo.rollout.audit import Audit
from grpo.rollout.sampling import sample_groups
from grpo.seeds import Purpose, mix_seed
from grpo.stream import PromptStream
from grpo.types import Group, sampled_tokens


@dataclass
class Run:
    """The objects that the loop calls, and how far it is."""

    config: Config
    folder: Path
    policy: Policy
    engine: Engine
    stream: PromptStream
    score: Scorer
    estimator: Estimator
    pack: Packer
    loss: Loss
    audit: Audit
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
    finish_step(run)  # the score before training, or one that the run was stopped in

    for step in range(run.progress.step, config.steps):
        clock = Clock(run.recorder.stage)
        groups, rolled_out = sample(run, step, clock)
        with clock("update"):
            run.engine.release()
            update = run.policy.update(run.pack(groups), run.loss, learning_rate(step, config), config.epochs)
            run.audit.check_gap(update["mismatch/gap"])
        with clock("sync"):
            sync = run.engine.sync()
        metrics = rolled_out | step_metrics(groups, rolled_out["groups/rolled_out"], run.pack.trains) | update | sync
        run.recorder.step(step, metrics | clock.metrics(groups) | {"memory/peak_gib": run.memory_peak()})
        run.recorder.completions(step, groups)

        run.progress.step, run.progress.cursor = step + 1, run.stream.cursor
        run.progress.version = run.policy.version
        remember(run)
        finish_step(run)
        if run.stop_requested:
            break


def sample(run: Run, step: int, clock: Clock) -> tuple[list[Group], dict[str, float]]:
    """The scored groups of a step, and metrics: how many were rolled out for them, and what rewards logged.

    Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) goes on until enough groups are worth training on.
    """
    config = run.config
    seed, weights = mix_seed(Purpose.ROLLOUT, config.seed, step), {each.name: each.weight for each in run.score.rewards}
    groups: list[Group] = []
    scored: list[Group] = []
    told: dict[str, float] = {}
    num_rolled_out = 0
    for _ in range(run.max_rollouts):
        with clock("rollout"):
            prompts = run.stream.take(config.prompts_per_step - len(groups))
            scored = sample_groups(
                run.engine, prompts, config.group_size, config.max_completion_tokens, seed, num_rolled_out
            )
        with clock("audit"):
            told |= run.audit(scored, mix_seed(Purpose.AUDIT, config.seed, step))
        with clock("score"):
            told |= run.score(scored, step)
        num_rolled_out += len(scored)
        assign_advantages(scored, run.estimator, weights)
        groups += filter(run.admits, scored)
        if len(groups) == config.prompts_per_step:
            break
    # Nothing worth training on after all: the step shows what it last saw, and trains nothing.
    groups = groups or scored
    # Anew over all groups of the step: some estimators scale by its spread.
    assign_advantages(groups, run.estimator, weights)
    return groups, told | run.score.failed() | {"groups/rolled_out": num_rolled_out}


def step_metrics(groups: list[Group], num_rolled_out: float, trains: Callable[[Group], bool]) -> dict[str, float]:
    """What the groups of a step look like, before any update. trains: whether a group is part of it."""
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
        "groups/zero_variance": 1 - sum(map(has_advantage, groups)) / num_rolled_out,
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
    run.recorder.stage("evaluation")
    groups = run.evaluator.answers(run.engine, run.progress.step)
    scores, progress = run.evaluator.scores(groups), run.progress
    run.recorder.evaluation(progress.step, scores, groups)
    progress.first_scores = progress.first_scores or scores
    progress.last_scores, progress.evaluated = scores, progress.step
    score = scores[headline(scores)]
    if score > progress.best or progress.best_step < 0:
        progress.best, progress.best_step = score, progress.step
    remember(run)


def remember(run: Run) -> None:
    """What a checkpoint of `progress` needs of the world around it, before anything moves on."""
    run.generators = run.generators_now()
    run.progress.position = run.recorder.position()
    run.progress.batch_limit = run.policy.fit.limit.state()
    run.progress.canary, run.progress.audit = run.engine.canary.state(), run.audit.state()


def is_unsaved(run: Run) -> bool:
    """There is a step, or a held-out score after one, that the last checkpoint does not have."""
    return run.progress.step > 0 and run.saved != (run.progress.step, run.progress.evaluated)


def save(run: Run) -> None:
    """Write a checkpoint of the run as it was after its last whole step, also when the next one has failed."""
    run.recorder.stage("checkpoint")
    run.recorder.fsync()
    save_checkpoint(run.folder, run.policy, run.progress, run.generators, run.config.keep)
    run.saved = (run.progress.step, run.progress.evaluated)
