"""Async rewards: at the same time, in one event loop, which none of them may block or stop."""

import asyncio
import threading
import time

import pytest
from scored import COLUMNS, error_of, make_group, scored

from grpo.errors import UserError
from grpo.rewards import (
    build_rewards,
    event_loop,
    score,
)


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


def test_an_async_reward_that_blocks_for_ever_is_an_error_too(monkeypatch):
    # A loop of its own: this one never comes back.
    monkeypatch.setattr(event_loop, "_loops", [])
    release = threading.Event()

    async def blocks(completion):
        release.wait()

    with pytest.raises(UserError, match=r"`blocks` gave no result in 0.05 s, .*the event loop .* is blocked"):
        scored({blocks: 1.0}, timeout=0.05)
    release.set()


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
