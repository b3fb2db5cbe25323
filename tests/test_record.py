"""What a run writes down can be read back, cut back and gone on with; what it prints is aligned."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.cells import cell_len
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo.config import Config
from grpo.errors import UserError
from grpo.folder import Saved, write_config
from grpo.record import Console, Recorder, draw_curves
from grpo.record.console import columns_for, columns_that_fit
from grpo.record.curves import _running_mean, _thinned, labels
from grpo.record.jsonl import JsonLines, finite, read_lines
from grpo.record.names import in_lines
from grpo.record.untrained import explain
from grpo.types import Completion, Group, Prompt

NAMES = ["correctness", "integer", "strict_xml", "soft_xml", "xml_count"]


def metrics_of(step):
    return {
        "reward/mean": 0.1 + step / 3,
        "reward/std": 0.5,
        **{f"reward/{name}": step / 7 for name in NAMES},
        "completion/length": 100.0 + step,
        "completion/truncated": 0.25,
        "groups/zero_variance": 0.125,
        "policy/entropy": 1.0 / (1 + step),
        "policy/loss": -1e-3,
        "mismatch/kl": 2e-5 * (step + 1),
        "optim/grad_norm": math.inf if step == 2 else 0.5,
        "optim/learning_rate": 1e-5,
        "speed/tokens_per_second": 12345.6,
        "memory/peak_gib": 12.34,
    }


def scores_of(step):
    return {"eval/pass@1": 0.3 + step / 100, "eval/pass@1/low": 0.25, "eval/pass@1/high": 0.35, "eval/pass@4": 0.5}


def group_of(step, text="<answer>\n5\n</answer>"):
    completions = [Completion([1, 2, 3], [-0.1] * 3, text, "stop", step), Completion([1], [-0.1], "5", "length", step)]
    return Group(
        Prompt(7, "What is 2 + 3?", [1], {}),
        completions,
        parts={"correctness": torch.tensor([2.0, math.nan])},
        rewards=torch.tensor([2.0, 0.0]),
        advantages=torch.tensor([0.1, -0.1]),
    )


def record_steps(recorder, start, stop, evaluate_every=3):
    for step in range(start, stop):
        if step % evaluate_every == 0:
            recorder.evaluation(step, scores_of(step))
        recorder.completions(step, [group_of(step)])
        recorder.step(step, metrics_of(step))


def scalars(folder, name):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_run_is_written_down_everywhere(tmp_path, capsys):
    with Recorder(tmp_path, 4, 0, "toy", NAMES) as recorder:
        recorder.message("hello")
        record_steps(recorder, 0, 4)
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 3, 3]
    assert lines[0] == {"step": 0, **scores_of(0)}
    assert lines[2] == {"step": 1, **metrics_of(1)}
    assert lines[3] == {"step": 2, **metrics_of(2), "optim/grad_norm": None}

    completions = list(read_lines(tmp_path / "completions.jsonl"))
    assert len(completions) == 8
    assert completions[3] == {
        "step": 1,
        "prompt": 7,
        "text": "5",
        "finish": "length",
        "tokens": 1,
        "parts": {"correctness": None},
        "reward": 0.0,
        "advantage": torch.tensor(-0.1).item(),
        "policy_version": 1,
    }
    assert scalars(tmp_path, "eval/pass@1") == [(0, pytest.approx(0.3)), (3, pytest.approx(0.33))]
    assert [step for step, _ in scalars(tmp_path, "reward/mean")] == [0, 1, 2, 3]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width >= 1200
    assert {path.name for path in tmp_path.iterdir()} == {
        *("metrics.jsonl", "completions.jsonl", "tensorboard", "curves.png"),
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
            recorder.evaluation(3, scores_of(3))
        position = recorder.position()
        # What the checkpoint does not know of: it must be gone after the resume.
        recorder.step(3, {"reward/mean": -1.0})
        recorder.completions(3, [group_of(99)])
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/me')  # killed while writing
    with Recorder(resumed, 6, 3, "toy", NAMES, position) as recorder:
        if not evaluate_before_saving:
            recorder.evaluation(3, scores_of(3))
        for step in range(3, 6):
            recorder.completions(step, [group_of(step)])
            recorder.step(step, metrics_of(step))

    for name in ("metrics.jsonl", "completions.jsonl"):
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
    JsonLines(tmp_path / "a.jsonl", position).close()
    assert [line["text"] for line in read_lines(tmp_path / "a.jsonl")] == ["é \ud800 \x1b\n", ""]


def test_json_gets_null_for_what_it_cannot_say():
    values = finite({"b": math.nan, "a": 1, "c": -math.inf, "d": 0.1})
    assert json.dumps(values, allow_nan=False) == '{"b": null, "a": 1, "c": null, "d": 0.1}'


@pytest.mark.parametrize("width", [200, 150, 120, 80, 60, 40])
def test_the_step_lines_are_aligned_and_fit_the_width(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    console = Console(1000, 0, "toy", NAMES, file=out)
    for step in (0, 1, 2, 9, 999):
        console.step(step, metrics_of(step) | scores_of(step % 9))
    console.step(10, {"reward/mean": 1.0})
    console.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 + 6
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= min(width, 150)
    # Under each title's last letter stands each number's last digit.
    ends = [at for at in range(len(lines[1])) if lines[1][at] != " " and lines[1][at + 1 : at + 2] in ("", " ")]
    for line in lines[2:]:
        for at in ends:
            assert line[at] != " " and line[at + 1 : at + 2] in ("", " ")
    assert lines[2].split()[:2] == ["1/1000", "0.100"]
    assert lines[-1].split()[:2] == ["11/1000", "1.000"]
    assert set(lines[-1].split()[2:]) <= {"-"}


def test_a_narrow_line_keeps_what_matters_most():
    columns = columns_for(NAMES)
    assert columns_that_fit(columns, 7, 10_000) == columns
    assert columns_that_fit(columns, 7, 5) == []
    few = [column.metric for column in columns_that_fit(columns, 7, 36)]
    assert few == ["reward/mean", "eval/pass@1", "completion/length"]


LONG = [
    *(
        "reversed_letters",
        "exact_match",
        "mathematical_equivalence",
        "penalty_for_repeating_the_question_asked",
        "tone",
    ),
    *("答えは正しいですか", "with\u200b\u202e_marks", "\x1b[31mred", "[bold]loud[/bold]", "cost_$a$_$b"),
]
WHOLE_WORDS = """step mean reward held-out pass@1 length cut off zero var. entropy nats mismatch KL gradient norm
learning rate tokens /s memory GiB reversed letters exact match mathematical equivalence penalty for repeating ..
question asked tone 答えは正し. with marks [31mred [bold]loud[. cost $a$ $b"""


def step_lines(monkeypatch, width, names, metrics):
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    console = Console(50, 0, "toy", names, file=out)
    console.step(0, metrics)
    console.close()
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 150])
def test_names_of_rewards_are_whole_words_at_every_width(monkeypatch, width):
    """A column goes before the words of its title do."""
    *header, line = step_lines(monkeypatch, width, LONG, {"reward/mean": 1.0} | {f"reward/{n}": 0.25 for n in LONG})
    assert len({cell_len(each) for each in (*header, line)}) == 1 and cell_len(line) <= width
    words = set(" ".join(header).split())
    assert words <= set(WHOLE_WORDS.split())
    assert {"reversed", "letters"} <= words
    assert "\x1b" not in " ".join(header)


def test_names_that_are_cut_alike_are_told_apart():
    names = ["internationalization_one", "internationalizations", "internationalizationist", "tone"]
    titles = [column.title for column in columns_for(names) if column.metric.removeprefix("reward/") in names]
    assert titles == [("internation.", "one"), ("internation.", "#2"), ("internation.", "#3"), ("tone",)]
    told = labels([f"reward/{name}" for name in [*LONG, *names[:3]]])
    assert told[:4] == [
        "reversed letters",
        "exact match",
        "mathematical\nequivalence",
        "penalty for ..\nquestion asked",
    ]
    assert len(set(told)) == len(LONG) + 3
    assert labels(["reward/cost_$a$_$b"]) == [r"cost \$a\$ \$b"]


def test_a_name_of_any_length_is_laid_out_at_once():
    assert in_lines("w_" * 10_000, 12, 9, fewest=2, most=3) == ("w w w", "w .. w", "w w w")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "-"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (1e30, "1e+30"),
        (-123456.0, "-1e+05"),
        (99999.9, "1e+05"),
    ],
)
def test_numbers_too_large_for_their_column_do_not_move_the_others(monkeypatch, value, shown):
    first, second, line = step_lines(monkeypatch, 150, ["tone"], {"reward/mean": 1.0, "reward/tone": value})
    assert line.split()[1:3] == ["1.000", shown]
    assert len(first) == len(second) == len(line)


def test_the_bar_says_the_stage_and_takes_no_orders_from_names(monkeypatch):
    out = io.StringIO()
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    console = Console(50, 0, "[red]toy[/blue]\x1b[2J\u202e_with_a_name_of_more_words", ["tone"], file=out)
    console.start()
    for stage in ("rollout", "evaluation"):
        console.stage(stage)
        console._progress.refresh()
    console.close()
    shown = out.getvalue()
    assert "rollout" in shown and "evaluation" in shown
    assert "[red]toy[/blue]\\x1b[2J\\." in shown
    assert "\x1b[2J" not in shown and "\u202e" not in shown


def test_a_message_gives_the_terminal_no_orders():
    out = io.StringIO()
    console = Console(50, 0, "toy", ["tone"], file=out)
    console.message("a \x1b[31m[bold]row[/bold]\x07\u202e told\nin two lines " + "x" * 400)
    console.close()
    assert out.getvalue() == "a \\x1b[31m[bold]row[/bold]\\x07\\u202e told\nin two lines " + "x" * 400 + "\n"


def test_a_completion_of_a_megabyte_is_a_frame_of_a_screen():
    out = io.StringIO()
    console = Console(100, 0, "toy", NAMES, file=out)
    for text in ("x" * 2**20, "\n" * 2**20, "e\u0301\u200b" * 2**18, "語" * 2**18):
        console.sample(4, group_of(4, text=text))
    console.close()
    lines = out.getvalue().splitlines()
    assert len(lines) < 4 * 60
    assert len({cell_len(line) for line in lines}) == 1


def test_the_header_comes_back_now_and_then():
    out = io.StringIO()
    console = Console(100, 0, "toy", NAMES, file=out)
    for step in range(41):
        console.step(step, metrics_of(step))
    console.close()
    lines = out.getvalue().splitlines()
    assert [at for at, line in enumerate(lines) if line.startswith("   step")] == [1, 23, 45]


def test_a_sample_shows_text_as_it_is_without_control_codes():
    out = io.StringIO()
    console = Console(100, 0, "toy", NAMES, file=out)
    console.sample(4, group_of(4, text="[bold]5[/bold] :smile: \x1b[31m\x07 \\ é 你好\n" + "y" * 500))
    console.close()
    shown = out.getvalue()
    assert "\x1b" not in shown and "\x07" not in shown
    for piece in (
        "step 5, row 7",
        "What is 2 + 3?",
        "[bold]5[/bold] :smile: \\x1b[31m\\x07 \\ é 你好",
        "correctness 2",
    ):
        assert piece in shown
    assert "[3 tokens, stopped by itself]" in shown
    assert "reward 2.000   advantage +0.100" in shown
    assert shown.count("y") == 500 + 1  # and that of "by itself"
    assert len({cell_len(line) for line in shown.splitlines()}) == 1


def test_a_log_file_that_holds_ascii_only_stops_no_run():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(100, 0, "toy", NAMES, file=out)
    console.sample(0, group_of(0, text="é 你"))
    console.close()
    out.flush()
    assert b"? ?" in out.buffer.getvalue()


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 0, "eval/pass@1": 0.5}],
        [{"step": 0, "reward/mean": None, "reward/a": 1.0, "policy/entropy": None, "mismatch/kl": -1e-5}],
        [{"step": step, "reward/mean": step, **{f"reward/{part}": 1 for part in range(12)}} for step in range(50)],
        [
            {"step": step, "reward/mean": sign * 1e308, "reward/答_$x$_{": 1, "policy/entropy": sign * 10**400}
            for step, sign in enumerate([1, -1, 1])
        ],
        [{"step": 0, "reward/mean": 1}, {"step": 1, "reward/mean": 1, "reward/new": 2, "eval/pass@1": 1}],
    ],
)
def test_curves_are_drawn_of_whatever_there_is(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1, "re')
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        assert len(set(picture.convert("L").getdata())) > 10
    assert not list(tmp_path.glob("*.partial"))


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


EMPTY = {"groups/rolled_out": 8, "groups/trained": 0, "groups/zero_variance": 1.0, "completion/truncated": 0.0,
         "completion/length": 7.0, "reward/mean": 0.5, "reward/std": 0.0, "optim/grad_norm": 0.0}  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({}, ["all completions earned the same, 0.5 for all", "--group-size"]),
        ({"reward/std": 0.5}, ["earned the same, so there", "--dynamic-sampling"]),
        ({"completion/truncated": 1.0}, ["cut off after 7 tokens", "equal in every group", "--max-completion-tokens"]),
        (
            {"completion/truncated": 1.0, "groups/zero_variance": 0.0},
            ["every completion was cut off after 7 tokens. "],
        ),
        ({"completion/truncated": 0.5, "groups/zero_variance": 0.25}, ["in 2 of 8 groups", "--mask-truncated"]),
        ({"groups/trained": 8, "groups/zero_variance": 0, "policy/kept": 0.0}, ["8 of them", "--off-policy-mask"]),
        ({"groups/trained": 8, "groups/zero_variance": 0, "mismatch/correction": 0.0}, ["--correction", "mismatch/kl"]),
        ({"groups/trained": 8, "groups/zero_variance": 1.0}, ["earned the same"]),  # KL pulls nowhere at the start
        ({"groups/trained": 8, "groups/zero_variance": 0.0}, ["the gradient of their loss is 0"]),
        ({"groups/rolled_out": None, "groups/zero_variance": math.nan}, ["the gradient of their loss is 0"]),
    ],
)
def test_a_step_that_trains_nothing_says_why_and_what_to_do(numbers, words):
    told = explain(EMPTY | numbers)
    for word in words:
        assert word in told


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


def test_a_step_in_which_all_is_solved_is_no_alarm(tmp_path):
    with Recorder(tmp_path, 9, 0, "toy", NAMES) as recorder:
        for step, mean in enumerate([0.0, 3.0, 4.0, 4.0, 4.0]):
            recorder.step(
                step, EMPTY | {"reward/mean": mean, "groups/trained": 3 * (mean == 3.0), "optim/grad_norm": 0.5}
            )
        (warning,) = recorder.warnings()
    assert "every completion earned 4, the most so far. These rows have no more to teach it" in warning
    assert "too easy" in explain(EMPTY) and "the most so far" in explain(EMPTY, solved=True)


def test_steps_that_train_nothing_are_told_as_they_come_and_at_the_end(tmp_path, capsys):
    trained = EMPTY | {"groups/trained": 3, "optim/grad_norm": 0.5}
    with Recorder(tmp_path, 9, 0, "toy", NAMES) as recorder:
        for step in range(2):
            recorder.step(step, trained | EMPTY)
        assert recorder.warnings() == []
        position = recorder.position()
    with Recorder(tmp_path, 9, 2, "toy", NAMES, position) as recorder:
        for step, metrics in enumerate([EMPTY, trained, EMPTY], 2):
            recorder.step(step, metrics)
        (warning,) = recorder.warnings()
    said = capsys.readouterr().out
    assert said.count("Step 1 trained nothing: in every group") == said.count("Step 5 trained nothing: in every") == 1
    assert "Step 3 trained nothing either, 3 in a row: in every group" in said
    assert "Step 4 trained" not in said
    assert warning.startswith("4 of the 5 steps trained nothing, 3 of them in a row (to step 3). Why: in every")


@pytest.mark.parametrize("length", [1, 1999, 2000, 2001, 5000])
def test_curves_of_many_steps_are_means_of_neighbours(length):
    columns = np.stack([np.arange(length, dtype=np.float64), np.arange(length) % 7.0])
    columns[1, ::3] = np.nan
    size = math.ceil(length / 2000)
    thin = _thinned(columns)
    assert thin.shape == (2, math.ceil(length / size))
    for place in (0, thin.shape[1] // 2, thin.shape[1] - 1):
        steps, values = columns[:, size * place : size * (place + 1)]
        known = values[~np.isnan(values)]
        expected = [steps.mean(), known.mean() if len(known) else np.nan]
        np.testing.assert_allclose(thin[:, place], expected)


def test_nothing_is_drawn_of_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(("length", "reach"), [(1, 0), (1, 3), (2, 5), (9, 0), (9, 1), (10, 4), (7, 20)])
def test_the_running_mean_is_that_of_the_neighbours_known(length, reach):
    values = np.arange(length, dtype=np.float64) ** 2
    values[::4] = np.nan
    expected = [
        np.mean([each for each in values[max(0, at - reach) : at + reach + 1] if not np.isnan(each)] or [np.nan])
        for at in range(length)
    ]
    np.testing.assert_allclose(_running_mean(values, reach), expected)
