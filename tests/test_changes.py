"""A run that goes on otherwise: what may change, where that is written down, and what may not."""

import json

import pytest

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
