"""Rewards tried before a run: what they pay gold answers and what is none."""

import json
import re

import pytest
from small_task import SMALL_CONFIG, task_with
from toy_task import SMALL, TASK

from grpo.errors import UserError
from grpo.questions import build_questions, preflight_rewards
from grpo.run import main

# ---- without a right answer


def test_a_task_without_right_answers_is_scored_by_its_reward(tmp_path, capsys):
    """From --check to the final line; the reward is below -1, and the best checkpoint is still the best."""
    text = TASK.format(rewards="{short: 1.0}", extra="def short(completion):\n    return -len(completion) / 5 - 2")
    text = re.sub(r"gold=.*", "gold=None,", text)
    path = tmp_path / "toy.py"
    path.write_text(re.sub(r"solved=.*", "solved=None,", text))
    run = tmp_path / "run"
    assert main([str(path), "--check"]) == 0
    assert "The task is ready" in capsys.readouterr().out
    assert main([str(path), *SMALL, "--steps", "2", "--run-dir", str(run)]) == 0
    told = capsys.readouterr().out
    assert "held-out reward: -" in told and "pass@1" not in told
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "eval/reward" in line]
    assert [line["step"] for line in scores] == [0, 2]
    assert all(line["eval/reward/low"] <= line["eval/reward"] <= line["eval/reward/high"] < -1 for line in scores)
    best = max(scores, key=lambda line: line["eval/reward"])
    state = json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["progress"]["best"] == best["eval/reward"] and state["progress"]["best_step"] == best["step"]
    assert main(["--eval", str(run)]) == 0
    assert "  reward -" in capsys.readouterr().out


def test_a_reward_that_fails_without_gold_is_told_before_the_run():
    def fragile(completion):
        return 1 / len(completion)

    task = task_with(gold=None, solved=None, rewards={fragile: 1.0}, held_out=0)
    questions = build_questions(task, SMALL_CONFIG, note=list)
    with pytest.raises(UserError, match=r"`fragile` raised ZeroDivisionError .* row 0"):
        preflight_rewards(task, SMALL_CONFIG, questions, every_row=False, note=list)


def test_rewards_that_never_apply_are_told_before_the_run():
    def silent(completion):
        return None

    def says(completion):
        return 1.0

    def tried(*rewards):
        task = task_with(gold=None, solved=None, rewards=dict.fromkeys(rewards, 1.0), held_out=0)
        questions = build_questions(task, SMALL_CONFIG, note=list)
        return preflight_rewards(task, SMALL_CONFIG, questions, every_row=False, note=list)

    with pytest.raises(UserError, match=r"No reward applies to anything that was tried \(silent returned None"):
        tried(silent)
    assert tried(silent, says).notes == ["`silent` gave no score (None) to anything tried."]


@pytest.mark.parametrize("every_row", [False, True])
def test_a_measure_that_calls_no_gold_answer_right_is_told_before_the_run(every_row):
    def tried(value, pays):
        def says(completion, answer):
            return pays(answer) if completion == answer else 0.0

        rows = [{"question": f"{number}?", "answer": str(number)} for number in range(4)]
        task = task_with(rows=lambda split, data: rows, rewards={says: 1.0}, solved=("says", value), held_out=1)
        questions = build_questions(task, SMALL_CONFIG, note=list)
        return preflight_rewards(task, SMALL_CONFIG, questions, every_row, note=list)

    with pytest.raises(UserError, match=r"`says` pays 5 or more for a right answer, but it paid at most 1 to"):
        tried(5.0, lambda answer: 1.0)
    assert not tried(1.0, lambda answer: 1.0).warnings
    assert "the gold answer of some row gets 0.5. --check says more" in " ".join(
        tried(1.0, lambda answer: 0.5 if answer == "2" else 1.0).warnings
    )
