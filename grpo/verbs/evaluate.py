"""Held-out scores of a run's best checkpoint, of one checkpoint, or of a model, alone or with --adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from grpo.build import build_engine, build_policy, settle_threads, share_of_rank
from grpo.checkpoint import best_checkpoint, check_run, load_trained
from grpo.config import Config
from grpo.evaluate import score_lines
from grpo.folder import run_of, saved_run
from grpo.guards import memory_in_words
from grpo.policy.quantization import PROMPTS
from grpo.questions import Questions, build_questions
from grpo.resolve import Resolved
from grpo.start import begin
from grpo.terminal import say, working
from grpo.threads import restored_threads
from grpo.verbs.announce import announce, over_its_adapter
from grpo.verbs.live import Live
from grpo.verbs.opening import opening
from grpo.verbs.together import HELD_OUT, digest_of_columns, same_command, same_questions
from grpo.world import ALONE, World


def evaluate(resolved: Resolved, target: str, world: World = ALONE) -> int:
    """--eval: held-out scores of a run's best checkpoint, of one checkpoint, or of a model. world: of the processes
    that share the work."""
    checkpoint = _checkpoint(target)
    live = opened(resolved if checkpoint else over_its_adapter(resolved), checkpoint, world)
    try:
        tell(target, live, live.score(resolved.task))
    finally:
        live.close()
    return 0


def opened(resolved: Resolved, checkpoint: Path | None, world: World = ALONE) -> Live:
    """The policy of a checkpoint, or of the configuration's model, with who samples from it.

    Raises:
        UserError: something of it cannot be had, is damaged, or does not fit into the memory.
    """
    announce(resolved)
    same_command(world, resolved, checkpoint)
    config = replace(resolved.config, optimizer="adamw")  # none is used, and bitsandbytes need not be here
    world.does("reading rows and making prompts")
    with working("rows and prompts"):
        questions = build_questions(resolved.task, config, note=say)
    same_questions(world, questions)
    if questions.lessons and not questions.rewards:
        config = replace(config, engine="none")
    with memory_in_words(config), restored_threads():
        world.does("loading the model")
        with working("model") as progressed:
            policy = build_policy(
                config, questions.tokenizer, questions.longest_sequence, say, progressed, questions.train[:PROMPTS],
                checkpoint, world,
            )  # fmt: skip
        if not checkpoint or config.method == "dpo":  # whose score is from the reference policy on
            begin(config, policy, run_of(checkpoint) if checkpoint else None, checkpoint, say)
        settle_threads(config, policy, questions.canary_prompts, checkpoint, say)
        if checkpoint:
            progress = load_trained(checkpoint, policy, say)
            say(f"adapter of {checkpoint}")
            _tell_of_rows(progress.rows.get(HELD_OUT), config, questions)
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
        world.does("sampling")
        return Live(config, policy, engine, questions, torch.get_num_threads(), checkpoint, world)


def _tell_of_rows(scored: str | None, config: Config, questions: Questions) -> None:
    """Whether the score will be one of what the run's own scores are of. scored: that, where the checkpoint says it."""
    held_out = questions.test if config.engine != "none" else [each.prompt for each in questions.held_out or ()]
    if scored and scored != digest_of_columns(held_out):
        say(
            "note: the held-out rows are not those that the run was scored on: this score and those of the run do not "
            "compare."
        )


def tell(target: str, live: Live, scores: Mapping[str, float]) -> None:
    """Print the scores."""
    say(f"{target}: {_of_what(live.config, live.questions)}")
    for line in score_lines(dict(scores)):
        say("  " + line)


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
