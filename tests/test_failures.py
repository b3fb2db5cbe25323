"""What a reward fails on is missing: left out, counted, told once; too much of it ends the run. Never scored 0."""

import json
import math
import random
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch
from toy_task import SMALL, TASK

from grpo.errors import UserError
from grpo.evaluate import measure_reward, measure_solved
from grpo.rewards import build_rewards, score
from grpo.rewards.failures import Tally, Tolerance, chance_of
from grpo.run import main
from grpo.types import Completion, Group, Prompt


def group_of(*texts, index=7):
    completions = [Completion([1], [0.0], text, "stop", 0) for text in texts]
    return Group(Prompt(index, "?", [1], {"answer": "5"}), completions)


def scored(rewards, groups, share=1.0, timeout=None):
    told = []
    tolerance = Tolerance(share, told.append)
    score(groups, build_rewards(rewards, ["answer"], chat=False, timeout=timeout), tolerance)
    return tolerance, told


def length(completion):
    return float(len(completion))


def crash(completion):
    return {"bad": 1 / len(completion.replace("bad", ""))}["bad"] if completion == "bad" else length(completion)


def not_a_number(completion):
    return math.nan if completion == "bad" else length(completion)


def text(completion):
    return "1.0" if completion == "bad" else length(completion)


def leaves(completion):
    raise SystemExit(0) if completion == "bad" else ZeroDivisionError if completion == "" else None


def endless(completion):
    while completion == "bad":
        pass
    return length(completion)


def one_of_the_batch(completions):
    return [not_a_number(completion) for completion in completions]


async def later(completion):
    return crash(completion)


@pytest.mark.parametrize(
    ("reward", "why"),
    [
        (crash, "raised ZeroDivisionError"),
        (not_a_number, "returned nan (float)"),
        (text, "returned '1.0' (str of length 3)"),
        (endless, "raised TimeoutError (no result in 0.05 s"),
        (one_of_the_batch, "returned nan (float)"),
        (later, "raised ZeroDivisionError"),
    ],
)
def test_a_failure_of_one_completion_leaves_that_completion_without_a_score(reward, why):
    groups = [group_of("a", "bad", "abc"), group_of("ab", "abcd", "", index=9)]
    tolerance, told = scored({reward: 2.0, length: 1.0}, groups, timeout=0.05)
    assert groups[0].rewards.tolist() == pytest.approx([3.0, math.nan, 9.0], nan_ok=True)
    assert groups[1].rewards.tolist() == [6.0, 12.0, 0.0]
    assert groups[0].parts[reward.__name__].isnan().tolist() == [False, True, False]
    assert groups[0].parts["length"].tolist() == [1.0, 3.0, 3.0]
    [words] = groups[0].failed.pop(reward.__name__).values()
    assert words.startswith(why)
    assert groups[0].failed == groups[1].failed == {}
    assert tolerance.counted() == {f"reward/{reward.__name__}/failed": 1.0}
    assert tolerance.counted() == {}
    assert len(told) == 1
    assert f"Reward `{reward.__name__}` {why}" in told[0]
    assert "row 7, completion 'bad'" in told[0]


def test_the_first_failure_is_told_with_its_traceback_and_the_others_are_counted():
    tolerance, told = scored({crash: 1.0}, [group_of("a", "bad", "bad", "b")])
    score([group_of("bad", "b")], build_rewards({crash: 1.0}, [], chat=False), tolerance)
    assert tolerance.counted() == {"reward/crash/failed": 3.0}
    assert len(told) == 1
    lines = told[0].splitlines()
    assert "Traceback" in lines[1]
    assert f'File "{__file__}"' in lines[2]  # none of ours stands before it
    assert "1 / len(" in lines[3]
    assert lines[-1] == "ZeroDivisionError: float division by zero" or "division by zero" in lines[-1]


def test_a_batch_that_raises_fails_as_a_whole():
    def batch(completions):
        raise RuntimeError("the judge is gone")

    groups = [group_of("a", "b"), group_of("c", index=9)]
    _, told = scored({batch: 1.0}, groups)
    assert [group.rewards.isnan().all().item() for group in groups] == [True, True]
    assert "on a batch of 3 completions (rows 7, 9)" in told[0]


