"""The task files: their gold answers get full marks, and hostile answers get nothing and harm nothing."""

import inspect
import json
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from random import random

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from toy_task import SMALL, TASK

from grpo import Config, Task
from grpo.cautions import cautions
from grpo.data import JsonLines, Rows, read_rows
from grpo.errors import UserError
from grpo.policy import load_tokenizer
from grpo.prompts import Asker, Prompts, Survey, build_prompts
from grpo.questions import build_questions, preflight_rewards
from grpo.run import main
from grpo.seeds import mix_seed
from grpo.splits import Answers
from grpo.stream import PromptStream
from grpo.task import load_task
from grpo.watchdog import Limit

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
    return prompts_for(
        Asker(task, tokenizer, longest_prompt=200, vocabulary=2000), [{"answer": str(n)} for n in range(rows)]
    )


def prompts_for(asker, rows):
    survey = Survey(asker)
    for index, row in enumerate(rows):
        survey.add(index, row)
    return build_prompts(asker, rows, survey, range(len(rows)))[0]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"name": None}, "`name` is None, which is no text."),
        ({"rows": []}, "`rows` is []. It must be a function."),
        ({"rewards": [exact]}, "It must be {reward: weight}"),
        ({"rewards": None}, "`rewards` is None"),
        ({"solved": ("exact",)}, "`solved` is ('exact',)"),
        ({"solved": "ab"}, "`solved` is 'ab'"),
        ({"solved": ("exact", "1")}, "`solved` is ('exact', '1')"),
        ({"gold": 5}, "`gold` is 5"),
        ({"gold": str}, "`gold` is <class 'str'>"),
        ({"gold": "{answer}}"}, "Single '}' encountered"),
        ({"gold": "{} {answer}"}, "where a field has no name"),
        ({"gold": "{answer:>1000000000}"}, "not as long as that"),
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
        list(Rows(task_with(rows=lambda split, data: [{"answer": "2"}, row]), "train", "embedded"))


async def rows_of_a_coroutine(split, data):
    return [{"answer": "2"}]


async def rows_one_after_the_other(split, data):
    yield {"answer": "2"}


@pytest.mark.parametrize("rows", [lambda split, data: None, rows_of_a_coroutine, rows_one_after_the_other])
def test_rows_are_rows(rows):
    with pytest.raises(UserError, match=r"`rows` of task \w+ gave .* for embedded \(train\)\. Write it with `def`"):
        Rows(task_with(rows=rows), "train", "embedded")


@pytest.mark.parametrize(("answer", "told"), [(lambda text: 1 / 0, "ZeroDivisionError"), (list, "(list)")])
def test_an_answer_that_fails_is_told(answer, told):
    with pytest.raises(UserError) as caught:
        task_with(answer=answer).vote("some text")
    assert told in str(caught.value)


def test_a_task_file_that_is_no_python_file(tmp_path):
    (tmp_path / "task.txt").write_text("x = 1")
    with pytest.raises(UserError, match=r"is not a Python file\. .* ends in \.py"):
        load_task(tmp_path / "task.txt")


WITH_HELPERS = """
from grpo import Task
from helpers import prompt, rows

def reward(completion):
    return 1.0

task = Task(name="t", rows=rows, prompt=prompt, rewards={reward: 1.0}, gold=None, solved=None, data="embedded")
"""
SPAWNS = """
import multiprocessing, sys
from grpo.task import load_task
if __name__ == "__main__":
    task = load_task(sys.argv[1])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(next(iter(task.rewards)), ["a completion"]))
"""


def test_modules_beside_a_task_file_and_processes_that_a_reward_starts(tmp_path):
    """From another folder, as a run is resumed; a new process unpickles the reward by its module's name."""
    tasks, elsewhere = tmp_path / "tasks", tmp_path / "elsewhere"
    tasks.mkdir(), elsewhere.mkdir()
    (tasks / "helpers.py").write_text("def rows(split, data): return []\ndef prompt(row): return 'x'\n")
    (tasks / "mine.py").write_text(WITH_HELPERS)
    (elsewhere / "spawns.py").write_text(SPAWNS)
    command = [sys.executable, str(elsewhere / "spawns.py"), str(tasks / "mine.py")]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[1.0]\n", "")


REFUSAL = "{{ raise_exception('System role not supported') }}"
PLAIN = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
GEMMA = "{% if messages[0]['role'] == 'system' %}" + REFUSAL + "{% endif %}" + PLAIN


def test_a_template_without_an_end_is_told_in_time(monkeypatch):
    monkeypatch.setattr("grpo.chat_template.TEMPLATE_LIMIT", Limit(0.05, "the longest that it may take", "Mend it."))
    many = "{% for i in range(99999) %}"
    with pytest.raises(UserError, match=r"refuses the messages of row 0: TimeoutError \(no result in 0.05 s"):
        prompts_of([{"role": "user", "content": "x"}], many * 4 + "{% endfor %}" * 4)


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
        ([{"role": "user", "content": "bad \ud83d"}], "half a surrogate pair, '\\ud83d', at character 4"),
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


# ---- rows


def test_json_lines_may_be_blank_or_begin_with_a_byte_order_mark(tmp_path):
    lines = [b'\xef\xbb\xbf{"answer": "1"}\r\n', b"\r\n", b'{"answer": "\xc3\xa4"}\n', b"  \n", b'{"answer": "3"}']
    (tmp_path / "train.jsonl").write_bytes(b"".join(lines))
    rows = read_rows(str(tmp_path), "train")
    assert isinstance(rows, JsonLines)
    expected = [{"answer": "1"}, {"answer": "ä"}, {"answer": "3"}]
    assert list(rows) == expected == [rows[place] for place in range(len(rows))]
    assert rows[1:] == expected[1:] and rows[-1] == expected[-1]
    with pytest.raises(IndexError):
        rows[3]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"answer": }', "line 3 is not JSON"),
        (b"[1, 2]", r"line 3 is '\[1, 2\]'; each line must be a JSON object"),
        (b'{"answer": "\xff"}', "line 3 is not UTF-8"),
        (b"[" * 200_000, "line 3 is not JSON"),
    ],
)
def test_a_line_that_is_no_row_is_told_with_its_number(tmp_path, line, told):
    (tmp_path / "train.jsonl").write_bytes(b'{"answer": "1"}\n\n' + line + b"\n")
    rows = read_rows(str(tmp_path), "train")
    for read in (list, lambda rows: rows[1]):
        with pytest.raises(UserError, match=told):
            read(rows)


def test_a_file_that_is_one_array_is_told(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps([{"question": "a"}, {"question": "b"}], indent=1))
    with pytest.raises(UserError, match=r"line 1 is not JSON.*Each line must be a whole JSON object"):
        list(read_rows(str(tmp_path), "train"))


def test_rows_without_an_end_are_refused():
    def endless(split, data):
        while True:
            yield {"question": "?", "answer": "2"}

    with pytest.raises(UserError, match=r"more than 1,000 rows of embedded .* Does it ever end\?"):
        Rows(task_with(rows=endless), "train", "embedded", most=1000)
    assert len(Rows(task_with(rows=endless), "test", "embedded", first=30)) == 30


def test_rows_that_fill_one_dict_again_and_again_are_different_rows():
    def rows(split, data):
        row = {}
        for number in range(3):
            row["answer"] = str(number)
            yield row

    assert list(Rows(task_with(rows=rows), "train", "embedded")) == [{"answer": "0"}, {"answer": "1"}, {"answer": "2"}]


@pytest.mark.parametrize(("name", "told"), [(5, r"5 \(int\)"), (None, r"None .*csv\.DictReader")])
def test_a_column_has_a_name(name, told):
    with pytest.raises(UserError, match=rf"A column of embedded \(train\) is called {told}"):
        build_questions(task_with(rows=lambda split, data: [{"answer": "2", "question": "?", name: 6}]), SMALL_CONFIG)


