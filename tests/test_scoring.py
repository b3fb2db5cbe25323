"""Rewards together: their sum, what cannot be built, and what is told of one that fails."""

import asyncio
import math
import os
import sys
import time

import numpy as np
import pytest
import torch
from scored import COLUMNS, error_of, make_group, named, scored

from grpo.errors import UserError
from grpo.rewards import (
    build_rewards,
    exact_match,
    score,
)


def test_the_weighted_sum_leaves_out_what_does_not_apply():
    def sometimes(completion):
        return None if completion.isalpha() else 0.1

    def penalty(completions):
        return torch.tensor([float(len(completion)) for completion in completions])

    def never(completions):
        return [None] * len(completions)

    group = make_group(0, ["1", "ab", "345"])
    scored({sometimes: 3.0, penalty: -0.5, never: 10.0}, [group])
    expected = np.nansum([[0.3, np.nan, 0.3], [-0.5, -1.0, -1.5], [np.nan] * 3], axis=0)
    np.testing.assert_allclose(group.rewards.numpy(), expected, rtol=1e-6)
    assert group.parts["sometimes"].isnan().tolist() == [False, True, False]
    assert group.parts["never"].isnan().all()
    assert not group.rewards.isnan().any()

    only_never = make_group(0, ["1"])
    scored({never: 10.0}, [only_never])
    assert only_never.rewards.tolist() == [0.0]


def test_a_crash_is_an_error_with_its_cause_and_never_a_zero():
    def crash(completion):
        return float(completion)

    async def crash_later(completion):
        await asyncio.sleep(0)
        return float(completion)

    def crash_batch(completions):
        return [float(completion) for completion in completions]

    for reward in (crash, crash_later):
        with pytest.raises(UserError, match=r"raised ValueError .*'four'.* on row 7, completion 'four'") as caught:
            scored({reward: 1.0})
        assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(UserError, match=r"raised ValueError .* a batch of 5 completions \(rows 7, 9\)"):
        scored({crash_batch: 1.0})


def test_a_time_out_is_an_error_and_gives_the_alarm_back():
    def endless(completion):
        while True:
            pass

    async def endless_async(completions):
        await asyncio.Event().wait()

    def quick(completion):
        return 1.0

    def swallows(completion):
        try:
            endless(completion)
        except Exception:
            return 0.0

    def swallows_all(completion):
        try:
            endless(completion)
        except:  # noqa: E722
            return 0.0

    async def blocks(completion):
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            pass
        return 0.0

    for reward in (endless, endless_async, swallows, swallows_all):
        with pytest.raises(UserError, match=f"`{reward.__name__}` raised TimeoutError .*never scored 0"):
            scored({reward: 1.0}, timeout=0.05)
    with pytest.raises(UserError, match=r"`blocks` .*no result in 0.05 s.*never scored 0"):
        scored({blocks: 1.0}, timeout=0.05)
    assert scored({quick: 1.0}, timeout=30.0)[0].rewards.tolist() == [1, 1]


def test_a_reward_that_exits_is_an_error():
    def leaves(completion):
        sys.exit(0)

    async def leaves_later(completion):
        sys.exit(3)

    for reward in (leaves, leaves_later):
        with pytest.raises(UserError, match=f"`{reward.__name__}` raised SystemExit .* on row 7, completion 'four'"):
            scored({reward: 1.0}, [make_group(7, ["four"])])


@pytest.mark.parametrize(
    ("rewards", "told"),
    [
        ({}, "nothing to learn"),
        ({exact_match: 0.0}, "nothing to learn"),
        ({exact_match: math.nan}, "weight nan"),
        ({exact_match: math.inf}, "weight inf"),
        ({exact_match: 1e39}, "that float32 can hold"),
        ({exact_match: "1"}, "weight '1'"),
        ({exact_match: True}, "weight True"),
        ({exact_match: 1.0, "grpo.rewards:exact_match": 1.0}, "Two rewards are called `exact_match`"),
        ({exact_match: 1.0, named("mean"): 1.0}, "called `mean`"),
        ({exact_match: 1.0, named("std"): 1.0}, "Rename the function"),
        ({lambda completion: 0.0: 1.0}, "<lambda>"),
        ({lambda question, answer: 0.0: 1.0}, "<lambda>"),
        ({"grpo.rewards:exact_mach": 1.0}, "Did you mean `exact_match`?"),
        ({"grpo.no_such_module:f": 1.0}, "importing grpo.no_such_module raised"),
        ({"module_that_is_not_python:f": 1.0}, "importing module_that_is_not_python raised SyntaxError ("),
        ({exact_match: 10**5000}, "the weight something that cannot be shown"),
        ({"no_such_plugin": 1.0}, "No installed package offers a reward `no_such_plugin`"),
    ],
)
def test_rewards_that_cannot_be_built(rewards, told, tmp_path, monkeypatch):
    (tmp_path / "module_that_is_not_python.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        build_rewards(rewards, COLUMNS, chat=False)
    assert told in str(caught.value)


def test_log_metric_comes_back_from_score():
    def reward(completions, log_metric, log_extra):
        log_extra("length", [len(completion) for completion in completions])
        log_metric("longest", max(map(len, completions)))
        return [0.0] * len(completions)

    groups = [make_group(0, ["a", "bcd"])]
    assert score(groups, build_rewards({reward: 1.0}, COLUMNS, chat=False)) == {"logged/longest": 3.0}


class Unspeakable(BaseException):
    def __str__(self):
        raise SystemExit


class CtrlC(KeyboardInterrupt):
    pass


@pytest.mark.parametrize(
    "error", [Unspeakable, CtrlC, GeneratorExit, asyncio.CancelledError, SystemExit, StopIteration]
)
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_whatever_a_reward_raises_is_told_in_a_sentence(error, timeout):
    def one(completion):
        raise error

    def batch(completions):
        raise error

    def listed(completions):
        yield 1.0
        raise error

    async def later(completion):
        raise error

    async def batch_later(completions):
        raise error

    for reward in (one, batch, listed, later, batch_later):
        told = error_of({reward: 1.0}, timeout=timeout)
        assert told.startswith(f"Reward `{reward.__name__}` raised ")
        assert "never scored 0" in told


def test_ctrl_c_is_not_a_rewards_error():
    def interrupted(completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored({interrupted: 1.0}, timeout=60.0)


def test_a_process_that_a_reward_forks_does_not_go_on_with_the_run(capfd):
    def forks(completion):
        copy = os.fork()
        if copy == 0:
            if completion == "four":
                raise ValueError("in the copy")
            return 0.0
        return float(os.waitpid(copy, 0)[1] != 0)

    assert scored({forks: 1.0}, timeout=60.0)[0].rewards.tolist() == [0, 1]
    assert "ValueError: in the copy" in capfd.readouterr().err


def test_what_a_reward_logs_stays_under_its_own_heading():
    def reward(completions, log_metric):
        log_metric("reward/mean", 99)
        log_metric("twice", 1)
        log_metric("twice", torch.tensor(2.0))
        return [0.0] * len(completions)

    def unnamed(completions, log_metric):
        log_metric("two\nlines", 1.0)
        return [0.0] * len(completions)

    metrics = score([make_group(0, ["a"])], build_rewards({reward: 1.0}, COLUMNS, chat=False))
    assert metrics == {"logged/reward/mean": 99.0, "logged/twice": 1.5}
    assert "it must be text of one line" in error_of({unnamed: 1.0})
