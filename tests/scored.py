"""Groups to be scored, and what scoring them gives: what the tests of rewards share. No test is here."""

import functools

import pytest

from grpo.errors import UserError
from grpo.rewards import (
    build_rewards,
    score,
)
from grpo.types import Completion, Group, Prompt

COLUMNS = ["question", "answer"]


def make_prompt(index, answer="5"):
    question = f"question {index}"
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": question}]
    return Prompt(index, f"<user>{question}", [1, 2], {"question": question, "answer": answer}, messages)


def make_group(index, texts, answer="5"):
    completions = [Completion(list(range(len(text) + 1)), [0.0] * (len(text) + 1), text, "stop", 0) for text in texts]
    return Group(make_prompt(index, answer), completions)


def scored(rewards, groups=None, chat=False, columns=COLUMNS, **arguments):
    """The groups after `score`; two groups of different sizes unless given."""
    groups = groups or [make_group(7, ["5", "four"], "5"), make_group(9, ["", "6", "66"], "6")]
    score(groups, build_rewards(rewards, columns, chat, **arguments))
    return groups


def error_of(rewards, groups=None, **arguments):
    with pytest.raises(UserError) as caught:
        scored(rewards, groups, **arguments)
    return str(caught.value)


def named(name):
    """A reward function of this name."""

    def function(completion):
        return 1.0

    function.__name__ = name
    return function


def quiet(function):
    """A decorator that passes everything on."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper
