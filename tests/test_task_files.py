"""The task files that ship: gold answers get full marks, hostile answers get nothing and harm nothing."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest
from toy_task import TASK

from grpo.errors import UserError
from grpo.resolve import resolve
from grpo.run import main
from grpo.task import load_task

TASKS = Path(__file__).parents[1] / "tasks"
NAMES = ("gsm8k", "countdown", "reverse", "math")
MAXIMA = {
    "gsm8k": {"correctness": 2.0, "integer": 0.5, "strict_xml": 0.5, "soft_xml": 0.5, "xml_count": 0.5},
    "countdown": {"reaches_target": 1.0, "soft_xml": 0.5},
    "math": {"math": 1.0},
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


def test_math_takes_the_answer_from_the_solution_where_the_data_has_no_column_for_it(tmp_path):
    rows = [
        {"problem": "a", "solution": r"So $\boxed{\frac{1}{2}}$."},
        {"problem": "b", "solution": r"So $x=\boxed{3}$.", "answer": "3"},
        {"problem": "c", "answer": r"(-\infty, 2) \cup (2, 3]"},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task("math")
    for row, answer in zip(task.rows("train", str(tmp_path)), (r"\frac{1}{2}", "3", rows[2]["answer"]), strict=True):
        assert row["answer"] == answer == task.vote(task.gold_text(row))
        assert marks(task, task.gold_text(row), row) == MAXIMA["math"]
        assert marks(task, task.gold_text({**row, "answer": "17"}), row) == {"math": 0.0}


def test_code_reads_the_columns_of_mbpp_and_its_own(tmp_path):
    rows = [
        {"text": "Add.", "code": "def add(a, b):\r\n  return a + math.floor(b)",
         "test_list": ["assert add(1, 2.5) == 3"], "test_setup_code": "import math"},
        {"prompt": "Add.", "solution": "def add(a, b):\n  return a + b", "tests": "assert add(1, 2) == 3"},
        {"prompt": "Double it.", "solution": "print(2 * int(input()))", "tests": [{"input": "4", "output": "8"}]},
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task("code")
    made = list(task.rows("train", str(tmp_path)))
    assert "pass this test: assert add(1, 2.5) == 3" in task.prompt(made[0])[-1]["content"]
    for row in [*made, *islice(task.rows("train", "embedded"), 3)]:
        assert marks(task, task.gold_text(row), row) == {"code": 1.0}
        assert marks(task, "```python\ndef add(a, b): return 4\n```", row) == {"code": 0.0}


def test_exercises_are_in_one_split():
    train, test = (
        {row["question"] for row in load_task("code").rows(split, "embedded")} for split in ("train", "test")
    )
    assert len(train) == len(test) == 400 and not train & test


# ---- Reasoning Gym


@pytest.mark.parametrize(
    "data",
    ["spell_backward:max_word_len=5", "chain_sum:size=9", "graph_color", "rubiks_cube", "figlet_font", "mini_sudoku"],
)
def test_a_generator_of_reasoning_gym_is_scored_by_its_own_score(data):
    gym = pytest.importorskip("reasoning_gym")
    task = load_task("reasoning_gym")
    train, test = (list(islice(task.rows(split, data), 10)) for split in ("train", "test"))
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    assert train == list(islice(task.rows("train", data), 10))
    assert (len(train), len(test)) == ((9, 1) if "size=9" in data else (10, 10))
    generator = gym.create_dataset(data.partition(":")[0])
    for row in train + test:
        assert marks(task, task.gold_text(row), row) == {"solved": 1.0, "soft_xml": 0.5}
        for other in ("0", train[0]["answer"], ""):
            entry = {"question": row["question"], "answer": row["answer"], "metadata": row["metadata"]}
            expected = generator.score_answer(other, entry) if other else 0.0
            assert marks(task, answered(other), row)["solved"] == expected
    if "max_word_len" in data:
        assert max(len(row["answer"]) for row in train + test) == 5


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("spellbackward", r"no generator 'spellbackward'\. Did you mean `spell_backward`"),
        ("chain_sum:max_term=3", r"unexpected keyword .* parameters are: min_terms=2, max_terms=6"),
        ("chain_sum:max_terms=1", r"max_terms must be >= min_terms"),
        ("chain_sum:3", "cannot be read"),
        ("chain_sum:max_terms=__import__('os')", "cannot be read"),
        ("rush_hour", "gives no right answer for rush_hour"),
    ],
)
def test_a_generator_that_is_none_is_told(data, told):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match=told):
        next(iter(load_task("reasoning_gym").rows("train", data)))


def test_what_is_made_up_is_looked_for_neither_here_nor_on_the_hub(tmp_path, monkeypatch):
    """A folder of the generator's name is none of its business, and the hub is not asked."""
    (tmp_path / "chain_sum").mkdir()
    monkeypatch.chdir(tmp_path)
    _, resolved = resolve(["reasoning_gym", "--data", "chain_sum"])
    assert resolved.config.data == "chain_sum"
    assert not any("data set" in what for what in resolved.missing)


