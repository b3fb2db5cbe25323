"""The task files: their gold answers get full marks, and hostile answers get nothing and harm nothing."""

import inspect
import json
import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest

from grpo import Task
from grpo.data import load_rows
from grpo.errors import UserError
from grpo.policy import load_tokenizer
from grpo.prompts import build_prompts
from grpo.task import load_task

TASKS = Path(__file__).parents[1] / "tasks"
NAMES = ("gsm8k", "countdown", "reverse")
MAXIMA = {
    "gsm8k": {"correctness": 2.0, "integer": 0.5, "strict_xml": 0.5, "soft_xml": 0.5, "xml_count": 0.5},
    "countdown": {"reaches_target": 1.0, "soft_xml": 0.5},
    "reverse": {"reversed_letters": 1.0, "right_start": 0.5, "soft_xml": 0.5},
}


def marks(task, completion, row):
    """{reward name: what it gives}, calling each reward with the columns that it names."""
    columns = {"completion": completion, **row}
    return {
        reward.__name__: reward(**{name: columns[name] for name in inspect.signature(reward).parameters})
        for reward in task.rewards
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_gold_completions_get_full_marks(name, split):
    task = load_task(TASKS / f"{name}.py")
    for row in islice(task.rows(split, "embedded"), 200):
        assert marks(task, task.gold_text(row), row) == MAXIMA[name], row
    assert task.solved == (task.solved[0], MAXIMA[name][task.solved[0]])


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_reproducible_and_the_splits_disjoint(name):
    task = load_task(TASKS / f"{name}.py")
    prompts = {}
    for split in ("train", "test"):
        rows = list(task.rows(split, "embedded"))
        assert rows[:20] == list(islice(task.rows(split, "embedded"), 20))
        prompts[split] = {task.prompt(row)[-1]["content"] for row in rows}
        assert len(prompts[split]) == len(rows) >= 1000
    assert not prompts["train"] & prompts["test"]


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_a_system_and_a_user_message(name):
    task = load_task(TASKS / f"{name}.py")
    row = next(iter(task.rows("test", "embedded")))
    assert [message["role"] for message in task.prompt(row)] == ["system", "user"]


def test_gsm8k_reads_the_columns_of_the_hub(tmp_path):
    solution = "She sold 48/2 = <<48/2=24>>24 clips.\nIt cost $<<1000+80=1080>>1,080.\n#### 1,080"
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "How much?", "answer": solution}))
    task = load_task(TASKS / "gsm8k.py")
    [row] = task.rows("test", str(tmp_path))
    assert row == {
        "question": "How much?",
        "solution": "She sold 48/2 = 24 clips.\nIt cost $1,080.",
        "answer": "1,080",
    }
    assert marks(task, task.gold_text(row), row) == MAXIMA["gsm8k"]
    assert marks(task, task.gold_text({**row, "answer": "1081"}), row)["correctness"] == 0.0


# ---- prompts


def exact(completion, answer):
    return float(completion == answer)


def task_with(**fields):
    """A small task that differs from a good one in these fields."""
    good = dict(
        name="small",
        rows=lambda split, data: [{"question": "1 + 1?", "answer": "2"}],
        prompt=lambda row: [{"role": "user", "content": row["question"]}],
        rewards={exact: 1.0},
        gold="{answer}",
        solved=("exact", 1.0),
        data="embedded",
    )
    return Task(**(good | fields))


def prompts_of(content, template=None, rows=1):
    """build_prompts of rows for which `prompt` gives `content`."""
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = template or tokenizer.chat_template
    task = task_with(prompt=content if callable(content) else lambda row: content)
    return build_prompts(task, [{"answer": str(index)} for index in range(rows)], tokenizer, room=200)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"name": None}, "`name` is None. It must be text."),
        ({"rows": []}, "`rows` is []. It must be a function."),
        ({"rewards": [exact]}, "It must be {reward: weight}"),
        ({"rewards": None}, "`rewards` is None"),
        ({"solved": None}, "`solved` is None"),
        ({"solved": ("exact",)}, "`solved` is ('exact',)"),
        ({"solved": "ab"}, "`solved` is 'ab'"),
        ({"solved": ("exact", "1")}, "`solved` is ('exact', '1')"),
        ({"gold": None}, "`gold` is None"),
        ({"gold": str}, "`gold` is <class 'str'>"),
        ({"gold": "{answer}}"}, "Single '}' encountered"),
        ({"gold": "{} {answer}"}, "where a place has no name"),
        ({"config": {"steps": 3}}, "`config` is {'steps': 3}. It must be a Config"),
        ({"embedded": {"modle": "embedded"}}, "`embedded` has modle"),
        ({"embedded": {"base": "fp32"}}, "base is 'fp32'"),
        ({"embedded": None}, "`embedded` is None"),
    ],
)
def test_a_malformed_task_is_refused(fields, told):
    with pytest.raises(UserError) as caught:
        task_with(**fields)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("gold", "answer", "told"),
    [
        ("{answer.foo}", "2", "has no attribute 'foo'"),
        ("{answer:d}", "2", "Unknown format code 'd'"),
        ('{"answer": "{answer}"}', "2", "a brace that is meant as such is written twice"),
        ("{answer}", "bad \ud83d", "half a surrogate pair"),
    ],
)
def test_gold_that_a_row_does_not_fill_is_told(gold, answer, told):
    with pytest.raises(UserError) as caught:
        task_with(gold=gold).gold_text({"answer": answer})
    assert told in str(caught.value)


@pytest.mark.parametrize("row", ["text", ("q", "a"), 3, None])
def test_a_row_is_a_dict(row):
    with pytest.raises(UserError, match="as row 1 of embedded"):
        load_rows(task_with(rows=lambda split, data: [{"answer": "2"}, row]), "train", "embedded")


