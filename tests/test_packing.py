"""Packing: what lands where, and that how it is split changes nothing."""

import pytest
import torch
import transformers
from tiny_models import CPU, build_policy, randomise, reference_logprobs

from grpo.advantages import ESTIMATORS, assign_advantages
from grpo.config import Config
from grpo.loss import build_loss
from grpo.packing import build_packer, has_advantage
from grpo.rollouts import step_metrics
from grpo.types import Completion, Group, Prompt, Span, sampled_tokens


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


@pytest.mark.parametrize("normalization", ["dapo", pytest.param("grpo", marks=pytest.mark.slow), "bnpo", "dr_grpo"])
@pytest.mark.parametrize("objective", [pytest.param("grpo", marks=pytest.mark.slow), "gspo"])
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


def test_kl_and_entropy_train_on_groups_of_equal_rewards_too(groups):
    groups[1].advantages = torch.zeros(3)
    for terms, trained in (({}, 2), (dict(kl_coef=0.1), 3), (dict(entropy_coef=0.1), 3)):
        pack = build_packer(Config(**terms), CPU)
        assert sum(map(pack.trains, groups)) == trained
        [[batch]] = pack(groups)
        assert len(batch.layout.prompt_lengths) == trained


def test_rewards_that_differ_in_their_parts_are_something_to_learn_from_though_their_sums_are_equal():
    """gdpo: parts [1, 0] and [0, 2] with weights 1 and 1/2."""
    tokens = Completion([5, 6], [-1.0, -1.0], "", "stop", 0)
    group = Group(Prompt(0, "", [4], {}), [tokens, tokens])
    group.parts = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 2.0])}
    group.rewards = torch.tensor([1.0, 1.0])
    weights = {"a": 1.0, "b": 0.5}
    assign_advantages([group], ESTIMATORS["grpo"], weights)
    assert not has_advantage(group)
    assign_advantages([group], ESTIMATORS["gdpo"], weights | {"b": 0.4})
    assert has_advantage(group)


def test_words_of_others_are_read_and_have_no_part_in_the_loss(groups, tiny_config):
    """A completion of two turns with five tokens of a tool between them: masks, weights, denominators, and the policy's
    log-probabilities of what it sampled, which are transformers' own."""
    turns = groups[0].completions[2]
    turns.others = (Span(4, 9),)
    assert turns.num_sampled == 8 and turns.mask[3:10] == [True, *[False] * 5, True]
    config = tiny_config()
    [[batch]] = build_packer(config, CPU)(groups)
    sampled = sampled_tokens(groups)
    assert int(batch.mask.sum()) == sampled == sum(len(c.tokens) for g in groups for c in g.completions) - 5
    assert batch.weights[batch.mask].tolist() == pytest.approx([1 / sampled] * sampled)
    assert not batch.weights[~batch.mask].any() and not batch.advantages[~batch.mask].any()
    policy = build_policy(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    whole, _ = reference_logprobs(model, groups, 1.0)
    own = torch.tensor([sampled for group in groups for c in group.completions for sampled in c.mask])
    logprobs = policy.logprobs(batch)[0]
    torch.testing.assert_close(logprobs[batch.mask].double(), whole[own], atol=1e-5, rtol=1e-5)
    assert not logprobs[~batch.mask].any()


def test_a_batch_that_failed_half_way_leaves_no_trace_and_can_be_tried_again(groups, tiny_config):
    config = tiny_config(tokens_per_batch=30)
    policy, loss = build_policy(config), build_loss(config)
    randomise(policy)
    [[first, second, *_]] = build_packer(config, CPU)(groups)
    policy.backward(first, loss)
    before = [p.grad.clone() for p in policy.store.parameters()]
    layer = policy.model.layers[0]

    def run_out(module, gradients):
        raise MemoryError("half-way")

    hook = layer.register_full_backward_pre_hook(run_out)
    with pytest.raises(MemoryError):
        policy.backward(second, loss)
    hook.remove()
    assert all(torch.equal(p.grad, b) for p, b in zip(policy.store.parameters(), before, strict=True))
    policy.backward(second, loss)
    assert not all(torch.equal(p.grad, b) for p, b in zip(policy.store.parameters(), before, strict=True))


def test_the_top_share_by_entropy_is_taken_anew_before_each_step(groups, tiny_config):
    """The second of two epochs takes it by the entropies after the first, which are what it masks by."""
    taken = []
    for epochs in (1, 2):
        config = tiny_config(epochs=2, top_entropy=0.3)
        policy, loss = build_policy(config), build_loss(config)
        randomise(policy)
        [[batch]] = build_packer(config, CPU)(groups)
        policy.update([[batch]], loss, 0.02, epochs)
        taken.append(batch.in_top[batch.mask])
        loss.prepare_step(policy, [batch])
        taken.append(batch.in_top[batch.mask])
        highest = policy.logprobs(batch)[1][batch.mask].topk(round(0.3 * int(batch.mask.sum()))).indices
        assert sorted(highest.tolist()) == taken[-1].nonzero().squeeze(1).tolist()
    first, after_one, second, _ = taken
    assert torch.equal(second, after_one)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("normalization", ["dapo", "grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_completions_without_a_score_are_as_good_as_not_there(normalization, kl_coef, groups):
    """In no batch, and in no denominator; where the loss asks for every group, too."""
    pack = build_packer(Config(normalization=normalization, kl_coef=kl_coef), CPU)
    [[expected]] = pack(groups)
    for group, index in zip(groups, (0, 3, 1), strict=True):
        group.completions.insert(index, Completion([5] * 40, [0.0] * 40, "", "stop", 0))
        nan = torch.tensor([torch.nan])
        group.advantages = torch.cat([group.advantages[:index], nan, group.advantages[index:]])
    gone = Group(groups[0].prompt, [Completion([5], [0.0], "", "stop", 0)] * 2)
    gone.advantages = torch.full((2,), torch.nan)
    [[batch]] = pack([*groups, gone])
    for name in ("tokens", "positions", "sequence", "mask", "sampler_logprobs", "advantages", "weights"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    assert not pack.trains(gone)
