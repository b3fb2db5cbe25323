"""--eval: held-out scores of a run's best checkpoint, of one checkpoint, or of a model, alone or with --adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from grpo.build import build_engine, build_evaluator, build_policy, settle_threads, share_of_rank
from grpo.checkpoint import best_checkpoint, check_run, load_trained
from grpo.config import Config
from grpo.evaluate import score_lines
from grpo.folder import run_of, saved_run
from grpo.guards import memory_in_words
from grpo.methods import build_examiner
from grpo.objectives import OBJECTIVES
from grpo.policy import Policy
from grpo.policy.quantization import PROMPTS
from grpo.questions import Questions, build_questions
from grpo.resolve import Resolved
from grpo.rewards.staff import staffed
from grpo.rollout import Engine
from grpo.start import begin
from grpo.task import Task
from grpo.terminal import say, working
from grpo.threads import restored_threads
from grpo.verbs.announce import announce, over_its_adapter
from grpo.verbs.opening import opening
from grpo.verbs.together import same_command, same_questions
from grpo.world import ALONE, World


def evaluate(resolved: Resolved, target: str, world: World = ALONE) -> int:
    """--eval: held-out scores of a run's best checkpoint, of one checkpoint, or of a model. world: of the processes
    that share the work."""
    checkpoint = _checkpoint(target)
    resolved = resolved if checkpoint else over_its_adapter(resolved)
    announce(resolved)
    same_command(world, resolved, checkpoint)
    config = replace(resolved.config, optimizer="adamw")  # none is used, and bitsandbytes need not be here
    with working("rows and prompts"):
        questions = build_questions(resolved.task, config, note=say)
    same_questions(world, questions)
    if questions.lessons and not questions.rewards:
        config = replace(config, engine="none")
    at_work = staffed(questions.rewards, config.reward_workers, len(questions.test) * config.eval_samples, None, say)
    with memory_in_words(config), restored_threads(), at_work as questions.rewards:
        with working("model") as progressed:
            policy = build_policy(
                config, questions.tokenizer, questions.longest_sequence, say, progressed, questions.train[:PROMPTS],
                checkpoint,
            )  # fmt: skip
        if not checkpoint or config.method == "dpo":  # whose score is from the reference policy on
            begin(config, policy, run_of(checkpoint) if checkpoint else None, checkpoint, say)
        settle_threads(config, policy, questions.canary_prompts, checkpoint, say)
        if checkpoint:
            load_trained(checkpoint, policy, say)
            say(f"adapter of {checkpoint}")
        engine = build_engine(
            share_of_rank(config, world),
            policy,
            questions.tokenizer,
            questions.canary_prompts,
            questions.longest_sequence,
            say,
        )
        for line in opening(config, policy, engine):
            say(line)
        with working("evaluation"):
            scores = _exam(resolved.task, config, questions, policy, world)(engine)
        engine.close()
    say(f"{target}: {_of_what(config, questions)}")
    for line in score_lines(scores):
        say("  " + line)
    return 0


def _exam(
    task: Task, config: Config, questions: Questions, policy: Policy, world: World
) -> Callable[[Engine], dict[str, float]]:
    """Who gives the scores: rewards of what the policy says, or what it makes of given answers, or both."""
    asked = build_evaluator(task, config, questions, say, world=world)
    if not questions.lessons:
        return asked
    exam = build_examiner(config, questions, policy, OBJECTIVES[config.method](config), asked)
    return lambda engine: exam.scores(exam.answers(engine))


def _of_what(config: Config, questions: Questions) -> str:
    asked = f"{len(questions.test)} held-out prompts, {config.eval_samples} samples each"
    given = f"{len(questions.held_out or ())} held-out {'pairs' if config.method == 'dpo' else 'answers'}"
    return {True: asked, False: given}[config.engine != "none"]


def _checkpoint(target: str) -> Path | None:
    """The one to score; None for a model."""
    if not (saved := saved_run(target)):
        return None
    checkpoint = best_checkpoint(Path(target))
    check_run(checkpoint, saved.id)
    return checkpoint