def test_rows_of_the_hub_stay_where_they_are():
    """A data set in Arrow's memory: nested columns, missing values, and rows that are asked for by place."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"question": ["a?", "b?", "c?"], "answer": [1, 2, 3], "more": [{"x": [1]}, {"x": []}, None]}
    )
    rows = Rows(task_with(rows=lambda split, data: table), "train", "hub", first=2)
    assert rows._rows is table
    assert list(rows) == rows[:] == [table[0], table[1]]


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".hidden", "", "  ", "x\0y", "a\nb", "a" * 101, "tab\there", "\x1b[31m", "x "]
)
def test_a_name_makes_a_safe_folder(name):
    with pytest.raises(UserError, match="A run's folder is named after it"):
        task_with(name=name)
    assert task_with(name="gsm8k-größer_2").name == "gsm8k-größer_2"


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

SMALL_CONFIG = Config(model="embedded", base="float32", device="cpu", eval_prompts=5, max_completion_tokens=64)


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
    with pytest.raises(UserError, match=r"`held_out` of task small is 40, but .* asks only 40 different prompts"):
        splits(texts, [], held_out=40)


# ---- tokens


def tokenizer_with_bos(kind="llama"):
    """The embedded tokenizer, but it begins every text with <|endoftext|>, and ends it so too if kind is "both"."""
    tokenizer = load_tokenizer("embedded")
    bos = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    single = "<|endoftext|> $A <|endoftext|>" if kind == "both" else "<|endoftext|> $A"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[bos])
    return tokenizer, bos[1]


@pytest.mark.parametrize("kind", ["llama", "both"])
def test_a_text_gets_the_tokenizer_s_first_tokens_once(kind):
    tokenizer, bos = tokenizer_with_bos(kind)
    bare = tokenizer("1 + 1?", add_special_tokens=False)["input_ids"]
    for text in ("1 + 1?", "<|endoftext|>1 + 1?"):
        asker = Asker(task_with(prompt=lambda row, text=text: text), tokenizer, 200, 2000)
        assert prompts_for(asker, [{"answer": "2"}])[0].tokens == [bos, *bare]


@pytest.mark.parametrize("begins", ["", "<|endoftext|>"])
def test_a_chat_has_the_tokens_that_the_template_writes(begins):
    """Also where both the tokenizer and the template begin with the same token."""
    tokenizer, _ = tokenizer_with_bos()
    tokenizer.chat_template = begins + tokenizer.chat_template
    messages = [{"role": "user", "content": "1 + 1?", "tool_calls": None}]
    [prompt] = prompts_for(Asker(task_with(prompt=lambda row: messages), tokenizer, 200, 2000), [{"answer": "2"}])
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1?"}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert prompt.tokens == expected
    assert prompt.messages == messages


def test_a_token_that_the_model_cannot_read_is_told():
    tokenizer = load_tokenizer("embedded")
    text = "1 + 1?"
    largest = max(tokenizer(text)["input_ids"])
    task = task_with(prompt=lambda row: text)
    assert prompts_for(Asker(task, tokenizer, 200, largest + 1), [{"answer": "2"}])
    with pytest.raises(UserError, match=f"makes the token {largest} of row 0, .* only {largest}"):
        prompts_for(Asker(task, tokenizer, 200, largest), [{"answer": "2"}])


CALLS = "{% if m.tool_calls is defined %}{{ m.tool_calls | length }}{% endif %}"
TOOLS = "{% for m in messages %}<{{ m.role }}>" + CALLS + "{{ m.content }}{% endfor %}"


def test_a_field_of_a_message_that_is_none_is_not_there():
    [prompt] = prompts_of([{"role": "user", "content": "x", "tool_calls": None}], TOOLS)
    assert prompt.text == "<user>x"


ANSWERED = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is"}]


def test_a_conversation_that_ends_with_an_answer_is_refused_or_gone_on_with():
    with pytest.raises(UserError, match="ends with the assistant's own answer"):
        prompts_of(ANSWERED)
    tokenizer = load_tokenizer("embedded")
    task = task_with(prompt=lambda row: ANSWERED, continue_final_message=True)
    [prompt] = prompts_for(Asker(task, tokenizer, 200, 2000), [{"answer": "2"}])
    assert prompt.text == tokenizer.apply_chat_template(ANSWERED, tokenize=False, continue_final_message=True)
    assert prompt.text.endswith("It is")


# ---- what is told and stops nothing


def cautions_of(prompt, template=None, gold="{answer}"):
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>"]})
    asker = Asker(task_with(prompt=prompt, gold=gold), tokenizer, 200, 2000)
    rows = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(3)]
    return list(cautions(asker, prompts_for(asker, rows)))


def both_say(row):
    return [{"role": "system", "content": "Think."}, {"role": "user", "content": row["question"]}]


USER_ONLY = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }}" + PLAIN
DATED_IF_ASKED = "{% if date is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + PLAIN


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, []),
        ({"template": USER_ONLY}, ["leaves out, or changes, what the system says in row 0: 'Think.'"]),
        ({"template": DATED}, ["writes today's date into every prompt"]),
        ({"template": DATED_IF_ASKED}, []),
        ({"template": PLAIN + "<think>\n", "gold": "<think>x</think>{answer}"}, ["ends inside <think>, and its gold"]),
        ({"template": PLAIN + "<think>\n", "gold": "x</think>{answer}"}, []),
        ({"gold": "<answer>{answer}</answer>"}, ["<answer> of the gold completion are special tokens"]),
        ({"prompt": lambda row: str(random())}, ["gives something else for row 0 each time"]),
        ({"prompt": lambda row: row.pop("question")}, []),
    ],
)
def test_what_may_not_be_expected_is_told_once(fields, told):
    found = cautions_of(**({"prompt": both_say} | fields))
    assert len(found) == len(told)
    assert all(expected in sentence for expected, sentence in zip(told, found, strict=True))


# ---- many rows


def test_many_prompts_are_those_that_few_are(monkeypatch):
    """Made when they are asked for, as if made at once; no longer than said, and the longest is looked at first."""
    tokenizer = load_tokenizer("embedded")
    rows = [{"question": f"{number} apples and {'more ' * (number % 7)}", "answer": "2"} for number in range(50)]
    asker = Asker(task_with(), tokenizer, 200, 2000)
    survey = Survey(asker)
    for index, row in enumerate(rows):
        survey.add(index, row)
    few, longest = build_prompts(asker, rows, survey, range(50))
    assert longest == max(len(prompt.tokens) for prompt in few)
    monkeypatch.setattr("grpo.prompts.MADE_AT_ONCE", 10)
    monkeypatch.setattr("grpo.prompts.LONGEST_MADE", 8)
    many, bound = build_prompts(asker, rows, survey, range(50))
    assert isinstance(many, Prompts) and list(many) == few and many[3:5] == few[3:5] and many[-1] == few[-1]
    assert longest <= bound <= max(len(prompt.text.encode()) for prompt in few) + 8
    taken = PromptStream(many, seed=3).take(120)
    assert taken == PromptStream(few, seed=3).take(120)
    assert PromptStream(many, seed=3, cursor=100).take(20) == taken[100:]
    rows[31]["question"] = "too long " * 200
    survey = Survey(asker)
    for index, row in enumerate(rows):
        survey.add(index, row)
    with pytest.raises(UserError, match=r"row 31 has .* tokens, but only 200 fit"):
        build_prompts(asker, rows, survey, range(50))


def test_the_order_of_prompts_is_that_of_torch():
    generator = torch.Generator().manual_seed(mix_seed(9, 0))
    order = torch.randperm(6, generator=generator).tolist()
    assert PromptStream(list("abcdef"), seed=9).take(6) == ["abcdef"[place] for place in order]


# ---- without a right answer


def test_a_task_without_right_answers_is_scored_by_its_reward(tmp_path, capsys):
    """From --check to the final line; the reward is below -1, and the best checkpoint is still the best."""
    text = TASK.format(rewards="{short: 1.0}", extra="def short(completion):\n    return -len(completion) / 5 - 2")
    text = re.sub(r"gold=.*", "gold=None,", text)
    path = tmp_path / "toy.py"
    path.write_text(re.sub(r"solved=.*", "solved=None,", text))
    run = tmp_path / "run"
    assert main([str(path), "--check"]) == 0
    assert "The task is ready" in capsys.readouterr().out
    assert main([str(path), *SMALL, "--steps", "2", "--run-dir", str(run)]) == 0
    told = capsys.readouterr().out
    assert "held-out reward: -" in told and "pass@1" not in told
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "eval/reward" in line]
    assert [line["step"] for line in scores] == [0, 2]
    assert all(line["eval/reward/low"] <= line["eval/reward"] <= line["eval/reward/high"] < -1 for line in scores)
    best = max(scores, key=lambda line: line["eval/reward"])
    state = json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["progress"]["best"] == best["eval/reward"] and state["progress"]["best_step"] == best["step"]
    assert main(["--eval", str(run)]) == 0
    assert "  reward -" in capsys.readouterr().out


def test_a_reward_that_fails_without_gold_is_told_before_the_run():
    def fragile(completion):
        return 1 / len(completion)

    task = task_with(gold=None, solved=None, rewards={fragile: 1.0}, held_out=0)
    questions = build_questions(task, SMALL_CONFIG, note=list)
    with pytest.raises(UserError, match=r"`fragile` raised ZeroDivisionError .* row 0"):
        preflight_rewards(task, SMALL_CONFIG, questions, every_row=False, note=list)


def test_rewards_that_never_apply_are_told_before_the_run():
    def silent(completion):
        return None

    def says(completion):
        return 1.0

    def tried(*rewards):
        task = task_with(gold=None, solved=None, rewards=dict.fromkeys(rewards, 1.0), held_out=0)
        questions = build_questions(task, SMALL_CONFIG, note=list)
        return preflight_rewards(task, SMALL_CONFIG, questions, every_row=False, note=list)

    with pytest.raises(UserError, match=r"No reward applies to anything that was tried \(silent returned None"):
        tried(silent)
    assert tried(silent, says).notes == ["`silent` gave no score (None) to anything tried."]


@pytest.mark.parametrize("every_row", [False, True])
def test_a_measure_that_calls_no_gold_answer_right_is_told_before_the_run(every_row):
    def tried(value, pays):
        def says(completion, answer):
            return pays(answer) if completion == answer else 0.0

        rows = [{"question": f"{number}?", "answer": str(number)} for number in range(4)]
        task = task_with(rows=lambda split, data: rows, rewards={says: 1.0}, solved=("says", value), held_out=1)
        questions = build_questions(task, SMALL_CONFIG, note=list)
        return preflight_rewards(task, SMALL_CONFIG, questions, every_row, note=list)

    with pytest.raises(UserError, match=r"`says` pays 5 or more for a right answer, but it paid at most 1 to"):
        tried(5.0, lambda answer: 1.0)
    assert not tried(1.0, lambda answer: 1.0).warnings
    assert "the gold answer of some row gets 0.5. --check says more" in " ".join(
        tried(1.0, lambda answer: 0.5 if answer == "2" else 1.0).warnings
    )
