"""Questions: a task and a configuration -> prompts, rewards and tokenizer: all of a run that needs no model.

build_questions(task, config)    what is asked and how answers are paid
preflight_rewards(...)           the rewards on gold answers, before any GPU is touched
"""

from __future__ import annotations

import heapq
import inspect
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from grpo.cautions import cautions
from grpo.config import Config
from grpo.data import Rows
from grpo.errors import UserError
from grpo.policy import load_tokenizer
from grpo.policy.load import context_length, vocabulary_size
from grpo.prompts import Asker, Survey, build_prompts
from grpo.rewards import Reward, build_rewards, resolve_reward, score
from grpo.rewards.preflight import Preflight, preflight
from grpo.rewards.scoring import unsampled
from grpo.task import Row, Task
from grpo.types import Group, Prompt

# Gold answers that every run tries its rewards on first; --check tries them all.
PREFLIGHT_ROWS = 64

# Prompts that the rollout engine is compared with the policy on.
CANARY_PROMPTS = 2

ROWS_BETWEEN_NOTES = 250_000

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

Note = Callable[[str], object]


@dataclass
class Questions:
    """What is asked and how answers are paid."""

    tokenizer: Any
    train: Sequence[Prompt]
    test: Sequence[Prompt]
    rewards: list[Reward]
    longest: int  # no prompt has more tokens
    max_completion_tokens: int

    @property
    def longest_sequence(self) -> int:
        """The longest prompt and completion together, in tokens."""
        return self.longest + self.max_completion_tokens

    @property
    def canary_prompts(self) -> list[list[int]]:
        """Tokens of the prompts that the rollout engine is compared with the policy on."""
        return [prompt.tokens for prompt in self.train[:CANARY_PROMPTS]]


def build_questions(task: Task, config: Config, all_tests: bool = False, note: Note = print) -> Questions:
    """Prompts of both splits and the task's rewards. Held-out prompts are the first `eval_prompts` of the test split,
    or all of them. `note` is told what is done, and what the user may not expect.

    Raises:
        UserError: the data, a prompt or a reward is not as it must be.
    """
    asker = build_asker(task, config)
    train, test = read_splits(asker, config, None if all_tests else config.eval_prompts, note)
    train_prompts, longest = build_prompts(asker, train.rows, train.survey, train.places)
    test_prompts, longest_test = build_prompts(asker, test.rows, test.survey, test.places)
    longest = max(longest, longest_test)
    for told in cautions(asker, [*train_prompts[:PREFLIGHT_ROWS], *test_prompts[:PREFLIGHT_ROWS]]):
        note(f"note: {told}")
    first = train_prompts[0]
    rewards = build_rewards(
        task.rewards,
        columns=dict.fromkeys([*train.columns, *test.columns]),
        chat=first.messages is not None,
        probe=(first, first.text if task.gold is None else task.gold_text(first.fields)),
        timeout=config.reward_timeout or None,
    )
    check_solved(task, rewards)
    count = f"{len(train_prompts):,} training and {len(test_prompts):,} held-out rows"
    note(f"{count} of {config.data or task.data}, prompts of at most {longest:,} tokens.")
    return Questions(asker.tokenizer, train_prompts, test_prompts, rewards, longest, config.max_completion_tokens)


def build_asker(task: Task, config: Config) -> Asker:
    """How rows are asked of the configuration's model.

    Raises:
        UserError: completions leave no room for a prompt.
    """
    tokenizer = load_tokenizer(config.model)
    room = context_length(config.model, config) - config.max_completion_tokens
    if room < 1:
        raise UserError(
            f"--max-completion-tokens is {config.max_completion_tokens}, which leaves {room} tokens of the context of "
            f"{config.model} for the prompt. Lower it."
        )
    return Asker(task, tokenizer, room, vocabulary_size(config.model))


# ---- the two splits


@dataclass
class Split:
    """The rows of a split and what they ask. `places` are those of the rows that are asked."""

    rows: Rows
    survey: Survey
    columns: list[str]
    places: Sequence[int]


def read_splits(asker: Asker, config: Config, num_tests: int | None, note: Note) -> tuple[Split, Split]:
    """The rows to train on, and those held out; of these at most `num_tests`.

    Raises:
        UserError: the rows, what they ask or their gold answers are not as they must be, or nothing is held out.
    """
    task, data = asker.task, config.data or asker.task.data
    train = read_split(asker, Rows(task, "train", data), note)
    if task.held_out is None:
        test = read_split(asker, Rows(task, "test", data, first=num_tests), note)
        check_held_out(task, train, test, note)
        return train, test
    if task.held_out == 0:
        note(f"note: task {task.name} holds nothing out: its held-out score is that of training prompts.")
        return train, replace(train, places=train.places[:num_tests])
    return hold_out(train, task.held_out, num_tests)


def read_split(asker: Asker, rows: Rows, note: Note) -> Split:
    """All rows of a split, looked at once."""
    survey, answers = Survey(asker), Answers(asker.task)
    for place, row in enumerate(rows):
        survey.add(place, row)
        answers.add(place, row)
        if (place + 1) % ROWS_BETWEEN_NOTES == 0:
            note(f"{place + 1:,} of {len(rows):,} rows of {rows.source} read")
    answers.check(rows.source)
    return Split(rows, survey, list(answers.columns), range(len(rows)))


