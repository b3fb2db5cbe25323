"""The task files that ship: gold answers get full marks, hostile answers get nothing and harm nothing."""

import inspect
import json
import subprocess
import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest

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


def test_a_task_file_is_loaded_without_torch():
    """It takes more than a second to import, and --help and every mistake in a task file would wait for it."""
    program = (
        f"import sys; from grpo.task import load_task; load_task({str(TASKS / 'gsm8k.py')!r}); "
        "print(sorted({'torch', 'triton', 'transformers', 'datasets', 'grpo_kernels'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


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
