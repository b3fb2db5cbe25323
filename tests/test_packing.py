"""Packing: what lands where, and that how it is split changes nothing."""

import pytest
import torch
from tiny_models import CPU, build_policy, randomise

from grpo.config import Config
from grpo.loss import build_loss
from grpo.packing import build_packer
from grpo.train import step_metrics


def rows_of(batch):
    """Each completion of a batch unpacked again: (prompt tokens, completion tokens, its other columns)."""
    layout = batch.layout
    start, sequence, head_start = layout.num_prompt_tokens, 0, 0
    for prompt, lengths in zip(layout.prompt_lengths, layout.completion_lengths, strict=True):
        head = batch.tokens[head_start : head_start + prompt].tolist()
        assert batch.positions[head_start : head_start + prompt].tolist() == list(range(prompt))
        head_start += prompt
        for length in lengths:
            here = slice(start, start + length)
            assert (batch.sequence[here] == sequence).all()
            assert batch.mask[here].all()
            assert batch.positions[here].tolist() == list(range(prompt, prompt + length))
            assert batch.previous[here].tolist() == [head_start - 1, *range(start, start + length - 1)]
            logprobs = batch.sampler_logprobs[here].tolist()
            yield head, batch.tokens[here].tolist(), batch.advantages[start].item(), logprobs
            start, sequence = start + length, sequence + 1
    assert start == len(batch.tokens) == layout.num_tokens
    assert not batch.mask[: layout.num_prompt_tokens].any()


@pytest.mark.parametrize("tokens_per_batch", [1, 17, 23, 40, 10_000])
def test_every_completion_is_packed_once_after_its_prompt(tokens_per_batch, groups):
    [batches] = build_packer(Config(tokens_per_batch=tokens_per_batch), CPU)(groups)
    packed = [row for batch in batches for row in rows_of(batch)]
    expected = [(g.prompt.tokens, c.tokens) for g in groups for c in g.completions]
    assert [row[:2] for row in packed] == expected
    assert [row[2] for row in packed] == pytest.approx([float(a) for g in groups for a in g.advantages])
    for (*_, logprobs), completion in zip(packed, (c for g in groups for c in g.completions), strict=True):
        assert logprobs == pytest.approx(completion.sampler_logprobs)
    largest_alone = max(len(g.prompt.tokens) + len(c.tokens) for g in groups for c in g.completions)
    assert all(len(batch.tokens) <= max(tokens_per_batch, largest_alone) for batch in batches)


@pytest.mark.parametrize("normalization", ["dapo", "grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_splitting_into_batches_changes_no_gradient(normalization, objective, groups, tiny_config):
    gradients, metrics = [], []
    for tokens_per_batch in (10_000, 30, 1):
        config = tiny_config(
            normalization=normalization,
            objective=objective,
            tokens_per_batch=tokens_per_batch,
            kl_coef=0.1,
            top_entropy=0.5,
        )
        gradient, measured = gradient_of(config, groups)
        gradients.append(gradient)
        metrics.append(measured)
    for other, other_metrics in zip(gradients[1:], metrics[1:], strict=True):
        for whole, split in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(split, whole, atol=1e-7, rtol=1e-4)
        assert other_metrics == pytest.approx(metrics[0], rel=1e-4, abs=1e-6)


def gradient_of(config, groups):
    """The gradient of one optimizer step, and its metrics."""
    policy = build_policy(config)
    randomise(policy)
    [batches] = build_packer(config, CPU)(groups)
    loss = build_loss(config)
    loss.prepare(policy, batches)
    loss.prepare_step(policy, batches)
    metrics = loss.summarize([policy.backward(batch, loss) for batch in batches])
    return [parameter.grad for parameter in policy.store.parameters()], metrics


def test_permuting_a_group_changes_no_gradient(groups, tiny_config):
    gradient, metrics = gradient_of(tiny_config(), groups)
    order = [2, 0, 1]
    groups[0].completions = [groups[0].completions[i] for i in order]
    groups[0].advantages = groups[0].advantages[order]
    permuted, permuted_metrics = gradient_of(tiny_config(), groups)
    assert max(float(g.abs().max()) for g in gradient) > 1e-4
    for one, other in zip(gradient, permuted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-4)
    assert metrics == pytest.approx(permuted_metrics, rel=1e-4, abs=1e-6)


def test_truncated_completions_are_left_out_of_loss_and_denominator(groups):
    groups[0].completions[2].finish = "length"
    [[masked]] = build_packer(Config(), CPU)(groups)
    [[whole]] = build_packer(Config(mask_truncated=False), CPU)(groups)
    assert masked.layout.completion_lengths[0] == (5, 1)
    assert whole.layout.completion_lengths[0] == (5, 1, 13)
    tokens = sum(len(c.tokens) for g in groups for c in g.completions)
    assert masked.weights.max().item() == pytest.approx(1 / (tokens - 13))
    assert whole.weights.max().item() == pytest.approx(1 / tokens)


def test_the_groups_that_train_are_those_in_a_batch(groups):
    for completion in groups[0].completions:
        completion.finish = "length"
    groups[1].advantages = torch.zeros(3)
    for masks, trained in ((True, [False, False, True]), (False, [True, False, True])):
        pack = build_packer(Config(mask_truncated=masks), CPU)
        assert [pack.trains(group) for group in groups] == trained
        [[batch]] = pack(groups)
        assert batch.layout.prompt_lengths == tuple(
            len(group.prompt.tokens) for group, is_in in zip(groups, trained, strict=True) if is_in
        )
        metrics = step_metrics([scored(group) for group in groups], 4, pack.trains)
        assert metrics["groups/trained"] == sum(trained)
        assert metrics["groups/zero_variance"] == 1 - 2 / 4


def scored(group):
    """The group with a reward's values, as `score` leaves them."""
    group.parts = {"letters": group.rewards}
    return group


def test_groups_are_dealt_out_to_mini_batches(groups):
    steps = build_packer(Config(mini_batches=2, prompts_per_step=3), CPU)(groups)
    assert [[batch.layout.prompt_lengths for batch in batches] for batches in steps] == [[(7, 12)], [(1,)]]
    for batches in steps:
        assert sum(float(batch.weights.sum()) for batch in batches) == pytest.approx(1.0)


def test_a_step_of_equal_rewards_trains_nothing(groups, tiny_config):
    for group in groups:
        group.advantages = torch.zeros(3)
    config = tiny_config()
    policy = build_policy(config)
    before = [p.detach().clone() for p in policy.store.parameters()]
    metrics = policy.update(build_packer(config, CPU)(groups), build_loss(config), 1e-3)
    assert metrics["optim/grad_norm"] == 0
    assert policy.version == 0
    assert all(torch.equal(b, p) for b, p in zip(before, policy.store.parameters(), strict=True))
