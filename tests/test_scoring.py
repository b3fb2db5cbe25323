"""How reward functions are called, what they may return, and what an error says."""

import asyncio
import copy
import functools
import itertools
import math
import os
import sys
import threading
import time
from collections import deque
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas
import pytest
import torch

from grpo.errors import UserError
from grpo.policy.load import load_tokenizer
from grpo.rewards import (
    build_rewards,
    event_loop,
    exact_match,
    score,
)
from grpo.rewards.samples import copies
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


def test_a_reward_of_one_completion_is_called_by_the_names_of_its_arguments():
    def right(answer, completion, missing="default"):
        assert missing == "default"
        return float(completion == answer)

    first, second = scored({right: 2.0})
    assert first.parts["right"].dtype == torch.float32
    assert first.parts["right"].tolist() == [1, 0]
    assert second.parts["right"].tolist() == [0, 1, 0]
    assert first.rewards.tolist() == [2, 0]
    assert second.rewards.tolist() == [0, 2, 0]


def test_a_reward_of_the_batch_gets_lists_as_trl_passes_them():
    seen = {}

    def trl_style(prompts, completions, answer, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, answer=answer)
        return [float(len(completion)) for completion in completions]

    groups = scored({trl_style: 1.0})
    assert seen["completions"] == ["5", "four", "", "6", "66"]
    assert seen["prompts"] == ["<user>question 7"] * 2 + ["<user>question 9"] * 3
    assert seen["answer"] == ["5", "5", "6", "6", "6"]
    assert seen["question"] == ["question 7"] * 2 + ["question 9"] * 3
    assert seen["completion_ids"] == [[0, 1], [0, 1, 2, 3, 4], [0], [0, 1], [0, 1, 2]]
    assert seen["trainer_state"].global_step == 0
    assert seen.keys() == {
        *("prompts", "completions", "answer", "question", "completion_ids"),
        *("trainer_state", "log_metric", "log_extra"),
    }
    assert [group.rewards.tolist() for group in groups] == [[1, 4], [0, 1, 2]]


def test_only_what_a_function_names_is_passed():
    def lengths(completion_ids):
        return [len(tokens) for tokens in completion_ids]

    def of_prompt(prompt, completion_ids, completion):
        return prompt.count("7") + len(completion_ids) - len(completion)

    first, second = scored({lengths: 1, of_prompt: 1})
    assert first.parts["lengths"].tolist() == [2, 5]
    assert first.parts["of_prompt"].tolist() == [2, 2]
    assert second.parts["of_prompt"].tolist() == [1, 1, 1]


def test_chat_tasks_give_the_chat_form_to_those_who_read_it_and_strings_to_the_rest():
    def of_chats(prompts, completions, **kwargs):
        assert prompts[0][-1] == {"role": "user", "content": "question 7"}
        return [float(completion[0]["content"] == "5") for completion in completions]

    def of_strings(completions, **kwargs):
        return [float(completion.strip() == "5") for completion in completions]

    # On chat messages it would run too, and always return 0.
    def silently_wrong(completions, **kwargs):
        return [float("5" in completion) for completion in completions]

    def of_both(completions, **kwargs):
        texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
        return [float(text == "5") for text in texts]

    def of_copies(completions, **kwargs):
        return [float({**completion[-1]}["content"] == "5") for completion in completions]

    def of_prompts(prompts, completion_ids):
        return [float(prompt[-1]["content"][-1] == "7") for prompt in prompts]

    async def asynchronous(completions, **kwargs):
        return [float(completion[0].get("content") == "5") for completion in completions]

    rewards = dict.fromkeys((of_chats, of_strings, silently_wrong, of_both, of_copies, of_prompts, asynchronous), 1.0)
    group = make_group(7, ["5", "four"])
    scored(rewards, [group], chat=True, probe=(make_prompt(7), "5"))
    parts = {name: part.tolist() for name, part in group.parts.items()}
    assert parts.pop("of_prompts") == [1, 1]
    assert parts == {name: [1, 0] for name in parts}
    assert len(parts) == 6


def test_a_reward_that_fails_on_both_forms_is_told_with_the_form_it_reads():
    def broken(completions, **kwargs):
        return [1 / 0 for completion in completions if completion[0]["content"]]

    assert "ZeroDivisionError" in error_of({broken: 1.0}, chat=True, probe=(make_prompt(7), "5"))


def test_without_a_probe_chat_tasks_give_the_chat_form():
    def of_chats(completions):
        return [len(completion[0]["content"]) for completion in completions]

    assert scored({of_chats: 1.0}, chat=True)[0].rewards.tolist() == [1, 4]


