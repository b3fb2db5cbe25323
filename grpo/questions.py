"""Questions: a task and a configuration -> prompts, rewards and tokenizer: all of a run that needs no model.

build_questions(task, config)    what is asked and how answers are paid
preflight_rewards(...)           the rewards on gold answers, before any GPU is touched
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from grpo.config import Config
from grpo.data import load_rows
from grpo.errors import UserError
from grpo.policy import load_tokenizer
from grpo.policy.load import context_length, vocabulary_size
from grpo.prompts import build_prompts
from grpo.rewards import Reward, build_rewards
from grpo.rewards.preflight import Preflight, preflight
from grpo.task import Task
from grpo.types import Prompt

# Gold answers that every run tries its rewards on first; --check tries them all.
PREFLIGHT_ROWS = 64

# Prompts that the rollout engine is compared with the policy on.
CANARY_PROMPTS = 2


@dataclass
class Questions:
    """What is asked and how answers are paid."""

    tokenizer: Any
    train: list[Prompt]
    test: list[Prompt]
    rewards: list[Reward]
    max_completion_tokens: int

    @property
    def longest(self) -> int:
        """The longest prompt, in tokens."""
        return max(len(prompt.tokens) for prompt in self.train + self.test)

    @property
    def longest_sequence(self) -> int:
        """The longest prompt and completion together, in tokens."""
        return self.longest + self.max_completion_tokens

    @property
    def canary_prompts(self) -> list[list[int]]:
        """Tokens of the prompts that the rollout engine is compared with the policy on."""
        return [prompt.tokens for prompt in self.train[:CANARY_PROMPTS]]


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
    return Questions(tokenizer, train, test, rewards, config.max_completion_tokens)


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
