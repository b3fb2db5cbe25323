"""Train a task from the start, or go on from a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grpo import watchdog
from grpo.build import build_run
from grpo.checkpoint import check_run, read_state
from grpo.command import Options
from grpo.config import Config
from grpo.errors import UserError
from grpo.folder import (
    REWARDS_LOG,
    Origin,
    Saved,
    check_new,
    list_checkpoints,
    new_id,
    new_run_folder,
    remove_unused,
    resume_folder,
    saved_run,
    set_aside,
    write_config,
)
from grpo.guards import command_to_go_on, files_in_words, memory_in_words, stops_gently, told_how_to_go_on
from grpo.questions import Questions, build_questions, preflight_rewards
from grpo.record.sinks import Sink
from grpo.record.starts import write_start
from grpo.record.theirs import Theirs
from grpo.record.trackers import About, build_trackers, check_installed
from grpo.report import ReportSink
from grpo.resolve import Resolved
from grpo.rewards.kept import Held, printed_to
from grpo.rewards.staff import NOT_KNOWN, staffed
from grpo.system import lacking
from grpo.task import Task
from grpo.terminal import say, working
from grpo.threads import restored_threads
from grpo.train import Run, evaluate, is_unsaved, save, train
from grpo.verbs.announce import announce, over_its_adapter
from grpo.verbs.closing import IN_A_SHELL, After, closing
from grpo.verbs.live import Live
from grpo.verbs.opening import device_in_words, engine_in_words, opening, what_comes
from grpo.verbs.together import HELD_OUT, TRAINED_ON, alone_with, digest_of_columns, same_command, same_questions
from grpo.world import ALONE, FOLDER, World

_MOST_PRINTED = 2000  # characters of what rewards printed before one failed


@dataclass(frozen=True)
class Trained:
    """How a training ended."""

    live: Live
    folder: Path
    is_done: bool  # every step was done
    exit_code: int  # as shells have it: 0, or 128 + 2 after Ctrl-C, 128 + 15 after SIGTERM, on every rank


def start(
    options: Options,
    resolved: Resolved,
    command: str,
    sinks: Sequence[Sink] = (),
    after: After = IN_A_SHELL,
    world: World = ALONE,
) -> Trained:
    """Train, from the start or from a checkpoint, and say how that ended. The policy stays in memory.

    command: as it was given, for the records. sinks: who else is told what happens. after: what can be done then.
    world: of the processes that train together.

    Raises:
        UserError: what is asked for cannot be done, or something failed; what was saved stays.
    """
    check_installed(resolved.config.log)
    saved = saved_run(options.resume)
    resolved = resolved if saved else over_its_adapter(resolved)
    announce(resolved)
    for told in lacking():
        say(f"note: {told}.")
    if saved and resolved.task_path and saved.task_sha256 != resolved.task_sha256:
        say(
            f"note: {resolved.task_path} is not the file that the run was started with. Its scores go on as one: "
            "before and after compare if the rewards still mean the same."
        )
    if saved and (changes := saved.changes_to(resolved.config)):
        told = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changes.items())
        say(f"note: changed since the run was last started: {told}.")
    checkpoint = resume_folder(Path(options.resume)) if options.resume else None
    same_command(world, resolved, checkpoint)
    if checkpoint and saved:
        check_run(checkpoint, saved.id)
    if options.resume_or_start and not saved:
        with suppress(OSError):  # an empty folder, made for the run by a scheduler or by one that died at once
            Path(resolved.config.run_dir).rmdir()
    if not saved:
        check_new(resolved.config)
    questions, printed = _questions(resolved, world)
    same_questions(world, questions)
    resolved = by_epochs(resolved, len(questions.lessons)) if questions.lessons else resolved
    if checkpoint:
        _check_steps(resolved.config, checkpoint)
    folder = saved.folder if saved else _new_folder(resolved, world)
    as_saved = resolved.as_saved(folder, saved.id if saved else new_id())
    watchdog.advise(f"Go on with `{command_to_go_on(folder)}`.")
    with alone_with(world, folder), told_how_to_go_on(folder), files_in_words(folder), restored_threads():
        config = resolved.config
        world.first(_keep_printed, printed, folder)
        completions = config.prompts_per_step * config.group_size
        before = read_state(checkpoint)[0].placed if checkpoint else NOT_KNOWN
        at_work = staffed(questions.rewards, config.reward_workers, completions, folder / REWARDS_LOG, say, before)
        with memory_in_words(config, folder), at_work as staff:
            asked_by, starts_over = replace(questions, rewards=staff, move=staff.move), bool(saved and not checkpoint)
            run = _built(resolved, as_saved, asked_by, checkpoint, starts_over, world)
            run.progress.placed = staff.placed
            rows, rows_before = _rows_of(run, questions), run.progress.rows
            changed = (saved.changes_to(resolved.config) if saved else {}) | _changed_rows(rows_before, rows)
            how = {"command": command, "changed": changed}
            world.first(_record_start, run, resolved, as_saved, asked_by, how)
            with run.recorder, stops_gently(run, partial(_told_to_stop, run)):
                stop = partial(setattr, run, "stop_requested", signal.SIGINT)
                for sink in sinks:
                    run.recorder.add(Theirs(sink, run.recorder.message, stop))
                _go_on_with(run, rows)
                _score_anew(run, resolved.task, rows_before)
                _train_and_keep(run)
        threads = torch.get_num_threads()
    _tell_the_end(run, after)
    last = list_checkpoints(folder)[-1:] if run.progress.step else []
    live = Live(run.config, run.policy, run.engine, questions, threads, next(iter(last), None), world)
    is_done = run.progress.step == run.config.steps
    return Trained(live, folder, is_done, 0 if is_done else 128 + run.stop_requested)


def _questions(resolved: Resolved, world: World) -> tuple[Questions, str]:
    """Rows, prompts and rewards; the rewards tried, and what they have printed."""
    task, config, held = resolved.task, resolved.config, Held()
    apart = partial(printed_to, held)
    try:
        world.does("reading rows and making prompts")
        with working("rows and prompts"):
            questions = build_questions(task, config, note=say, apart=apart)
        if not questions.rewards:
            return questions, ""
        world.does("trying the rewards")
        with working("preflight of the rewards"):
            report = preflight_rewards(task, config, questions, every_row=False, note=say, apart=apart)
    except UserError:
        if printed := held.getvalue().strip():
            say(f"What the rewards printed before that, the end of it:\n{printed[-_MOST_PRINTED:]}\n")
        raise
    for warning in report.warnings:
        say(f"note: {warning}")
    return questions, held.getvalue()


def _keep_printed(printed: str, folder: Path) -> None:
    if printed:
        with suppress(OSError), (folder / REWARDS_LOG).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(printed)


def _new_folder(resolved: Resolved, world: World) -> Path:
    """Made by rank 0, and known to all."""
    made: list[Path] = []
    world.first(lambda: made.append(new_run_folder(resolved.task.name, resolved.config, resolved.here)))
    [folder] = world.broadcast(made)
    return folder


def _told_to_stop(run: Run, sentence: str) -> None:
    run.world.hurry(run.stop_requested)
    run.world.first(run.recorder.message, sentence)


def by_epochs(resolved: Resolved, lessons: int) -> Resolved:
    """Of a run that is taught: as many steps as go through its lessons so many times, unless --steps says how many."""
    config, origins = resolved.config, resolved.origins
    if origins.get("steps") in ("flag", "data") and origins.get("epochs") != "flag":
        return resolved
    if origins.get("steps") == "flag":
        raise UserError(
            f"--steps {config.steps} and --epochs {config.epochs} both say how long the run is. Give one of them."
        )
    steps = -(-config.epochs * lessons // config.prompts_per_step)
    origin: Origin = "data"
    return dataclasses.replace(
        resolved, config=dataclasses.replace(config, steps=steps), origins=origins | {"steps": origin}
    )


def _built(
    resolved: Resolved, saved: Saved, questions: Questions, checkpoint: Path | None, starts_over: bool, world: World
) -> Run:
    """The run, its config.json written: before anything is trained, so that a run that is killed goes on.

    A new run's is there before it is built, for that takes minutes; a resumed one's stays as it was until all is well.
    """
    is_new = not checkpoint and not starts_over
    try:
        if is_new:
            world.first(write_config, saved)
        elif starts_over:
            world.first(_start_over, saved)
        world.first(world.remember, FOLDER, str(saved.folder))
        world.does("loading the model and the engine")
        with working("model and engine") as progressed:
            run = build_run(resolved.task, resolved.config, saved.folder, questions, checkpoint, say, progressed, world)
    except BaseException:
        if is_new:
            world.first(remove_unused, saved.folder)
        raise
    world.first(write_config, saved)
    run.progress.run = saved.id
    for line in opening(resolved.config, run.policy, run.engine):
        say(line)
    for line in what_comes(resolved.config, resolved.task, saved):
        say(line)
    return run


def _start_over(saved: Saved) -> None:
    if left := set_aside(saved.folder):
        say(f"note: there was no checkpoint yet, so the run starts over. What it had recorded is in {left}.")


def _record_start(run: Run, resolved: Resolved, saved: Saved, questions: Questions, how: dict[str, Any]) -> None:
    """What the run is made of, for whoever reads its records; and who else is told of what comes."""
    task, device = resolved.task, run.policy.device
    is_cuda = device.type == "cuda"
    about = {
        **how,
        "step": run.progress.step,
        "steps": run.config.steps,
        "task": task.name,
        "model": run.config.model,
        "device": device_in_words(device),
        "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if is_cuda else None,
        "engine": engine_in_words(run.engine),
        "rows": {"train": len(questions.train), "held-out": len(questions.test)},
        "rewards": {reward.name: reward.weight for reward in questions.rewards},
        "solved": task.solved,
        "threads": run.progress.threads,
    }
    write_start(run.folder, about)
    tracked = About(run.folder, task.name, saved.id, dataclasses.asdict(run.config))
    report = ReportSink(run.folder, run.recorder.message)
    for sink in [*build_trackers(run.config.log, tracked, run.recorder.message), report]:
        run.recorder.add(sink)


def _rows_of(run: Run, questions: Questions) -> dict[str, str]:
    """Fingerprints of the rows that a run is trained and scored on."""
    return {TRAINED_ON: questions.rows, HELD_OUT: digest_of_columns(run.evaluator.prompts)}


def _changed_rows(before: dict[str, str], now: dict[str, str]) -> dict[str, list[str]]:
    """Which of them are others than before, as `Saved.changes_to` says it. Nobody knows of runs of earlier versions."""
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    return {name: [f"SHA-256 {before[name][:12]}", f"SHA-256 {now[name][:12]}"] for name in changed}


def _go_on_with(run: Run, rows: dict[str, str]) -> None:
    """Other rows to train on are told: the cursor of the checkpoint stands in an order of those that it had."""
    if TRAINED_ON in _changed_rows(run.progress.rows, rows):
        run.recorder.message(
            "note: the training rows are not those that the run has learnt from so far: rows were added, taken out, "
            "changed or put in another order. The run goes on with those that are there now; of the epoch that it is "
            "in, some may come twice and others not at all."
        )
    run.progress.rows = rows


def _score_anew(run: Run, task: Task, rows_before: dict[str, str]) -> None:
    """What is held out is what the scores so far are of. Otherwise they are no measure of what comes: not for the best
    checkpoint, nor for the comparison at the end. Then the policy is scored on it now."""
    progress, prompts = run.progress, [prompt.tokens for prompt in run.evaluator.prompts]
    held_out = fingerprint_of_held_out(prompts, task.solved, run.config)
    other_rows = HELD_OUT in _changed_rows(rows_before, progress.rows)
    if progress.held_out and (progress.held_out != held_out or other_rows):
        run.recorder.message(
            "note: the held-out prompts, their answers, their samples, their measure or the base weights are not those "
            "of the scores so far. The policy is scored anew; the best checkpoint and the comparison at the end begin "
            "here."
        )
        progress.best, progress.best_step, progress.first_scores = -1.0, -1, {}
        evaluate(run)
        run.saved = (0, -1)
    run.progress.held_out = held_out


def fingerprint_of_held_out(prompts: list[list[int]], solved: tuple[str, float] | None, config: Config) -> str:
    """The SHA-256 of all that a held-out score depends on beside the policy. prompts: their tokens [P]."""
    sampled = (config.eval_samples, config.eval_k, config.temperature, config.max_completion_tokens, config.seed)
    how = (*sampled, config.base, config.quantization)  # other base weights are another policy, whatever was trained
    return hashlib.sha256(json.dumps([solved, how, prompts]).encode()).hexdigest()


def _tell_the_end(run: Run, after: After) -> None:
    """The last lines."""
    for warning in run.recorder.warnings():
        say(f"warning: {warning}")
    run.world.first(_say_all, closing(run.folder, run.progress, run.config.steps, after))


def _say_all(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


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
    run.world.does("training")
    try:
        train(run)
    finally:
        run.source.close()
        # After an error in the middle of an update the policy is not that of the last whole step: nothing to save.
        if run.policy.version == run.progress.version and is_unsaved(run):
            save(run)
