"""`choice` on the ways in which models choose a letter."""

import pytest

from grpo.rewards import choice


@pytest.mark.parametrize(
    "completion",
    [
        "B",
        "(B)",
        "b)",
        "B.",
        "**B**",
        "B. Lima",
        "**B) Lima**",
        "B: Lima",
        "B. Lima\nbecause A is wrong.",
        "A. Quito lies in Ecuador.\nC. Cusco was long ago.\nB. Lima.",
        "The answer is (B).",
        "The answer is B) Lima",
        "The answer is (B) because (A) and (C) are wrong.",
        "The answer is A. No: the answer is B.",
        "the answer is $\\textbf{(B)}$",
        "Answer: B",
        "**Answer: B**",
        "**Answer:** B",
        "Answer:\n\nB",
        "## Final Answer\n\n**B**",
        "ANSWER: [B]",
        "Final answer: option B",
        "The correct answer is option B.",
        "The correct option is B",
        "The correct choice is (b).",
        "Option B",
        "The best answer is B because A is wrong.",
        "My answer: B",
        "So, the answer is B) 42",
        "Thus the correct option is (B) 42.",
        "B\n\nExplanation: A is no capital.",
        "Answer: I think (B)",
        "The correct answer is **B**.",
        "The answer is option (B): Lima",
        "Therefore, B is correct.",
        "(B) is the right one: (B) is right.",
        "The answer is not A. It is B.",
        "I think it's B",
        "I'd say (B)",
        r"\boxed{B}",
        r"$\boxed{\text{(B)}}$",
        r"\boxed{\textbf{(B)}\ 12}",
        r"\boxed{B: Lima}",
        r"\boxed{\mathrm{B}",
        r"\boxed{A}? No, \boxed{B}. So not A.",
        "<answer>B</answer>",
        "<answer>\nB. Lima\n</answer>",
        r"<answer>The answer is \boxed{B}</answer>",
        "<answer>It must be B.</answer>",
        "<think>The answer is A.</think>\nB",
        "答案是B",
        "答案：B",
        "故选B。",
        "故选：（B）",
    ],
)
def test_a_choice_is_read_as_models_write_it(completion):
    for gold in ("B", "(B)", "b", "B.", "B) Lima", r"\text{(B)}"):
        assert choice(completion, gold) == 1.0
    for other in ("A", "C", "I", "A, B"):
        assert choice(completion, other) == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "no",
        "I don't know.",
        "The answer is I don't know.",
        "A cat is in the list.",
        "\\boxed{}",
        "AB",
        "A or B",
        "Lima",
    ],
)
def test_what_chooses_nothing_or_too_much_earns_nothing(completion):
    assert [choice(completion, gold) for gold in "ABCDEI"] == [0.0] * 6


@pytest.mark.parametrize(
    "completion", ["A, C and D", "The answer is A, C, D.", "ACD", r"\boxed{A, C, D}", "(A), (C) & (D)"]
)
def test_several_right_letters_have_to_be_chosen_exactly(completion):
    assert choice(completion, "A, C, D") == choice(completion, "ACD") == 1.0
    assert choice(completion, "A, C") == choice(completion, "A") == choice(completion, "A, B, C, D") == 0.0


def test_letters_beyond_e():
    assert choice("The answer is (J).", "J") == choice("Z", "Z") == choice("The answer is I.", "I") == 1.0


def test_an_article_is_no_choice():
    assert choice("The best answer is A because B is wrong.", "A") == 1.0
    assert choice("The answer is a cat.", "A") == choice("A cat is in the list.", "A") == 0.0


@pytest.mark.parametrize("gold", [1, "", None, "Lima", "1", ["B"], "a cat"])
def test_a_gold_answer_that_is_no_letter_is_an_error(gold):
    with pytest.raises(ValueError, match="gold answer"):
        choice("B", gold)