def spoil(value):
    """Change whatever can be changed, at any depth."""
    if isinstance(value, dict):
        for each in list(value.values()):
            spoil(each)
        value.clear()
        value["role"] = "spoiled"
    elif isinstance(value, (list, set, deque, bytearray)):
        for each in list(value):
            spoil(each)
        value.clear()
    elif isinstance(value, tuple):
        for each in value:
            spoil(each)
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        value[...] = 99
    elif hasattr(value, "__dict__") and not callable(value):
        spoil(vars(value))


class Cell:
    def __init__(self):
        self.content = [1, {"deep": [2]}]


def nested_fields(answer):
    return {
        "question": "q",
        "answer": answer,
        "numbers": [1, 2, 3],
        "tests": [{"input": [1, {"deep": (4, [5])}]}],
        "array": np.arange(3),
        "tensor": torch.arange(3),
        "cell": Cell(),
        "names": {"a", "b"},
        "held": threading.Lock(),  # cannot be copied: passed as it is
    }


@pytest.mark.parametrize("chat", [False, True])
def test_nothing_that_a_reward_does_to_its_arguments_reaches_the_run_or_another_call(chat):
    seen = []

    def spoils(arguments):
        # The lock is everybody's.
        seen.append(
            copy.deepcopy({key: each for key, each in arguments.items() if key != "held" and not callable(each)})
        )
        spoil(arguments)

    def one(completion, prompt, completion_ids, numbers, tests, array, tensor, cell, names):
        spoils(dict(locals(), spoils=None, seen=None))
        return 1.0

    async def one_async(completion, prompt, completion_ids, numbers, tests, array, tensor, cell, names):
        spoils(dict(locals(), spoils=None, seen=None))
        return 1.0

    def batch(completions, prompts, **kwargs):
        count = len(completions)
        spoils(kwargs | {"completions": completions, "prompts": prompts, "held": None})
        return [1.0] * count

    async def batch_async(completions, prompts, **kwargs):
        return batch(completions, prompts, **kwargs)

    def world(groups):
        fields = [{key: each for key, each in group.prompt.fields.items() if key != "held"} for group in groups]
        prompts = [(group.prompt.text, group.prompt.tokens, group.prompt.messages) for group in groups]
        return repr([prompts, [group.completions for group in groups]]), [
            {**each, "cell": vars(each["cell"]), "array": each["array"].tolist(), "tensor": each["tensor"].tolist()}
            for each in fields
        ]

    groups = [make_group(7, ["5", "four"], "5"), make_group(9, ["", "6", "66"], "6")]
    for group in groups:
        group.prompt.fields.update(nested_fields("5"))
    before = copy.deepcopy(world(groups))
    rewards = build_rewards(dict.fromkeys((one, batch, one_async, batch_async), 1.0), list(nested_fields("5")), chat)
    for _ in range(2):
        score(groups, rewards)
    assert world(groups) == before
    each_call = [each for each in seen if "completion" in each]
    assert len(each_call) == 2 * 2 * 5
    for arguments in each_call:
        assert arguments["numbers"] == [1, 2, 3]
        assert arguments["tests"] == [{"input": [1, {"deep": (4, [5])}]}]
        assert arguments["array"].tolist() == arguments["tensor"].tolist() == [0, 1, 2]
        assert arguments["cell"].content == [1, {"deep": [2]}]
        assert len(arguments["completion_ids"]) == len(arguments["completion"]) + 1
    batches = [each for each in seen if "completions" in each]
    assert len(batches) == 2 * 2
    for arguments in batches[1:]:
        assert arguments["completions"] == batches[0]["completions"]
        assert arguments["prompts"] == batches[0]["prompts"]
        assert arguments["tests"] == [[{"input": [1, {"deep": (4, [5])}]}]] * 5


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


class Half:
    def __float__(self):
        return 0.5


