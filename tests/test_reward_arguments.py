"""What TRL passes to a reward beside the completions: the trainer's state, `log_metric`, `log_extra`; whole groups."""

import functools
import json
from pathlib import Path

import pytest
import torch
from toy_task import SMALL, TASK

from grpo.errors import UserError
from grpo.record.files import completion_records
from grpo.rewards import build_rewards, reward, score
from grpo.rewards.failures import Tolerance
from grpo.rewards.preflight import Calls, preflight
from grpo.rewards.samples import TrainerState
from grpo.rewards.scoring import Scorer
from grpo.run import main
from grpo.types import Completion, Group, Prompt


def group_of(*texts, index=7, **fields):
    completions = [Completion([1], [0.0], text, "stop", 0) for text in texts]
    return Group(Prompt(index, "?", [1], {"answer": "5", **fields}), completions)


def build(*rewards, **arguments):
    return build_rewards(dict.fromkeys(rewards, 1.0), ["answer"], chat=False, **arguments)


def test_a_reward_knows_the_step():
    seen = []

    def batch(completions, trainer_state, **kwargs):
        seen.append((trainer_state.global_step, trainer_state.max_steps))
        return [min(1.0, trainer_state.global_step / 10)] * len(completions)

    def one(completion, trainer_state):
        return trainer_state.global_step

    call = Scorer(build(batch, one), Tolerance(), steps=20)
    group = group_of("a", "b")
    call([group], 5)
    assert seen == [(5, 20)]
    assert group.rewards.tolist() == [5.5, 5.5]


def test_what_is_told_of_completions_stands_beside_them():
    def batch(completions, log_extra, log_metric):
        log_extra("letters", torch.tensor([len(completion) for completion in completions]))
        log_extra("said", [f"it says {completion}" for completion in completions])
        log_metric("mean letters", sum(map(len, completions)) / len(completions))
        return [0.0] * len(completions)

    def one(completion, log_extra, log_metric):
        if completion != "a":
            log_extra("odd", {"list": [1], "nan": float("nan")} if completion == "ab" else float("nan"))
        log_metric("calls", 1)
        return 0.0

    groups = [group_of("a", "ab"), group_of("abc", index=9)]
    assert score(groups, build(batch, one)) == {"logged/mean letters": 2.0, "logged/calls": 1.0}
    assert groups[0].extra == {
        "letters": {0: 1, 1: 2},
        "said": {0: "it says a", 1: "it says ab"},
        "odd": {1: "{'list': [1], 'nan': nan}"},
    }
    assert groups[1].extra == {"letters": {0: 3}, "said": {0: "it says abc"}, "odd": {0: None}}
    records = completion_records(0, "train", groups, {"reward": "rewards"})
    assert json.loads(json.dumps(records[0]))["extra"] == {"letters": 1, "said": "it says a"}


def told(completions, log_extra, log_metric):
    log_extra("letters", [len(completion) for completion in completions])
    log_metric("most", max(map(len, completions)))
    return [0.0] * len(completions)


def test_it_is_the_same_group_by_group_and_after_a_retry():
    flaky = functools.cache(lambda: [0])

    @reward(batch="group", retries=1, backoff=0)
    def grouped(completions, log_extra, log_metric):
        flaky()[0] += 1
        if flaky()[0] == 2:
            raise ConnectionError
        return told(completions, log_extra, log_metric)

    expected = [{"letters": {0: 1, 1: 2}}, {"letters": {0: 3, 1: 4}}]

    def groups():
        return [group_of("a", "ab"), group_of("abc", "abcd", index=9)]

    here = groups()
    assert score(here, build(grouped)) == {"logged/most": 3.0}
    assert [group.extra for group in here] == expected


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [("x", [1], "was given 1 values for 'x', and 2 are scored"), ("a\nb", [1, 2], "must be text of one line")],
)
def test_what_cannot_be_told_is_a_failure(column, values, words):
    def batch(completions, log_extra):
        log_extra(column, values)
        return [0.0] * len(completions)

    with pytest.raises(UserError) as caught:
        score([group_of("a", "b")], build(batch))
    assert words in str(caught.value)


