"""`tags`, the length rewards and `repetition`, beside the formulas that they cite."""

import math
import re

import pytest

from grpo.errors import UserError
from grpo.rewards import (
    cosine,
    exact_match,
    length,
    overlong,
    repetition,
    repetition_penalty,
    short_when_right,
    tags,
    think_answer,
    think_format,
)

# ---- tags


@pytest.mark.parametrize(
    ("completion", "pays"),
    [
        ("<a>x</a><b>y</b>", 1),
        ("\n<a>\nx\n</a>\n\n<b>\ny\n</b>\n", 1),
        ("<a>x</a>", 0),
        ("<b>y</b><a>x</a>", 0),
        ("<a>x<b>y</b></a>", 0),
        ("<a>x</a><b> </b>", 0),
        ("<a>x</a><b>y</b> more", 0),
        ("so <a>x</a><b>y</b>", 0),
        ("<a>x</a> and <b>y</b>", 0),
        ("<a>x</a><b>y</b><b>y</b>", 0),
        ("<a>x</a><b>y", 0),
        ("<A>x</A><b>y</b>", 0),
        ("</a>x<a><b>y</b>", 0),
        ("", 0),
    ],
)
def test_blocks_stand_once_and_in_order(completion, pays):
    assert tags("a", "b")(completion) == pays


def test_the_first_block_may_be_open_in_the_prompt_and_text_may_follow():
    assert tags("think", text_after=True, open_in_prompt=True)("because\n</think>\n72") == 1.0
    assert tags("think", text_after=True, open_in_prompt=True)("<think>because\n</think>\n72") == 0.0
    assert tags("think", text_after=True)("<think>because</think>\n") == 0.0


def test_a_reward_of_tags_has_a_name_that_a_metric_can_have():
    assert tags("plan", "x-y").__name__ == "tags_plan_x_y"


def test_tags_of_no_name_are_the_think_format():
    for completion in ("<think>a</think>b", "<think>a</think>", "a</think>b"):
        assert tags()(completion) == think_format(completion)


@pytest.mark.parametrize("names", [("a", "a"), ("a b",), ("<a>",), (1,), ("",)])
def test_names_that_are_none_are_told(names):
    with pytest.raises(UserError, match="tags"):
        tags(*names)


TRL_THINK = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL)  # its documentation's pattern


@pytest.mark.parametrize(
    "completion",
    ["<think>a</think>b", "<think>\na\n</think>\nb", "<think>a", "a</think>b", "<think>a<think>b</think>c", "b"],
)
def test_the_think_format_is_trls(completion):
    assert think_format(completion) == float(bool(TRL_THINK.match(completion)))


def test_the_think_and_answer_format_is_open_r1s_and_more_tolerant_of_white_space():
    assert think_answer("<think>\na\n</think>\n<answer>\nb\n</answer>") == 1.0
    assert think_answer("<think>a</think> <answer>b</answer>") == 1.0
    assert think_answer("<think>a</think><answer></answer>") == 0.0


# ---- length


@pytest.mark.parametrize(("longest", "buffer"), [(20480, 4096), (100, 100), (7, 3)])
def test_overlong_is_equation_13_of_dapo(longest, buffer):
    penalty = overlong(longest, buffer)
    for tokens in {0, 1, longest - buffer, longest - buffer + 1, longest - 1, longest, longest + 1, 10 * longest}:
        if tokens <= longest - buffer:
            expected = 0.0
        elif tokens <= longest:
            expected = ((longest - buffer) - tokens) / buffer
        else:
            expected = -1.0
        assert penalty("", [0] * tokens) == pytest.approx(expected, abs=1e-12)


def test_a_buffer_that_is_not_given_is_a_fifth():
    for tokens in (79, 80, 90, 100, 101):
        assert overlong(100)("", [0] * tokens) == overlong(100, 20)("", [0] * tokens)


@pytest.mark.parametrize(("longest", "buffer"), [(100, 101), (100, -1), (0, -1)])
def test_a_buffer_that_is_none_is_told(longest, buffer):
    with pytest.raises(UserError, match="buffer"):
        overlong(longest, buffer)


def test_length_costs_a_thousandth_a_token_down_to_minus_one():
    assert [length("", [0] * tokens) for tokens in (0, 1, 999, 1000, 5000)] == [0.0, -0.001, -0.999, -1.0, -1.0]


def test_short_when_right_is_the_formula_of_kimi():
    tokens, answers = [10, 20, 40, 10, 10], ["1", "1", "2", "1", "2"]
    prompts = ["a", "a", "a", "b", "b"]
    paid = short_when_right(exact_match)(prompts, ["1"] * 5, [[0] * each for each in tokens], answers)
    lambdas = [0.5 - (each - 10) / 30 for each in tokens[:3]]
    assert paid == pytest.approx([lambdas[0], lambdas[1], min(0, lambdas[2]), 0.0, 0.0])
    chats = [[{"role": "assistant", "content": "1"}]] * 5
    assert short_when_right(exact_match)(prompts, chats, [[0] * each for each in tokens], answers) == paid


@pytest.mark.parametrize("tokens", [0, 1, 50, 99, 100, 300])
def test_cosine_is_open_r1s_formula(tokens):
    paid = cosine(exact_match, 100)
    swing = math.cos(min(1.0, tokens / 100) * math.pi)
    assert paid("1", [0] * tokens, "1") == pytest.approx(0.5 + 0.5 * 0.5 * (1 + swing))
    assert paid("2", [0] * tokens, "1") == pytest.approx(-0.5 - 0.5 * 0.5 * (1 + swing))


# ---- repetition


@pytest.mark.parametrize("words", [1, 2, 3, 5])
@pytest.mark.parametrize("text", ["", "a", "a b c d e f", "a b a b a b a b", "The the THE the the the", "so " * 500])
def test_repetition_is_the_share_of_phrases_seen_before(words, text):
    split = text.lower().split()
    phrases = [tuple(split[start : start + words]) for start in range(len(split) - words + 1)]
    expected = -(1 - len(set(phrases)) / len(phrases)) if phrases else 0.0
    assert repetition_penalty(words)(text) == pytest.approx(expected)


def test_scripts_without_spaces_repeat_too():
    assert repetition("我们来看看" * 20) < -0.9
    assert repetition("我们来看看这个问题") == 0.0


def test_phrases_of_no_words_are_told():
    with pytest.raises(UserError, match="phrases"):
        repetition_penalty(0)
