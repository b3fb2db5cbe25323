"""Held-out scores against brute force and scipy's intervals."""

import itertools
import math
import statistics

import pytest
import torch

from grpo.evaluate import comparison, interval, majority_at_k, measure_reward, pass_at_k, score_lines, standing
from grpo.types import Group, Prompt


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 4), (7, 3, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, c, k):
    samples = [True] * c + [False] * (n - c)
    share = statistics.mean(any(subset) for subset in itertools.combinations(samples, k))
    assert pass_at_k(n, c, k) == pytest.approx(share)


@pytest.mark.parametrize(
    ("votes", "k", "expected"),
    [
        (["4", "4", "5"], 3, 1.0),
        (["5", "5", "4"], 3, 0.0),
        (["4", "5", "6"], 3, 1 / 3),  # a tie of three, one of them right
        (["4", None, None], 3, 1.0),  # no answer is no vote
        ([None, None, None], 3, 0.0),
        (["4", "5", "4", "4"], 2, 0.75),  # two runs of two: a tie, then right
        (["4", "5", "5"], 1, 1 / 3),
    ],
)
def test_majority_at_k(votes, k, expected):
    assert majority_at_k(votes, [vote == "4" for vote in votes], k) == pytest.approx(expected)


def test_interval_of_single_samples_is_wilsons():
    """Seven of twenty: the interval is the textbook's (Wilson 1927), computed here from its quadratic."""
    mean, low, high = interval([1.0] * 7 + [0.0] * 13)
    p, n, z2 = 7 / 20, 19, 1.959964**2  # the sample variance divides by n - 1, so 19 trials count
    for bound in (low, high):
        assert (p - bound) ** 2 == pytest.approx(z2 * bound * (1 - bound) / n, rel=1e-4)
    assert low < mean == p < high


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0.0, 0.1611), (1.0, 0.8389, 1.0)])
def test_interval_of_unanimous_prompts_is_not_a_point(value, low, high):
    assert interval([value] * 20) == pytest.approx((value, low, high), abs=1e-4)


def test_interval_narrows_with_prompts_and_covers_the_mean():
    few, many = interval([0.25, 0.75] * 10), interval([0.25, 0.75] * 1000)
    assert few[1] < many[1] < 0.5 < many[2] < few[2]
    # Far from the edges the interval is the normal one of the prompts' means.
    error = statistics.stdev([0.25, 0.75] * 1000) / 2000**0.5
    assert many[2] - many[1] == pytest.approx(2 * 1.96 * error, rel=1e-2)


def test_comparison_says_whether_intervals_are_apart():
    def scores(mean, low, high):
        return {"eval/pass@1": mean, "eval/pass@1/low": low, "eval/pass@1/high": high}

    assert "+25.0 points; the 95% intervals are apart" in comparison(scores(0.3, 0.2, 0.4), scores(0.55, 0.45, 0.65))
    assert "+5.0 points; the 95% intervals overlap" in comparison(scores(0.3, 0.2, 0.4), scores(0.35, 0.25, 0.45))


def scored(*rewards):
    groups = [Group(Prompt(index, "", [1], {}), []) for index in range(len(rewards))]
    for group, of_group in zip(groups, rewards, strict=True):
        group.rewards = torch.tensor(of_group)
    return groups


def test_without_right_answers_the_score_is_the_mean_reward():
    """Of any size and sign; the prompts are the sample, not their completions."""
    scores = measure_reward(scored([-4.0, -2.0], [0.0, 2.0], [5.0, 6.0], [7.0, 8.0]))
    means = statistics.NormalDist(0, statistics.stdev([-3.0, 1.0, 5.5, 7.5]) / math.sqrt(4))
    half = means.inv_cdf(0.975)
    expected = {"eval/reward": 2.75, "eval/reward/low": 2.75 - half, "eval/reward/high": 2.75 + half}
    assert scores == pytest.approx(expected, rel=1e-6)
    assert list(score_lines(scores)) == [f"reward 2.750 (95% interval {2.75 - half:.3f} to {2.75 + half:.3f})"]
    lower = measure_reward(scored([-3.0, -3.0], [-3.5, -3.5]))
    assert comparison(lower, scores).startswith("held-out reward: -3.250 [-3.740, -2.760] before, 2.750 [")
    assert comparison(lower, scores).endswith("after: +6.000; the 95% intervals are apart")


def test_one_prompt_has_no_interval():
    scores = measure_reward(scored([1.0, 2.0]))
    assert scores["eval/reward"] == 1.5 and math.isnan(scores["eval/reward/low"])
    assert list(score_lines(scores)) == ["reward 1.500"]
    told = comparison(scores, scores)
    assert told == "held-out reward: 1.500 before, 1.500 after: +0.000; one alone has no interval"


def test_scores_that_cannot_be_compared_are_not():
    before = {"eval/pass@1": 0.5, "eval/pass@1/low": 0.4, "eval/pass@1/high": 0.6, "eval/reward": 1.0}
    assert comparison(before, measure_reward(scored([1.0], [2.0]))).endswith("before, something else was measured")


def test_a_higher_score_is_better_and_of_equal_ones_the_lower_loss():
    def scored(accuracy, loss):
        return {"eval/accuracy": accuracy, "eval/accuracy/low": 0.0, "eval/accuracy/high": 1.0, "eval/loss": loss}

    assert standing(scored(0.75, 9.0)) > standing(scored(0.5, 0.1))
    assert standing(scored(0.75, 0.3)) > standing(scored(0.75, 0.4))
    asked = {"eval/pass@1": 0.5, "eval/pass@1/low": 0.0, "eval/pass@1/high": 1.0, "eval/reward": 1.0}
    assert standing(asked) == standing(asked | {"eval/reward": 2.0})  # the first of them stays the best
    assert standing(asked | {"eval/loss": 0.3}) > standing(asked | {"eval/loss": 0.4})