def test_the_size_of_a_group_is_passed_to_who_names_it_unless_a_column_is_called_so():
    def rank(completions, group_size, **kwargs):
        assert "group_size" not in kwargs
        lengths = torch.tensor([float(len(each)) for each in completions]).reshape(-1, group_size)
        return (lengths - lengths.mean(dim=1, keepdim=True)).flatten()

    def everything(completions, **kwargs):
        assert "group_size" not in kwargs
        return [0.0] * len(completions)

    groups = [group_of("a", "abc"), group_of("abcd", "ab", index=9)]
    score(groups, build(rank, everything))
    assert [group.rewards.tolist() for group in groups] == [[-1.0, 1.0], [1.0, -1.0]]

    def column(completion, group_size):
        return group_size

    group = group_of("a")
    group.prompt.fields["group_size"] = 9
    score([group], build_rewards({column: 1.0}, ["group_size"], chat=False))
    assert group.rewards.tolist() == [9.0]


def rank_of_eight(completions, **kwargs):
    lengths = torch.tensor([float(len(each)) for each in completions]).reshape(-1, 8)
    return lengths.argsort(dim=1).argsort(dim=1).float().flatten()


def test_a_reward_that_ranks_within_groups_runs_from_the_preflight_on():
    gold = [(Prompt(index, "?", [1], {"answer": "5"}), "the answer") for index in range(5)]
    report = preflight(build(rank_of_eight, group_size=8), gold, Calls(group_size=8, prompts=2))
    assert report.num_rows == 5
    rewards = build(rank_of_eight, group_size=8)
    texts = ["a" * (1 + (3 * place) % 8) for place in range(8)]
    groups = [group_of(*texts), group_of(*reversed(texts), index=9)]
    score(groups, rewards)
    assert groups[0].rewards.tolist() == [len(text) - 1 for text in texts]
    assert groups[1].rewards.tolist() == groups[0].rewards.flip(0).tolist()


def test_where_groups_are_smaller_it_ranks_what_is_there():
    """A held-out score with --eval-samples 3: each group is filled up with its own completions."""
    groups = [group_of("aaa", "a", "aa"), group_of("b", "bbb", "bb", index=9), group_of("c", "cc", index=11)]
    score(groups, build(rank_of_eight, group_size=8))
    for group in groups:
        lengths = torch.tensor([float(len(completion.text)) for completion in group.completions])
        assert torch.equal(group.rewards.argsort(), lengths.argsort())

    def broken(completions):
        raise ValueError("for another reason")

    with pytest.raises(UserError, match="for another reason"):
        score(groups, build(broken, group_size=8))


RANKS = """
import torch
def rank(completions, trainer_state, log_extra, **kwargs):
    lengths = torch.tensor([float(len(set(each[0]["content"]))) for each in completions]).reshape(-1, 4)
    log_extra("step", [trainer_state.global_step] * len(completions))
    return lengths.argsort(dim=1).argsort(dim=1).flatten() / 3
"""


@pytest.mark.slow
def test_a_whole_run_with_a_reward_that_ranks_within_groups(tmp_path):
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{rank: 1.0, says: 1.0}", extra=RANKS))
    flags = [*SMALL, "--steps", "2", "--eval-samples", "3", "--eval-prompts", "3", "--run-dir", str(tmp_path / "run")]
    assert main([str(tmp_path / "toy.py"), *flags]) == 0
    lines = [json.loads(line) for line in Path(tmp_path, "run", "completions.jsonl").read_text().splitlines()]
    assert [line["extra"]["step"] for line in lines] == [line["step"] for line in lines]
    for step in (0, 1):
        for number in (0, 1):
            paid = [line["parts"]["rank"] for line in lines if (line["step"], line["group"]) == (step, number)]
            assert sorted(paid) == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_the_state_of_the_trainer_has_trls_names():
    assert TrainerState(3, 7).global_step == 3 and TrainerState(3, 7).max_steps == 7


def test_a_function_of_verl_runs_as_it_is():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
        return {"score": float(solution_str == ground_truth), "source": float(data_source == "x")}

    groups = [group_of("5", "4", data_source="x", ground_truth="5")]
    score(groups, build_rewards({compute_score: 1.0}, ["data_source", "ground_truth"], chat=True))
    assert groups[0].rewards.tolist() == [1.0, 0.0]
    assert groups[0].parts["compute_score/source"].tolist() == [1.0, 1.0]

    def of_a_column(completions, solution_str):
        return [float(text == column) for text, column in zip(completions, solution_str, strict=True)]

    groups = [group_of("5", "4", solution_str="4")]
    score(groups, build_rewards({of_a_column: 1.0}, ["solution_str"], chat=False))
    assert groups[0].rewards.tolist() == [0.0, 1.0]
