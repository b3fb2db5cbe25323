"""What a run writes down can be read back, cut back and gone on with."""

import datetime
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recorded import NAMES, group_of, held_out_of, metrics_of, record_steps, scalars, scores_of
from tensorboard.summary.writer import event_file_writer

from grpo.config import Config
from grpo.errors import UserError
from grpo.folder import Saved, write_config
from grpo.record import Recorder, draw_curves
from grpo.record.files import FILES, no_gold, prompt_record
from grpo.record.jsonl import JsonLines, finite, read_lines
from grpo.record.sinks import Sink, Tolerated
from grpo.record.starts import write_start
from grpo.types import Prompt


@pytest.fixture(autouse=True)
def files_that_are_read_as_they_were_made(monkeypatch):
    """TensorBoard reads a run's files in the order of their names: the second, then the process, then how many it has
    made. Of one second a process's tenth comes before its ninth; a run that is resumed is another process, later."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def test_a_run_is_written_down_everywhere(tmp_path, capsys):
    sources = {"gold": lambda prompt: prompt.fields["answer"] + "!", "traced": lambda groups: [{"of": len(groups)}]}
    with Recorder(tmp_path, 4, 0, "toy", NAMES, **sources) as recorder:
        recorder.message("hello")
        record_steps(recorder, 0, 4)
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 3, 3]
    assert lines[0] == {"step": 0, **scores_of(0)}
    assert lines[2] == {"step": 1, **metrics_of(1)}
    assert lines[3] == {"step": 2, **metrics_of(2), "optim/grad_norm": None}

    completions = list(read_lines(tmp_path / "completions.jsonl"))
    assert len(completions) == 8
    asked, held_out = prompts = list(read_lines(tmp_path / "prompts.jsonl"))[::-1]
    assert asked == {"id": asked["id"], "split": "train", "prompt": 7, "text": "What is 2 + 3?", "messages": None,
                     "fields": {"answer": "5"}, "gold": "5!"}  # fmt: skip
    assert (held_out["split"], held_out["gold"], len(prompts)) == ("held-out", "2!", 2)
    assert completions[3] == {
        "step": 1,
        "group": 0,
        "member": 1,
        "prompt": 7,
        "id": asked["id"],
        "text": "5",
        "finish": "length",
        "tokens": 1,
        "parts": {"correctness": None},
        "reward": 0.0,
        "advantage": torch.tensor(-0.1).item(),
        "policy_version": 1,
        "seed": 0,
    }
    answers = list(read_lines(tmp_path / "held_out.jsonl"))
    assert [(line["step"], line["id"], line["reward"]) for line in answers[1:3]] == [
        (0, held_out["id"], 0.0),
        (3, held_out["id"], 2.0),
    ]
    assert "advantage" not in answers[0]
    assert list(read_lines(tmp_path / "tokens.jsonl")) == [{"step": step, "of": 1} for step in range(4)]
    assert scalars(tmp_path, "eval/pass@1") == [(0, pytest.approx(0.3)), (3, pytest.approx(0.33))]
    assert [step for step, _ in scalars(tmp_path, "reward/mean")] == [0, 1, 2, 3]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width >= 1200
    assert {path.name for path in tmp_path.iterdir()} == {
        *FILES,
        *("tensorboard", "curves.png"),
    }
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\r" not in said
    assert said.startswith("hello\n")
    assert "held-out after 3 steps:  pass@1 33.0% (95%: 25.0 to 35.0)   pass@4 50.0%" in said


@pytest.mark.parametrize("evaluate_before_saving", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path, evaluate_before_saving):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    with Recorder(whole, 6, 0, "toy", NAMES) as recorder:
        record_steps(recorder, 0, 6)

    with Recorder(resumed, 6, 0, "toy", NAMES) as recorder:
        record_steps(recorder, 0, 3)
        if evaluate_before_saving:
            recorder.evaluation(3, scores_of(3), [held_out_of(3)])
        position = recorder.position()
        # What the checkpoint does not know of: it must be gone after the resume.
        recorder.step(3, {"reward/mean": -1.0})
        recorder.completions(3, [group_of(99), group_of(99, prompt=Prompt(8, "What is 4 + 4?", [1], {}))])
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/me')  # killed while writing
    with Recorder(resumed, 6, 3, "toy", NAMES, position) as recorder:
        if not evaluate_before_saving:
            recorder.evaluation(3, scores_of(3), [held_out_of(3)])
        for step in range(3, 6):
            recorder.completions(step, [group_of(step)])
            recorder.step(step, metrics_of(step))

    for name in FILES:
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    for name in ("reward/mean", "eval/pass@1"):
        assert scalars(resumed, name) == scalars(whole, name)


def test_a_resumed_run_goes_on_showing_the_last_held_out_score(tmp_path, capsys):
    with Recorder(tmp_path, 9, 0, "toy", NAMES) as recorder:
        recorder.evaluation(0, {"eval/pass@1": 0.123})
        position = recorder.position()
    capsys.readouterr()
    with Recorder(tmp_path, 9, 5, "toy", NAMES, position) as recorder:
        recorder.step(5, metrics_of(5))
    header, _, line = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "mean"
    assert line.startswith(" 6/9")
    assert "12.3%" in line


def test_a_run_never_overwrites_another(tmp_path):
    with Recorder(tmp_path, 2, 0, "toy", NAMES) as recorder:
        record_steps(recorder, 0, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl exists already.*--resume"):
        Recorder(tmp_path, 2, 0, "toy", NAMES)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_file_shorter_than_the_checkpoint_says_is_an_error_and_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n')
    with pytest.raises(UserError, match=r"has 12 bytes, but .* it had 13"):
        JsonLines(path, 13)
    with pytest.raises(UserError, match="has 0 bytes"):
        JsonLines(tmp_path / "gone.jsonl", 1)
    assert path.read_bytes() == b'{"step": 0}\n'


def test_a_position_counts_bytes_of_whole_lines(tmp_path):
    file = JsonLines(tmp_path / "a.jsonl", None)
    assert file.position() == 0
    file.write([{"text": "é \ud800 \x1b\n"}, {"text": ""}])
    assert file.position() == (tmp_path / "a.jsonl").stat().st_size
    position = file.position()
    file.write([{"text": "later"}])
    file.close()
    assert [line["text"] for line in read_lines(tmp_path / "a.jsonl")] == ["é \ud800 \x1b\n", "", "later"]
    again = JsonLines(tmp_path / "a.jsonl", position)
    assert again.position() == position, "a checkpoint may be saved before the next line is written"
    again.close()
    assert [line["text"] for line in read_lines(tmp_path / "a.jsonl")] == ["é \ud800 \x1b\n", ""]


def test_json_gets_null_for_what_it_cannot_say():
    values = finite({"b": math.nan, "a": 1, "c": -math.inf, "d": 0.1})
    assert json.dumps(values, allow_nan=False) == '{"b": null, "a": 1, "c": null, "d": 0.1}'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ('{"step": 1, "reward/mean": 1.0', "line 2 is not JSON"),
        ("[1, 2]", "line 2 is not an object"),
        ('{"reward/mean": 1.0}', "line 2 is not a step and its numbers"),
        ('{"step": 1, "reward/mean": "high"}', "line 2 is not a step and its numbers"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_a_damaged_line_is_told_on_resume_and_nothing_is_cut(tmp_path, damage, words):
    with Recorder(tmp_path, 6, 0, "toy", NAMES) as recorder:
        record_steps(recorder, 0, 2)
        position = recorder.position()
        record_steps(recorder, 2, 3)
    path = tmp_path / "metrics.jsonl"
    first, second, *rest = path.read_text().splitlines(keepends=True)
    position["metrics.jsonl"] += len(damage) + 1 - len(second)
    path.write_text("".join([first, damage + "\n", *rest]))
    before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "completions.jsonl")}
    with pytest.raises(UserError, match=f"metrics.jsonl is damaged: {words}"):
        Recorder(tmp_path, 6, 2, "toy", NAMES, position)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_a_shorter_file_or_one_of_other_lines_is_told_before_any_is_cut(tmp_path):
    with Recorder(tmp_path, 6, 0, "toy", NAMES) as recorder:
        record_steps(recorder, 0, 2)
        position = recorder.position()
        record_steps(recorder, 2, 3)
    metrics, completions = (tmp_path / name for name in ("metrics.jsonl", "completions.jsonl"))
    before = metrics.read_bytes()
    whole = completions.read_bytes()
    completions.write_bytes(whole[: position["completions.jsonl"] - 1])
    with pytest.raises(UserError, match=r"completions.jsonl has \d+ bytes"):
        Recorder(tmp_path, 6, 2, "toy", NAMES, position)
    completions.write_bytes(b" " + whole)
    with pytest.raises(UserError, match=r"completions.jsonl is damaged: no line ends at byte"):
        Recorder(tmp_path, 6, 2, "toy", NAMES, position)
    assert metrics.read_bytes() == before


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"not ours" * 9999 + b"\n"), Path.unlink])
def test_a_file_that_is_damaged_while_the_run_goes_on_stops_nothing(damage, tmp_path, capsys):
    with Recorder(tmp_path, 6, 0, "toy", NAMES) as recorder:
        record_steps(recorder, 0, 2)
        damage(tmp_path / "metrics.jsonl")
        recorder.evaluation(2, scores_of(2))
    assert "note: curves.png is not drawn" in capsys.readouterr().out


def test_links_in_a_run_that_was_downloaded_lead_nowhere(tmp_path):
    """Whoever packs a run must not choose a file of ours that resuming it cuts, writes into or draws over."""
    mine = tmp_path / "mine"
    mine.write_text('{"step": 0, "reward/mean": 1.0}\n')
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "curves.png.partial", ".config.json.partial"):
        (run / name).symlink_to(mine)
    before = mine.read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl is a symbolic link, .* only into files of its own"):
        JsonLines(run / "metrics.jsonl", 5)
    draw_curves(mine, run / "curves.png")
    write_config(Saved(run, "id", "task.py", "0", "toy", Config(), {}))
    assert mine.read_bytes() == before
    assert (run / "curves.png").exists() and (run / "config.json").exists()


class Odd:
    def __repr__(self):
        raise RuntimeError("not today")


ROWS = [
    ({"a": math.nan, "b": [1e400, {"c": None}], "d": True}, {"a": None, "b": [None, {"c": None}], "d": True}),
    ({"when": datetime.date(2026, 1, 2), "raw": b"x" * 999}, {"when": "date datetime.date(2026, 1, 2)"}),
    ({"numbers": np.arange(3), ("a", 1): 2}, {"numbers": "ndarray array([0, 1, 2])"}),
    ({"huge": 10**5000}, {"not written": "ValueError"}),
    ({"odd": Odd()}, {"not written": "RuntimeError"}),
]


@pytest.mark.parametrize(("fields", "written"), ROWS)
def test_a_row_of_anything_is_written_down_as_json(fields, written):
    record = prompt_record("id", "train", Prompt(1, "\ud800?", [1], fields), no_gold)
    line = json.loads(json.dumps(record, allow_nan=False))
    assert line["fields"].items() >= written.items()
    assert all(len(str(value)) < 300 for value in line["fields"].values())


def test_a_row_in_a_circle_and_a_gold_answer_that_fails_stop_nothing():
    circle = {"answer": "5"}
    circle["self"] = circle
    assert prompt_record("id", "train", Prompt(1, "?", [1], circle), no_gold)["gold"] is None
    record = prompt_record("id", "train", Prompt(1, "?", [1], {}), lambda prompt: prompt.fields["answer"])
    assert (record["gold"], record["text"]) == (None, "?")


def test_a_prompt_that_was_changed_is_another_prompt(tmp_path):
    with Recorder(tmp_path, 9, 0, "toy", NAMES) as recorder:
        recorder.completions(0, [group_of(0), group_of(0)])
        position = recorder.position()
    with Recorder(tmp_path, 9, 1, "toy", NAMES, position) as recorder:
        recorder.completions(1, [group_of(1), group_of(1, prompt=Prompt(7, "What is 2 + 4?", [1], {}))])
    prompts = list(read_lines(tmp_path / "prompts.jsonl"))
    assert [line["text"] for line in prompts] == ["What is 2 + 3?", "What is 2 + 4?"]
    completions = list(read_lines(tmp_path / "completions.jsonl"))
    assert [line["id"] for line in completions] == [prompts[place]["id"] for place in (0,) * 6 + (1,) * 2]
    assert [(line["step"], line["group"], line["member"]) for line in completions[2:5]] == [
        (0, 1, 0),
        (0, 1, 1),
        (1, 0, 0),
    ]


def test_a_checkpoint_of_an_earlier_version_goes_on_again_and_again(tmp_path):
    """It knows of metrics and completions alone; what later files have by then is done again."""
    with Recorder(tmp_path, 9, 0, "toy", NAMES) as recorder:
        record_steps(recorder, 0, 2)
        position = recorder.position()
    position = {name: position[name] for name in ("metrics.jsonl", "completions.jsonl")}
    for _ in range(2):
        with Recorder(tmp_path, 9, 2, "toy", NAMES, position) as recorder:
            record_steps(recorder, 2, 4)
    assert [line["split"] for line in read_lines(tmp_path / "prompts.jsonl")] == ["train", "held-out"]
    assert len(list(read_lines(tmp_path / "metrics.jsonl"))) == 1 + 4 + 1


class Failing(Sink):
    def __init__(self):
        self.steps = []

    def step(self, step, metrics):
        self.steps.append(step)
        if step == 1:
            raise ConnectionError("the service is gone")


def test_a_sink_of_others_that_fails_is_left_out_and_told_once(tmp_path, capsys):
    failing = Failing()
    with Recorder(tmp_path, 4, 0, "toy", NAMES) as recorder:
        recorder.add(Tolerated("tracker", failing, recorder.message))
        record_steps(recorder, 0, 4)
    assert failing.steps == [0, 1]
    told = "note: tracker is not written any more: ConnectionError (the service is gone)."
    assert capsys.readouterr().out.count(told) == 1
    assert len(list(read_lines(tmp_path / "metrics.jsonl"))) == 6


class Listening(Sink):
    def __init__(self):
        self.heard = []

    def resumed(self, recorded, start_step):
        self.heard.append(("resumed", [step for step, _ in recorded], start_step))

    def evaluation(self, step, scores, groups=()):
        self.heard.append(("evaluation", step, len(groups)))

    def step(self, step, metrics):
        self.heard.append(("step", step))

    def completions(self, step, groups, tokens):
        self.heard.append(("completions", step, len(groups)))

    def close(self):
        self.heard.append(("close",))


def test_a_sink_hears_of_everything_in_its_order(tmp_path):
    with Recorder(tmp_path, 9, 0, "toy", NAMES) as recorder:
        record_steps(recorder, 0, 2)
        position = recorder.position()
        record_steps(recorder, 2, 3)
    sink = Listening()
    with Recorder(tmp_path, 9, 2, "toy", NAMES, position) as recorder:
        recorder.add(sink)
        record_steps(recorder, 2, 4)
    assert sink.heard == [
        ("resumed", [0, 0, 1], 2),
        *(("completions", 2, 1), ("step", 2)),
        *(("evaluation", 3, 1), ("completions", 3, 1), ("step", 3), ("close",)),
    ]


def test_each_start_is_written_down(tmp_path):
    write_start(tmp_path, {"command": "python -m grpo.run a.py", "steps": 3})
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"time": "2026-')  # killed while writing
    write_start(tmp_path, {"command": "python -m grpo.run --resume ."})
    first, second = read_lines(tmp_path / "starts.jsonl")
    assert (first["command"], second["command"]) == ("python -m grpo.run a.py", "python -m grpo.run --resume .")
    assert first["versions"]["torch"] == torch.__version__
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "starts.jsonl").symlink_to(mine)
    with pytest.raises(UserError, match="is a symbolic link"):
        write_start(tmp_path / "other", {})
    assert mine.read_text() == "mine"
