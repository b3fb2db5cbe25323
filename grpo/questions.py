"""Questions: a task and a configuration -> prompts, rewards and tokenizer: all of a run that needs no model.

build_questions(task, config)    what is asked and how answers are paid
preflight_rewards(...)           the rewards on gold answers, before any GPU is touched
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from grpo.cautions import caution_of_answer, cautions
from grpo.config import Config
from grpo.errors import UserError
from grpo.lessons import Lessons, build_lessons, build_teacher
from grpo.policy import load_tokenizer
from grpo.policy.load import context_length, ends_of_completion, vocabulary_size
from grpo.policy.stop import end_of_turn
from grpo.prompts import Asker, Prompts, build_prompts, short_enough
from grpo.rewards import Reward, build_rewards
from grpo.rewards.preflight import Calls, Preflight, preflight, preflight_without_gold
from grpo.splits import Note, Split, read_splits
from grpo.task import Task
from grpo.types import Prompt

# Gold answers that every run tries its rewards on first; --check tries them all.
PREFLIGHT_ROWS = 64

# After so many a reward is tried on no further row before a run: each call of a judge takes time, and may cost money.
PREFLIGHT_SECONDS = 20.0

# Prompts that the rollout engine is compared with the policy on.
CANARY_PROMPTS = 2


@dataclass
class Questions:
    """What is asked and how answers are paid."""

    tokenizer: Any
    train: Sequence[Prompt]
    test: Sequence[Prompt]
    rewards: list[Reward]
    longest: int  # no prompt has more tokens
    max_completion_tokens: int
    left_out: list[str] = field(default_factory=list)  # rows that cannot be used, a sentence each
    rows: str = ""  # the SHA-256 of those to train on
    move: Callable[[set[str]], object] = set.clear  # is told which rewards took too long: see rewards/staff.py
    lessons: Lessons | None = None  # what sft and dpo teach
    held_out: Lessons | None = None  # of the held-out prompts

    @property
    def longest_sequence(self) -> int:
        """The longest prompt and completion together, in tokens."""
        lessons = max(each.longest if each else 0 for each in (self.lessons, self.held_out))
        return max(lessons, self.longest + self.max_completion_tokens)

    @property
    def canary_prompts(self) -> list[list[int]]:
        """Tokens of the prompts that the rollout engine is compared with the policy on."""
        return [prompt.tokens for prompt in self.train[:CANARY_PROMPTS]]


def build_questions(
    task: Task,
    config: Config,
    all_tests: bool = False,
    note: Note = print,
    apart: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Questions:
    """Prompts of both splits and the task's rewards. Held-out prompts are the first `eval_prompts` of the test split,
    or all of them. `note` is told what is done, and what the user may not expect. apart: keeps what rewards print from
    the screen.

    Raises:
        UserError: the data, a prompt or a reward is not as it must be.
    """
    if config.method != "grpo":
        task, config = for_lessons(task, config)
    asker = build_asker(task, config)
    train, test = read_splits(asker, config, None if all_tests else config.eval_prompts, note)
    train, test = (_short_enough(asker, split, note) for split in (train, test))
    train_prompts, longest = build_prompts(asker, train.rows, train.survey, train.indices)
    test_prompts, longest_test = build_prompts(asker, test.rows, test.survey, test.indices)
    longest = max(longest, longest_test)
    for told in cautions(asker, [*train_prompts[:PREFLIGHT_ROWS], *test_prompts[:PREFLIGHT_ROWS]]):
        note(f"note: {told}")
    unscored = config.method != "grpo" and not task.rewards
    with apart():
        rewards = [] if unscored else _rewards(task, config, asker, [*train.columns, *test.columns], train_prompts[0])
    check_solved(task, rewards)
    count = f"{len(train_prompts):,} training and {len(test_prompts):,} held-out rows"
    later = ", made when they are asked" if isinstance(train_prompts, Prompts) else ""
    note(f"{count} of {config.data or task.data}, prompts of at most {longest:,} tokens{later}.")
    left_out = [
        told for rows in {id(each.rows): each.rows for each in (train, test)}.values() for told in rows.reading.bad
    ]
    most = config.max_completion_tokens
    questions = Questions(asker.tokenizer, train_prompts, test_prompts, rewards, longest, most, left_out, train.sha256)
    return questions if config.method == "grpo" else with_lessons(questions, asker, config, note)


def _rewards(task: Task, config: Config, asker: Asker, columns: Sequence[str], first: Prompt) -> list[Reward]:
    """The task's. first: a prompt to try them on."""
    return build_rewards(
        task.rewards,
        columns=dict.fromkeys(columns),
        chat=first.messages is not None,
        probe=(first, first.text if task.gold is None else task.gold_text(first.fields)),
        tokenizer=asker.tokenizer,
        group_size=config.group_size,
        timeout=config.reward_timeout or None,
    )


