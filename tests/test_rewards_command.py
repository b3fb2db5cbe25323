"""`python -m grpo.rewards`: the list, one text, the completions of a run; and what is wrong told in a sentence."""

import io
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.record.files import Files
from grpo.rewards import math as math_reward
from grpo.rewards.__main__ import main
from grpo.rewards.names import installed_rewards
from grpo.rewards.shipped import _HERE, MAKERS, SHIPPED
from grpo.types import Completion, Group, Prompt

ROOT = Path(__file__).parents[1]

OWN = '''"""Rewards of somebody's own."""

import helper_beside


def short(completion):
    """1.0 for less than ten characters.

    Range: 0 or 1.

    >>> short("12"), short("1234567890")
    (1.0, 0.0)
    """
    return float(len(completion) < 10)


def of_batch(prompts, completions, answer, **kwargs):
    return [float(each[0]["content"] == right) for each, right in zip(completions, answer)]


def breaks(completion):
    """Says nothing good.

    >>> breaks("")
    0
    """
    raise RuntimeError("broken \\x1b[31m")


def _private(completion):
    return 0.0


def not_a_reward(text):
    return 0.0
'''


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own_rewards.py").write_text(OWN)
    (tmp_path / "helper_beside.py").write_text("")
    return str(tmp_path / "own_rewards.py")


def run(capsys, *argv):
    """(exit code, standard output, standard error)"""
    try:
        code = main(list(argv))
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_what_ships_is_at_hand_by_name_however_old_the_installation_is():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["grpo.rewards"]
    assert set(SHIPPED) == set(points)
    assert set(SHIPPED) <= set(installed_rewards())
    assert all(len(installed_rewards()[name]) == 1 for name in SHIPPED)


def test_what_others_call_them_is_here():
    for name in _HERE.values():
        assert name in (*SHIPPED, *MAKERS)


def test_the_list_says_of_every_reward_what_it_takes_pays_and_gave_just_now(capsys, own):
    code, out, _ = run(capsys, "--module", own)
    assert code == 0
    entries = {entry.partition("(")[0]: entry for entry in out.split("\n\n")}
    for name in (*SHIPPED, "tags", "overlong", "judge"):
        assert re.search(r"ships with grpo   range -?[\d.]+ (or|to) -?[\d.]+\n", entries[name]), name
        assert " is " in entries[name].splitlines()[-1], name
    assert 'short("12"), short("1234567890") is (1.0, 0.0)' in entries["short"]
    assert re.search(r"own_rewards.py:\d+   range 0 or 1", entries["short"])
    assert "range not stated" in entries["of_batch"]
    assert r"raised RuntimeError (broken \x1b[31m)" in entries["breaks"]
    assert "_private" not in out
    assert "not_a_reward" not in out


def test_packages_are_named_and_one_that_is_broken_does_not_hide_the_others(capsys, tmp_path, monkeypatch):
    for package, module in (("good-rewards", "own_rewards:short"), ("bad-rewards", "nothing_of_this_name:x")):
        folder = tmp_path / f"{package.replace('-', '_')}-1.5.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        (folder / "entry_points.txt").write_text(f"[grpo.rewards]\nof_{package.partition('-')[0]} = {module}\n")
    (tmp_path / "own_rewards.py").write_text(OWN)
    (tmp_path / "helper_beside.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run(capsys)
    entries = {entry.partition("\n")[0]: entry for entry in out.split("\n\n")}
    assert code == 0
    assert "package good-rewards 1.5   range 0 or 1" in entries["of_good(completion)"]
    assert "it raised ModuleNotFoundError" in entries["of_bad"]
    assert "math(completion, answer)" in entries
    assert run(capsys, "of_good", "--completion", "12")[1] == "of_good 1\n"


def test_a_reward_and_a_maker_are_shown_alone(capsys, own):
    assert "range 0 or 1" in run(capsys, "math")[1]
    assert "range 0 or 1" in run(capsys, "short", "--module", own)[1]
    assert "text_after=False" in run(capsys, "tags")[1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["math", "--completion", r"\boxed{\frac12}", "--answer", "0.5"], "math 1\n"),
        (["math", "--completion", "-5", "--answer", "-5"], "math 1\n"),
        (["number", "--completion=-5", "--answer=-6"], "number 0\n"),
        (["correctness", "--completion", "<answer>4</answer>", "--column", "answer=4"], "correctness 2\n"),
        (["code", "--completion", "print(1)", "--column", 'tests:=[{"input": "", "output": "1"}]'], "code 1\n"),
        (["grpo.rewards:similarity", "--completion", "oll", "--answer", "olleh"], "similarity 0.75\n"),
        (["length", "--completion", "x" * 99], "length -0.1\n"),
        (["letters", "--task", str(ROOT / "tests" / "absent.py")], ""),
    ],
)
def test_one_text_is_scored(capsys, argv, said):
    code, out, _ = run(capsys, *argv)
    assert (code, out) == ((0, said) if said else (2, ""))


