"""`number` and `strict_number` on the ways in which models write a number, and beside the formula of verl's score."""

import re

import pytest

from grpo.rewards import number, strict_number


@pytest.mark.parametrize(
    ("completion", "flexible", "strict"),
    [
        ("24 + 48 = 72", 1, 0),
        ("24 + 48 = 72\n#### 72", 1, 1),
        ("#### 72\nThat was 1 problem of 3.", 1, 1),
        ("#### 71\n#### 72", 1, 1),
        ("#### 72 clips", 1, 1),
        ("#### 72 of 80 clips", 0, 0),
        (r"So \boxed{72}.", 1, 1),
        (r"So $\boxed{72}$ clips, which is 3 boxes.", 1, 1),
        (r"\boxed{24} in May and \boxed{72} in all", 1, 1),
        (r"\boxed{72 \text{ clips}}", 1, 1),
        (r"\boxed{72\%}", 1, 1),
        (r"\boxed{x = 72}", 1, 1),
        (r"\boxed{72", 1, 1),
        (r"\boxed 72", 1, 1),
        (r"Answer in \boxed{}. 72", 1, 0),
        (r"\boxed{\frac{72}{1}}", 0, 0),
        ("<answer>72</answer>", 1, 1),
        ("<answer>\\boxed{72}</answer> 5", 1, 1),
        ("<answer>#### 72</answer>", 1, 1),
        ("<answer>24 + 48 = 72</answer>", 1, 0),
        ("**Answer:** 72", 1, 0),
        ("**Answer: 72**", 1, 0),
        ("The answer is $72. She has 3 children.", 1, 0),
        ("The final answer is: $72$", 1, 0),
        ("## Answer\n\n72 clips", 1, 0),
        ("答案是72", 1, 0),
        ("The answer is not 71. It is 72.", 1, 0),
        ("72.", 1, 0),
        ("72.00", 1, 0),
        ("$72", 1, 0),
        ("72%", 1, 0),
        ("- 72 clips", 1, 0),
        ("<think>71</think>72", 1, 0),
        ("<think>\\boxed{71}</think>\\boxed{72}", 1, 1),
        ("<think>it is \\boxed{72}</think>", 1, 1),
        ("<think>it is 72, or", 1, 0),
        ("-72", 0, 0),
        ("7 2", 0, 0),
        ("72a1", 1, 0),
        ("a72", 0, 0),
        ("720", 0, 0),
        ("", 0, 0),
        ("no", 0, 0),
        ("#### ", 0, 0),
        ("\\boxed{", 0, 0),
        ("\N{ARABIC-INDIC DIGIT SEVEN}\N{ARABIC-INDIC DIGIT TWO}", 0, 0),
    ],
)
def test_the_number_counts_where_models_put_it(completion, flexible, strict):
    assert strict_number(completion, "72") == strict
    assert number(completion, "72") == flexible


@pytest.mark.parametrize("written", ["1080", "1,080", "$1,080.00", r"1{,}080", r"1\,080", "1080.0", r"\$1,080"])
@pytest.mark.parametrize(
    "gold", ["1080", "1,080", "$1080", 1080, 1080.0, "12 * 90 = 1080\n#### 1,080", "12 * 90 =\nA: 1080"]
)
def test_numbers_are_compared_by_value(written, gold):
    assert number(f"It is {written}", gold) == number(rf"\boxed{{{written}}}", gold) == 1.0
    assert number(f"It is {written}9", gold) == 0.0


def test_a_sign_belongs_to_a_number_that_nothing_stands_before():
    assert number("3 - 5", "5") == number("(3) -5", "5") == 1.0
    assert (
        number("x = -5", "-5") == number("-$5", "-5") == number("$-5", "-5") == number("\N{MINUS SIGN}5", "-5") == 1.0
    )


@pytest.mark.parametrize("gold", ["five", "3 or 4", "", None, [72], float("nan"), "x + y"])
def test_a_gold_answer_that_is_no_number_is_an_error(gold):
    with pytest.raises(ValueError, match="gold answer"):
        number("72", gold)


def verl_gsm8k(text: str, gold: str, method: str) -> float:
    """verl's formula (utils/reward_score/gsm8k.py), from its description."""
    if method == "strict":
        found = re.findall(r"#### (\-?[0-9\.\,]+)", text[-300:])
    else:
        found = [each for each in re.findall(r"(\-?[0-9\.\,]+)", text[-300:]) if each not in ("", ".")]
    return float(bool(found) and found[-1].replace(",", "").replace("$", "") == gold)


@pytest.mark.parametrize(
    "text", ["6 * 7 = 42\n#### 42", "#### 41\n#### 42", "42", "It is 42", "#### 1,042", "nothing", ""]
)
@pytest.mark.parametrize("gold", ["42", "41", "1042"])
def test_what_verl_pays_is_paid(text, gold):
    assert number(text, gold) == verl_gsm8k(text, gold, "flexible")
    assert strict_number(text, gold) == verl_gsm8k(text, gold, "strict")
