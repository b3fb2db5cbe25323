"""Build: a task and a configuration -> the objects that the loop calls. Every choice of a run is made here.

build_policy(config, tokenizer, ...) the model over its projections; without data
build_engine(config, policy, ...)    who samples from it; without data but for a few prompts' tokens
build_run(...)                       a Run, ready to train or resumed
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo import generators, memory, system
from grpo.checkpoint import Progress, load_checkpoint, read_state
from grpo.config import Config
from grpo.errors import UnsuitedEngine, UserError
from grpo.evaluate import Evaluator, measure_reward, measure_solved
from grpo.fitting import Fitting
from grpo.folder import REWARDS_LOG, leave_later
from grpo.loss import Loss
from grpo.memory import Plan
from grpo.memory_of_run import parkable, plan_memory, settle_memory, suits_vllm
from grpo.methods import build_examiner, build_rollouts, build_taught, headline_of, planned_for
from grpo.objectives import OBJECTIVES
from grpo.packing import (
    PACKERS,
    batch_limit,
    lay_out_longest,
    lay_out_longest_pairs,
    lay_out_to_read,
)
from grpo.policy import Policy, load_model
from grpo.policy.actor_critic import ActorCritic
from grpo.policy.load import choose_device
from grpo.policy.optimizer import check_optimizer, lift_state, restore_optimizer
from grpo.policy.promises import Progressed, no_progress
from grpo.policy.quantization import PROMPTS
from grpo.questions import Questions
from grpo.record import Recorder, TokenTrace
from grpo.record.files import Gold, no_gold
from grpo.record.silent import Silent
from grpo.rewards import Scorer
from grpo.rewards.draws import Draws, apart
from grpo.rewards.failures import Tolerance
from grpo.rewards.kept import Log
from grpo.rollout import Engine
from grpo.rollout.idle import Idle, OnCall
from grpo.rollout.server import ServerEngine, check_reachable
from grpo.rollout.torch_engine import TorchEngine
from grpo.seeds import Purpose, mix_seed
from grpo.start import begin, keep
from grpo.task import Task
from grpo.threads import choose
from grpo.train import Run
from grpo.types import Completion, Group, Prompt
from grpo.world import ALONE, World

# Sequences, and tokens of a prompt, that the number of threads is measured with.
PROBE_ROWS, PROBE_TOKENS = 64, 32

# Where the largest batch is run before the first step. What a CPU's memory holds is no plan: it is swapped and shared.
REHEARSED = ("cuda",)


def build_policy(
    config: Config,
    tokenizer: Any,
    longest: int,
    note: Callable[[str], object] = print,
    progressed: Progressed = no_progress,
    prompts: Sequence[Prompt] = (),
    checkpoint: Path | None = None,
    world: World = ALONE,
) -> Policy:
    """The model of a configuration with a fresh adapter and its optimizer.

    tokenizer: of the model; it and its chat template are asked which tokens end a completion. longest: prompt and
    completion together, in tokens, that will be run at most. progressed: told how many bytes of how many are read.
    prompts: what --quantization dynamic measures on. checkpoint: what was chosen for it is kept. world: that it is
    trained in.
    """
    check_torch()
    if config.engine == "server":
        check_reachable(config, config.model)
    before = read_state(checkpoint)[0] if checkpoint else None
    if before:  # it goes on over the base that it began with
        config = replace(config, double_quant="on" if before.double_quant else "off")
    dense = before.dense if before else None
    measured_on = [prompt.tokens for prompt in prompts]
    loaded = load_model(config, choose_device(config), longest, tokenizer, note, progressed, measured_on, dense, world)
    kind = ActorCritic if config.has_values else Policy
    return kind(loaded, config, world)


def check_torch() -> None:
    """torch is as it comes: what a task file sets for a model of its own would hold for everything that is made here.

    Raises:
        UserError: it is not.
    """
    made = torch.zeros(1)
    changed = {
        f"torch.set_default_dtype({made.dtype})": made.dtype != torch.float32,
        f'torch.set_default_device("{made.device}")': made.device.type != "cpu",
        "torch.set_grad_enabled(False)": not torch.is_grad_enabled(),
        "torch.inference_mode()": torch.is_inference_mode_enabled(),
    }
    if told := [call for call, is_so in changed.items() if is_so]:
        raise UserError(
            f"The task file, or a reward of it, has changed torch for everybody: {', '.join(told)}. The policy would "
            "be made and trained like that. Change it for what needs it alone, by `with torch.no_grad():` or by the "
            "arguments device= and dtype=."
        )


def settle_threads(
    config: Config,
    policy: Policy,
    prompts: list[list[int]],
    checkpoint: Path | None,
    note: Callable[[str], object] = print,
) -> int:
    """Set how many threads the CPU computes with, to be asked for before anything is computed that a run depends on;
    `note` is told. A policy on a GPU leaves the number as it is, unless one is asked for.

    prompts: tokens [P] of a few prompts to measure with. checkpoint: a resumed run keeps the number it began with.
    """
    kept = read_state(checkpoint)[0].threads if checkpoint else 0
    if (policy.device.type == "cpu" and config.engine != "vllm") or config.threads:
        choice = choose(config.threads, kept, a_step(config, policy, prompts))
        torch.set_num_threads(choice.count)
        note(f"threads: {choice.count} ({choice.why})")
    return torch.get_num_threads()


def a_step(config: Config, policy: Policy, prompts: list[list[int]]) -> Callable[[], object]:
    """A little of what a step computes, to be timed: the policy reads as many sequences as a rollout writes at once, a
    token of each."""
    rows = min(PROBE_ROWS, config.prompts_per_step * config.group_size)
    context = prompts[0][:PROBE_TOKENS]
    tokens = [Completion(context[:1], [0.0], "", "stop", 0) for _ in range(rows)]
    batch = lay_out_to_read([Group(Prompt(0, "", context, {}), tokens)], policy.device)
    return torch.no_grad()(lambda: policy.logprobs(batch))


def build_engine(
    config: Config,
    policy: Policy,
    tokenizer: Any,
    canary_prompts: list[list[int]],
    longest: int,
    note: Callable[[str], object] = print,
) -> Engine:
    """The rollout engine that a configuration asks for. Where the choice is ours and vLLM refuses the model, PyTorch's
    is taken instead, and `note` is told.

    canary_prompts: tokens [P] of a few prompts that engine and policy are compared on after every update.
    longest: prompt and completion together, in tokens, that will be sampled at most.

    Raises:
        UserError: vLLM is asked for and cannot be had, or cannot sample from this policy; so with servers.
    """
    if config.engine == "none":
        return Idle()
    if config.engine == "server":
        return ServerEngine(policy, tokenizer, canary_prompts, config, longest, note)
    if config.engine == "vllm":
        return build_vllm_engine(config, policy, tokenizer, canary_prompts, longest, note)
    if config.engine == "auto" and suits_vllm(config, policy):
        try:
            return build_vllm_engine(config, policy, tokenizer, canary_prompts, longest, note)
        except UnsuitedEngine as refusal:
            note(f"note: {refusal} --engine auto takes that one, which is slower.")
    return TorchEngine(policy, tokenizer, canary_prompts, config.temperature)


def build_vllm_engine(
    config: Config,
    policy: Policy,
    tokenizer: Any,
    canary_prompts: list[list[int]],
    longest: int,
    note: Callable[[str], object],
) -> Engine:
    """vLLM. Raises UserError where it cannot be had, UnsuitedEngine where it cannot sample from this policy."""
    from grpo.rollout.vllm_engine import VllmEngine  # not before it is wanted: vLLM takes seconds to import

    return VllmEngine(policy, tokenizer, canary_prompts, config, longest, note)


def rehearse(
    config: Config, policy: Policy, engine: Engine, loss: Loss, questions: Questions, note: Callable[[str], object]
) -> None:
    """Run the largest batch that can come as an update would, so that what does not fit shows now; `note` is told."""
    engine.release()
    prompt = max(1, questions.longest_sequence - config.max_completion_tokens)
    lay_out = lay_out_longest_pairs if config.method == "dpo" else lay_out_longest
    batch = lay_out(config, policy.fit.limit, prompt, questions.canary_prompts[0], policy.device)
    policy.rehearse(batch, loss)
    size = min(len(batch.tokens), max(policy.fit.limit.tokens, questions.longest_sequence))
    note(f"rehearsal: a batch of {size:,} tokens, the largest that can come, fits into the memory")


def build_scorer(
    config: Config, questions: Questions, tell: Callable[[str], object], own: tuple[Draws, Log] | None = None
) -> Scorer:
    """How groups are scored. `tell` is told of the first failure of a reward. own: what a run's rewards draw from, and
    print into."""
    tolerance = Tolerance(config.max_reward_failures, tell)
    if own is None:
        return Scorer(questions.rewards, tolerance, steps=config.steps, max_tokens=config.max_completion_tokens)
    tolerance, most = replace(tolerance, log=own[1].write), config.max_completion_tokens
    return Scorer(questions.rewards, tolerance, partial(apart, *own), config.steps, most, questions.move)


def build_evaluator(
    task: Task,
    config: Config,
    questions: Questions,
    tell: Callable[[str], object],
    own: tuple[Draws, Log] | None = None,
    world: World = ALONE,
) -> Evaluator:
    """The held-out score of a task, whose arguments are those of its scorer. world: whose ranks share the work."""
    measure = partial(measure_solved, task.solved, task.vote, config.eval_k) if task.solved else measure_reward
    return Evaluator(
        prompts=list(questions.test),
        score=build_scorer(config, questions, tell, own),
        measure=measure,
        samples=config.eval_samples,
        max_tokens=config.max_completion_tokens,
        seed=mix_seed(Purpose.EVALUATION, config.seed),
        world=world,
    )


def build_run(
    task: Task,
    config: Config,
    folder: Path,
    questions: Questions,
    checkpoint: Path | None,
    note: Callable[[str], object] = print,
    progressed: Progressed = no_progress,
    world: World = ALONE,
) -> Run:
    """Everything that training needs, in the state of `checkpoint` or at the start. world: that this process is in."""
    check_optimizer(config, choose_device(config))
    if questions.lessons:  # each is gone through once in a step, and nobody samples where nothing could be scored
        config = replace(config, epochs=1, engine=config.engine if questions.rewards else "none")
    measured_on = questions.train[:PROMPTS]
    policy = build_policy(
        config, questions.tokenizer, questions.longest_sequence, note, progressed, measured_on, checkpoint, world
    )
    begin(config, policy, folder, checkpoint, note)
    threads = world.broadcast(settle_threads(config, policy, questions.canary_prompts, checkpoint, note))
    torch.set_num_threads(threads)  # which sums depend on, and what every rank computes for itself must be the same
    seed_globals(config.seed)
    progress = load_checkpoint(checkpoint, policy, note) if checkpoint else Progress()
    progress.threads = threads
    progress.dense = policy.store.dense if config.quantization == "dynamic" else []
    of_rank = share_of_rank(config, world)
    planned = planned_for(of_rank, questions)
    world.prepare(policy.masters())
    moments = lift_state(policy.optimizer)  # or they would be measured as weights, and counted as moments too
    room = min(world.gather(parkable()))  # or ranks would plan, and round, otherwise than each other
    plan = plan_memory(planned, policy, questions.longest_sequence, progress.tokens_per_batch, room, note)
    progress.double_quant = policy.config.double_quant == "on" or bool(plan and plan.sizes.double_quantised)
    world.require_same(lambda: [progress.dense, progress.double_quant], rounded_otherwise)
    engine = build_engine(
        plan.settled(of_rank) if plan else of_rank,
        policy,
        questions.tokenizer,
        questions.canary_prompts,
        questions.longest_sequence,
        note,
    )
    engine = OnCall(engine) if questions.lessons else engine
    words = questions.canary_prompts[0]
    plan = settle_memory(plan, planned, policy, engine, words, note) if plan else None
    restore_optimizer(policy.optimizer, moments)
    tokens = plan.tokens_per_batch if plan else config.tokens_per_batch or progress.tokens_per_batch
    config = replace(config, tokens_per_batch=tokens)
    progress.tokens_per_batch = config.tokens_per_batch
    policy.fit = Fitting(batch_limit(config), note)
    policy.fit.restore(progress.batch_limit)
    objective = loss = OBJECTIVES[config.method](config)
    if policy.device.type in REHEARSED:
        rehearse(replace(planned, tokens_per_batch=tokens), policy, engine, loss, questions, note)
    goes_on = engine.canary.restore(progress.canary)
    if world.rank == 0:
        loss, recorder = open_records(task, config, folder, questions, policy, progress, checkpoint, loss, note)
    else:
        recorder = Silent(f"rank {world.rank}")
        seed_globals(mix_seed(config.seed, progress.step, world.rank) % 2**32)
    policy.fit.tell = recorder.message
    inner = engine.engine if isinstance(engine, OnCall) else engine
    if isinstance(inner, ServerEngine):
        inner.tell = recorder.message
    draws = Draws(generators.reader(policy.device))
    own = (draws, Log(folder / REWARDS_LOG))
    pack = PACKERS[config.method](config, policy.device, policy.fit.limit, world)
    asked = build_evaluator(task, config, questions, recorder.message, own, world)
    if questions.lessons:
        source = build_taught(config, questions.lessons, progress.cursor)
        evaluator = build_examiner(config, questions, policy, objective, asked)
    else:
        score = build_scorer(config, questions, recorder.message, own)
        kept = progress.audit if goes_on else []
        evaluator = asked
        ahead = progress.ahead
        source = build_rollouts(config, questions, policy, engine, score, pack, progress.cursor, kept, ahead, world)
    return Run(
        config=config,
        world=world,
        folder=folder,
        policy=policy,
        engine=engine,
        source=source,
        pack=pack,
        loss=loss,
        evaluator=evaluator,
        recorder=recorder,
        memory_peak=partial(gpu_peak, plan) if plan else process_peak,
        generators_now=lambda: draws.state,
        generators=draws.state,
        progress=progress,
        saved=(progress.step, progress.evaluated),
    )


def rounded_otherwise(others: list[int]) -> str:
    """Of ranks whose base is not that of rank 0, which would train another policy without a word."""
    return (
        f"Ranks {', '.join(map(str, others))} would keep the base in 4 bits otherwise than rank 0: their GPUs have "
        "other memory free, or measured otherwise. Say it for all: --double-quant on or off, --quantization uniform."
    )


def share_of_rank(config: Config, world: World) -> Config:
    """As a rank by itself has it: so much is sampled and computed by each."""
    return replace(
        config,
        prompts_per_step=max(config.mini_batches, math.ceil(config.prompts_per_step / world.size)),
        eval_prompts=math.ceil(config.eval_prompts / world.size),
    )


def open_records(
    task: Task,
    config: Config,
    folder: Path,
    questions: Questions,
    policy: Policy,
    progress: Progress,
    checkpoint: Path | None,
    loss: Loss,
    note: Callable[[str], object],
) -> tuple[Loss, Recorder]:
    """The run's folder made ready to go on in; the loss that is looked at for the records, and who writes them."""
    if config.adapter and not checkpoint:
        progress.start = keep(folder, policy)
    # Before the files are cut back: whatever stops us in between, the last checkpoint is one that the files reach.
    if left := leave_later(folder, progress.step):
        note(f"note: going on from step {progress.step}: later checkpoints are now {', '.join(map(str, left))}.")
    trace = TokenTrace(loss, questions.tokenizer.decode)
    recorder = Recorder(
        folder,
        config.steps,
        progress.step,
        task.name,
        [reward.name for reward in questions.rewards],
        progress.position if checkpoint else None,
        headline=headline_of(task, config),
        gold=gold_of(task),
        traced=trace.records,
        method=config.algorithm,
    )
    return trace, recorder


def gold_of(task: Task) -> Gold:
    """The gold answer of a prompt, for the records. What is wrong with it was told when the rows were read."""
    template = task.gold
    return no_gold if template is None else lambda prompt: template.format_map(prompt.fields)


def seed_globals(seed: int) -> None:
    """Seed the global generators. Only reward functions draw from them: the run's own draws have their own seeds."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def gpu_peak(plan: Plan) -> float:
    """The most memory that PyTorch and the KV cache held on the GPU so far, GiB.

    To PyTorch a cache that was given back is still there. It stands beside the least in a rollout, and in an update
    beside nothing.
    """
    given_back = plan.kv_cache * plan.gives_cache_back
    rollout = plan.peaks[0] - plan.sizes.others
    return max(rollout, torch.cuda.max_memory_reserved() - given_back) / memory.GIB


def process_peak() -> float:
    """The most memory that the process held so far, GiB."""
    return system.peak_memory() / 2**30
