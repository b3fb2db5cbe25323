"""The policy loss against its formulas, written out token by token in float64 numpy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo.config import Config
from grpo.loss import KL_ESTIMATORS, Pass, build_loss, stored
from grpo.packing import build_packer

CPU = torch.device("cpu")


def forward_pass(batch, seed=0, spread=0.4):
    """Random log-probabilities near the sampler's, with their entropy and old values."""
    generator = torch.Generator().manual_seed(seed)

    def noise(size):
        return torch.randn(batch.tokens.shape, generator=generator) * size * batch.mask

    logprobs = (batch.sampler_logprobs + noise(spread)).requires_grad_()
    entropy = (2.0 + noise(0.5).abs()) * batch.mask
    old = batch.sampler_logprobs + noise(0.3)
    batch.reference_logprobs = batch.sampler_logprobs + noise(0.3)
    return Pass(logprobs, entropy.requires_grad_(), old)


def loss_of(config, forward, batch):
    """The loss of a configuration with the old log-probabilities of this pass."""
    batch.old_logprobs = forward.old
    return replace(build_loss(config), old=stored)(forward.logprobs, forward.entropy, batch)


def expected_loss(config, forward, batch):
    """sum_t weight_t (keep_t correction_t objective_t + kl_coef KL_t - entropy_coef H_t), one token after the other."""
    p, entropy, o = (x.detach().double().numpy() for x in (forward.logprobs, forward.entropy, forward.old))
    q, f = batch.sampler_logprobs.double().numpy(), batch.reference_logprobs.double().numpy()
    total = 0.0
    for sequence in range(batch.num_sequences):
        tokens = [t for t in range(len(p)) if batch.mask[t] and batch.sequence[t] == sequence]
        product = math.exp(sum(o[t] - q[t] for t in tokens))
        drift = np.mean([q[t] - p[t] for t in tokens])
        for t in tokens:
            advantage = float(batch.advantages[t])
            log_ratio = np.mean([p[s] - o[s] for s in tokens]) if config.objective == "gspo" else p[t] - o[t]
            ratio = math.exp(log_ratio)
            if config.objective == "cispo":
                value = -min(ratio, config.cispo_cap) * advantage * p[t]
            else:
                clip = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
                surrogate = min(ratio * advantage, clip * advantage)
                if advantage < 0:
                    surrogate = max(surrogate, config.dual_clip * advantage)
                value = -surrogate
            weight = math.exp(o[t] - q[t]) if config.correction.startswith("token") else product
            if config.correction == "none":
                weight = 1.0
            elif config.correction.endswith("tis"):
                weight = min(weight, config.correction_cap)
            elif not config.correction_floor <= weight <= config.correction_cap:
                weight = 0.0
            keep = float(not (advantage < 0 and drift > config.off_policy_mask))
            keep *= float(batch.in_top[t]) if config.top_entropy < 1 else 1.0
            d = p[t] - f[t]
            k3 = math.exp(-d) + d - 1
            kl = {"k1": d, "k2": d * d / 2, "k3": k3, "weighted": math.exp(p[t] - o[t]) * k3}[config.kl_estimator]
            loss = keep * weight * value + config.kl_coef * kl - config.entropy_coef * entropy[t]
            total += float(batch.weights[t]) * loss
    return total