def test_functions_of_the_batch_and_of_a_task_are_scored_too(capsys, own):
    assert run(capsys, "of_batch", "--module", own, "--completion", "4", "--answer", "4")[:2] == (0, "of_batch 1\n")
    argv = ["integer", "--task", "gsm8k", "--completion", "<answer>4</answer>"]
    assert run(capsys, *argv)[:2] == (0, "integer 0.5\n")


def test_the_text_may_come_from_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("It is 42.\n"))
    assert run(capsys, "math", "--completion", "-", "--answer", "42")[:2] == (0, "math 1\n")


@pytest.mark.slow
def test_it_is_a_command():
    command = [sys.executable, "-m", "grpo.rewards", "math", "--completion", "-", "--answer", "42"]
    done = subprocess.run(command, input="It is 42.", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "math 1\n")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["mth", "--completion", "x"], "Did you mean `math`"),
        (["accuracy_reward", "--completion", "x"], "Here it is `math`"),
        (["len_reward", "--completion", "x"], "Here it is `short_when_right`. It is made by a call"),
        (["math", "--completion", "x"], "asks for `answer`.*--answer"),
        (["code", "--completion", "x"], "asks for `tests`.*--column tests="),
        (["number", "--completion", "4", "--answer", "x"], "no number"),
        (["--completion", "x"], "Say which reward"),
        (["cosine", "--completion", "x"], "`cosine`: missing a required argument: 'right'"),
        (["math", "extra"], "no use for 'extra'"),
        (["math", "--colum", "a=b"], "Did you mean `--column`"),
        (["math", "--completion", "x", "--column", "answer"], "name=text"),
        (["math", "--completion", "x", "--column", "answer:=x"], "no JSON"),
        (["math", "--completion", "x", "--on", "y"], "one of them"),
        (["math", "--on", "/nowhere"], "no run's folder"),
        (["--module", "nothing_of_this_name"], "ModuleNotFoundError"),
        (["--module", "nothing/there.py"], "no file"),
        (["--module", "json.decoder"], "no reward"),
        (["--task", "nothing/there.py"], "no task file"),
        (["math", "--groups", "x"], "--groups"),
    ],
)
def test_bad_input_is_told_in_a_sentence(capsys, argv, told):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert re.search(told, err, re.S)
    assert "Traceback" not in err


def test_what_a_module_makes_by_a_call_is_at_hand_and_a_slip_is_told(capsys, tmp_path):
    (tmp_path / "made.py").write_text("from grpo.rewards import math, tags\n\nplan = tags('plan', 'code')\n")
    made = str(tmp_path / "made.py")
    assert (
        run(capsys, "plan", "--module", made, "--completion", "<plan>a</plan><code>b</code>")[1] == "tags_plan_code 1\n"
    )
    assert "Did you mean `plan`" in run(capsys, "plam", "--module", made, "--completion", "x")[2]


