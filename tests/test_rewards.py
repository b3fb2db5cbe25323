"""The shipped rewards pay what their documentation says, on the format and on every known way to miss it."""

import doctest
import importlib
import math
from decimal import Decimal
from fractions import Fraction

import pytest

from grpo.rewards import (
    correctness,
    exact_match,
    extract_answer,
    final_answer,
    integer,
    parse_number,
    same_answer,
    similarity,
    soft_xml,
    strict_xml,
    xml_count,
)

FIVE = (correctness, integer, strict_xml, soft_xml, xml_count)


def five(completion, gold="5"):
    """correctness, integer, strict, soft, count"""
    return (correctness(completion, gold), *(reward(completion) for reward in FIVE[1:]))


def formatted(reasoning, answer):
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


@pytest.mark.parametrize("name", ["correctness", "gold", "integer", "text", "xml_format"])
def test_the_examples_of_the_docstrings_hold(name):
    failed, tried = doctest.testmod(importlib.import_module(f"grpo.rewards.{name}"))
    assert tried > 0
    assert failed == 0


# The rows are the hand-made completions on which the circulating copies of these rewards go wrong.
@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (formatted("2 + 3 = 5", "5") + "\n", (2, 0.5, 0.5, 0.5, 0.5)),
        (formatted("2 + 3 = 5", "5"), (2, 0.5, 0.5, 0.5, 0.5)),
        (formatted("2 + 3\n\n= 5", "5") + "\n", (2, 0.5, 0.5, 0.5, 0.5)),
        (formatted("x " * 2000, "5"), (2, 0.5, 0.5, 0.5, 0.5)),
        (formatted("2 - 7", "-5"), (0, 0.5, 0.5, 0.5, 0.5)),
        (formatted("2 + 3", "five"), (0, 0, 0.5, 0.5, 0.5)),
        (formatted("2 + 3", "5.5"), (0, 0, 0.5, 0.5, 0.5)),
        ("<reasoning>2 + 3</reasoning><answer>5</answer>", (2, 0.5, 0, 0.5, 0)),
        ("<reasoning>\n2 + 3\n</reasoning>\n\n<answer>\n5\n</answer>", (2, 0.5, 0, 0.5, 0.5)),
        ("5", (0, 0, 0, 0, 0)),
        ("", (0, 0, 0, 0, 0)),
        ("<answer>\n5\n</answer>", (2, 0.5, 0, 0, 0.125)),
        ("The answer is 5. " + formatted("", ""), (0, 0, 0, 0, 0.5)),
        (formatted("   ", "5"), (2, 0.5, 0, 0, 0.5)),
        (formatted("2 + 3", "5") * 2, (2, 0.5, 0, 0, 0)),
        (formatted("2 + 3 <answer>\n9\n</answer>", "5"), (2, 0.5, 0, 0, 0.25)),
        ("So: " + formatted("2 + 3", "5"), (2, 0.5, 0, 0, 0.5)),
        (formatted("2 + 3", "5")[: -len("</answer>")], (0, 0, 0, 0, 0.375)),
        ("</answer>5<answer>", (0, 0, 0, 0, 0)),
    ],
)
def test_the_five_rewards_pay_what_they_say(completion, expected):
    assert five(completion) == expected


def test_trailing_text_costs_a_thousandth_a_character_down_to_nothing():
    whole = formatted("2 + 3", "5")
    assert xml_count(whole + "\n") == 0.5
    assert math.isclose(xml_count(whole + "\n" + "x" * 99), 0.5 - 0.1)
    assert math.isclose(xml_count(whole + "x" * 100 + "\n"), 0.5 - 0.1)
    assert xml_count(whole + "x" * 5000) == 0.0
    assert soft_xml(whole + "x" * 5000) == 0.5
    assert strict_xml(whole + "x") == 0.0


def test_a_tag_pays_once_and_only_alone_on_its_line():
    assert xml_count("<reasoning>\n") == 0.125
    assert xml_count("<reasoning>\n<reasoning>\n") == 0.0
    assert xml_count("<reasoning>\nso <reasoning>, and") == 0.0
    assert xml_count("<reasoning> so") == 0.0
    assert xml_count("<reasoning>\nso\n</reasoning>\n") == 0.25