VARIANTS = {
    "default": {},
    "no correction": dict(correction="none"),
    "sequence tis": dict(correction="sequence_tis", correction_cap=1.1),
    "token mask": dict(correction="token_mask", correction_floor=0.8, correction_cap=1.3),
    "sequence mask": dict(correction="sequence_mask", correction_floor=0.6, correction_cap=1.5),
    "dual clip": dict(dual_clip=1.05, clip_low=0.01),
    "gspo": dict(objective="gspo", clip_low=0.02, clip_high=0.03),
    "cispo": dict(objective="cispo", cispo_cap=1.1),
    "k1": dict(kl_coef=0.3, kl_estimator="k1"),
    "k2": dict(kl_coef=0.3, kl_estimator="k2"),
    "k3": dict(kl_coef=0.3, kl_estimator="k3"),
    "weighted KL": dict(kl_coef=0.3),
    "entropy bonus": dict(entropy_coef=0.2),
    "off-policy mask": dict(off_policy_mask=0.02),
    "top entropy": dict(top_entropy=0.4),
    "grpo mean": dict(normalization="grpo"),
    "dr_grpo mean": dict(normalization="dr_grpo"),
    "bnpo mean": dict(normalization="bnpo"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_is_its_formula(name, groups):
    config = Config(**VARIANTS[name])
    [[batch]] = build_packer(config, CPU)(groups)
    forward = forward_pass(batch)
    if config.top_entropy < 1:
        batch.in_top = forward.entropy >= forward.entropy[batch.mask].median()
    loss, _ = loss_of(config, forward, batch)
    assert loss.item() == pytest.approx(expected_loss(config, forward, batch), rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_is_that_of_the_formula(name, groups):
    """Central differences of the float64 formula; weights that the loss holds constant are held constant there too."""
    config = Config(**VARIANTS[name])
    [[batch]] = build_packer(config, CPU)(groups)
    forward = forward_pass(batch)
    if config.top_entropy < 1:
        batch.in_top = forward.entropy >= forward.entropy[batch.mask].median()
    loss, _ = loss_of(config, forward, batch)
    loss.backward()
    sampled = batch.mask.nonzero().squeeze(1).tolist()
    base = forward.logprobs.detach().double()
    held = dict(off_policy_mask=math.inf) if config.objective == "cispo" else {}
    for t in sampled[::5]:
        values = []
        for step in (-1e-4, 1e-4):
            moved = base.clone()
            moved[t] += step
            values.append(expected_loss(replace(config, **held), Pass(moved, forward.entropy, forward.old), batch))
        difference = (values[1] - values[0]) / 2e-4
        if config.objective == "cispo":
            # The formula's derivative also moves the importance weight, which the loss holds constant.
            ratio = math.exp(float(base[t] - forward.old[t]))
            difference = float(-batch.weights[t] * batch.advantages[t] * min(ratio, config.cispo_cap))
            difference *= min(math.exp(float(forward.old[t] - batch.sampler_logprobs[t])), config.correction_cap)
        assert float(forward.logprobs.grad[t]) == pytest.approx(difference, rel=5e-3, abs=2e-6)


def test_prompt_tokens_and_equal_reward_groups_have_no_gradient(groups):
    config = Config()
    groups[1].advantages = torch.zeros(3)
    [[batch]] = build_packer(config, CPU)(groups)
    assert batch.layout.prompt_lengths == (7, 12)  # the middle group is not even there
    forward = forward_pass(batch)
    loss, _ = loss_of(config, forward, batch)
    loss.backward()
    assert torch.equal(forward.logprobs.grad[~batch.mask], torch.zeros(19))
    assert forward.logprobs.grad[batch.mask].abs().max() > 0


def test_dropped_groups_stay_in_the_denominators_that_say_so(groups):
    groups[1].advantages = torch.zeros(3)
    lengths = [[len(c.tokens) for c in group.completions] for group in groups]
    every, trained = sum(map(sum, lengths)), sum(lengths[0]) + sum(lengths[2])
    weights = {}
    for name in ("dapo", "bnpo", "grpo", "dr_grpo"):
        config = Config(normalization=name, max_completion_tokens=50)
        [[batch]] = build_packer(config, CPU)(groups)
        weights[name] = batch.weights[batch.mask]
    assert weights["dapo"].tolist() == pytest.approx([1 / every] * trained)
    assert weights["bnpo"].tolist() == pytest.approx([1 / trained] * trained)
    assert weights["grpo"][:5].tolist() == pytest.approx([1 / (5 * 9)] * 5)
    assert weights["dr_grpo"].tolist() == pytest.approx([1 / (9 * 50)] * trained)


def test_on_policy_and_equal_engines_the_gradient_is_reinforce(groups):
    """Ratio 1, correction 1: dL/dp_t = -weight_t A_t, whatever the clip range."""
    [[batch]] = build_packer(Config(), CPU)(groups)
    logprobs = batch.sampler_logprobs.clone().requires_grad_()
    forward = Pass(logprobs, torch.zeros_like(logprobs), logprobs.detach())
    loss, sums = loss_of(Config(), forward, batch)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -batch.weights * batch.advantages)
    metrics = build_loss(Config()).summarize([sums])
    assert metrics["mismatch/kl"] == 0
    assert metrics["policy/clip_fraction"] == 0


def test_a_step_that_trained_nothing_has_no_means():
    """An entropy of 0 would look like a collapse."""
    metrics = build_loss(Config()).summarize([])
    assert metrics.pop("policy/loss") == 0
    assert metrics
    assert all(math.isnan(value) for value in metrics.values())


def test_metrics_are_token_means_over_all_batches(groups):
    config = Config(tokens_per_batch=20, clip_low=0.1, clip_high=0.1)
    [batches] = build_packer(config, CPU)(groups)
    assert len(batches) > 2
    forwards = [forward_pass(batch, seed) for seed, batch in enumerate(batches)]
    metrics = build_loss(config).summarize([loss_of(config, f, b)[1] for f, b in zip(forwards, batches, strict=True)])
    p, o, q, advantages, entropy = (
        torch.cat([getattr(source, name)[batch.mask].detach().double() for source, batch in pairs])
        for name, pairs in [
            ("logprobs", list(zip(forwards, batches, strict=True))),
            ("old", list(zip(forwards, batches, strict=True))),
            ("sampler_logprobs", list(zip(batches, batches, strict=True))),
            ("advantages", list(zip(batches, batches, strict=True))),
            ("entropy", list(zip(forwards, batches, strict=True))),
        ]
    )
    ratio = (p - o).exp()
    clipped = ((ratio < 0.9) & (advantages < 0)) | ((ratio > 1.1) & (advantages > 0))
    gap = o - q
    assert metrics["policy/entropy"] == pytest.approx(float(entropy.mean()), rel=1e-5)
    assert metrics["policy/clip_fraction"] == pytest.approx(float(clipped.double().mean()), rel=1e-6)
    assert metrics["mismatch/kl"] == pytest.approx(float((gap.exp() - gap - 1).mean()), rel=1e-4)
    assert metrics["mismatch/correction"] == pytest.approx(float(gap.exp().clamp(max=2).mean()), rel=1e-5)


def test_extreme_ratios_stay_finite(groups):
    config = Config(kl_coef=0.1, objective="grpo", correction="sequence_mask")
    [[batch]] = build_packer(config, CPU)(groups)
    forward = forward_pass(batch, spread=200.0)
    loss, sums = loss_of(config, forward, batch)
    loss.backward()
    assert loss.isfinite()
    assert forward.logprobs.grad.isfinite().all()
    assert all(value.isfinite() for value in sums.values())


def expectation(estimator, shift=0.0):
    """Value and gradient with respect to the policy's logits of E[estimator] over exactly enumerated tokens, drawn from
    the policy as it was (shift 0: as it is): 7 tokens, float64. -> (value, gradient, and those of both KLs)"""
    generator = torch.Generator().manual_seed(3)
    logits, base, drift = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    p, f = logits.log_softmax(0), base.log_softmax(0)
    o = (logits.detach() - shift * drift).log_softmax(0)
    value = (o.exp() * estimator(p - f, p - o)).sum()
    forward, backward = (p.exp() * (p - f)).sum(), (f.exp() * (f - p)).sum()
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (value, forward, backward)]
    return value.item(), gradients[0], (forward.item(), gradients[1]), (backward.item(), gradients[2])


def test_what_the_expected_gradient_of_each_kl_estimator_is():
    """k1 teaches nothing; k3 alone pulls by the other divergence; weighted is right in both, off the policy too."""
    value, gradient, (kl, _), _ = expectation(KL_ESTIMATORS["k1"])
    assert value == pytest.approx(kl)
    torch.testing.assert_close(gradient, torch.zeros(7, dtype=torch.float64))
    _, gradient, (_, right), _ = expectation(KL_ESTIMATORS["k2"])
    torch.testing.assert_close(gradient, right)
    value, gradient, (kl, right), (_, reverse) = expectation(KL_ESTIMATORS["k3"])
    assert value == pytest.approx(kl)
    torch.testing.assert_close(gradient, reverse)
    assert (gradient - right).norm() > 0.1 * right.norm()
    for shift in (0.0, 0.5):
        value, gradient, (kl, right), _ = expectation(KL_ESTIMATORS["weighted"], shift)
        assert value == pytest.approx(kl)
        torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize("terms", [dict(kl_coef=0.3), dict(entropy_coef=0.2), dict(kl_coef=0.1, entropy_coef=0.1)])
def test_groups_of_equal_rewards_have_the_gradient_of_kl_and_entropy(terms, groups):
    groups[1].advantages = torch.zeros(3)
    config = Config(**terms)
    [[batch]] = build_packer(config, CPU)(groups)
    assert batch.num_sequences == 9
    forward = forward_pass(batch)
    loss, _ = loss_of(config, forward, batch)
    assert loss.item() == pytest.approx(expected_loss(config, forward, batch), rel=2e-5)
    wanted = forward.logprobs if config.kl_coef else forward.entropy
    (gradient,) = torch.autograd.grad(loss, wanted)
    equal = batch.mask & (batch.advantages == 0)
    assert equal.sum() == 8
    assert (gradient[equal] != 0).all()


def test_cispo_counts_what_its_own_cap_cuts(groups):
    config = Config(objective="cispo", cispo_cap=1.1)
    [[batch]] = build_packer(config, CPU)(groups)
    forward = forward_pass(batch)
    _, sums = loss_of(config, forward, batch)
    over = ((forward.logprobs - forward.old).exp() > 1.1) & batch.mask
    assert 0 < over.sum() < batch.mask.sum()
    assert sums["policy/clip_fraction"] == over.sum()


def test_what_dual_clip_cuts_is_counted(groups):
    config = Config(dual_clip=1.05)
    [[batch]] = build_packer(config, CPU)(groups)
    forward = forward_pass(batch)
    _, sums = loss_of(config, forward, batch)
    ratio, negative = (forward.logprobs - forward.old).exp(), batch.advantages < 0
    cut = ((ratio < 0.8) | (ratio > 1.05)) & negative | (ratio > 1.28) & (batch.advantages > 0)
    assert sums["policy/clip_fraction"] == (cut & batch.mask).sum() > 0


def test_rounding_does_not_decide_which_tokens_are_of_highest_entropy(groups):
    """The update's entropies are those of the preparation but for rounding: the token that the share ends at stays."""
    [[batch]] = build_packer(Config(), CPU)(groups)
    forward = forward_pass(batch)
    loss = build_loss(Config(top_entropy=0.5))

    class Reader:
        def read(self, batch):
            return forward.logprobs.detach(), forward.entropy.detach()

        def of_all_ranks(self, values):
            return torch.cat(values)

    loss.prepare_step(Reader(), [batch])
    for rounding in (-1e-6, 0.0, 1e-6):
        _, sums = loss(forward.logprobs, forward.entropy + rounding, batch)
        assert sums["policy/kept"] == round(0.5 * int(batch.mask.sum()))
