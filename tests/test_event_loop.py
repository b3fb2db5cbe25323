"""Async rewards: at the same time, in one event loop, which none of them may block or stop."""

import asyncio
import threading
import time

import pytest
from scored import COLUMNS, error_of, make_group, scored

from grpo.errors import UserError
from grpo.rewards import build_rewards, event_loop, score
from grpo.rewards.failures import Tolerance


def test_async_rewards_run_at_the_same_time_as_each_other_and_as_the_rest():
    # Each waits for the other and for the plain one: called one after the other, they would never end.
    arrived, release = [], threading.Event()
    both = asyncio.Barrier(2 * 5)

    async def first(completion):
        arrived.append("first")
        await both.wait()
        await asyncio.to_thread(release.wait)
        return 1.0

    async def second(completion):
        await both.wait()
        return 2.0

    async def batch(completions, answer):
        return [float(completion == each) for completion, each in zip(completions, answer, strict=True)]

    def plain(completion):
        release.set()
        return 3.0

    group, _ = scored({first: 1.0, second: 1.0, batch: 1.0, plain: 1.0}, timeout=60.0)
    assert len(arrived) == 5
    assert group.rewards.tolist() == [7.0, 6.0]


def test_async_rewards_keep_one_event_loop_over_steps_and_run_inside_another():
    loops = []

    async def remember(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    rewards = build_rewards({remember: 1.0}, COLUMNS, chat=False)
    score([make_group(0, ["a"])], rewards)

    async def as_in_a_notebook():
        score([make_group(0, ["a"])], rewards)

    asyncio.run(as_in_a_notebook())
    assert loops[0] is loops[1]


def test_an_async_reward_that_blocks_for_ever_fails_alone(monkeypatch):
    # A loop of its own: this one never comes back.
    monkeypatch.setattr(event_loop, "_loops", [])
    release, calls = threading.Event(), []

    async def waits(completion):
        calls.append(completion)
        await asyncio.sleep(0.1)
        return 2.0

    async def blocks(completion):
        if completion == "a":
            release.wait()
        while completion == "b":  # never lets the loop go on, but Python can be interrupted
            pass
        return 1.0

    try:
        group = make_group(0, ["z", "a", "x", "b", "y"])
        rewards = build_rewards({waits: 1.0, blocks: 1.0}, COLUMNS, chat=False, timeout=0.3)
        told = []
        score([group], rewards, Tolerance(0.9, told.append))
    finally:
        release.set()
    assert group.rewards.nan_to_num(-1).tolist() == [3, -1, 3, -1, 3]
    assert group.failed.keys() == {"blocks"}
    assert all("no result in 0.3 s" in why for why in group.failed["blocks"].values())
    assert "row 0, completion 'a'" in told[0] and "it blocks the event loop" in told[0]
    assert set(calls) == set("zaxby")  # made anew where a blocked loop was left
    for loop in event_loop._loops[:-1]:
        loop.thread.join(10)
        assert not loop.thread.is_alive()


def test_async_rewards_that_block_again_and_again_end_the_run(monkeypatch):
    monkeypatch.setattr(event_loop, "_loops", [])
    monkeypatch.setattr(event_loop, "_MOST_BLOCKED", 1)
    release = threading.Event()

    async def blocks(completion):
        release.wait()

    try:
        with pytest.raises(UserError, match=r"`blocks` gave no result in 0.05 s, .*the event loop .* is blocked, not"):
            score(
                [make_group(0, ["a", "b", "c"])],
                build_rewards({blocks: 1.0}, COLUMNS, chat=False, timeout=0.05),
                Tolerance(1.0),
            )
    finally:
        release.set()


def test_an_async_reward_that_does_not_let_itself_be_cancelled_fails_alone(monkeypatch):
    monkeypatch.setattr(event_loop, "_loops", [])
    release = asyncio.Event()

    async def stays(completion):
        while completion == "a" and not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                pass
        return 1.0

    group = make_group(0, ["a", "b"])
    score([group], build_rewards({stays: 1.0}, COLUMNS, chat=False, timeout=0.1), Tolerance(1.0))
    assert group.rewards.nan_to_num(-1).tolist() == [-1, 1]
    event_loop._loops[-1].loop.call_soon_threadsafe(release.set)


def test_async_rewards_that_block_for_less_than_their_time_may():
    async def patient(completion):
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass
        return 1.0

    assert scored({patient: 1.0}, timeout=2.0)[0].rewards.tolist() == [1, 1]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_reward_that_stops_the_loop_of_all_is_told_and_the_next_run_has_another(timeout):
    async def stops(completion):
        asyncio.get_running_loop().stop()
        await asyncio.Event().wait()

    async def cancels(completion):
        for task in asyncio.all_tasks():
            task.cancel()
        await asyncio.Event().wait()

    async def well(completion):
        return 1.0

    assert "the event loop that all async rewards share was stopped" in error_of({stops: 1.0}, timeout=timeout)
    assert "`cancels` raised CancelledError" in error_of({cancels: 1.0}, timeout=timeout)
    assert scored({well: 1.0}, timeout=timeout)[0].rewards.tolist() == [1, 1]