@dataclass
class Answers:
    """The gold answers of a split: those that are none. As text ("None") they would be an answer that pays."""

    task: Task
    columns: dict[str, None] = field(default_factory=dict)  # that any row has, in their order
    num_missing: int = 0
    shown: list[str] = field(default_factory=list)  # the first of them

    def __post_init__(self) -> None:
        self.wanted = _columns_of_solved(self.task)

    def add(self, place: int, row: Row) -> None:
        """The next row."""
        self.columns.update(dict.fromkeys(row))
        if missing := self.task.missing_gold(row, [name for name in self.wanted if name in self.columns]):
            self.num_missing += 1
            self.shown += [f"row {place}: {missing}"][: 4 - len(self.shown)]

    def check(self, source: str) -> None:
        """Raises UserError if an answer is missing, or a column has no name that a reward could ask for it by."""
        wrong = next((name for name in self.columns if not isinstance(name, str)), None)
        if wrong is not None:
            raise UserError(
                f"A column of {source} is called {wrong!r} ({type(wrong).__name__}). Rewards ask for columns by name: "
                f"let `rows` of task {self.task.name} give it a name that is text."
            )
        if self.num_missing:
            rows = "1 row" if self.num_missing == 1 else f"{self.num_missing:,} rows"
            more = "; ..." * (self.num_missing > len(self.shown))
            raise UserError(
                f"The gold answer is missing in {rows} of {source} ({'; '.join(self.shown)}{more}). Leave such rows "
                f"out in `rows` of task {self.task.name}, or mend the data. A column may be empty if the reward "
                "that decides has a default for it."
            )


def _columns_of_solved(task: Task) -> list[str]:
    """The columns that the reward which tells right from wrong cannot do without."""
    named = [key for key in task.rewards if task.solved and _name(key) == task.solved[0]]
    functions = [resolve_reward(key) if isinstance(key, str) else key for key in named]
    with suppress(TypeError, ValueError):  # what has no signature is refused where the rewards are built
        parameters = [each for function in functions for each in inspect.signature(function).parameters.values()]
        return [each.name for each in parameters if each.default is each.empty and each.kind in _NAMED]
    return []


def _name(key: Callable | str) -> str:
    """The name of a reward of a task, as its metric has it."""
    if isinstance(key, str):
        return key.rpartition(":")[2]
    function = key.func if isinstance(key, partial) else key
    return getattr(function, "__name__", type(function).__name__)


def check_held_out(task: Task, train: Split, test: Split, note: Note) -> None:
    """Held-out prompts must not be training prompts.

    Raises:
        UserError: all of them are.
    """
    trained = set(train.survey.keys)
    shared = [place for place in test.places if test.survey.keys[place] in trained]
    if len(shared) == len(test.places):
        raise UserError(
            f"Every held-out prompt of {test.rows.source} is a training prompt too: the held-out score would say "
            f"nothing. Give --data two different splits, and let `rows` of task {task.name} look at its `split`. Where "
            "there is no test split, say `held_out=100` in the Task: so many prompts are then kept out of training (0: "
            "none, to try things out)."
        )
    if shared:
        rows = ", ".join(map(str, shared[:4])) + ", ..." * (len(shared) > 4)
        note(
            f"note: {len(shared):,} of {len(test.places):,} held-out prompts of {test.rows.source} are training "
            f"prompts too (rows {rows}), and their score is not one of held-out prompts."
        )


def hold_out(split: Split, count: int, num_tests: int | None) -> tuple[Split, Split]:
    """One split as two: `count` prompts are held out, with every row that asks the same.

    Which ones, their own text decides, as if by lot: they are the same in every run, whatever its seed and the order of
    the rows, and few change when rows are added.

    Raises:
        UserError: there are no more prompts than that.
    """
    keys = split.survey.keys
    chosen = heapq.nsmallest(count + 1, set(keys))
    if len(chosen) <= count:
        raise UserError(
            f"`held_out` of task {split.survey.asker.task.name} is {count}, but {split.rows.source} asks only "
            f"{len(chosen):,} different prompts. Hold out fewer."
        )
    first = {key: place for place, key in reversed(list(enumerate(keys))) if key <= chosen[-2]}
    kept = array("Q", (place for place, key in enumerate(keys) if key > chosen[-2]))
    test = [first[key] for key in chosen[:-1]]
    return replace(split, places=kept), replace(split, places=test[:num_tests])


def check_solved(task: Task, rewards: list[Reward]) -> None:
    """The reward that says whether an answer is right must be one of the task's."""
    names = [reward.name for reward in rewards]
    if task.solved and task.solved[0] not in names:
        raise UserError(
            f"Task {task.name} says that `{task.solved[0]}` tells right from wrong, but its rewards are "
            f"{', '.join(names)}. Change `solved` in the task file."
        )


def preflight_rewards(task: Task, questions: Questions, every_row: bool) -> Preflight:
    """The rewards on gold answers of both splits, and on what is not an answer; on the latter alone, with nothing to
    report, where nobody knows a gold answer.

    Raises:
        UserError: a reward fails.
    """
    if task.gold is None:
        prompts = [*questions.train[:PREFLIGHT_ROWS], *questions.test[:PREFLIGHT_ROWS]]
        score([_without_gold(task, prompt) for prompt in prompts], questions.rewards)
        return Preflight(len(prompts), [], 0.0, 0.0)
    return preflight(questions.rewards, _gold(task, questions, None if every_row else PREFLIGHT_ROWS))


def _without_gold(task: Task, prompt: Prompt) -> Group:
    """What a model may say to a prompt, right or wrong: nothing, what it was asked, the same in part."""
    texts = ["", prompt.text, prompt.text[: len(prompt.text) // 2]]
    for text in texts:
        task.vote(text)
    return Group(prompt, [unsampled(text) for text in texts])


def _gold(task: Task, questions: Questions, limit: int | None) -> Iterator[tuple[Prompt, str]]:
    for split in (questions.train, questions.test):
        for prompt in islice(split, limit):
            gold = task.gold_text(prompt.fields)
            task.vote(gold)  # an `answer` that fails does so here, not in the first evaluation
            yield prompt, gold
