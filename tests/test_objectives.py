"""Likelihood and preference against the formulas in float64 over PEFT's model, one sequence at a time, and against
TRL's trainers over padded ones, where TRL is installed: losses and the gradient of every LoRA factor."""

import math
from dataclasses import replace

import pytest
import torch
from test_policy import assert_same_gradient, peft_gradients, peft_model, reference_model
from tiny_models import CPU, build_policy, randomise, reference_logprobs

from grpo.config import Config
from grpo.errors import UserError
from grpo.objectives import OBJECTIVES, preferred
from grpo.packing import PACKERS, fill_whole, halve
from grpo.types import Span


@pytest.fixture
def taught(groups):
    """Answers to three prompts, the second with a turn of somebody else's in it."""
    answers = [
        replace(
            group, completions=[group.completions[place]], advantages=torch.ones(1), rewards=torch.full((1,), torch.nan)
        )
        for group, place in zip(groups, (2, 0, 1), strict=True)
    ]
    answers[0].completions[0].others = (Span(4, 7),)
    return answers


@pytest.fixture
def pairs(groups):
    return [replace(group, completions=group.completions[1:], advantages=torch.tensor([1.0, -1.0])) for group in groups]


def update(policy, groups, batches_at_least=2):
    """The metrics of an optimizer step on these groups, whose gradient stays in the policy."""
    config = policy.config
    loss, [batches] = OBJECTIVES[config.method](config), PACKERS[config.method](config, CPU)(groups)
    assert len(batches) >= batches_at_least
    loss.prepare(policy, batches)
    loss.prepare_step(policy, batches)
    return loss.summarize([policy.backward(batch, loss) for batch in batches])


def check_gradients(policy, theirs):
    gradients = peft_gradients(theirs)
    for projection in policy.store.projections.values():
        factors = projection.lora_a.grad.split(policy.config.lora_rank)
        for part, (linear, of_a) in enumerate(zip(projection.names, factors, strict=True)):
            assert_same_gradient(of_a, gradients[linear + ".lora_A"])
            assert_same_gradient(projection.lora_b[part].grad, gradients[linear + ".lora_B"])


