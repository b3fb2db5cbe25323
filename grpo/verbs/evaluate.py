"""--eval: held-out scores of a run's best checkpoint, of one checkpoint, or of a model, alone or with --adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from grpo.build import build_engine, build_evaluator, build_policy, settle_threads, share_of_rank
from grpo.checkpoint import best_checkpoint, check_run, load_trained
from grpo.evaluate import score_lines
from grpo.folder import saved_run
from grpo.guards import memory_in_words
from grpo.policy.quantization import PROMPTS
from grpo.questions import build_questions
from grpo.resolve import Resolved
from grpo.rewards.staff import staffed
from grpo.start import begin
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
    at_work = staffed(questions.rewards, config.reward_workers, len(questions.test) * config.eval_samples, None, say)
    with memory_in_words(config), restored_threads(), at_work as questions.rewards:
        with working("model") as progressed:
            policy = build_policy(
                config, questions.tokenizer, questions.longest_sequence, say, progressed, questions.train[:PROMPTS],
                checkpoint,
            )  # fmt: skip
        if not checkpoint:
            begin(config, policy, None, None, say)
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
            scores = build_evaluator(resolved.task, config, questions, say, world=world)(engine)
        engine.close()
    say(f"{target}: {len(questions.test)} held-out prompts, {config.eval_samples} samples each")
    for line in score_lines(scores):
        say("  " + line)
    return 0


def _checkpoint(target: str) -> Path | None:
    """The one to score; None for a model."""
    if not (saved := saved_run(target)):
        return None
    checkpoint = best_checkpoint(Path(target))
    check_run(checkpoint, saved.id)
    return checkpoint