def test_a_batch_that_raises_is_one_failure():
    def batch(completions):
        if completions[0] == "bad":
            raise RuntimeError("the judge is gone")
        return [None if completion == "odd" else math.nan for completion in completions]

    tolerance, rewards = Tolerance(0.1), build_rewards({batch: 1.0}, [], chat=False)
    for _ in range(4):
        score([group_of("bad", "a"), group_of("b", "c")], rewards, tolerance)
    with pytest.raises(UserError, match=r"`batch` has failed 5 times in its last 5 calls[^\0]*in batch\n") as caught:
        score([group_of("bad", "a"), group_of("b", "c")], rewards, tolerance)
    assert isinstance(caught.value.__cause__, RuntimeError)
    # However long it was well before, and however many completions a call is for.
    tolerance = Tolerance(0.1)
    for _ in range(100):
        score([group_of("a", "b", "c")], build_rewards({length: 1.0}, [], chat=False), tolerance)
    rewards = build_rewards({batch: 1.0}, [], chat=False)
    tolerance.tallies["batch"] = tolerance.tallies["length"]
    for _ in range(4):
        score([group_of("bad", "a")], rewards, tolerance)
    with pytest.raises(UserError, match="`batch` has failed 5 times in its last 5 calls"):
        score([group_of("bad", "a")], rewards, tolerance)
    # What it returned for each is each one's own.
    with pytest.raises(UserError, match="6 times in its last 7 calls"):
        score([group_of("odd", *"abcdef")], rewards, Tolerance(0.1))


@pytest.mark.parametrize(("calls", "share"), [(1, 0.1), (5, 0.1), (64, 0.03), (64, 0.5), (1500, 0.1), (40, 0.999)])
def test_the_probability_of_so_many_failures(calls, share):
    one, other = Decimal(share), 1 - Decimal(share)  # which are what these doubles are, in 50 digits
    with localcontext(prec=50):
        exact = [math.comb(calls, k) * one**k * other ** (calls - k) for k in range(calls + 1)]
    for failed in {0, 1, calls // 10, calls // 2, calls}:
        assert chance_of(failed, calls, share) == pytest.approx(float(sum(exact[failed:])), rel=1e-9)
    assert [chance_of(failed, 9, 0.0) for failed in (0, 1, 9)] == [1.0, 0.0, 0.0]
    assert [chance_of(failed, 9, 1.0) for failed in (0, 1, 9)] == [1.0, 1.0, 1.0]


def steps_until_it_stops(share_that_fails, seed, of_a_step=64, steps=60):
    """A reward that fails so often, call by call, in a run: the step that the run stops in, None if it ends well."""
    draws, tally = random.Random(seed), Tally()
    for step in range(steps):
        tally.begin()
        for _ in range(of_a_step):
            tally.calls += 1
            if draws.random() < share_that_fails:
                tally.failed += 1
                if tally.too_many(0.1):
                    return step
    return None


def test_runs_end_well_with_few_failures_and_stop_with_many():
    assert [steps_until_it_stops(0.03, seed) for seed in range(150)] == [None] * 150
    assert [steps_until_it_stops(0.05, seed, of_a_step=8, steps=300) for seed in range(50)] == [None] * 50
    assert sum(steps_until_it_stops(0.1, seed) is not None for seed in range(40)) <= 2
    assert all(step is not None and step < 20 for step in (steps_until_it_stops(0.2, seed) for seed in range(40)))
    assert all(step == 0 for step in (steps_until_it_stops(0.6, seed) for seed in range(40)))
    assert steps_until_it_stops(1.0, 0) == 0


def test_a_judge_that_is_gone_ends_the_run_after_a_few_calls_however_long_it_was_well():
    calls = []

    def gone(completion):
        calls.append(completion)
        if len(calls) > 1280:
            raise ValueError
        return 1.0

    tolerance, rewards = Tolerance(0.1), build_rewards({gone: 1.0}, [], chat=False)
    for _ in range(64):
        score([group_of(*["a"] * 20)], rewards, tolerance)
    with pytest.raises(UserError, match=r"`gone` has failed 5 times in its last 5 calls, .* \(0.1\)"):
        score([group_of(*["a"] * 20)], rewards, tolerance)
    assert len(calls) == 1285
    with pytest.raises(UserError, match=r"^Reward `gone` raised ValueError"):
        score([group_of("a")], rewards, Tolerance(0.0))
    score([group_of(*["a"] * 20)], rewards, Tolerance(1.0))


def test_two_rewards_that_fail_on_one_completion_are_one_completion():
    groups = [group_of("bad", *"abcdefghi")]
    tolerance, told = scored({crash: 1.0, text: 1.0}, groups, share=0.1)
    assert groups[0].rewards.isnan().sum() == 1
    assert tolerance.counted() == {"reward/crash/failed": 1.0, "reward/text/failed": 1.0}
    assert len(told) == 2
    assert groups[0].failed.keys() == {"crash", "text"}


def test_a_reward_without_a_weight_may_fail_and_the_completion_keeps_its_score():
    group = group_of("bad", "ab")
    scored({crash: 0.0, length: 1.0}, [group])
    assert group.rewards.tolist() == [3.0, 2.0]
    assert group.failed["crash"].keys() == {0}


def test_numbers_by_name_pay_their_sum_or_their_score():
    def parts(completion):
        return {"right": 1.0, "brief": None if completion == "a" else 0.5}

    def as_verl(completions):
        return [{"score": 0.25, "letters": len(completion)} for completion in completions]

    def columns(completions):
        return {"x": [1.0, 2.0, 3.0], "y": torch.tensor([0.5, 0.5, 0.5])}

    def sometimes(completion):
        return {"odd": 1.0} if completion == "abc" else 0.0

    def silent(completion):
        return {"a": None}

    first, second = group_of("a", "ab"), group_of("abc", index=9)
    scored({parts: 1.0, as_verl: 4.0, columns: 1.0, sometimes: 1.0, silent: 5.0}, [first, second])
    assert first.rewards.tolist() == [1.0 + 1.0 + 1.5, 1.5 + 1.0 + 2.5]
    assert second.rewards.tolist() == [1.5 + 1.0 + 3.5 + 1.0]
    assert first.parts["parts/brief"].tolist() == pytest.approx([math.nan, 0.5], nan_ok=True)
    assert first.parts["as_verl/letters"].tolist() == [1.0, 2.0]
    assert second.parts["columns/y"].tolist() == [0.5]
    assert first.parts["sometimes/odd"].isnan().all() and second.parts["sometimes/odd"].tolist() == [1.0]
    assert first.parts["silent"].isnan().all()


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ({"a": math.nan}, "returned nan (float)"),
        ({"a": "1"}, "returned '1' (str"),
        ({"failed": 1.0}, "a part called `failed`"),
        ({"a\nb": 1.0}, "dictionary of such numbers by name"),
        ({1: 1.0}, "dictionary of such numbers by name"),
        ({"a": {"b": 1.0}}, "returned {'b': 1.0} (dict"),
    ],
)
def test_numbers_by_name_that_are_none(returned, told):
    def odd(completion):
        return returned

    with pytest.raises(UserError) as caught:
        scored({odd: 1.0}, [group_of("a")], share=0.0)
    assert told in str(caught.value)


