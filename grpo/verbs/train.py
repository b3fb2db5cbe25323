"""Train a task from the start, or go on from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from grpo.build import build_run
from grpo.checkpoint import read_state
from grpo.config import Config
from grpo.errors import UserError
from grpo.evaluate import comparison
from grpo.folder import alone_in, new_run_folder, removed_if_empty, resume_folder, run_of, write_config
from grpo.guards import full_disk_in_words, memory_in_words, stops_gently
from grpo.questions import build_questions, preflight_rewards
from grpo.resolve import Resolved
from grpo.terminal import say, working
from grpo.threads import restored_threads
from grpo.train import Run, is_unsaved, save, train
from grpo.verbs.announce import announce
from grpo.verbs.opening import opening


def start(resolved: Resolved, resume: str) -> int:
    """Train, from the start or from a checkpoint."""
    announce(resolved)
    checkpoint = resume_folder(Path(resume)) if resume else None
    if checkpoint:
        _check_steps(resolved.config, checkpoint)
    with working("rows and prompts"):
        questions = build_questions(resolved.task, resolved.config, note=say)
    with working("preflight of the rewards"):
        report = preflight_rewards(resolved.task, questions, every_row=False)
    for warning in report.warnings:
        say(f"note: {warning}")
    folder = run_of(checkpoint) if checkpoint else new_run_folder(resolved.task.name, resolved.config)
    with alone_in(folder), full_disk_in_words(folder), memory_in_words(resolved.config, folder), restored_threads():
        with removed_if_empty(folder), working("model and engine"):
            run = build_run(resolved.task, resolved.config, folder, questions, checkpoint, say)
        write_config(folder, resolved.task_path, resolved.task.name, resolved.config, resolved.origins)
        for line in opening(resolved.config, run.policy, run.engine, folder):
            say(line)
        with run.recorder, stops_gently(run):
            _train_and_keep(run)
    run.engine.close()
    for warning in run.recorder.warnings():
        say(f"warning: {warning}")
    if run.progress.step < resolved.config.steps:
        say(f"Stopped after step {run.progress.step} of {resolved.config.steps}; everything is saved. Go on with")
        say(f"  python -m grpo.run --resume {folder}")
        return 130
    say(comparison(run.progress.first_scores, run.progress.last_scores))
    files = {"curves": "curves.png", "completions": "completions.jsonl", "adapter": "checkpoints"}
    say("   ".join(f"{what}: {folder / name}" for what, name in files.items()))
    return 0


def _check_steps(config: Config, checkpoint: Path) -> None:
    """A run does not go on to fewer steps than it has done.

    Raises:
        UserError: --steps asks for that.
    """
    done = read_state(checkpoint)[0].step
    if config.steps < done:
        raise UserError(
            f"{checkpoint} has done {done} steps, more than --steps {config.steps} asks for. Give a larger number, or "
            f"--resume an earlier checkpoint of {checkpoint.parent}."
        )


def _train_and_keep(run: Run) -> None:
    """Train; when that ends early, for an error or on request, save what is done so far."""
    try:
        train(run)
    finally:
        # After an error in the middle of an update the policy is not that of the last whole step: nothing to save.
        if run.policy.version == run.progress.version and is_unsaved(run):
            save(run)