def test_a_module_that_fails_is_told(capsys, tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0")
    assert re.search("ZeroDivisionError", run(capsys, "--module", str(tmp_path / "bad.py"))[2])


# ---- a run's completions

TEXTS = ["It is 4.", "It is 5.", r"\boxed{4}", "", "4 \x1b[31m", "five", "<answer>4</answer>", "no idea"]


@pytest.fixture
def a_run(tmp_path):
    """The folder of a run of six groups, in which `right` was paid for the letter 4, whatever was meant."""
    folder = tmp_path / "run"
    folder.mkdir()
    files = Files(folder)
    for step in range(3):
        groups = []
        for index in (0, 1):
            prompt = Prompt(index, f"{index}?", [1], {"answer": "4"}, [{"role": "user", "content": f"{index}?"}])
            texts = TEXTS[4 * index : 4 * index + 4]
            group = Group(
                prompt,
                [Completion([1] * (len(text) + 1), [0.0] * (len(text) + 1), text, "stop", step) for text in texts],
            )
            right = torch.tensor([float("4" in text) for text in texts])
            group.parts = {"right": right, "always": torch.ones(4), "right/part": right}
            group.rewards, group.advantages = 2 * right, right - right.mean()
            groups.append(group)
        files.completions(step, groups, [])
        files.step(step, {"reward/mean": 1.0})
    files.close()
    return folder


def test_a_run_is_scored_anew_as_by_hand(capsys, a_run):
    code, out, _ = run(capsys, "math", "--on", str(a_run))
    lines = [json.loads(line) for line in (a_run / "completions.jsonl").read_text().splitlines()]
    now = np.array([math_reward(line["text"], "4") for line in lines])
    then = np.array([line["reward"] for line in lines])
    assert code == 0
    assert f"math on {len(lines)} completions" in out
    assert f"mean {now.mean():.4g}, best 1 for {now.mean():.1%}" in out
    rows = {row.split()[0]: row.split()[1:] for row in out.splitlines() if row.strip()}
    same = ((now == 1) == (then == 2)).mean()
    only_then = int(((then == 2) & (now < 1)).sum())
    expected = [f"{then.mean():.4g}", f"{np.corrcoef(now, then)[0, 1]:.3f}", f"{same:.1%}", str(only_then), "0"]
    assert rows["reward"] == expected
    assert rows["right"][1:] == expected[1:]
    assert rows["always"][1] == "-"
    assert "right/part" not in rows
    assert "\x1b" not in out


def test_the_same_reward_agrees_with_itself(capsys, a_run, tmp_path):
    (tmp_path / "same.py").write_text("def right(completion):\n    return float('4' in completion)\n")
    out = run(capsys, "right", "--module", str(tmp_path / "same.py"), "--on", str(a_run))[1]
    rows = {row.split()[0]: row.split()[1:] for row in out.splitlines() if row.strip()}
    assert rows["right"][1:] == ["1.000", "100.0%", "0", "0"]


def test_only_the_first_groups_are_scored_where_that_is_asked(capsys, a_run):
    assert "math on 8 completions" in run(capsys, "math", "--on", str(a_run), "--groups", "2")[1]


def test_a_reward_that_fails_or_does_not_apply_is_counted(capsys, a_run, tmp_path):
    text = "def odd(completion):\n    return None if completion == 'five' else 1 / (len(completion) > 0)\n"
    (tmp_path / "odd.py").write_text(text)
    code, out, _ = run(capsys, "odd", "--module", str(tmp_path / "odd.py"), "--on", str(a_run))
    assert code == 0
    assert "It gave no score to 6, 3 of them because it failed." in out
    assert "ZeroDivisionError" in out


def test_a_run_that_has_nothing_to_score_is_told(capsys, a_run):
    assert "asks for `tests`" in run(capsys, "code", "--on", str(a_run))[2]
    (a_run / "prompts.jsonl").write_text("{}\n")
    assert "line 1 does not say fields, id, prompt, text" in run(capsys, "math", "--on", str(a_run))[2]
    (a_run / "prompts.jsonl").write_text("")
    assert "nothing to score" in run(capsys, "math", "--on", str(a_run))[2]
    (a_run / "prompts.jsonl").unlink()
    assert "has no prompts.jsonl" in run(capsys, "math", "--on", str(a_run))[2]
