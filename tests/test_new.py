"""python -m grpo.new: a task file for data as people have them, which passes its check or says what to fill in."""

import inspect
import json
import shlex
import sys

import pytest

from grpo.new import main
from grpo.run import main as run
from grpo.task import load_task

TAGGED = "<reasoning>\nStep by step.\n</reasoning>\n<answer>\n{}\n</answer>\n"
BOX = r"so \boxed{{\frac{{{}}}{{3}}}}"


def each(make, count=40):
    return [make(number) for number in range(count)]


CASES = {
    "numbers": (each(lambda n: {"id": n, "problem": f"{n}?", "gold": n}), "number", "3?", "3"),
    "text numbers": (each(lambda n: {"Question": f"{n}?", "Final_Answer": f"${n},000"}), "number", "3?", "$3,000"),
    "gsm8k": (each(lambda n: {"question": f"{n}?", "answer": f"x\n#### {n}"}), "number", "3?", "3"),
    "boxes": (each(lambda n: {"problem": f"{n}?", "solution": BOX.format(n)}), "math", "3?", r"\frac{3}{3}"),
    "formulas": (each(lambda n: {"question": f"{n}?", "answer": rf"\sqrt{{{n}}}"}), "math", "3?", r"\sqrt{3}"),
    "arc": (
        each(lambda n: {"q": f"{n}?", "choices": {"text": ["w", "x"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}),
        "choice", "3?\n\nA. w\nB. x", "B"),
    "mmlu": (each(lambda n: {"question": f"{n}?", "choices": ["w", "x"], "answer": n % 2}), "choice",
             "3?\n\nA. w\nB. x", "B"),
    "sciq": (
        each(lambda n: {"q": f"{n}?", "option1": f"w{n}", "option2": f"x{n}", "correct_answer": f"{'wx'[n % 2]}{n}"}),
        "choice", "3?\n\nA. w3\nB. x3", "B"),
    "letters": (each(lambda n: {"q": f"{n}?", "A": "w", "B": "x", "a": f"({'AB'[n % 2]})"}), "choice",
                "3?\n\nA. w\nB. x", "(B)"),
    "labels": (each(lambda n: {"text": f"film {n}", "label": ("bad", "good")[n % 2]}), "correctness",
               "film 3\n\nAnswer with one of: bad, good", "good"),
    "boolq": (each(lambda n: {"question": f"{n}", "passage": "p", "answer": n % 2 == 1}), "correctness",
              "p\n\n3\n\nAnswer with one of: False, True", "True"),
    "hellaswag": (each(lambda n: {"ctx": f"{n}", "endings": ["w", "x"], "label": str(n % 2)}), "choice",
                  "3\n\nA. w\nB. x", "B"),
    "open-r1": (
        each(lambda n: {"problem": f"{n}?", "solution": "long", "answer": f"{n}", "messages": [
            {"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "long"}]}), "number", "3?", "3"),
    "aime": (each(lambda n: {"ID": n, "Problem": f"{n}?", "Solution": "long", "Answer": n}), "number", "3?", "3"),
    "words": (each(lambda n: {"question": f"{n}?", "answers": {"text": [f"name {n}"], "at": [0]}, "context": f"c{n}"}),
              "correctness", "c3\n\n3?", "name 3"),
    "alpaca": (each(lambda n: {"instruction": "add", "input": f"{n}+{n}", "output": str(2 * n)}), "number",
               "3+3\n\nadd", "6"),
}  # fmt: skip


def written(tmp_path, monkeypatch, rows, *flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["made", "--data", "rows.jsonl", *flags]) == 0
    return load_task(tmp_path / "made.py")


@pytest.mark.parametrize("case", CASES)
def test_a_task_for_such_rows_pays_their_gold_answers(tmp_path, monkeypatch, capsys, case):
    rows, reward, question, answer = CASES[case]
    task = written(tmp_path, monkeypatch, rows)
    made = list(task.rows("train", task.data))
    assert (len(made), made[3]["question"], str(made[3]["answer"])) == (40, question, answer)
    assert task.solved and task.solved[0] == reward == next(iter(task.rewards)).__name__
    assert task.held_out == 4 and "TODO" not in (tmp_path / "made.py").read_text()
    pays = next(iter(task.rewards))
    assert task.gold_text(made[3]) == TAGGED.format(answer)
    assert [pays(task.gold_text(row), row["answer"]) for row in made] == [task.solved[1]] * 40
    assert pays(task.gold_text(made[3]), made[4]["answer"]) == 0.0
    assert task.prompt(made[3])[-1] == {"role": "user", "content": question}
    assert "Fill in" not in capsys.readouterr().out


@pytest.mark.parametrize("answered", [False, True])
def test_chat_messages_are_asked_as_they_are(tmp_path, monkeypatch, answered):
    said = [{"role": "user", "content": "1 + 1?"}, *([{"role": "assistant", "content": "2"}] * answered)]
    rows = each(lambda n: {"messages": said} | ({} if answered else {"reward_model": {"ground_truth": 2}}))
    task = written(tmp_path, monkeypatch, rows)
    row = next(iter(task.rows("train", task.data)))
    assert task.prompt(row) == said[:1] and str(row["answer"]) == "2"
    assert next(iter(task.rewards))(task.gold_text(row), row["answer"]) == 1.0


def test_what_cannot_be_known_is_to_be_filled_in(tmp_path, monkeypatch, capsys):
    written(tmp_path, monkeypatch, each(lambda n: {"prompt": f"write {n}", "topic": "x"}))
    assert "Fill in: no column looks like an answer" in capsys.readouterr().out
    assert run(["made.py", "--check", "--model", "embedded"]) == 2
    assert "say in this file what a good completion is" in capsys.readouterr().err
    long = each(
        lambda n: {"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "bing", "value": f"{n} " * 200}]}
    )
    (tmp_path / "made.py").unlink()
    task = written(tmp_path, monkeypatch, long)
    assert "is a stand-in" in capsys.readouterr().out
    assert task.prompt(next(iter(task.rows("train", task.data)))) == [{"role": "user", "content": "0?"}]
    (tmp_path / "made.py").unlink()
    written(tmp_path, monkeypatch, each(lambda n: {"x": f"{n}?", "y": n}))
    assert "Fill in: no column looks like a question" in capsys.readouterr().out
    (tmp_path / "made.py").unlink()
    task = written(tmp_path, monkeypatch, each(lambda n: {"x": f"{n}?", "y": n}), "--columns", "question=x", "answer=y")
    assert next(iter(task.rows("train", task.data))) == {"question": "0?", "answer": 0}


def test_it_passes_its_check_as_it_stands_bad_rows_and_all(tmp_path, monkeypatch, capsys):
    rows = each(lambda n: {"question": f"{n}?" if n % 9 else None, "answer": n if n % 7 else None})
    written(tmp_path, monkeypatch, [*rows, 3])
    assert "they are left out" in capsys.readouterr().out
    assert run(["made.py", "--check", "--model", "embedded"]) == 0
    assert "The task is ready" in capsys.readouterr().out


def test_splits_that_are_there_are_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train_sft", "train_gen", "test_sft"):
        (tmp_path / "data" / f"{name}-00000-of-00001.jsonl").write_text('{"question": "a", "answer": "1"}')
    (tmp_path / "tasks").mkdir()
    assert main(["tasks/made", "--data", ".", "--splits", "train=train_sft"]) == 0
    task = load_task("tasks/made.py")
    assert (task.held_out, task.config.splits, task.data) == (None, ("train=train_sft",), str(tmp_path))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["made", "--data", "rows.jsonl"], "made.py exists, and is not written over"),
        (["link", "--data", "rows.jsonl"], "link.py exists"),
        (["math", "--data", "rows.jsonl"], "a module of Python's own"),
        (["none/there", "--data", "rows.jsonl"], "There is no folder none"),
        ([".x", "--data", "rows.jsonl"], "A task cannot be called"),
        (["new", "--data", "gone.csv"], "There is no file or folder gone.csv"),
        (["new", "--data", "empty.jsonl"], "has no rows"),
        (["new", "--data", "rows.jsonl", "--columns", "answer=z"], "no column z, but a"),
        (["new", "--data", "rows.jsonl", "--columns", "gold=a"], "which column is `question`"),
        (["new", "--data", "rows.jsonl", "--columns", "a"], "It takes NAME=COLUMN"),
    ],
)
def test_what_cannot_be_done_is_told_and_nothing_is_written(tmp_path, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"a": 1}')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "made.py").write_text("mine")
    (tmp_path / "link.py").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    assert main(argv) == 2
    assert told in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "made.py").read_text() == "mine"


def test_names_of_columns_are_no_code(tmp_path, monkeypatch):
    """Whatever they are: they stand in the file as texts."""
    odd = ['"', "'", '"""', "{x}", "\\", "\n", '"\'"]); import os; os._exit(3) #', "\u202e", "it's"]
    for name in odd:
        rows = each(lambda n, name=name: {name: f"{n}?", "answer": {name: str(n)}})
        columns = ["--columns", f"question={name}"] if "." not in name else []
        if not columns:
            continue
        task = written(tmp_path, monkeypatch, rows, *columns, f"answer=answer.{name}")
        assert next(iter(task.rows("train", task.data))) == {"question": "0?", "answer": "0"}
        (tmp_path / "made.py").unlink()
        sys.modules.pop("grpo_task_made", None)
    assert inspect.isfunction(task.rows)


def test_the_next_command_is_understood_by_a_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it's mine").mkdir()
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, CASES["numbers"][0])))
    assert main(["it's mine/made", "--data", "rows.jsonl"]) == 0
    command = capsys.readouterr().out.partition("Next: ")[2]
    assert shlex.split(command) == ["python", "-m", "grpo.run", "it's mine/made.py", "--check"]