def for_lessons(task: Task, config: Config) -> tuple[Task, Config]:
    """Of a run that is taught by given answers: prompts that leave no room for one are left out, and only where the
    task has rewards does the policy answer any."""
    most = config.max_completion_tokens if task.rewards and config.engine != "none" else 1
    config = replace(config, max_completion_tokens=most)
    longest = max(1, context_length(config.model, config) - most)
    return replace(task, max_prompt_tokens=min(task.max_prompt_tokens or longest, longest)), config


def with_lessons(questions: Questions, asker: Asker, config: Config, note: Note) -> Questions:
    """The same with what is taught, and what is held out of it."""
    stop = ends_of_completion(config.model, questions.tokenizer)
    end = end_of_turn(questions.tokenizer) if questions.train[0].messages is not None else None
    teacher = build_teacher(asker, config, stop, end, context_length(config.model, config))
    source = config.data or asker.task.data
    for told in _told_of_texts(questions.train[0], asker, config):
        note(f"note: the prompts of {source} are {told}")
    made = [
        build_lessons(teacher, prompts, f"{source} ({split})", config.skip_bad_rows, note)
        for split, prompts in (("train", questions.train), ("held-out", questions.test))
    ]
    lessons, held_out = made
    what = "pairs" if config.method == "dpo" else "answers"
    for told in _told_of_lessons(lessons, what, config):
        note(f"note: {told}")
    note(
        f"{len(lessons):,} {what} to learn from and {len(held_out):,} held out, with their prompts of at most "
        f"{max(lessons.longest, held_out.longest):,} tokens; {lessons.num_tokens:,} tokens are taught in an epoch."
    )
    return replace(questions, lessons=lessons, held_out=held_out)


def _told_of_texts(prompt: Prompt, asker: Asker, config: Config) -> Iterator[str]:
    """What may not be expected of prompts that are texts."""
    if prompt.messages is None and asker.template.is_there:
        yield (
            "texts, which go through no chat template, and the model has one. If it is to be chatted with, give them "
            'as chat messages, [{"role": "user", "content": "..."}].'
        )
    if prompt.messages is None and config.method == "dpo" and not prompt.fields.get("prompt"):
        yield (
            f"what both texts of a pair begin with, such as {prompt.text[-60:]!r}: no column `prompt` says what was "
            "asked. --columns prompt=NAME says it."
        )


def _told_of_lessons(lessons: Lessons, what: str, config: Config) -> Iterator[str]:
    """What may not be expected of lessons."""
    decode = lessons.teacher.asker.tokenizer.decode
    first = (caution_of_answer(group.prompt, decode(group.completions[0].tokens)) for group in lessons[:PREFLIGHT_ROWS])
    yield from [told for told in first if told][:1]
    if len(lessons) < config.prompts_per_step:
        yield (
            f"a step has {config.prompts_per_step:,} {what} and there are {len(lessons):,}: some come more than once "
            f"in it. --prompts-per-step {len(lessons)} takes each once."
        )


def _short_enough(asker: Asker, split: Split, note: Note) -> Split:
    """The split without the rows whose prompts are longer than the task wants them."""
    indices, told = short_enough(asker, split.rows, split.survey, split.indices)
    if told:
        note(f"note: of {split.rows.source} {told}.")
    return replace(split, indices=indices)