@pytest.mark.parametrize(
    "value",
    [
        *(True, -2, 0.25, None, Fraction(1, 4), Decimal("0.25"), Half()),
        *(np.float32(0.25), np.float16(0.25), np.bool_(True), np.int64(3), np.array(0.25)),
        *(torch.tensor(0.5), torch.tensor(0.5, requires_grad=True), torch.tensor([0.5]), torch.tensor([[0.5]])),
        *(
            torch.tensor(0.5, dtype=dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)
        ),
        *(torch.tensor(True), torch.tensor(3)),
    ],
)
def test_whatever_is_a_number_counts_as_it_does_in_torch(value):
    def constant(completion):
        return value

    def constants(completions):
        return [value] * len(completions)

    # What TRL makes of a reward's list.
    plain = value.item() if isinstance(value, (torch.Tensor, np.ndarray)) else value
    expected = torch.tensor([torch.nan if plain is None else plain] * 2, dtype=torch.float32)
    group = scored({constant: 1.0, constants: 1.0})[0]
    for part in group.parts.values():
        assert torch.equal(part.nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize(
    "container",
    [
        *(list, tuple, np.array, torch.tensor, iter, deque, pandas.Series),
        *(lambda values: map(float, values), lambda values: (value for value in values)),
        *(
            lambda values: dict(enumerate(values)).values(),
            lambda values: pandas.Series(values, index=[9] * len(values)),
        ),
        *(
            lambda values, d=dtype: torch.tensor(values, dtype=d)
            for dtype in (torch.bfloat16, torch.float16, torch.int64)
        ),
        *(lambda values: torch.tensor(values)[:, None], lambda values: [torch.tensor([value]) for value in values]),
        *(lambda values: torch.tensor(values, requires_grad=True), lambda values: np.array(values, dtype=object)),
    ],
)
def test_whatever_gives_numbers_in_order_counts(container):
    def lengths(completions):
        return container([float(len(completion)) for completion in completions])

    async def later(completions):
        return lengths(completions)

    for reward in (lengths, later):
        assert [group.rewards.tolist() for group in scored({reward: 1.0})] == [[1, 4], [0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_is_finite_or_not_whatever_it_is_held_in(dtype, value):
    def one(completion):
        return torch.tensor(value, dtype=dtype)

    def batch(completions):
        return torch.full((len(completions),), value, dtype=dtype)

    def batch_of_numpy(completions):
        return torch.full((len(completions),), value, dtype=torch.float32).numpy()

    for reward in (one, batch, batch_of_numpy):
        assert "A reward is a finite number" in error_of({reward: 1.0})


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("1.0", "'1.0' (str of length 3)"),
        (math.nan, "nan (float)"),
        (math.inf, "inf (float)"),
        (1e300, "1e+300 (float)"),
        (10**400, "(int)"),
        ([1.0], "[1.0] (list of length 1)"),
        (torch.ones(2), "(Tensor of length 2)"),
        ({}, "{} (dict of length 0)"),
        (1j, "1j (complex)"),
        (np.complex64(1), "(complex64)"),
        (torch.tensor(1 + 0j), "(Tensor)"),
        (b"1", "b'1' (bytes of length 1)"),
        (pandas.NA, "<NA> (NAType)"),
        (Decimal("Infinity"), "(Decimal)"),
        (np.array([1.0, 2.0]), "(ndarray of length 2)"),
    ],
)
def test_anything_else_is_an_error_that_says_what_and_where(value, told):
    def odd(completion):
        return value if completion == "6" else 0.0

    def odd_batch(completions):
        return [odd(completion) for completion in completions]

    for reward, name in ((odd, "odd"), (odd_batch, "odd_batch")):
        message = error_of({reward: 1.0})
        assert message.startswith(f"Reward `{name}` returned ")
        assert told in message
        assert "row 9, completion '6'" in message
        assert "finite number" in message


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ([1.0], "[1.0] (list of length 1)"),
        ([1.0] * 6, "(list of length 6)"),
        (1.0, "1.0 (float)"),
        (None, "None (NoneType)"),
        ("12345", "'12345' (str of length 5)"),
        (dict.fromkeys(range(5), 1.0), "(dict of length 5)"),
        (torch.tensor(1.0), "tensor(1.) (Tensor)"),
        (torch.ones(2, 5), "(Tensor of length 2)"),
        (b"12345", "(bytes of length 5)"),
        ({1.0, 2.0, 3.0, 4.0, 5.0}, "(set of length 5)"),
        (itertools.count(), "(list of length 6)"),
        (map(float, "1234"), "(list of length 4)"),
    ],
)
def test_a_batch_must_come_back_as_a_list_of_its_length(returned, told):
    def batch(completions):
        return returned

    message = error_of({batch: 1.0})
    assert told in message
    assert "here 5" in message
    assert "rows 7, 9" in message


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


def test_functions_of_any_kind_are_rewards():
    def with_bonus(completion, bonus):
        return len(completion) + bonus

    class Judge:
        def __call__(self, completion):
            return 1.0

        def method(self, completions):
            return [2.0] * len(completions)

    class AsyncJudge:
        async def __call__(self, completion):
            return 3.0

    cached = functools.cache(exact_match)
    rewards = {functools.partial(with_bonus, bonus=10): 1, Judge(): 1, Judge().method: 1, AsyncJudge(): 1, cached: 1}
    group = scored(rewards)[0]
    assert {name: part.tolist() for name, part in group.parts.items()} == {
        "with_bonus": [11, 14],
        "Judge": [1, 1],
        "method": [2, 2],
        "AsyncJudge": [3, 3],
        "exact_match": [1, 0],
    }