def test_the_likelihood_is_the_cross_entropy_of_what_is_taught(tiny_config, taught, tmp_path):
    policy = build_policy(tiny_config(method="sft", tokens_per_batch=30))
    randomise(policy)
    theirs = peft_model(policy, reference_model(policy.config), tmp_path)
    metrics = update(policy, taught)

    logprobs, entropy = reference_logprobs(theirs, taught, 1.0)
    mask = torch.tensor([sampled for group in taught for c in group.completions for sampled in c.mask])
    assert not mask.all()
    expected = -logprobs[mask].mean()
    expected.backward()
    assert metrics["policy/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["policy/entropy"] == pytest.approx(float(entropy[mask].mean()), rel=1e-5)
    check_gradients(policy, theirs)


def formula(config, p, f, lengths):
    """The loss of pairs, in float64. p, f: log p of each answer; lengths: its tokens; all [pairs, 2]."""
    ratio, beta, smoothing = p - f, config.dpo_beta, config.label_smoothing
    if config.dpo_loss in ("ipo", "sigmoid_norm"):
        ratio = ratio / lengths
    margin = ratio[:, 0] - ratio[:, 1]
    if config.dpo_loss == "ipo":
        return ((margin - 1 / (2 * beta)) ** 2).mean()
    right, wrong = -(1 / (1 + (-beta * margin).exp())).log(), -(1 / (1 + (beta * margin).exp())).log()
    if config.dpo_loss == "robust":
        return (((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)).mean()
    return ((1 - smoothing) * right + smoothing * wrong).mean()


@pytest.mark.parametrize(
    ("reference", "settings"),
    [
        ("base", {}),
        ("start", {}),
        ("base", {"label_smoothing": 0.2, "dpo_beta": 0.5}),
        ("base", {"dpo_loss": "sigmoid_norm", "dpo_beta": 2.0}),
        ("base", {"dpo_loss": "ipo"}),
        ("base", {"dpo_loss": "robust", "label_smoothing": 0.1}),
        ("start", {"sft_coef": 0.7}),
    ],
)
def test_the_preference_is_its_formula(reference, settings, tiny_config, pairs, tmp_path):
    policy = build_policy(tiny_config(method="dpo", tokens_per_batch=30, **settings))
    f_policy = reference_model(policy.config)
    if reference == "start":
        randomise(policy, seed=9)
        policy.refer_to_start()
        (tmp_path / "start").mkdir()
        f_policy = peft_model(policy, f_policy, tmp_path / "start")
    randomise(policy)
    theirs = peft_model(policy, reference_model(policy.config), tmp_path)
    metrics = update(policy, pairs)

    lengths = [len(completion.tokens) for group in pairs for completion in group.completions]

    def of_answers(logprobs):
        return torch.stack([part.sum() for part in logprobs.split(lengths)]).view(-1, 2)

    p = reference_logprobs(theirs, pairs, 1.0)[0]
    with torch.no_grad():
        f = of_answers(reference_logprobs(f_policy, pairs, 1.0)[0])
    expected = formula(policy.config, of_answers(p), f, torch.tensor(lengths).view(-1, 2))
    chosen = torch.cat(p.split(lengths)[::2])
    expected = expected - settings.get("sft_coef", 0.0) * chosen.mean()
    expected.backward()
    assert metrics["policy/loss"] == pytest.approx(expected.item(), rel=1e-5)
    check_gradients(policy, theirs)
    if settings == {}:
        rewards = 0.1 * (of_answers(p) - f).detach()
        told = [metrics[f"dpo/{name}"] for name in ("chosen", "rejected", "margin", "accuracy")]
        margins = rewards[:, 0] - rewards[:, 1]
        means = [rewards[:, 0].mean(), rewards[:, 1].mean(), margins.mean(), (margins > 0).double().mean()]
        assert told == pytest.approx([float(mean) for mean in means], rel=1e-4, abs=1e-6)


def test_a_policy_that_has_not_moved_has_no_margin(tiny_config, pairs):
    metrics = update(build_policy(tiny_config(method="dpo", tokens_per_batch=30)), pairs)
    assert metrics["policy/loss"] == pytest.approx(math.log(2)) and metrics["dpo/margin"] == 0
    assert metrics["dpo/accuracy"] == 0.5  # a tie is no defeat


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_loss_of_several_optimizer_steps_is_their_mean(method, tiny_config, taught, pairs):
    groups, found = {"sft": taught, "dpo": pairs}[method], []
    for steps, epochs in ((1, 1), (2, 1), (1, 3)):
        policy = build_policy(tiny_config(method=method))
        [batches] = PACKERS[method](policy.config, CPU)(groups)
        found.append(policy.update([batches] * steps, OBJECTIVES[method](policy.config), 0.0, epochs)["policy/loss"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-6) and found[0] > 0


def test_pairs_that_moved_at_random_are_no_gain():
    """Held-out accuracy begins where chance ends: a policy that gained on half of the pairs has learnt nothing."""
    assert preferred(torch.tensor([-2.0, 0.0, 1e-30])).tolist() == [0.0, 0.5, 1.0]
    moved = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert float(preferred(moved).mean()) == pytest.approx(float(preferred(0 * moved).mean()), abs=0.02)


def test_the_gradient_is_the_same_however_pairs_are_packed(tiny_config, pairs):
    found = []
    for tokens in (24, 35, 60):
        policy = build_policy(tiny_config(method="dpo", tokens_per_batch=tokens, sft_coef=0.3))
        randomise(policy)
        update(policy, pairs, batches_at_least=1)
        found.append(torch.cat([master.grad.flatten() for master in policy.store.parameters()]))
    for gradient in found[1:]:
        assert_same_gradient(gradient, found[0])


def test_a_pair_is_never_divided(pairs):
    sizes = [len(g.prompt.tokens) + sum(len(c.tokens) for c in g.completions) for g in pairs]
    pieces = [(group, [0, 1]) for group in pairs]
    assert [len(row) for row in fill_whole(pieces, 1)] == [1, 1, 1]
    assert [len(row) for row in fill_whole(pieces, sizes[0] + sizes[1])] == [2, 1]
    assert [len(row) for row in fill_whole(pieces, sum(sizes))] == [3]
    [[batch]] = PACKERS["dpo"](Config(method="dpo"), CPU)(pairs)
    halves = halve(batch)
    assert sorted(half.num_sequences for half in halves) == [2, 4]
    alone = next(half for half in halves if half.num_sequences == 2)
    assert halve(alone) == [alone]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"dpo_beta": 0.0}, "dpo_beta is 0.0"),
        ({"dpo_loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is of a sigmoid"),
        ({"method": "sft", "temperature": 0.7}, "temperature is 0.7"),
        ({"engine": "none"}, "learns from what is sampled"),
    ],
)
def test_what_makes_no_sense_is_told(fields, told):
    with pytest.raises(UserError, match=told):
        Config(**fields)


