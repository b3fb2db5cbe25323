"""Build: a task and a configuration -> the objects that the loop calls. Every choice of a run is made here.

build_questions(task, config)        tokenizer, prompts and rewards: what needs no model
preflight_rewards(...)               the rewards on gold answers, before any GPU is touched
build_policy(config, questions)      the model over its projections
build_run(...)                       a Run, ready to train or resumed
"""

from __future__ import annotations

import random
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo import generators
from grpo.advantages import RULES
from grpo.checkpoint import Progress, leave_later, load_checkpoint
from grpo.config import Config
from grpo.errors import UnsuitedEngine, UserError
from grpo.evaluate import Evaluator
from grpo.packing import build_packer
from grpo.policy import Policy, load_model, load_tokenizer
from grpo.policy.fused import FusedModel
from grpo.policy.load import choose_device, context_length, vocabulary_size
from grpo.record import Recorder
from grpo.rewards import Preflight, Reward, build_rewards, preflight
from grpo.rollout import Engine
from grpo.rollout.torch_engine import TorchEngine
from grpo.rollout.vllm_compat import is_installed
from grpo.seeds import Purpose, mix_seed
from grpo.task import PromptStream, Task, build_prompts, load_rows
from grpo.train import Run
from grpo.types import Group, Prompt

# Gold answers that every run tries its rewards on first; --check tries them all.
PREFLIGHT_ROWS = 64

# What getrusage counts memory in: bytes on macOS, KiB on Linux.
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass
class Questions:
    """What is asked and how answers are paid."""

    tokenizer: Any
    train: list[Prompt]
    test: list[Prompt]
    rewards: list[Reward]

    @property
    def longest(self) -> int:
        """The longest prompt, in tokens."""
        return max(len(prompt.tokens) for prompt in self.train + self.test)


def build_questions(task: Task, config: Config, all_tests: bool = False) -> Questions:
    """Prompts of both splits and the task's rewards. Held-out prompts are the first `eval_prompts` of the test split,
    or all of them.

    Raises:
        UserError: the data, a prompt or a reward is not as it must be.
    """
    data = config.data or task.data
    tokenizer = load_tokenizer(config.model)
    room = context_length(config.model, config) - config.max_completion_tokens
    if room < 1:
        raise UserError(
            f"--max-completion-tokens is {config.max_completion_tokens}, which leaves {room} tokens of the context of "
            f"{config.model} for the prompt. Lower it."
        )
    train = build_prompts(task, load_rows(task, "train", data), tokenizer, room)
    test_rows = load_rows(task, "test", data)
    test = build_prompts(task, test_rows if all_tests else test_rows[: config.eval_prompts], tokenizer, room)
    check_vocabulary(config.model, train + test)
    rewards = build_rewards(
        task.rewards,
        columns=train[0].fields,
        chat=train[0].messages is not None,
        probe=(train[0], task.gold_text(train[0].fields)),
        timeout=config.reward_timeout or None,
    )
    check_solved(task, rewards)
    return Questions(tokenizer, train, test, rewards)


def check_vocabulary(model: str, prompts: list[Prompt]) -> None:
    """The tokenizer must be the model's own: a token without a row in the embedding cannot be read."""
    largest, size = max(max(prompt.tokens) for prompt in prompts), vocabulary_size(model)
    if largest >= size:
        raise UserError(
            f"The tokenizer of {model} makes the token {largest}, but the vocabulary in its config.json has only "
            f"{size}. Get the tokenizer that belongs to the model."
        )


def check_solved(task: Task, rewards: list[Reward]) -> None:
    """The reward that says whether an answer is right must be one of the task's."""
    names = [reward.name for reward in rewards]
    if task.solved[0] not in names:
        raise UserError(
            f"Task {task.name} says that `{task.solved[0]}` tells right from wrong, but its rewards are "
            f"{', '.join(names)}. Change `solved` in the task file."
        )


def preflight_rewards(task: Task, questions: Questions, every_row: bool) -> Preflight:
    """The rewards on gold answers of both splits, and on what is not an answer.

    Raises:
        UserError: a reward fails on a gold answer, or a gold answer does not count as right.
    """
    return preflight(questions.rewards, _gold(task, questions, None if every_row else PREFLIGHT_ROWS))


def _gold(task: Task, questions: Questions, limit: int | None) -> Iterator[tuple[Prompt, str]]:
    for split in (questions.train, questions.test):
        for prompt in islice(split, limit):
            gold = task.gold_text(prompt.fields)
            task.vote(gold)  # an `answer` that fails does so here, not in the first evaluation
            yield prompt, gold


def build_policy(config: Config, questions: Questions) -> Policy:
    """The model of a configuration with a fresh adapter and its optimizer."""
    device = choose_device(config)
    longest = questions.longest + config.max_completion_tokens
    return Policy(load_model(config, device, longest), config)


def build_engine(config: Config, policy: Policy, questions: Questions, note: Callable[[str], object] = print) -> Engine:
    """The rollout engine that a configuration asks for. Where the choice is ours and vLLM refuses the model, PyTorch's
    takes its place, and `note` is told.

    Raises:
        UserError: vLLM is asked for and cannot be had, or cannot sample from this policy.
    """
    if config.engine == "vllm":
        return build_vllm_engine(config, policy, questions)
    if config.engine == "auto" and suits_vllm(config, policy):
        try:
            return build_vllm_engine(config, policy, questions)
        except UnsuitedEngine as refusal:
            note(f"note: {refusal} --engine auto takes that one, which is slower.")
    return TorchEngine(policy, questions.tokenizer, questions.train, config.max_completion_tokens, config.temperature)


def build_vllm_engine(config: Config, policy: Policy, questions: Questions) -> Engine:
    """vLLM. Raises UserError where it cannot be had, UnsuitedEngine where it cannot sample from this policy."""
    from grpo.rollout.vllm_engine import VllmEngine  # not before it is wanted: vLLM takes seconds to import

    longest = questions.longest + config.max_completion_tokens
    return VllmEngine(policy, questions.tokenizer, questions.train, config, longest)


def suits_vllm(config: Config, policy: Policy) -> bool:
    """Whether vLLM is the better engine: it is here, there is a GPU, and it can hold this base as the policy does."""
    shares = isinstance(policy.model, FusedModel)
    return policy.device.type == "cuda" and is_installed() and config.base in (("bf16", "nf4") if shares else ("bf16",))


def build_evaluator(task: Task, config: Config, questions: Questions) -> Evaluator:
    """The held-out score of a task."""
    return Evaluator(
        prompts=questions.test,
        rewards=questions.rewards,
        solved=task.solved,
        answer=task.vote,
        samples=config.eval_samples,
        k=config.eval_k,
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
    policy = build_policy(config, questions)
    seed_globals(config.seed)
    progress = load_checkpoint(checkpoint, policy) if checkpoint else Progress()
    engine = build_engine(config, policy, questions, note)
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
        rule=RULES[config.advantage],
        pack=build_packer(config, policy.device),
        evaluator=build_evaluator(task, config, questions),
        recorder=recorder,
        memory_peak=gpu_peak if policy.device.type == "cuda" else process_peak,
        admits=has_different_rewards if config.dynamic_sampling else admit_all,
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


def has_different_rewards(group: Group) -> bool:
    """Some completion did better than another, so there is something to learn."""
    return bool(group.rewards.min() < group.rewards.max())


def gpu_peak() -> float:
    """The most memory that PyTorch held on the GPU so far, GiB."""
    return torch.cuda.max_memory_reserved() / 2**30


def process_peak() -> float:
    """The most memory that the process held so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT / 2**30
