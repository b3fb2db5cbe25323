"""What a run prints is aligned, fits the width, and gives the terminal no orders."""

import io
import math
import re

import pytest
from recorded import NAMES, group_of, metrics_of, scores_of
from rich.cells import cell_len

from grpo.record import Console
from grpo.record.console import TIME_LEFT, columns_for, columns_that_fit
from grpo.record.curves import labels
from grpo.record.names import in_lines
from grpo.terminal import between_words


@pytest.mark.parametrize("width", [200, 160, 150, 120, 100, 80, 60, 40])
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
    assert len(lines[0]) <= min(width, 160)
    # Under each title's last letter stands each number's last digit.
    ends = [at for at in range(len(lines[1])) if lines[1][at] != " " and lines[1][at + 1 : at + 2] in ("", " ")]
    for line in lines[2:]:
        for at in ends:
            assert line[at] != " " and line[at + 1 : at + 2] in ("", " ")
    assert lines[2].split()[:2] == ["1/1000", "0.100"]
    assert lines[-1].split()[:2] == ["11/1000", "1.000"]
    assert {number for number in lines[-1].split()[2:] if not re.fullmatch(r"\d+s", number)} <= {"-"}


def test_a_narrow_line_keeps_what_matters_most():
    columns = columns_for(NAMES)
    assert columns_that_fit(columns, 7, 10_000) == columns
    assert columns_that_fit(columns, 7, 5) == []
    few = [column.metric for column in columns_that_fit(columns, 7, 36)]
    assert few == ["reward/mean", "eval/pass@1", "completion/length"]


def test_ppo_shows_what_grpo_does_and_its_values():
    of_grpo, of_ppo = ([column.metric for column in columns_for(NAMES, method=name)] for name in ("grpo", "ppo"))
    assert [metric for metric in of_ppo if metric not in of_grpo] == ["value/explained_variance"]
    assert [metric for metric in of_ppo if metric in of_grpo] == of_grpo


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


WHOLE_WORDS = """step time left
mean reward held-out pass@1 length cut off zero var. entropy nats mismatch KL gradient norm
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


def test_without_a_terminal_a_step_is_a_plain_line_that_says_the_time_left(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    clock = iter([0.0, 30.0, 60.0, 90.0])
    monkeypatch.setattr("grpo.record.console.time.monotonic", lambda: next(clock))
    out = io.StringIO()
    console = Console(500, 0, "toy", NAMES, file=out)
    for step in range(3):
        console.step(step, metrics_of(step))
    first, second, *lines = out.getvalue().splitlines()
    assert (first.split()[-1], second.split()[-1]) == ("time", "left")
    assert [line.split()[-1] for line in lines] == ["4h10m", "4h09m", "4h08m"]
    assert "memory" in first and "\r" not in out.getvalue() and "\x1b" not in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, "0s"), (99.4, "99s"), (100, "2m"), (5999, "100m"), (6000, "1h40m"), (1e6, "277h47m")]
)
def test_the_time_left_is_told_shortly(seconds, told):
    assert TIME_LEFT.cell({"time/left": seconds}).strip() == told


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_color_means_none_and_a_held_out_score_fits(monkeypatch, width):
    for variable, value in {"TTY_INTERACTIVE": "1", "TTY_COMPATIBLE": "1", "NO_COLOR": "1", "COLUMNS": width}.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    console = Console(50, 0, "toy", ["tone"], file=out)
    console.start()
    console.sample(0, group_of(0))
    console.step(0, metrics_of(0))
    console.evaluation(0, scores_of(0) | {"eval/pass@4/low": 0.4, "eval/pass@4/high": 0.6, "eval/majority@4": 0.5})
    console.close()
    shown = out.getvalue()
    codes = {code for codes in re.findall("\x1b\\[([0-9;]*)m", shown) for code in codes.split(";")}
    assert codes <= {"", "0", "1", "2", "3"}  # bold, dim, italic
    told = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n").splitlines()
    assert all(cell_len(line) <= width for line in told)
    assert sum("95%:" in line for line in told) == (1 if width == 160 else 2)


def test_long_sentences_are_broken_between_words_and_what_is_copied_is_not():
    command = "`python -m grpo.run --resume runs/a-very-long-name-of-a-run-that-goes-on-and-on --steps 20`"
    text = f"{'many words ' * 12}go on with {command}. And so on.\n  python -m grpo.run {'x ' * 60}\nshort\n\nlast"
    broken = between_words(text, 80)
    lines = broken.split("\n")
    assert broken.replace("\n", " ").split() == text.replace("\n", " ").split()
    assert command in broken and "  python -m grpo.run " + "x " * 60 in lines
    assert all(len(line) <= 80 or "`" in line or line.startswith(" ") for line in lines)
    assert lines[-3:] == ["short", "", "last"]
    assert between_words("  - one two three", 12) == "  - one two\n    three"


def test_a_terminal_gets_its_sentences_by_words(monkeypatch):
    for variable, value in {"TTY_INTERACTIVE": "0", "TTY_COMPATIBLE": "1", "COLUMNS": "80"}.items():
        monkeypatch.setenv(variable, value)
    out = io.StringIO()
    console = Console(50, 0, "toy", ["tone"], file=out)
    console.message("words of a sentence \x1b[31m " * 20)
    console.close()
    ends = {line.split()[-1] for line in out.getvalue().splitlines()}
    assert ends <= {"words", "of", "a", "sentence", "\\x1b[31m"} and len(out.getvalue().splitlines()) > 5
    assert "\x1b[31m" not in out.getvalue()


def test_what_a_sample_says_of_an_answer_is_of_its_method():
    """A given answer earned nothing and did not stop by itself; with a value head every token has its own advantage."""

    def shown(method):
        out = io.StringIO()
        Console(10, 0, "toy", NAMES, file=out, method=method).sample(0, group_of(0))
        return out.getvalue()

    assert "a completion of step" in shown("grpo") and "advantage" in shown("grpo")
    assert "reward" in shown("ppo") and "advantage" not in shown("ppo")
    for method in ("sft", "dpo"):
        assert "an answer of step" in shown(method) and "tokens taught]" in shown(method)
        assert not any(word in shown(method) for word in ("advantage", "scored", "stopped by itself"))