# ---- TRL, where it is installed


def padded(sequences, value):
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences])


def trl_inputs(groups):
    """TRL's padded tensors; of pairs all chosen ones come first."""
    members = range(len(groups[0].completions))
    answers = [(group.prompt.tokens, group.completions[member]) for member in members for group in groups]
    tokens = [[*prompt, *completion.tokens] for prompt, completion in answers]
    return {
        "input_ids": padded(tokens, 0),
        "attention_mask": padded([[1] * len(each) for each in tokens], 0),
        "completion_mask": padded([[0] * len(prompt) + [int(m) for m in c.mask] for prompt, c in answers], 0),
    }


def trl_trainer(kind, model, tokenizer_of, folder, **settings):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    row = (
        {"chosen": "a b", "rejected": "a c", "prompt": "a"}
        if kind == "DPO"
        else {"input_ids": [1, 2], "labels": [1, 2]}
    )
    config = getattr(trl, f"{kind}Config")(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, **settings)
    data = datasets.Dataset.from_list([row])
    return getattr(trl, f"{kind}Trainer")(model=model, args=config, train_dataset=data, processing_class=tokenizer_of)


@pytest.fixture
def embedded_tokenizer():
    from grpo.policy import load_tokenizer

    return load_tokenizer("embedded")


@pytest.mark.slow
def test_the_likelihood_is_that_of_trl(tiny_config, taught, tmp_path, embedded_tokenizer):
    pytest.importorskip("trl")
    policy = build_policy(tiny_config(method="sft", tokens_per_batch=30))
    randomise(policy)
    theirs = peft_model(policy, reference_model(policy.config), tmp_path)
    metrics = update(policy, taught)
    trainer = trl_trainer("SFT", theirs, embedded_tokenizer, tmp_path / "trl", max_length=None)
    inputs = trl_inputs(taught)
    mask = inputs.pop("completion_mask")
    inputs["labels"] = inputs["input_ids"].masked_fill(mask == 0, -100)
    theirs.eval()
    loss = trainer.compute_loss(theirs, inputs)
    loss.backward()
    assert metrics["policy/loss"] == pytest.approx(loss.item(), rel=1e-5)
    check_gradients(policy, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "settings"),
    [
        ({}, {}),
        ({"dpo_loss": "sigmoid_norm", "dpo_beta": 2.0}, {"loss_type": ["sigmoid_norm"], "beta": 2.0}),
        ({"dpo_loss": "ipo"}, {"loss_type": ["ipo"]}),
        ({"dpo_loss": "robust", "label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
        ({"sft_coef": 0.7}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    ],
)
def test_the_preference_is_that_of_trl(ours, settings, tiny_config, pairs, tmp_path, embedded_tokenizer):
    pytest.importorskip("trl")
    policy = build_policy(tiny_config(method="dpo", tokens_per_batch=30, **ours))
    randomise(policy)
    theirs = peft_model(policy, reference_model(policy.config), tmp_path)
    metrics = update(policy, pairs)
    trainer = trl_trainer("DPO", theirs, embedded_tokenizer, tmp_path / "trl", **settings)
    theirs.eval()
    if "ref" in theirs.peft_config:  # TRL's reference is the adapter as it was given; ours, of a fresh run, the base
        for name, parameter in theirs.named_parameters():
            if ".ref." in name:
                parameter.data.zero_()
    loss = trainer._compute_loss(theirs, trl_inputs(pairs), return_outputs=False)
    loss.backward()
    assert metrics["policy/loss"] == pytest.approx(loss.item(), rel=1e-5)
    check_gradients(policy, theirs)
