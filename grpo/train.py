"""The loop, and nothing that the loop calls.

    source: groups with their advantages -> pack -> update -> sync -> record        (a step)
                                           then evaluate and save, when due

Every choice (engine, loss, estimator, precision) was made when the `Run` was built (grpo/build.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from grpo.checkpoint import Progress, save_checkpoint
from grpo.clock import Clock
from grpo.config import Config
from grpo.evaluate import standing
from grpo.generators import Generators
from grpo.loss import Loss
from grpo.packing import Packer
from grpo.policy import Policy
from grpo.policy.optimizer import learning_rate
from grpo.record import Recorder
from grpo.rollout import Engine
from grpo.types import Group, Prompt
from grpo.world import World


class Source(Protocol):
    """Where the groups of a step come from: rollouts (grpo/rollouts.py), or answers that somebody gave."""

    def __call__(self, step: int, clock: Clock) -> tuple[list[Group], dict[str, float]]:
        """The groups of a step, with their advantages, and metrics: what is known of them before the update. The time
        that it takes is told to the clock, stage by stage."""
        ...

    def check(self, update: dict[str, float], clock: Clock) -> None:
        """The metrics of the update go with what the groups came with, and nobody samples any more beside it.

        Raises:
            UserError: they do not.
        """
        ...

    def remember(self, progress: Progress) -> None:
        """Write into `progress` what a source must know to go on from here."""
        ...

    def close(self) -> None:
        """The run ends, perhaps in the middle of a step: nothing of it goes on."""
        ...


class Exam(Protocol):
    """The held-out score."""

    @property
    def prompts(self) -> list[Prompt]:
        """What it is of."""
        ...

    def answers(self, engine: Engine, step: int = 0) -> list[Group]:
        """Held-out answers after so many steps, with what they are worth."""
        ...

    def scores(self, groups: list[Group]) -> dict[str, float]:
        """Of these answers, under eval/ names."""
        ...


@dataclass
class Run:
    """The objects that the loop calls, and how far it is."""

    config: Config
    world: World
    folder: Path
    policy: Policy
    engine: Engine
    source: Source
    pack: Packer
    loss: Loss
    evaluator: Exam
    recorder: Recorder
    memory_peak: Callable[[], float]  # GiB
    generators_now: Callable[[], Generators]
    generators: Generators  # as they were when `progress` was
    progress: Progress = field(default_factory=Progress)
    stop_requested: int = 0  # by the signal of this number, here or at another rank; 0: by none
    saved: tuple[int, int] = (0, -1)  # (steps done, of them at the last held-out score), as the last checkpoint has it


def train(run: Run) -> None:
    """Train from where the run is to its last step, or until somebody asks it to stop."""
    config = run.config
    finish_step(run)  # the score before training, or one that the run was stopped in

    for step in range(run.progress.step, config.steps):
        clock = Clock(run.recorder.stage)
        groups, told = run.source(step, clock)
        with clock("update"):
            run.engine.release()
            update = run.policy.update(run.pack(groups), run.loss, learning_rate(step, config), config.epochs)
            run.world.require_same(run.policy.digest, drifted)
        run.source.check(update, clock)
        with clock("sync"):
            sync = run.engine.sync()
        metrics = told | update | sync | clock.metrics(groups) | {"memory/peak_gib": run.memory_peak()}
        run.recorder.step(step, metrics)
        run.recorder.completions(step, groups)

        remember(run, step=step + 1, version=run.policy.version)
        finish_step(run)
        if asked := max(run.world.gather(run.stop_requested)):
            run.stop_requested = asked
            break


def drifted(others: list[int]) -> str:
    """Why a run ends whose ranks have not the same adapter."""
    return (
        f"After an update the adapters of ranks {', '.join(map(str, others))} are not that of rank 0: they have taken "
        "another step on the same gradient. GPUs of different kinds and different versions of PyTorch do that; "
        "otherwise please report it. What the last checkpoint holds is one."
    )


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
    best, step = (progress.best, progress.best_tie), progress.best_step
    if step < 0 or standing(scores) > best:
        best, step = standing(scores), progress.step
    remember(
        run,
        first_scores=progress.first_scores or scores,
        last_scores=scores,
        evaluated=progress.step,
        best=best[0],
        best_tie=best[1],
        best_step=step,
    )


def remember(run: Run, **changed: Any) -> None:
    """So far is the run now, with what a checkpoint of that needs of the world around it. All of it at once: a signal,
    or another rank's end, may interrupt anywhere, and what is saved then is of one moment."""
    limit, position = run.policy.fit.limit.state(), run.recorder.position()
    progress = replace(run.progress, batch_limit=limit, position=position, **changed)
    run.source.remember(progress)
    generators = run.generators_now()
    run.generators, run.progress = generators, progress


def is_unsaved(run: Run) -> bool:
    """There is a step, or a held-out score after one, that the last checkpoint does not have."""
    return run.progress.step > 0 and run.saved != (run.progress.step, run.progress.evaluated)


def save(run: Run) -> None:
    """Write a checkpoint of the run as it was after its last whole step, also when the next one has failed."""
    run.recorder.stage("checkpoint")
    run.recorder.fsync()
    run.world.first(save_checkpoint, run.folder, run.policy, run.progress, run.generators, run.config.keep)
    run.saved = (run.progress.step, run.progress.evaluated)
