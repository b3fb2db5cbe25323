"""What a reward says of its own calls, and that it is carried out."""

import asyncio
import functools
import pickle
import threading

import pytest
import torch

from grpo.errors import UserError
from grpo.rewards import build_rewards, reward, score
from grpo.rewards.failures import Tolerance
from grpo.rewards.options import Options, options_of
from grpo.types import Completion, Group, Prompt


def group_of(*texts, index=7):
    return Group(Prompt(index, "?", [1], {}), [Completion([1], [0.0], text, "stop", 0) for text in texts])


def scored(function, *groups, share=1.0, timeout=None):
    groups = list(groups) or [group_of("a", "b")]
    score(groups, build_rewards({function: 1.0}, [], chat=False, timeout=timeout), Tolerance(share))
    return [group.rewards.tolist() for group in groups]


@reward(time_limit=5, retries=2)
def marked(completion):
    return 1.0


def test_a_marked_function_is_the_function_that_it_was():
    assert marked.__name__ == "marked"
    assert marked("") == 1.0
    assert pickle.loads(pickle.dumps(marked)) is marked
    assert options_of(marked) == Options(time_limit=5, retries=2)
    assert reward(group_of) is group_of


def test_what_wraps_or_holds_a_marked_function_has_its_options():
    class Judge:
        @reward(retries=4)
        def __call__(self, completion):
            return 1.0

        @reward(concurrency=3)
        async def method(self, completion):
            return 1.0

    @functools.wraps(marked)
    def wrapper(*args):
        return marked(*args)

    bound = functools.partial(marked)
    assert options_of(wrapper) == options_of(bound) == options_of(marked)
    assert options_of(reward(retries=1)(functools.partial(marked))).retries == 1
    assert options_of(Judge()).retries == 4
    assert options_of(Judge().method).concurrency == 3
    assert options_of(len) == options_of(lambda completion: 0) == Options()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"retires": 3}, "retires=..., which it does not know. It knows time_limit, workers"),
        ({"time_limit": -1}, "time_limit=-1"),
        ({"time_limit": "10"}, "seconds, 0 for no limit, or None"),
        ({"time_limit": float("nan")}, "time_limit=nan"),
        ({"retries": True}, "how many times"),
        ({"retries": 1.5}, "retries=1.5"),
        ({"workers": -1}, "a number of processes"),
        ({"concurrency": 0}, "1 or more"),
        ({"on_failure": "ignore"}, '"missing" or "stop"'),
        ({"batch": "row"}, '"step" or "group"'),
    ],
)
def test_options_that_are_none_are_told(options, told):
    with pytest.raises(UserError) as caught:
        reward(**options)
    assert told in str(caught.value)


def test_what_cannot_be_marked_is_told():
    with pytest.raises(UserError, match=r"which is no function. Its options are given by name"):
        reward(10)
    with pytest.raises(UserError, match=r"takes no attributes. Wrap it"):
        reward(retries=1)(len)


def test_its_own_time_limit_goes_before_the_runs():
    def endless(completion):
        while completion == "b":
            pass
        return 1.0

    assert scored(reward(time_limit=0.05)(endless), timeout=60.0)[0][0] == 1.0
    limits = []

    @reward(time_limit=0)
    def free(completion):
        limits.append(threading.current_thread())
        return 1.0

    assert scored(free, timeout=1e-9) == [[1.0, 1.0]]


def test_the_first_failure_of_a_reward_that_says_so_ends_the_run():
    @reward(on_failure="stop")
    def careful(completion):
        return 1 / (completion != "b")

    with pytest.raises(UserError, match=r"`careful` raised ZeroDivisionError .* completion 'b'"):
        scored(careful, group_of(*"abcdefghij" * 3))


def failing(times, kind, **options):
    """A reward that fails so many times on "b"; and the texts that it was called with."""
    calls = []

    def answer(completion):
        calls.append(completion)
        if completion == "b" and calls.count("b") <= times:
            raise ConnectionError("503")
        return float(len(calls))

    async def later(completion):
        await asyncio.sleep(0)
        return answer(completion)

    def batch(completions):
        return [answer(completion) for completion in completions]

    return reward(backoff=0, **options)({"plain": answer, "async": later, "batch": batch}[kind]), calls


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_what_failed_is_called_again_and_what_did_not_is_not(kind):
    function, calls = failing(2, kind, retries=3)
    [[first, second, third]] = scored(function, group_of("a", "b", "c"))
    assert sorted(calls) == ["a", "b", "b", "b", "c"]
    assert {first, third, second} == {1.0, 3.0, 5.0} if kind == "plain" else second == 5.0


def test_after_the_last_try_it_is_missing():
    function, calls = failing(9, "plain", retries=2)
    [[first, second]] = scored(function)
    assert calls.count("b") == 3
    assert first == 1.0 and second != second
    with pytest.raises(UserError, match="503"):
        scored(failing(9, "plain", retries=1)[0], share=0.0)


def test_a_batch_is_called_again_as_a_whole_and_group_by_group_the_group_alone():
    function, calls = failing(1, "batch", retries=1)
    scored(function, group_of("a", "b"), group_of("c", index=9))
    assert calls == ["a", "b", "a", "b", "c"]
    function, calls = failing(1, "batch", retries=1, batch="group")
    assert scored(function, group_of("c", index=5), group_of("a", "b"), group_of("c", "d", index=9)) == [
        [1.0],
        [6.0, 7.0],
        [4.0, 5.0],
    ]
    assert calls == ["c", "a", "b", "c", "d", "a", "b"]


def test_waits_are_twice_as_long_each_time_up_to_a_minute(monkeypatch):
    waits = []
    monkeypatch.setattr("grpo.rewards.retries.time.sleep", waits.append)

    @reward(retries=8, backoff=1.5)
    def fails(completion):
        raise ConnectionError

    scored(fails)
    assert waits == [1.5, 3.0, 6.0, 12.0, 24.0, 48.0, 60.0, 60.0]


def test_a_function_of_the_batch_gets_one_group_at_a_time_if_it_asks_for_it():
    seen = []

    @reward(batch="group")
    def rank(prompts, completions, completion_ids):
        seen.append((prompts, completions))
        lengths = torch.tensor([float(len(completion)) for completion in completions])
        return lengths - lengths.mean()

    groups = [group_of("a", "abc"), group_of("abcd", "ab", index=7), group_of("abcdef", index=9)]
    assert scored(rank, *groups) == [[-1.0, 1.0], [1.0, -1.0], [0.0]]
    assert [completions for _, completions in seen] == [["a", "abc"], ["abcd", "ab"], ["abcdef"]]

    @reward(batch="group")
    def broken(completions):
        return [1 / (len(completions) - 1)] * len(completions)

    assert [[each == each for each in group] for group in scored(broken, *groups)] == [[True] * 2, [True] * 2, [False]]


def test_so_many_calls_of_an_async_reward_are_under_way_and_no_more():
    now, most = [0], [0]

    @reward(concurrency=3)
    async def judge(completion):
        now[0] += 1
        most[0] = max(most[0], now[0])
        for _ in range(3):
            await asyncio.sleep(0)
        now[0] -= 1
        return 1.0

    scored(judge, group_of(*"abcdefghijk"))
    assert most == [3]