@pytest.mark.parametrize(("answer", "told"), [(lambda text: 1 / 0, "ZeroDivisionError"), (list, "(list)")])
def test_an_answer_that_fails_is_told(answer, told):
    with pytest.raises(UserError) as caught:
        task_with(answer=answer).vote("some text")
    assert told in str(caught.value)


def test_a_task_file_that_is_no_python_file(tmp_path):
    (tmp_path / "task.txt").write_text("x = 1")
    with pytest.raises(UserError, match=r"is not a Python file\. .* ends in \.py"):
        load_task(tmp_path / "task.txt")


REFUSAL = "{{ raise_exception('System role not supported') }}"
PLAIN = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
GEMMA = "{% if messages[0]['role'] == 'system' %}" + REFUSAL + "{% endif %}" + PLAIN


def test_where_the_template_refuses_a_system_message_the_user_says_it():
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1?"}]
    [prompt] = prompts_of(messages, GEMMA)
    assert prompt.text == "<user>Think.\n\n1 + 1?"
    assert prompt.messages == messages
    [prompt] = prompts_of(messages, PLAIN)
    assert prompt.text == "<system>Think.<user>1 + 1?"


@pytest.mark.parametrize("roles", [["system"], ["system", "system"], ["user"]])
def test_messages_that_the_template_refuses_are_told(roles):
    template = REFUSAL if roles == ["user"] else GEMMA
    with pytest.raises(UserError, match=f"row 0: .*System role not supported.* Their roles are {', '.join(roles)}"):
        prompts_of([{"role": role, "content": "x"} for role in roles], template)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "gave an empty text for row 0"),
        (None, "gave None (NoneType) for row 0"),
        ([], "gave [] (list)"),
        (7, "gave 7 (int)"),
        ({"role": "user", "content": "x"}, "(dict)"),
        (("a", "b"), "(tuple)"),
        (["a", "b"], "the message 'a' (str)"),
        ([{"role": "user", "content": None}], "a message whose content is None"),
        ([{"role": "user", "content": 5}], "a message whose content is 5"),
        ([{"role": "user"}], "a message whose content is None"),
        ([{"content": "x"}], "a message whose role is None"),
        ([{"role": "user", "content": ""}], "an empty text"),
        ([{"role": "user", "content": "bad \ud83d"}], "half a surrogate pair, '\\ud83d', at place 4"),
        ("bad \ud83d", "half a surrogate pair"),
        (lambda row: "text" if row["answer"] == "3" else [{"role": "user", "content": "x"}], "rows 0 and 3 differ"),
    ],
)
def test_what_is_asked_must_be_text(content, told):
    with pytest.raises(UserError) as caught:
        prompts_of(content, rows=5)
    assert told in str(caught.value)


@pytest.fixture(scope="module")
def countdown():
    load_task(TASKS / "countdown.py")
    return sys.modules["grpo_task_countdown"]


def answered(expression):
    return f"<reasoning>\nx\n</reasoning>\n<answer>\n{expression}\n</answer>\n"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("4/(2*3)", Fraction(2, 3)),
        ("((4)) - 3 - 2", -1),
        ("3*(4-2)", 6),
    ],
)
def test_an_expression_has_its_exact_value(countdown, expression, value):
    assert countdown.evaluate(expression, [2, 3, 4]) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "2 + 3",  # one number missing
        "2 + 3 + 4 + 4",  # one twice
        "23 + 4",
        "2 ** 3 ** 4",
        "2 // 3 + 4",
        "-2 + 3 + 4",
        "2(3)(4)",
        "2 3 4",
        "2 + 3 + 4)",
        "2 / (3 - 3) + 4",
        "2 + 3 + 4 = 9",
        "2 + 3 + 4\n+ 0",
        "02 + 3 + 4",
        "2_ + 3 + 4",
        "\u0662 + 3 + 4",  # an Arabic two
        "0x2 + 3 + 4",
        "2 + 3 + True",
        "(lambda: 2 + 3 + 4)()",
        "__import__('os').system('true')",
        "9" * 5000,
        "(" * 50 + "2 + 3 + 4" + ")" * 50,
        "(" * 5000 + "2 + 3 + 4" + ")" * 5000,
        "9**9**9**9",
        "2 +" * 10_000,
        "\x00",
    ],
)
def test_anything_else_earns_nothing(countdown, expression):
    assert countdown.evaluate(expression, [2, 3, 4]) is None
    assert countdown.reaches_target(answered(expression), [2, 3, 4], 9) == 0.0


def test_division_by_zero_earns_nothing(countdown):
    assert countdown.evaluate("2 / (3 - 3)", [2, 3, 3]) is None


def test_a_solution_reaches_its_target_and_no_other(countdown):
    assert countdown.reaches_target(answered("(2 + 3) * 4"), [4, 3, 2], 20) == 1.0
    assert countdown.reaches_target(answered("(2 + 3) * 4"), [4, 3, 2], 21) == 0.0
    assert countdown.reaches_target("(2 + 3) * 4", [4, 3, 2], 20) == 0.0


def test_reverse_pays_for_the_letters_before_the_first_mistake():
    task = load_task(TASKS / "reverse.py")
    row = {"letters": "a b c d", "answer": "d c b a"}
    assert marks(task, answered("d c b a"), row)["reversed_letters"] == 1.0
    assert marks(task, answered("d c a b"), row) == {"reversed_letters": 0.0, "right_start": 0.25, "soft_xml": 0.5}
    assert marks(task, answered("d c b a a a a a"), row)["right_start"] == 0.25
    assert marks(task, "d c b a", row) == {"reversed_letters": 0.0, "right_start": 0.0, "soft_xml": 0.0}
