"""Each advantage estimator against its formula in float64, and what all of them must keep."""

import numpy as np
import pytest
import torch

from grpo.advantages import ESTIMATORS, assign_advantages
from grpo.packing import has_advantage
from grpo.types import Completion, Group, Prompt

WEIGHTS = {"correct": 1.0, "format": 0.5}


def group_of(correct, form):
    parts = {"correct": torch.tensor(correct), "format": torch.tensor(form)}
    group = Group(Prompt(0, "", [1], {}), [Completion([1], [0.0], "", "stop", 0)] * len(correct), parts)
    group.rewards = sum(WEIGHTS[name] * part.nan_to_num(0.0) for name, part in parts.items())
    return group


def some_groups(seed=0, size=5):
    generator = torch.Generator().manual_seed(seed)
    return [
        group_of(torch.rand(size, generator=generator).tolist(), torch.rand(size, generator=generator).tolist())
        for _ in range(3)
    ]


def expected(estimator, groups):
    rewards = np.array([group.rewards.double().numpy() for group in groups])
    centered = rewards - rewards.mean(1, keepdims=True)
    size = rewards.shape[1]
    if estimator == "grpo":
        return centered / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    if estimator == "dr_grpo":
        return centered
    if estimator == "lite_ppo":
        return centered / (rewards.std(ddof=1) + 1e-4)
    if estimator == "rloo":
        return np.array([[r - (row.sum() - r) / (size - 1) for r in row] for row in rewards])
    total = np.zeros_like(rewards)
    for name, weight in WEIGHTS.items():
        part = np.array([group.parts[name].double().numpy() for group in groups])
        total += weight * (part - part.mean(1, keepdims=True)) / (part.std(1, ddof=1, keepdims=True) + 1e-4)
    return total / (total.std(ddof=1) + 1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimator_is_its_formula(estimator):
    groups = some_groups()
    assign_advantages(groups, ESTIMATORS[estimator], WEIGHTS)
    ours = np.array([group.advantages.numpy() for group in groups])
    np.testing.assert_allclose(ours, expected(estimator, groups), atol=2e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", [0.0, 0.1, 3.3])
def test_equal_rewards_give_exactly_zero(estimator, value):
    groups = [group_of([value] * 7, [0.3] * 7), *some_groups(size=7)]
    assign_advantages(groups, ESTIMATORS[estimator], WEIGHTS)
    assert torch.equal(groups[0].advantages, torch.zeros(7))
    assert groups[1].advantages.abs().max() > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_permuting_a_group_permutes_its_advantages(estimator):
    groups, permuted = some_groups(), some_groups()
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted[1].rewards = permuted[1].rewards[order]
    permuted[1].parts = {name: part[order] for name, part in permuted[1].parts.items()}
    assign_advantages(groups, ESTIMATORS[estimator], WEIGHTS)
    assign_advantages(permuted, ESTIMATORS[estimator], WEIGHTS)
    torch.testing.assert_close(permuted[1].advantages, groups[1].advantages[order])
    torch.testing.assert_close(permuted[0].advantages, groups[0].advantages)


def test_gdpo_leaves_out_rewards_that_do_not_apply():
    nan = float("nan")
    groups = [group_of([1.0, 0.0, 1.0], [nan, 0.2, 0.4]), group_of([0.0, 0.0, 1.0], [nan, nan, nan])]
    assign_advantages(groups, ESTIMATORS["gdpo"], WEIGHTS)
    correct = np.array([[1.0, 0, 1], [0, 0, 1.0]])
    total = (correct - correct.mean(1, keepdims=True)) / (correct.std(1, ddof=1, keepdims=True) + 1e-4)
    known = np.array([0.2, 0.4])
    total[0, 1:] += 0.5 * (known - known.mean()) / (known.std(ddof=1) + 1e-4)
    total /= total.std(ddof=1) + 1e-4
    np.testing.assert_allclose(np.array([g.advantages.numpy() for g in groups]), total, atol=2e-5)


def with_missing(groups, places):
    """The same groups with more completions, at these places of each, that a reward failed on."""
    for group, at in zip(groups, places, strict=True):
        for index in at:
            group.completions.insert(index, group.completions[0])
            insert = lambda values, new, i=index: torch.cat([values[:i], torch.tensor([new]), values[i:]])  # noqa: E731
            group.parts["correct"] = insert(group.parts["correct"], float("nan"))
            group.parts["format"] = insert(group.parts["format"], 0.7)
            group.rewards = insert(group.rewards, float("nan"))
    return groups


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_missing_completion_leaves_the_advantages_of_the_group_without_it(estimator):
    # Each group in its own way, so that a scale over the step is seen too.
    groups = with_missing(some_groups(), [(0,), (5,), (2,)])
    assign_advantages(groups, ESTIMATORS[estimator], WEIGHTS)
    scored = [~group.rewards.isnan() for group in groups]
    ours = np.array([group.advantages[known].numpy() for group, known in zip(groups, scored, strict=True)])
    np.testing.assert_allclose(ours, expected(estimator, some_groups()), atol=2e-5)
    assert all(group.advantages[~known].isnan().all() for group, known in zip(groups, scored, strict=True))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_who_is_alone_has_no_advantage(estimator):
    groups = [group_of([0.3, 0.9, 0.1], [0.0, 1.0, 1.0]) for _ in range(3)]
    groups[0].rewards[[0, 2]] = float("nan")
    groups[1].rewards[:] = float("nan")
    assign_advantages(groups, ESTIMATORS[estimator], WEIGHTS)
    assert groups[0].advantages.nan_to_num(9).tolist() == [9, 0, 9]
    assert groups[1].advantages.isnan().all()
    assert not has_advantage(groups[0]) and not has_advantage(groups[1]) and has_advantage(groups[2])


def test_with_every_score_there_the_advantages_are_torchs_own_to_the_bit():
    for seed in range(50):
        groups = some_groups(seed, size=2 + seed % 9)
        rewards = torch.stack([group.rewards for group in groups])
        centered = rewards - rewards.mean(dim=1, keepdim=True)
        size = rewards.shape[1]
        before = {
            "grpo": centered / (rewards.std(dim=1, keepdim=True) + 1e-4),
            "lite_ppo": centered / (rewards.std() + 1e-4),
            "rloo": centered * (size / (size - 1)),
        }
        for estimator, advantages in before.items():
            assign_advantages(groups, ESTIMATORS[estimator], WEIGHTS)
            assert torch.equal(torch.stack([group.advantages for group in groups]), advantages), (estimator, seed)
