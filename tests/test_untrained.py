"""Steps that train nothing, and completions that are mostly cut off, are told with what helps."""

import math

import pytest
from recorded import NAMES

from grpo.record import Recorder
from grpo.record.untrained import explain

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


def test_that_most_completions_are_cut_off_is_told_once_with_what_helps(tmp_path, capsys):
    """Also of a run that is resumed: it was told before."""
    numbers = EMPTY | {"groups/trained": 8, "groups/zero_variance": 0.0, "optim/grad_norm": 0.5}
    with Recorder(tmp_path, 9, 0, "toy", NAMES) as recorder:
        for step, share in enumerate([0.0, 0.5, 0.625, 0.75, 1.0]):
            recorder.step(step, numbers | {"completion/truncated": share})
        position = recorder.position()
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("were cut off by the token limit") == 1
    assert "Step 3: 62% of the completions" in told
    for remedy in ("raise --max-completion-tokens", "enable_thinking=False", "soft overlong", "--no-mask-truncated"):
        assert remedy in told
    with Recorder(tmp_path, 9, 5, "toy", NAMES, position) as recorder:
        recorder.step(5, numbers | {"completion/truncated": 1.0})
    assert "were cut off by the token limit" not in " ".join(capsys.readouterr().out.split())