def test_held_out_scores_leave_out_what_was_not_scored():
    whole = [group_of("5", "4", "5", "5"), group_of("1", "5", "2", "3"), group_of("5", "5")]
    cut = [group_of("5", "bad", "4", "5", "5"), group_of("1", "5", "bad", "2", "3"), group_of("5", "5")]

    def right(completion):
        return 1 / 0 if completion == "bad" else float(completion == "5")

    for groups in (whole, cut):
        scored({right: 1.0}, groups)
    cut.append(group_of("bad", "bad", index=13))
    scored({right: 1.0}, cut[-1:])
    expected = measure_solved(("right", 1.0), str, 2, whole)
    assert measure_solved(("right", 1.0), str, 2, cut) == expected
    assert measure_reward(cut) == measure_reward(whole)
    # Where no prompt has enough left there is no such score.
    assert math.isnan(measure_solved(("right", 1.0), str, 2, cut[-1:])["eval/pass@2"])


FAILS = """
def fails(completion):
    if completion.startswith("<") and len(set(completion)) % 3 == 0:  # never a gold answer
        raise RuntimeError("503")
    return 0.25
"""
FAILING = TASK.format(rewards="{letters: 1.0, fails: 1.0, says: 1.0}", extra=FAILS)


def lines_of(folder, name):
    return [json.loads(line) for line in Path(folder, name).read_text().splitlines()]


def test_a_run_in_which_a_reward_fails_goes_on_counts_and_says_so(tmp_path, capsys):
    (tmp_path / "toy.py").write_text(FAILING)
    flags = [*SMALL, "--steps", "3", "--max-reward-failures", "0.9", "--run-dir", str(tmp_path / "run")]
    assert main([str(tmp_path / "toy.py"), *flags]) == 0
    out = capsys.readouterr().out
    steps = [line for line in lines_of(tmp_path / "run", "metrics.jsonl") if "reward/mean" in line]
    completions = lines_of(tmp_path / "run", "completions.jsonl")
    for line in steps:
        own = [each for each in completions if each["step"] == line["step"]]
        failed = [each for each in own if each["reward"] is None]
        kept = [each["reward"] for each in own if each["reward"] is not None]
        assert line.get("reward/fails/failed", 0) == len(failed)
        assert all(each["advantage"] is None and "503" in each["failed"]["fails"] for each in failed)
        assert not any("failed" in each for each in own if each["reward"] is not None)
        assert line["reward/mean"] == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    count = sum(line.get("reward/fails/failed", 0) for line in steps)
    assert count > 0
    assert out.count("Traceback") in (1, 2)  # a step's, and the first evaluation's
    assert f"warning: `fails` failed on {count:.0f} completions" in out