def quiet(function):
    """A decorator that passes everything on."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def test_partial_objects_and_decorated_functions_are_read_by_what_they_take_themselves():
    def right(completion, answer, bonus=0):
        return float(completion == answer) + bonus

    def lengths(completions, answer):
        return [len(completion) for completion in completions]

    @functools.wraps(right)
    def with_its_own_names(completion, question):
        return right(completion, answer=question[-1])

    @functools.wraps(lengths)
    def one_for_a_batch(completion):
        return lengths([completion], None)[0]

    @functools.wraps(right)
    def adds_a_name(question, **kwargs):
        return right(**kwargs) + len(question)

    class Judge:
        @quiet
        def method(self, completion, answer):
            return right(completion, answer)

        @quiet
        def __call__(self, completion, answer):
            return right(completion, answer)

    bound = functools.partial(right, answer="four")
    renamed = functools.partial(functools.cache(right), bonus=1)
    renamed.__name__ = "renamed"
    adds_a_name.__name__, one_for_a_batch.__name__, bound_twice = (
        "adds",
        "each",
        functools.partial(quiet(right), bonus=2),
    )
    bound_twice.__name__ = "bound_twice"
    with_its_own_names.__name__ = "own"
    everything = {bound: 1, renamed: 1, with_its_own_names: 1, one_for_a_batch: 1, adds_a_name: 1, bound_twice: 1}
    group = scored(everything | {Judge(): 1, Judge().method: 1, quiet(lengths): 1})[0]
    assert {name: part.tolist() for name, part in group.parts.items()} == {
        "right": [0, 1],
        "renamed": [2, 1],
        "own": [0, 0],
        "each": [1, 4],
        "adds": [1 + len("question 7"), len("question 7")],
        "bound_twice": [3, 2],
        "Judge": [1, 0],
        "method": [1, 0],
        "lengths": [1, 4],
    }
    assert "asks for `answer`" in error_of({quiet(right): 1.0}, columns=["question"])


def test_a_missing_column_names_those_that_exist_and_the_nearest():
    def reward(completion, awnser):
        return 0.0

    message = error_of({reward: 1.0})
    assert "`reward` asks for `awnser`" in message
    assert "Did you mean `answer`?" in message
    assert "question, answer" in message


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


def test_signatures_that_cannot_be_called_by_name():
    def blind(question, answer):
        return 0.0

    def positional(completion, /):
        return 0.0

    assert "never sees what it should score" in error_of({blind: 1.0})
    assert "by position only" in error_of({positional: 1.0})


def test_log_metric_comes_back_from_score():
    def reward(completions, log_metric, log_extra):
        log_extra("length", [len(completion) for completion in completions])
        log_metric("longest", max(map(len, completions)))
        return [0.0] * len(completions)

    groups = [make_group(0, ["a", "bcd"])]
    assert score(groups, build_rewards({reward: 1.0}, COLUMNS, chat=False)) == {"logged/longest": 3.0}


class Leaves:
    """Everything that is asked of it ends the program, as a success."""

    def leave(self, *given):
        raise SystemExit(0)

    __float__ = __repr__ = __len__ = __reduce_ex__ = __deepcopy__ = leave


def test_a_value_that_ends_the_program_is_no_number():
    def one(completion):
        return Leaves()

    def batch(completions):
        return Leaves()

    for reward in (one, batch):
        with pytest.raises(UserError, match=rf"`{reward.__name__}` returned something that cannot be shown"):
            scored({reward: 1.0})
    prompts = copies([Leaves()])
    assert isinstance(prompts[0], Leaves)


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


def test_a_coroutine_that_nobody_awaits_is_told():
    async def right(completion, answer):
        return 1.0

    groups = [make_group(7, ["5"])]  # one: only the first is told, and closed
    assert "It must be awaited: write the reward" in error_of({quiet(right): 1.0}, groups)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


def test_the_probe_of_a_chat_reward_is_a_group_in_the_models_tokens(tokenizer):
    seen = []

    def batch(completions, completion_ids):
        seen.append((len(completions), completion_ids[0]))
        return [float(len(completion[0]["content"])) for completion in completions]

    arguments = {"tokenizer": tokenizer, "group_size": 8}
    build_rewards({batch: 1.0}, COLUMNS, chat=True, probe=(make_prompt(1), "<answer>\n5\n</answer>"), **arguments)
    size, tokens = seen[0]
    assert size == 8
    assert tokenizer.decode(tokens[:-1]) == "<answer>\n5\n</answer>"
    assert tokens[-1] == tokenizer.eos_token_id


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
