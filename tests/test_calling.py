"""How a reward is called: by the names of its arguments, with copies, in the form that it reads."""

import copy
import functools
import threading
from collections import deque

import numpy as np
import pytest
import torch
from scored import COLUMNS, error_of, make_group, make_prompt, quiet, scored

from grpo.policy.load import load_tokenizer
from grpo.rewards import (
    build_rewards,
    exact_match,
    score,
)


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


def test_signatures_that_cannot_be_called_by_name():
    def blind(question, answer):
        return 0.0

    def positional(completion, /):
        return 0.0

    assert "never sees what it should score" in error_of({blind: 1.0})
    assert "by position only" in error_of({positional: 1.0})


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
