"""Rewards that are called elsewhere begin with the first finished group, and nothing else is different for that."""

import asyncio
import json
import random
import sys
import threading
from dataclasses import replace

import pytest
import torch
from tiny_engines import Letters, contexts, prompts, tokens_of
from tiny_models import build_policy, randomise
from toy_task import SMALL, TASK

from grpo.rewards import Scorer, build_rewards, reward
from grpo.rewards.failures import Tolerance
from grpo.rewards.staff import staffed
from grpo.rollout.sampling import sample_groups
from grpo.rollout.torch_engine import TorchEngine
from grpo.run import main
from grpo.types import Completion, Group, Prompt

REWARDS = """
import os, random

def draws(completion, log_metric, log_extra):
    log_metric("letters", len(completion))
    log_extra("first", completion[:1])
    return random.random()

def fails(completion):
    if completion in ("bb", "d"):
        raise ValueError(completion)
    return float(len(completion))

def leaves(completion):
    return os._exit(4) if completion == "ccc" else 1.0

def ranks(completions):
    return [sorted(completions).index(each) for each in completions]

def of_all(completions):
    return [float(len(completions))] * len(completions)
"""


@pytest.fixture(scope="module")
def bring(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap")
    (folder / "overlapping_rewards.py").write_text(REWARDS)
    sys.path.insert(0, str(folder))
    import overlapping_rewards as module

    module.ranks = reward(batch="group")(module.ranks)
    yield module
    sys.path.remove(str(folder))


async def later(completion, log_metric):
    log_metric("later", 0.1 * len(completion))
    await asyncio.sleep(0)
    return 1 / 0 if completion == "a" else 2.0


seen = set()


@reward(retries=1, backoff=0)
async def at_second_try(completion, log_extra):
    if completion not in seen:
        seen.add(completion)
        raise ConnectionError("503")
    log_extra("tried", completion)
    return 0.5


def here(completion):
    return random.random()


def a_few_groups():
    texts = [["a", "bb", "ccc"], ["d", "", "e"], ["ff", "bb", "g"], ["h", "i", "j"]]
    return [
        Group(Prompt(20 + number, "?", [1], {}), [Completion([1], [0.0], text, "stop", 0) for text in of_group])
        for number, of_group in enumerate(texts)
    ]


def scored_as(bring, order):
    """What comes of a scoring whose groups are handed over in this order, and those that it leaves out at the end."""
    functions = [bring.draws, bring.fails, bring.leaves, bring.ranks, bring.of_all, later, at_second_try, here]
    rewards = build_rewards(dict.fromkeys(functions, 1.0), [], chat=False, timeout=60.0, group_size=3)
    told, groups = [], a_few_groups()
    random.seed(5)
    seen.clear()
    # Without `here`, whose module every worker would import: torch, for seconds.
    with staffed([replace(each) for each in rewards[:-1]], 2, 12, None, lambda note: None) as moved:
        at_work = [*moved, rewards[-1]]
        tolerance = Tolerance(1.0, told.append)
        with Scorer(at_work, tolerance, steps=9).begun(3) as scoring:
            for number in order:
                scoring.begin(3 * number, groups[number])
            metrics = scoring.finish(groups)
    counted = tolerance.counted()
    parts = [{name: part.tolist() for name, part in group.parts.items()} for group in groups]
    of_groups = [(group.rewards.tolist(), group.failed, group.extra) for group in groups]
    return json.dumps([metrics, counted, [text.splitlines()[0] for text in told], parts, of_groups])


@pytest.mark.slow
def test_scores_and_failures_are_those_of_a_scoring_afterwards(bring):
    afterwards = scored_as(bring, [])
    for order in ([0, 1, 2, 3], [3, 1], [2, 0, 3, 1]):
        assert scored_as(bring, order) == afterwards
    metrics, counted, told, parts, _ = json.loads(afterwards)
    assert counted == {"reward/fails/failed": 3, "reward/leaves/failed": 1, "reward/later/failed": 1}
    assert metrics["logged/later"] == pytest.approx(0.1 * 16 / 12)
    assert len(told) == 3 and "row 20, completion 'bb'" in told[0]
    assert parts[1]["ranks"] == [1, 0, 2] and parts[3]["of_all"] == [12, 12, 12]


def test_an_async_reward_is_called_while_other_groups_are_sampled(tiny_config):
    """The engine waits, in the middle of its work, for the reward of what it has finished."""
    config = tiny_config(max_completion_tokens=24)
    policy = build_policy(config)
    randomise(policy, 1)
    engine = TorchEngine(policy, Letters(), contexts(prompts()), config.temperature)
    afterwards = sample_groups(engine, prompts(), 2, 24, seed=4)
    assert len({max(map(len, tokens_of([group]))) for group in afterwards}) > 1  # they do not end at the same time
    called, first = threading.Event(), []

    async def judge(completion):
        called.set()
        return float(len(completion))

    with Scorer(build_rewards({judge: 1.0}, [], chat=False, timeout=60.0), Tolerance()).begun() as scoring:

        def begin(place, group):
            scoring.begin(place, group)
            first.append(place)
            assert called.wait(60)

        groups = sample_groups(engine, prompts(), 2, 24, seed=4, finished=begin)
        scoring.finish(groups)
    assert sorted(first) == [0, 2, 4, 6, 8]
    assert first != sorted(first)
    assert tokens_of(groups) == tokens_of(afterwards)
    for group in groups:
        assert group.rewards.tolist() == [len(completion.text) for completion in group.completions]


def test_what_is_called_here_waits_until_all_groups_are_there():
    calls = []

    def plain(completion):
        calls.append(completion)
        return 1.0

    async def of_all(completions):
        calls.append(len(completions))
        return [1.0] * len(completions)

    groups = a_few_groups()
    with Scorer(build_rewards({plain: 1.0, of_all: 1.0}, [], chat=False), Tolerance()).begun() as scoring:
        for number, group in enumerate(groups):
            scoring.begin(3 * number, group)
        assert calls == []
        scoring.finish(groups)
    assert len(calls) == 13


def test_a_rollout_that_fails_takes_back_what_was_begun():
    begun, cancelled = threading.Event(), threading.Event()

    async def judge(completion):
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with (
        pytest.raises(MemoryError),
        Scorer(build_rewards({judge: 1.0}, [], chat=False, timeout=600.0), Tolerance()).begun() as scoring,
    ):
        scoring.begin(0, a_few_groups()[0])
        assert begun.wait(60)
        raise MemoryError
    assert cancelled.wait(60)


ASYNC = """
async def judge(completion):
    print("asked")
    torch_of_others = random.random()
    return len(completion) / 10

def shows(completions, **columns):
    print("shown")
    return [0.5] * len(completions)
"""


@pytest.mark.slow
def test_a_run_is_the_same_and_what_an_async_reward_prints_during_a_rollout_is_in_the_log(tmp_path, capsys):
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{judge: 1.0, says: 1.0, shows: 1.0}", extra=ASYNC))
    assert main([str(tmp_path / "toy.py"), *SMALL, "--steps", "3", "--run-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "asked" not in out and "shown" not in out
    assert (tmp_path / "run" / "rewards.log").read_text().count("asked\n") >= 24
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(line["reward/mean"])) for line in lines if "reward/mean" in line)