@pytest.mark.parametrize(
    ("predicted", "gold", "equal"),
    [
        ("1080", "1,080", True),
        ("$1,080.00", "1080", True),
        ("1 080", "1080", True),
        (" 72 ", "72", True),
        ("072", "72", True),
        ("72.", "72", True),
        (".5", "0.50", True),
        ("-$5", "$-5", True),
        ("\N{MINUS SIGN}5", "-5", True),
        ("+5", "5", True),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 5000, "9" * 4999 + "8", False),
        ("0.1", "0.10000000000000001", False),
        ("5", "-5", False),
        ("--5", "5", False),
        ("3 4", "34", False),
        ("3,4", "34", False),
        ("10,80", "1080", False),
        ("5 apples", "5", False),
        ("5%", "5", False),
        ("\N{ARABIC-INDIC DIGIT FIVE}", "5", False),
        ("", "5", False),
        ("x  = y", "x = y", True),
        ("X = y", "x = y", False),
    ],
)
def test_numbers_are_compared_by_value_and_the_rest_as_text(predicted, gold, equal):
    assert same_answer(predicted, gold) is equal
    assert same_answer(gold, predicted) is equal
    assert correctness(f"<answer>{predicted}</answer>", gold) == 2.0 * equal


def test_every_way_of_writing_a_number_means_that_number():
    for number in (0, 7, 80, 999, 1000, 1080, 123456, 1234567, 10**12):
        for spelled in (str(number), f"{number:,}", f"${number:,}", f"{number:,}".replace(",", " "), f" {number}.0 "):
            assert parse_number(spelled) == Decimal(number)
            assert integer(f"<answer>{spelled}</answer>") == 0.5
            assert integer(f"<answer>-{spelled.strip()}</answer>") == 0.5


@pytest.mark.parametrize(
    "text", ["", "-", "$", ",", ".", "1e5", "0x10", "1/2", "inf", "nan", "1,,000", "1.2.3", "five"]
)
def test_what_is_no_number_is_none(text):
    assert parse_number(text) is None
    assert integer(f"<answer>{text}</answer>") == 0.0


def test_the_gold_may_be_a_solution_or_a_number():
    completion = formatted("48 + 24", "72")
    assert correctness(completion, "48 / 2 = <<48/2=24>>24\n#### 72") == 2.0
    assert correctness(completion, "72") == correctness(completion, 72) == correctness(completion, 72.0) == 2.0
    assert correctness(completion, "48 / 2 = 24\n#### 24") == 0.0
    assert final_answer("no marks") == "no marks"


def test_the_answer_is_that_of_the_last_whole_pair():
    assert extract_answer("<answer>1</answer> no, <answer>\n2\n</answer> that is it") == "2"
    assert extract_answer("<answer>1</answer> or <answer>2") == "1"
    assert extract_answer("<answer>1<answer>2</answer>") == "2"
    assert extract_answer("<answer></answer>") == ""
    for text in ("", "5", "<answer>5", "5</answer>", "</answer>5<answer>"):
        assert extract_answer(text) is None


def test_no_completion_takes_long():
    # Each would take minutes in a pattern that can match in many ways; a hang fails the suite.
    for text in ("<reasoning>\n" * 20_000, "<reasoning>" + " " * 200_000, ("</reasoning>\n<answer>\n" * 20_000)):
        assert five(text)[:4] == (0, 0, 0, 0)


def test_text_rewards():
    assert exact_match(" olleh\n", "olleh") == 1.0
    assert exact_match("olleh!", "olleh") == 0.0
    assert similarity("olleh", "olleh") == 1.0
    assert similarity("xyz", "olleh") == 0.0
    # 4 characters in common order, of 5 + 5: by hand.
    assert math.isclose(similarity("oleh!", "olleh"), 2 * 4 / 10)


def test_nothing_is_never_the_right_answer():
    for nothing in ("", " ", "\n\t "):
        assert not same_answer(nothing, nothing)
        assert not same_answer(nothing, "5")
        for gold in ("5", "x", 5):
            assert correctness(f"<answer>{nothing}</answer>", gold) == 0.0
            assert exact_match(nothing, gold) == 0.0
            assert similarity(nothing, gold) == 0.0


@pytest.mark.parametrize("gold", [None, "", " \n", [5], ["5"], {"a": 5}, (5,), {5}, b"5", math.nan, math.inf, 1j])
@pytest.mark.parametrize("reward", [correctness, exact_match, similarity])
def test_what_is_no_gold_answer_is_never_compared_as_its_text(reward, gold):
    for completion in (f"<answer>{gold}</answer>", str(gold), ""):
        with pytest.raises(
            ValueError, match=r"the gold answer is .*; it must be text that is not blank, or a finite number"
        ):
            reward(completion, gold)


def test_a_gold_answer_may_be_any_finite_number():
    for gold in (5, 5.0, Decimal(5), Fraction(5), True + 4):
        assert correctness(formatted("2 + 3", "5"), gold) == 2.0
    assert correctness(formatted("", "9" * 500), 10**500 - 1) == 2.0
    with pytest.raises(ValueError, match="which is blank"):
        correctness("<answer></answer>", "48 + 24 ####")