def build_asker(task: Task, config: Config) -> Asker:
    """How rows are asked of the configuration's model.

    Raises:
        UserError: completions leave no token for a prompt.
    """
    tokenizer = load_tokenizer(config.model)
    longest_prompt = context_length(config.model, config) - config.max_completion_tokens
    if longest_prompt < 1:
        raise UserError(
            f"--max-completion-tokens is {config.max_completion_tokens}, and the context of {config.model} has "
            f"{context_length(config.model, config)} tokens: none is left for the prompt. Lower it"
            f"{f', or raise --max-context ({config.max_context})' if config.max_context else ''}."
        )
    return Asker(task, tokenizer, longest_prompt, vocabulary_size(config.model), config.chat_template_kwargs)


def check_solved(task: Task, rewards: list[Reward]) -> None:
    """The reward that says whether an answer is right must be one of the task's."""
    names = [reward.name for reward in rewards]
    if task.solved and task.solved[0] not in names:
        raise UserError(
            f"Task {task.name} says that `{task.solved[0]}` tells right from wrong, but its rewards are "
            f"{', '.join(names)}. Change `solved` in the task file."
        )


def preflight_rewards(
    task: Task,
    config: Config,
    questions: Questions,
    every_row: bool,
    note: Note = print,
    apart: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Preflight:
    """The rewards on gold answers of both splits, and on what is not an answer; on the latter alone, with nothing to
    report but what was tried, where nobody knows a gold answer. apart: keeps what they print from the screen.

    Raises:
        UserError: a reward fails.
    """
    seconds = math.inf if every_row else PREFLIGHT_SECONDS
    calls = Calls(
        questions.tokenizer,
        config.group_size,
        config.prompts_per_step,
        seconds,
        note,
        thorough=every_row,
        answer_of=task.vote,  # an `answer` that fails does so here, not in the first evaluation
        filled=task.gold_filled,
        solved=task.solved[0] if task.solved else "",
        apart=apart,
    )
    if task.gold is None:
        prompts = [*questions.train[:PREFLIGHT_ROWS], *questions.test[:PREFLIGHT_ROWS]]
        return preflight_without_gold(questions.rewards, (_without_gold(task, prompt) for prompt in prompts), calls)
    report = preflight(questions.rewards, _gold(task, questions, None if every_row else PREFLIGHT_ROWS), calls)
    report.notes.extend(_fault_of_measure(task, report))
    return report


def _fault_of_measure(task: Task, report: Preflight) -> Iterator[str]:
    """A sentence if the held-out score would not count every gold answer that was tried as right.

    Raises:
        UserError: it would count none of them, and be 0 whatever is learned.
    """
    if task.solved is None:
        return
    name, value = task.solved
    measure = next(check for check in report.checks if check.name == name)
    told = f"`solved` of task {task.name} says that `{name}` pays {value:g} or more for a right answer"
    highest, count = measure.highest["gold"], measure.num_rows
    if highest < value:
        best = f"paid at most {highest:g}" if highest > -math.inf else "gave no score (None)"
        raise UserError(
            f"{told}, but it {best} to {count:,} of {count:,} gold answers: nothing would ever count as right. Mend "
            "`solved` or `gold` in the task file, or the reward."
        )
    if measure.lowest["gold"] < value:
        yield f"{told}, but the gold answer of some row gets {measure.lowest['gold']:g}. --check says more."


def _without_gold(task: Task, prompt: Prompt) -> tuple[Prompt, list[str]]:
    """What a model may say to a prompt, right or wrong: nothing, what it was asked, the same in part."""
    texts = ["", prompt.text, prompt.text[: len(prompt.text) // 2]]
    for text in texts:
        task.vote(text)
    return prompt, texts


def _gold(task: Task, questions: Questions, limit: int | None) -> Iterator[tuple[Prompt, str]]:
    for split in (questions.train, questions.test):
        for prompt in islice(split, limit):
            yield prompt, task.gold_text(prompt.fields)