# ---- by name, from anywhere


def test_a_task_that_ships_goes_by_its_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "gsm8k").mkdir()  # as people call the folder of its data
    monkeypatch.chdir(tmp_path)
    _, resolved = resolve(["gsm8k"])
    assert Path(resolved.task_path).samefile(TASKS / "gsm8k.py")
    (tmp_path / "reverse.py").write_text((TASKS / "gsm8k.py").read_text())
    assert resolve(["reverse.py"])[1].task.name == "gsm8k"
    assert main(["gsm8kk"]) == 2
    assert "Did you mean `gsm8k`? It may lie anywhere; these ship" in capsys.readouterr().err


def test_a_task_that_ships_hides_no_module_of_python():
    """tasks/math.py beside it is not Python's `math`, nor tasks/code.py its `code`."""
    program = (
        "import sys; from grpo.task import load_task; load_task('gsm8k'); sys.modules.pop('code', 0); import code; "
        "print(code.__file__, [path for path in sys.path if path.endswith('tasks')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "tasks" not in done.stdout.split()[0] and done.stdout.endswith("[]\n")


def test_what_lies_beside_a_task_comes_before_what_is_installed_and_after_python_s_own(tmp_path):
    """A worker imports anew what the run has long ago: `copy.py` beside a task file would end it."""
    for name in ("copy", "tyro"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0}", extra=""))
    program = (
        "import sys; from grpo.task import load_task; load_task(sys.argv[1]); "
        "from importlib.machinery import PathFinder; "
        "print(PathFinder.find_spec('copy').origin, PathFinder.find_spec('tyro').origin)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "toy.py")]
    own, beside = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert Path(own).parent != tmp_path and Path(beside).parent == tmp_path


@pytest.mark.slow
def test_the_wheel_brings_the_tasks(tmp_path):
    """Built from a copy, so that nothing is left here; unpacked, the command runs from another folder."""
    source, built, installed = (tmp_path / name for name in ("source", "built", "installed"))
    for name in ("grpo", "kernels", "tasks"):
        shutil.copytree(TASKS.parent / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(TASKS.parent / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(built), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = built.iterdir()
    zipfile.ZipFile(wheel).extractall(installed)
    for file in TASKS.glob("*.py"):
        assert (installed / "grpo" / "tasks" / file.name).read_bytes() == file.read_bytes()
    command = [sys.executable, "-m", "grpo.run", "reverse", "--check", "--model", "embedded"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "The task is ready" in done.stdout


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


USER, SAID, SAID_TOO = (
    {"role": role, "content": text} for role, text in (("user", "q"), *[("assistant", t) for t in "ab"])
)


@pytest.mark.parametrize(
    ("name", "row", "asked"),
    [
        ("messages", {"messages": [USER, SAID], "prompt": "another"}, [USER]),
        ("messages", {"messages": [USER, SAID], "prompt": "whose", "completion": "own"}, "whose"),
        ("messages", {"prompt": "q", "completion": [SAID]}, [USER]),
        ("messages", {"messages": [USER, SAID], "prompt": None, "completion": None}, [USER]),
        ("messages", {"messages": None, "prompt": "q", "completion": "c"}, "q"),
        ("messages", {"messages": [USER]}, [USER]),  # there is no answer: it is told of as such
        ("pairs", {"chosen": [USER, SAID], "rejected": [USER, SAID_TOO]}, [USER]),
        ("pairs", {"prompt": "q", "chosen": [USER, SAID], "rejected": [USER, SAID_TOO]}, [USER]),
        ("pairs", {"prompt": "q", "chosen": [SAID], "rejected": [SAID_TOO]}, [USER]),
        ("pairs", {"prompt": "q", "chosen": "a", "rejected": "b"}, "q"),
    ],
)
def test_what_rows_to_learn_from_ask(name, row, asked):
    assert load_task(TASKS / f"{name}.py").prompt(row) == asked


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("messages", {"conversations": []}, r"`conversations` must be a list of chat messages, not \[\]"),
        ("messages", {"question": "q", "answer": "a"}, "have `messages`.*these have question, answer.*three lines"),
        ("messages", {"messages": [USER, SAID], "completion": "c"}, "these have messages, completion"),
        ("messages", {"messages": "[]"}, "must be a list of chat messages"),
        ("messages", {"messages": [3]}, "must be a list of chat messages"),
        ("pairs", {"messages": [USER, SAID]}, "these have messages. --columns chosen=NAME"),
        ("pairs", {"chosen": "a", "rejected": "b"}, "there is no `prompt`"),
    ],
)
def test_rows_of_other_columns_are_told_what_is_wanted(name, row, told):
    with pytest.raises(UserError, match=told):
        load_task(TASKS / f"{name}.py").prompt(row)
