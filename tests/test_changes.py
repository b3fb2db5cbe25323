"""A run that goes on otherwise: what may change, where that is written down, and what may not."""

import json

import pytest
from toy_task import TASK

from grpo.data import as_bytes
from grpo.folder import saved_run
from grpo.report.__main__ import main as report
from grpo.run import main


def test_what_may_change_is_told_recorded_and_on_the_page(toy_run, capsys):
    before = saved_run(str(toy_run)).config
    flags = ["--steps", "5", "--learning-rate", "5e-4", "--kl-coef", "0.1", "--eval-every", "0", "--dual-clip", "3"]
    assert main(["--resume", str(toy_run), *flags]) == 0
    told = capsys.readouterr().out
    assert "changed since the run was last started: " in told and "learning_rate 0.001 -> 0.0005" in told
    starts = [json.loads(line) for line in (toy_run / "starts.jsonl").read_text().splitlines()]
    assert starts[0]["changed"] == {}
    assert starts[1]["changed"] == {
        "steps": ["4", "5"],
        "learning_rate": ["0.001", "0.0005"],
        "kl_coef": ["0.0", "0.1"],
        "eval_every": ["4", "0"],
        "dual_clip": ["inf", "3.0"],
    }
    saved = saved_run(str(toy_run))
    assert saved.config.learning_rate == 5e-4 and saved.origins["learning_rate"] == "flag"
    assert before.learning_rate == 1e-3
    steps = [json.loads(line) for line in (toy_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["optim/learning_rate"] for line in steps if "optim/learning_rate" in line] == [1e-3] * 4 + [5e-4]
    assert "<code>learning_rate</code> 0.001 → 0.0005" in (toy_run / "report.html").read_text()


def test_a_run_that_goes_on_as_it_was_has_changed_nothing(toy_run, capsys):
    assert main(["--resume", str(toy_run)]) == 0
    assert "changed since" not in capsys.readouterr().out
    assert json.loads((toy_run / "starts.jsonl").read_text().splitlines()[-1])["changed"] == {}


@pytest.mark.parametrize("flags, told", [
    (["--seed", "7"], "--seed is 7, but"),
    (["--model", "org/another"], "--model is org/another, but the adapter of"),
    (["--lora-rank", "8"], "--lora-rank is 8"),
    (["--adapter", "x"], "--adapter is"),
    (["--run-dir", "elsewhere"], "--run-dir is given with --resume"),
])  # fmt: skip
def test_what_may_not_change_is_refused_and_nothing_is_touched(flags, told, toy_run, capsys):
    before = {path: path.read_bytes() for path in toy_run.iterdir() if path.is_file()}
    assert main(["--resume", str(toy_run), *flags]) == 2
    assert told in capsys.readouterr().err
    assert {path: path.read_bytes() for path in toy_run.iterdir() if path.is_file()} == before


def test_a_damaged_record_of_changes_is_left_out_of_the_page(toy_run):
    lines = [json.loads(line) for line in (toy_run / "starts.jsonl").read_text().splitlines()]
    wrong = {"a": 1, "<b>": ["<script>", 2], "c": [1]}
    (toy_run / "starts.jsonl").write_text("".join(json.dumps(line | {"changed": wrong}) + "\n" for line in lines))
    assert report([str(toy_run)]) == 0
    page = (toy_run / "report.html").read_text()
    assert "&lt;b&gt;</code> &lt;script&gt; → 2" in page


@pytest.mark.parametrize("one, other", [
    ({"a": "1", "b": 2}, {"b": 2, "a": "1"}),
    ({"a": object()}, {"a": object()}),
    ({"a": "\ud800", None: float("nan")}, {None: float("nan"), "a": "\ud800"}),
])  # fmt: skip
def test_equal_rows_are_equal_bytes(one, other):
    assert as_bytes(one) == as_bytes(other)


@pytest.mark.parametrize("one, other", [
    ({"a": "1"}, {"a": 1}), ({"a": "1"}, {"b": "1"}), ({"a": [1, 2]}, {"a": [2, 1]}), ({"a": None}, {}),
    ({"a": {"b": "x"}}, {"a": {"b": "y"}}),
])  # fmt: skip
def test_other_rows_are_other_bytes(one, other):
    assert as_bytes(one) != as_bytes(other)


TRAINED_ON, HELD_OUT = "the training rows are not those", "scored anew"


@pytest.mark.parametrize("there, here, told, untold", [
    ("range(8)", "range(1, 8)", TRAINED_ON, HELD_OUT),  # a row is taken out
    ("str(2 * n + 2)", 'str(2 * n + 2 - (split == "train"))', TRAINED_ON, HELD_OUT),  # other answers, the same prompts
    ("str(2 * n + 2)", 'str(2 * n + 2 - (split == "test"))', HELD_OUT, TRAINED_ON),
], ids=["fewer", "answers", "held-out answers"])  # fmt: skip
def test_other_data_are_told_and_recorded(there, here, told, untold, toy_run, tmp_path, capsys):
    """Of a data file that somebody has changed in between, for which these are rows made by another task file."""
    task = TASK.format(rewards="{letters: 1.0, says: 1.0}", extra="")
    assert there in task
    (tmp_path / "toy.py").write_text(task.replace(there, here))
    assert main([str(tmp_path / "toy.py"), "--eval", str(toy_run)]) == 0
    assert ("the held-out rows are not those" in capsys.readouterr().out) == (told == HELD_OUT)
    assert main([str(tmp_path / "toy.py"), "--resume", str(toy_run), "--steps", "5"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert told in printed and untold not in printed
    changed = json.loads((toy_run / "starts.jsonl").read_text().splitlines()[-1])["changed"]
    assert list(changed) == ["steps", {TRAINED_ON: "training rows", HELD_OUT: "held-out rows"}[told]]
    assert main([str(tmp_path / "toy.py"), "--resume", str(toy_run), "--steps", "5"]) == 0  # they are its own by now
    printed = " ".join(capsys.readouterr().out.split())
    assert told not in printed and untold not in printed
