"""Build: a task and a configuration -> the objects that the loop calls. Every choice of a run is made here.

build_policy(config, longest)        the model over its projections; without data
build_engine(config, policy, ...)    who samples from it; without data but for a few prompts' tokens
build_run(...)                       a Run, ready to train or resumed
"""

from __future__ import annotations

import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo import generators
from grpo.advantages import ESTIMATORS
from grpo.checkpoint import Progress, leave_later, load_checkpoint
from grpo.config import Config
from grpo.errors import UnsuitedEngine
from grpo.evaluate import Evaluator
from grpo.loss import build_loss
from grpo.packing import build_packer, has_advantage
from grpo.policy import Policy, load_model
from grpo.policy.fused import FusedModel
from grpo.policy.load import choose_device
from grpo.questions import Questions
from grpo.record import Recorder
from grpo.rollout import Engine
from grpo.rollout.audit import Audit
from grpo.rollout.torch_engine import TorchEngine
from grpo.rollout.vllm_compat import is_installed
from grpo.seeds import Purpose, mix_seed
from grpo.stream import PromptStream
from grpo.task import Task
from grpo.train import Run
from grpo.types import Group

# What getrusage counts memory in: bytes on macOS, KiB on Linux.
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def build_policy(config: Config, longest: int) -> Policy:
    """The model of a configuration with a fresh adapter and its optimizer.

    longest: prompt and completion together, in tokens, that will be run at most.
    """
    return Policy(load_model(config, choose_device(config), longest), config)


def build_engine(
    config: Config,
    policy: Policy,
    tokenizer: Any,
    canary_prompts: list[list[int]],
    longest: int,
    note: Callable[[str], object] = print,
) -> Engine:
    """The rollout engine that a configuration asks for. Where the choice is ours and vLLM refuses the model, PyTorch's
    takes its place, and `note` is told.

    canary_prompts: tokens [P] of a few prompts that engine and policy are compared on after every update.
    longest: prompt and completion together, in tokens, that will be sampled at most.

    Raises:
        UserError: vLLM is asked for and cannot be had, or cannot sample from this policy.
    """
    if config.engine == "vllm":
        return build_vllm_engine(config, policy, tokenizer, canary_prompts, longest)
    if config.engine == "auto" and suits_vllm(config, policy):
        try:
            return build_vllm_engine(config, policy, tokenizer, canary_prompts, longest)
        except UnsuitedEngine as refusal:
            note(f"note: {refusal} --engine auto takes that one, which is slower.")
    return TorchEngine(policy, tokenizer, canary_prompts, config.temperature)


def build_vllm_engine(
    config: Config, policy: Policy, tokenizer: Any, canary_prompts: list[list[int]], longest: int
) -> Engine:
    """vLLM. Raises UserError where it cannot be had, UnsuitedEngine where it cannot sample from this policy."""
    from grpo.rollout.vllm_engine import VllmEngine  # not before it is wanted: vLLM takes seconds to import

    return VllmEngine(policy, tokenizer, canary_prompts, config, longest)


def suits_vllm(config: Config, policy: Policy) -> bool:
    """Whether vLLM is the better engine: it is here, there is a GPU, and it can hold this base as the policy does."""
    shares = isinstance(policy.model, FusedModel)
    return policy.device.type == "cuda" and is_installed() and config.base in (("bf16", "nf4") if shares else ("bf16",))


def build_evaluator(task: Task, config: Config, questions: Questions) -> Evaluator:
    """The held-out score of a task."""
    return Evaluator(
        prompts=list(questions.test),
        rewards=questions.rewards,
        solved=task.solved,
        answer=task.vote,
        samples=config.eval_samples,
        k=config.eval_k,
        max_tokens=config.max_completion_tokens,
        seed=mix_seed(Purpose.EVALUATION, config.seed),
    )


def build_run(
    task: Task,
    config: Config,
    folder: Path,
    questions: Questions,
    checkpoint: Path | None,
    note: Callable[[str], object] = print,
) -> Run:
    """Everything that training needs, in the state of `checkpoint` or at the start."""
    policy = build_policy(config, questions.longest_sequence)
    seed_globals(config.seed)
    progress = load_checkpoint(checkpoint, policy) if checkpoint else Progress()
    engine = build_engine(
        config, policy, questions.tokenizer, questions.canary_prompts, questions.longest_sequence, note
    )
    engine.canary.restore(progress.canary)
    # Before the files are cut back: whatever stops us in between, the last checkpoint is one that the files reach.
    if left := leave_later(folder, progress.step):
        note(f"note: going on from step {progress.step}: later checkpoints are now {', '.join(map(str, left))}.")
    recorder = Recorder(
        folder,
        config.steps,
        progress.step,
        task.name,
        [reward.name for reward in questions.rewards],
        progress.position if checkpoint else None,
    )
    generators_now = generators.reader(policy.device)
    return Run(
        config=config,
        folder=folder,
        policy=policy,
        engine=engine,
        stream=PromptStream(questions.train, mix_seed(Purpose.ORDER, config.seed), progress.cursor),
        rewards=questions.rewards,
        estimator=ESTIMATORS[config.advantage],
        pack=build_packer(config, policy.device),
        loss=build_loss(config),
        audit=Audit(policy, engine.canary.noise, progress.audit),
        evaluator=build_evaluator(task, config, questions),
        recorder=recorder,
        memory_peak=gpu_peak if policy.device.type == "cuda" else process_peak,
        admits=has_advantage if config.dynamic_sampling else admit_all,
        max_rollouts=1 + config.max_refills * config.dynamic_sampling,
        generators_now=generators_now,
        generators=generators_now(),
        progress=progress,
        saved=(progress.step, progress.evaluated),
    )


def seed_globals(seed: int) -> None:
    """Seed the global generators. Only reward functions draw from them: the run's own draws have their own seeds."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def admit_all(group: Group) -> bool:
    """Without dynamic sampling every group is part of the step."""
    return True


def gpu_peak() -> float:
    """The most memory that PyTorch held on the GPU so far, GiB."""
    return torch.cuda.max_memory_reserved() / 2**30


def process_peak() -> float:
    """The most memory that the process held so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT / 2**30