@pytest.mark.slow
def test_a_run_in_which_rewards_fail_is_resumed_bit_for_bit(tmp_path, capsys):
    (tmp_path / "toy.py").write_text(FAILING)
    flags = [*SMALL, *"--max-reward-failures 0.9 --save-every 2 --eval-every 2 --kl-coef 0.1 --epochs 2".split()]
    for name, steps in (("whole", 4), ("part", 2)):
        assert main([str(tmp_path / "toy.py"), *flags, "--steps", str(steps), "--run-dir", str(tmp_path / name)]) == 0
    assert main(["--resume", str(tmp_path / "part"), "--steps", "4"]) == 0
    timing = ("time/", "speed/", "memory/")
    whole, part = (
        [
            {key: value for key, value in line.items() if not key.startswith(timing)}
            for line in lines_of(tmp_path / name, "metrics.jsonl")
            if "reward/mean" in line
        ]
        for name in ("whole", "part")
    )
    assert whole == part
    assert any("reward/fails/failed" in line for line in whole)
    assert lines_of(tmp_path / "whole", "completions.jsonl") == lines_of(tmp_path / "part", "completions.jsonl")


SOMETIMES = """
calls = 0
def judge(completion):
    global calls
    calls += 1
    if calls > 1000 and calls % 33 == 0:
        raise ConnectionError("503")
    return 0.25
"""


@pytest.mark.slow
def test_a_long_run_with_a_reward_that_fails_now_and_then_ends_well(tmp_path, capsys):
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, judge: 1.0, says: 1.0}", extra=SOMETIMES))
    flags = [*SMALL, "--prompts-per-step", "8", "--group-size", "12", "--max-completion-tokens", "3"]
    flags += ["--steps", "20", "--eval-every", "0"]
    assert main([str(tmp_path / "toy.py"), *flags, "--run-dir", str(tmp_path / "run")]) == 0
    steps = [line for line in lines_of(tmp_path / "run", "metrics.jsonl") if "reward/mean" in line]
    count = sum(line.get("reward/judge/failed", 0) for line in steps)
    assert len(steps) == 20
    assert 20 <= count <= 60
    assert f"warning: `judge` failed on {count:.0f} completions" in capsys.readouterr().out


ALL = """
calls = 0
def judge(completions):
    global calls
    calls += 1
    if calls > 20 and calls % 2:
        raise ConnectionError("503")
    return [0.25] * len(completions)
"""


@pytest.mark.slow
def test_a_step_in_which_a_call_for_all_fails_trains_nothing_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, judge: 1.0, says: 1.0}", extra=ALL))
    flags = [*SMALL, "--steps", "30", "--max-reward-failures", "0.7", "--eval-every", "0"]
    assert main([str(tmp_path / "toy.py"), *flags, "--run-dir", str(tmp_path / "run")]) == 0
    steps = [line for line in lines_of(tmp_path / "run", "metrics.jsonl") if "groups/trained" in line]
    lost = [line for line in steps if line.get("reward/judge/failed") == 8]
    assert len(steps) == 30 and 0 < len(lost) < 30
    assert all(line["groups/trained"] == 0 for line in lost)
    assert "`judge` failed on" in capsys.readouterr().out


GONE = """
calls = 0
def judge(completion):
    global calls
    calls += 1
    if calls > 130:
        raise ConnectionError("the judge is gone")
    return 0.25
"""


@pytest.mark.slow
def test_a_run_whose_reward_fails_for_good_stops_saved_with_the_first_traceback(tmp_path, capsys):
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, judge: 1.0, says: 1.0}", extra=GONE))
    flags = [*SMALL, "--steps", "60", "--eval-every", "0", "--save-every", "50", "--run-dir", str(tmp_path / "run")]
    assert main([str(tmp_path / "toy.py"), *flags]) == 2
    error = capsys.readouterr().err
    for words in (
        "Reward `judge` has failed 7 times in its last 9 calls",
        "Traceback",
        "in judge",
        "the judge is gone",
        "--resume",
    ):
        assert words in error
    done = [line["step"] for line in lines_of(tmp_path / "run", "metrics.jsonl") if "reward/mean" in line]
    assert list((tmp_path / "run" / "checkpoints").glob(f"step-{len(done):06d}"))
