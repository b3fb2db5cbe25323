"""The two splits: gold answers that are missing, held-out prompts that are training prompts, what is held out."""

from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from small_task import SMALL_CONFIG, task_with

from grpo.errors import UserError
from grpo.questions import build_questions
from grpo.splits import Answers

# ---- gold answers


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "None"),
        (float("nan"), "nan"),
        (np.float32("nan"), "nan"),
        ("", "'', an empty text"),
        (" \n", "an empty text"),
        (["2"], r"\['2'\] \(list\), no single answer"),
        ({"a": 1}, "no single answer"),
        (np.array([2]), "no single answer"),
        (b"2", "no single answer"),
    ],
)
def test_an_answer_that_is_none_is_refused_with_its_row(value, told):
    values = ["2", value, 3, value]
    rows = [{"question": f"{place}?", "answer": value} for place, value in enumerate(values)]
    task = task_with(rows=lambda split, data: rows if split == "train" else [{"question": "x", "answer": 0}])
    with pytest.raises(
        UserError, match=rf"^The gold answer is missing in 2 rows of .*\(train\) \(row 1: `answer` is .*{told}.*row 3"
    ):
        build_questions(task, SMALL_CONFIG, note=list)


@pytest.mark.parametrize("value", [0, -1, 0.0, 2.5, True, Fraction(1, 3), Decimal("1.5"), np.int64(3), "0", "None"])
def test_numbers_and_texts_are_answers(value):
    assert task_with().missing_gold({"question": "?", "answer": value}) == ""


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_the_deciding_reward_reads_must_be_there_unless_it_has_a_default(wrapped):
    def right(completion, answer, unit="", numbers=()):
        return 1.0

    right = partial(right, unit="m") if wrapped else right
    columns = {"question": "?", "working": " ", "answer": "4", "unit": None, "numbers": []}
    task = task_with(gold="{working}{question}", rewards={right: 1.0}, solved=("right", 1.0))
    answers = Answers(task)
    answers.add(0, columns)
    answers.check("data")  # working that is not shown is no answer that is missing
    answers.add(1, columns | {"answer": None})
    answers.add(2, {key: value for key, value in columns.items() if key != "answer"})
    with pytest.raises(UserError, match=r"in 2 rows of data .*row 1: `answer` is None; row 2: `answer` is None"):
        answers.check("data")


# ---- the two splits


def splits(train, test, **fields):
    """The questions of a task with these texts as its training and test prompts; and what was noted."""
    texts, notes = {"train": train, "test": test}, []
    task = task_with(rows=lambda split, data: [{"question": text, "answer": "2"} for text in texts[split]], **fields)
    return build_questions(task, SMALL_CONFIG, note=notes.append), "\n".join(notes)


def asked(prompts):
    return [prompt.fields["question"] for prompt in prompts]


def test_held_out_prompts_that_are_training_prompts_are_told_and_counted():
    _, notes = splits(["a", "b", "c"], ["c", "d", "e", "a"])
    assert "2 of 4 held-out prompts of embedded (test) are training prompts too (rows 0, 3)" in notes
    _, notes = splits(["a", "b", "c"], ["d"])
    assert "training prompts too" not in notes


def test_a_task_that_ignores_its_split_is_refused_unless_it_says_so():
    with pytest.raises(UserError, match=r"let `rows` of task small look at its `split`.*`held_out=100`"):
        splits(["a", "b", "c"], ["a", "b", "c"])
    questions, notes = splits(["a", "b", "c"], ["a"], held_out=0)
    assert asked(questions.train) == asked(questions.test) == ["a", "b", "c"]
    assert "its held-out score is that of training prompts" in notes


def test_both_splits_ask_in_the_same_way():
    def prompt(row):
        return row["question"] if row["question"] == "b" else [{"role": "user", "content": row["question"]}]

    with pytest.raises(UserError, match="chat messages for one split and a text for the other"):
        splits(["a"], ["b"], prompt=prompt)


def test_held_out_prompts_are_the_same_in_any_order_and_leave_nothing_behind():
    texts = [f"question {number}" for number in range(40)]
    questions, _ = splits(texts + texts[:10], [], held_out=4)
    test, train = asked(questions.test), asked(questions.train)
    assert len(test) == len(set(test)) == 4
    assert set(train) == set(texts) - set(test)
    assert len(train) == 50 - sum(2 if text in texts[:10] else 1 for text in test)
    assert set(asked(splits(texts[::-1], [], held_out=4)[0].test)) == set(test)
    # Of more, the first are the same: a run that asks fewer of them asks some of these.
    assert asked(splits(texts, [], held_out=9)[0].test)[:4] == test
    assert [prompt.index for prompt in questions.test] == [texts.index(text) for text in test]
    with pytest.raises(
        UserError, match=r"40 prompts of task small are to be held out, but .* asks only 40 different prompts"
    ):
        splits(texts, [], held_out=40)


def test_of_prompts_that_are_too_long_the_longest_is_asked_first_and_named():
    """A prompt of 10 MB takes seconds to tell the length of; where one is too long the others need not be tried."""
    rows = [{"question": "word " * count, "answer": "1"} for count in (5, 3000, 9000, 4000)]
    task = task_with(
        rows=lambda split, data: rows if split == "train" else [{"question": "x", "answer": "1"}],
        prompt=lambda row: row["question"],
    )
    with pytest.raises(UserError, match=r"^The prompt of row 2 has \d+ tokens"):
        build_questions(task, SMALL_CONFIG, note=list)
