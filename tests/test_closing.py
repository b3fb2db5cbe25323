"""The last lines of a run name files that are there and commands that are understood."""

import re
import shlex

import pytest
from made_up_run import make_run

from grpo.chat.__main__ import _parser as chat_parser
from grpo.checkpoint import Progress
from grpo.command import parse
from grpo.export.__main__ import _parse as read_export
from grpo.report.__main__ import main as report
from grpo.verbs.closing import IN_A_SHELL, IN_PYTHON, closing

SCORES = {"eval/pass@1": 0.5, "eval/pass@1/low": 0.4, "eval/pass@1/high": 0.6}


@pytest.fixture
def run(tmp_path):
    folder = make_run(tmp_path / "a run's", steps=12)
    assert report([str(folder)]) == 0
    for step in (9, 12):
        (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    return folder


def test_what_was_learnt_where_it_is_and_what_comes_next(run, capsys):
    progress = Progress(step=12, best_step=9, first_scores=SCORES, last_scores=SCORES | {"eval/pass@1": 0.9})
    lines = list(closing(run, progress, 12))
    assert lines[0].startswith("held-out pass@1: 50.0% [40.0%, 60.0%] before, 90.0%")
    assert re.fullmatch(r"paired over 18 prompts: \+[\d.]+ points \(95%: \+.* to \+.*\), p < 0.001; .*", lines[1])
    named = dict(re.split(r"\s{2,}| (?=/)", line, maxsplit=1) for line in lines if line.partition(" /")[1])
    places = {what.strip(): path for what, path in named.items() if not what.strip().startswith("python")}
    assert set(places) == {"report", "completions", "numbers", "adapter", "the best"}
    assert places["adapter"].endswith("step-000012") and places["the best"].endswith("step-000009")
    assert all(run.joinpath(path).exists() for path in places.values())


def test_the_commands_are_understood(run, tmp_path, monkeypatch, capsys):
    progress = Progress(step=12, best_step=12, first_scores=SCORES, last_scores=SCORES)
    commands = [shlex.split(line, comments=True) for line in closing(run, progress, 12) if line.startswith("  python")]
    assert len(commands) == 5
    another = make_run(tmp_path / "another", steps=3)
    for command in commands:
        assert command[:2] == ["python", "-m"]
        if command[2] == "grpo.run":
            options, flags = parse(command[3:])
            assert str(run) in (options.eval, options.resume)
            assert flags in ({}, {"steps": 24})
        elif command[2] == "grpo.chat":
            assert chat_parser().parse_args(command[3:]).run == str(run)
        elif command[2] == "grpo.export":
            options = read_export(command[3:])
            assert (options.run, options.to) == (str(run), "FOLDER")
        else:
            words = {"ANOTHER": str(another), "FILE": str(tmp_path / "both.html")}
            assert report([words.get(word, word) for word in command[3:]]) == 0
            assert (tmp_path / "both.html").exists()


def test_a_run_that_was_stopped_says_how_it_goes_on_and_nothing_more(run):
    lines = list(closing(run, Progress(step=7), 12))
    assert lines == [
        "Stopped after step 7 of 12; everything is saved. Go on with",
        f"  python -m grpo.run --resume {shlex.quote(str(run))}",
    ]


def test_files_that_are_gone_by_then_are_no_error(tmp_path):
    progress = Progress(step=12, first_scores=SCORES, last_scores=SCORES)
    lines = list(closing(tmp_path / "gone", progress, 12))
    assert not any(line.startswith(("paired", "report")) for line in lines)


@pytest.mark.parametrize("after, how", [
    (IN_A_SHELL, "python -m grpo.run --resume {run} --steps N   # train"),
    (IN_PYTHON, "run.resume(steps=N)   # train"),
])  # fmt: skip
def test_a_run_of_no_steps_has_no_adapter_to_talk_to(after, how, tmp_path):
    lines = list(closing(tmp_path, Progress(first_scores=SCORES, last_scores=SCORES), 0, after))
    assert not any(line.startswith("adapter") for line in lines)
    assert lines[lines.index("next:") + 1 :] == ["  " + how.format(run=shlex.quote(str(tmp_path)))]
