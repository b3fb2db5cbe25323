"""PPO: values, advantages, both losses and every gradient against formulas in float64 over PEFT's model, one completion
at a time; and the runs that are made of it."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from several import run_ranks
from test_objectives import check_gradients
from test_policy import assert_same_gradient, peft_model, reference_model
from tiny_models import CPU, randomise
from toy_task import SMALL, TASK

from grpo.advantages import assign_advantages, earned
from grpo.checkpoint import Progress, load_checkpoint, save_checkpoint
from grpo.config import Config
from grpo.errors import UserError
from grpo.gae import explained_variance
from grpo.generators import reader
from grpo.objectives import OBJECTIVES
from grpo.packing import PACKERS, halve
from grpo.policy import load_model
from grpo.policy.actor_critic import ActorCritic
from grpo.policy.optimizer import optimizer_tensors
from grpo.run import main
from grpo.types import Span

# ---- the numbers


@pytest.fixture
def earning(groups):
    """Completions of 1 to 13 tokens: in one somebody else speaks, one was cut off, and on one a reward failed."""
    groups[0].completions[2].others = (Span(4, 7),)
    groups[1].rewards[0] = torch.nan
    groups[2].completions[0].finish = "length"
    assign_advantages(groups, earned, {})
    return groups


def build(config, seed):
    policy = ActorCritic(load_model(config, CPU, 64, note=[].append), config)
    move(policy, seed)
    return policy


def move(policy, seed):
    randomise(policy, seed)
    with torch.no_grad():
        policy.value_head.copy_(torch.randn(65, generator=torch.Generator().manual_seed(seed)) * 0.05)


def counted(groups, config):
    """(group, completion, its reward) of all that have a part in the loss, in the order that batches have them in."""
    for group in groups:
        for completion, reward in zip(group.completions, group.rewards.tolist(), strict=True):
            if not math.isnan(reward) and not (config.mask_truncated and completion.finish == "length"):
                yield group, completion, reward


def read_by_peft(model, head, groups, config):
    """[(log p, values)] of the sampled tokens of each completion, float64, by the head [D + 1]."""
    read = []
    for group, completion, _ in counted(groups, config):
        tokens = torch.tensor([group.prompt.tokens + completion.tokens])
        out = model(input_ids=tokens, use_cache=False, output_hidden_states=True)
        before = slice(len(group.prompt.tokens) - 1, -1)
        log_p = torch.log_softmax(out.logits[0, before].double() / config.temperature, dim=-1)
        of_tokens = log_p.gather(1, torch.tensor(completion.tokens)[:, None]).squeeze(1)
        values = out.hidden_states[-1][0, before].detach().double() @ head[:-1] + head[-1]
        read.append((of_tokens[completion.mask], values[completion.mask]))
    return read


def advantages_by_sums(values, reward, gamma, lam):
    """Equation 16 of arXiv 1506.02438, as it stands there."""
    size = len(values)
    deltas = [
        (reward if t == size - 1 else 0.0) + gamma * (values[t + 1] if t + 1 < size else 0.0) - values[t]
        for t in range(size)
    ]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(size - t)) for t in range(size)]


def formula(config, before, now, groups):
    """The loss, the mean error of the values, and how much of the returns' variance they explain."""
    rows = list(counted(groups, config))
    of_tokens = [
        advantages_by_sums(V.tolist(), reward, config.gamma, config.gae_lambda)
        for (_, V), (_, _, reward) in zip(before, rows, strict=True)
    ]
    A = torch.tensor([a for row in of_tokens for a in row], dtype=torch.float64)
    o, V = (torch.cat(column) for column in zip(*before, strict=True))
    p, v = (torch.cat(column) for column in zip(*now, strict=True))
    R = A + V
    A = (A - A.mean()) / A.var(correction=0).sqrt()
    lengths = [completion.num_sampled for _, completion, _ in rows]
    of_sequence = [n if config.normalization == "grpo" else sum(lengths) / len(lengths) for n in lengths]
    weights = torch.tensor(
        [1 / (n * len(rows)) for n, own in zip(of_sequence, lengths, strict=True) for _ in range(own)]
    )
    q = torch.tensor([q for _, c, _ in rows for q, own in zip(c.sampler_logprobs, c.mask, strict=True) if own])
    ratio = (p - o).exp()
    objective = -torch.minimum(ratio * A, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * A)
    near = V + (v - V).clamp(-config.value_clip, config.value_clip)
    errors = torch.maximum((v - R) ** 2, (near - R) ** 2) / 2
    loss = (weights * ((o - q).exp().clamp(max=2.0) * objective + errors)).sum()
    return loss, errors.mean(), 1 - (R - V).var(correction=0) / R.var(correction=0)


def opened(policy, folder):
    """By PEFT, as it is now."""
    folder.mkdir()
    return peft_model(policy, reference_model(policy.config), folder)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gamma": 0.9, "gae_lambda": 0.7, "value_clip": math.inf},
        {"gae_lambda": 0.0, "normalization": "grpo", "temperature": 0.7},
        {"gae_lambda": 0.95, "mask_truncated": False, "value_clip": 0.05},
    ],
)
def test_both_losses_and_all_gradients_are_those_of_the_formula(settings, tiny_config, earning, tmp_path):
    """The policy and its values have moved since they were read: something is clipped in both losses."""
    config = tiny_config(advantage="gae", epochs=2, tokens_per_batch=30, **settings)
    policy = build(config, seed=1)
    loss, [batches] = OBJECTIVES["grpo"](config), PACKERS["grpo"](config, CPU)(earning)
    assert len(batches) > 1
    heads, theirs = [policy.value_head.detach().double()], [opened(policy, tmp_path / "before")]
    loss.prepare(policy, batches)
    move(policy, seed=2)
    loss.prepare_step(policy, batches)
    metrics = loss.summarize([policy.backward(batch, loss) for batch in batches])

    heads.append(policy.value_head.detach().double().requires_grad_())
    theirs.append(opened(policy, tmp_path / "now"))
    with torch.no_grad():
        before = read_by_peft(theirs[0], heads[0], earning, config)
    expected, errors, explained = formula(config, before, read_by_peft(theirs[1], heads[1], earning, config), earning)
    expected.backward()
    errors, explained = errors.item(), explained.item()
    assert metrics["value/loss"] == pytest.approx(errors, rel=1e-5)
    assert metrics["value/explained_variance"] == pytest.approx(explained, rel=1e-5)
    assert metrics["policy/clip_fraction"] > 0.05
    check_gradients(policy, theirs[1])
    assert_same_gradient(policy.value_head.grad.double(), heads[1].grad)


def prepared(config, groups, seed=1):
    policy = build(config, seed)
    loss, [batches] = OBJECTIVES["grpo"](config), PACKERS["grpo"](config, CPU)(groups)
    loss.prepare(policy, batches)
    return policy, loss, batches


def test_a_batch_that_memory_does_not_hold_gives_the_same_in_halves(tiny_config, earning):
    policy, loss, [batch] = prepared(tiny_config(advantage="gae"), earning)
    whole = loss.summarize([policy.backward(batch, loss)])
    gradients = [master.grad for master in policy.masters()]
    policy.optimizer.zero_grad(set_to_none=True)
    parts = [part for half in halve(batch) for part in halve(half)]
    assert len(parts) > 2
    assert loss.summarize([policy.backward(part, loss) for part in parts]) == pytest.approx(whole, rel=1e-5, abs=1e-6)
    for master, expected in zip(policy.masters(), gradients, strict=True):
        assert_same_gradient(master.grad, expected)


def test_a_batch_prepared_twice_is_as_prepared_once(tiny_config, earning):
    """A rehearsal prepares too, and advantages are made of rewards, not of advantages."""
    policy, loss, batches = prepared(tiny_config(advantage="gae", gae_lambda=0.9, tokens_per_batch=30), earning)
    once = [(batch.token_advantages, batch.returns) for batch in batches]
    loss.prepare(policy, batches)
    for batch, (advantages, returns) in zip(batches, once, strict=True):
        assert torch.equal(batch.token_advantages, advantages) and torch.equal(batch.returns, returns)
        assert not batch.token_advantages[~batch.mask].any() and not batch.returns[~batch.mask].any()


def test_equal_returns_have_no_variance_to_explain(tiny_config, groups):
    for group in groups:
        group.advantages = group.rewards = torch.full((3,), 0.1)
    policy, loss, batches = prepared(tiny_config(advantage="gae"), groups)
    metrics = loss.summarize([policy.backward(batch, loss) for batch in batches])
    assert math.isnan(metrics["value/explained_variance"]) and metrics["value/loss"] > 0
    assert math.isnan(loss.summarize([])["value/loss"]) and loss.summarize([])["policy/loss"] == 0
    assert explained_variance(5.0, 2.0, 1.0, 1.0) == 1.0  # what is missed everywhere alike varies with nothing


def test_a_head_that_is_nothing_leaves_grpos_log_probabilities_as_they_are(tiny_config, earning):
    config = tiny_config(advantage="gae")
    policy = ActorCritic(load_model(config, CPU, 64, note=[].append), config)
    [[batch]] = PACKERS["grpo"](config, CPU)(earning)
    logprobs, entropy, passed = policy.forward(batch)
    assert not passed.values.any() and not policy.values(batch).any()
    assert torch.equal(logprobs, policy.logprobs(batch)[0]) and torch.equal(entropy, policy.logprobs(batch)[1])


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw8bit", marks=pytest.mark.slow)])
def test_a_checkpoint_has_the_head_and_its_moments(optimizer, tiny_config, earning, tmp_path):
    config = tiny_config(advantage="gae", optimizer=optimizer, lora_rank=64, value_lr=0.3)
    policy = build(config, 1)
    loss, pack = OBJECTIVES["grpo"](config), PACKERS["grpo"](config, CPU)
    for _ in range(2):
        policy.update(pack(earning), loss, 1e-3)
    place = save_checkpoint(tmp_path, policy, Progress(step=2, version=2), reader(CPU)(), keep=1)
    assert load_file(place / "optimizer.safetensors")["value_head"].shape == (65,)
    assert not any("value" in name for name in load_file(place / "adapter_model.safetensors"))
    again = ActorCritic(load_model(config, CPU, 64, note=[].append), config)
    load_checkpoint(place, again)
    for each in (policy, again):
        each.update(pack(earning), loss, 1e-3)
    for one, other in zip(policy.masters(), again.masters(), strict=True):
        assert torch.equal(one, other)
    expected, found = (optimizer_tensors(each.optimizer) for each in (policy, again))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert policy.digest() == again.digest()
    with torch.no_grad():
        again.value_head[3] += 1
    assert policy.digest() != again.digest()


# ---- the configuration


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"advantage": "gae", "dynamic_sampling": True}, "dynamic_sampling drops groups of equal rewards"),
        ({"advantage": "gae", "gae_lambda": 1.5}, "gae_lambda is 1.5. Use at most 1"),
        ({"advantage": "gae", "gamma": -0.1}, "gamma is -0.1. Use 0 or more"),
        ({"advantage": "gae", "value_lr": -1.0}, "value_lr is -1.0. Use 0 or more"),
        ({"advantage": "gae", "value_clip": math.nan}, "value_clip is nan"),
        ({"group_size": 1}, "group_size is 1, so every advantage would be 0. Use 2 or more"),
    ],
)
def test_what_makes_no_sense_is_told(fields, told):
    with pytest.raises(UserError, match=told):
        Config(**fields)


# ---- runs

FLAGS = [*SMALL, "--advantage", "gae", "--value-lr", "1e-2", "--eval-every", "0"]
LETTERS = "\ndef letters(completion):\n    return len(set(completion)) / 10\n"


def write_task(folder):
    (folder / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=LETTERS))
    return str(folder / "toy.py")


def metrics_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    untimed = ("time/", "speed/", "memory/")
    return [{name: value for name, value in line.items() if not name.startswith(untimed)} for line in lines]


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    """A run of four steps, two optimizer steps on each rollout, twice over."""
    folder = tmp_path_factory.mktemp("ppo")
    flags = [*FLAGS, "--mini-batches", "2", "--epochs", "2", "--steps", "4", "--save-every", "2"]
    assert main([write_task(folder), *flags, "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_a_resumed_run_is_the_run_uninterrupted(of_one, tmp_path):
    resumed = shutil.copytree(of_one, tmp_path / "run")
    assert main(["--resume", str(resumed / "checkpoints" / "step-000002")]) == 0
    assert metrics_of(resumed) == metrics_of(of_one)
    steps = [line for line in metrics_of(of_one) if "value/loss" in line]
    assert len(steps) == 4 and all(line["groups/trained"] == 2 for line in steps)
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        ours, theirs = (run / "checkpoints" / "step-000004" / file for run in (resumed, of_one))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("argv", [["--advantage", "grpo"], ["--recipe", "dr_grpo"]])
def test_a_run_keeps_its_head(argv, of_one, capsys):
    assert main(["--resume", str(of_one), "--steps", "5", *argv]) == 2
    assert "was started with gae: it has a value head" in capsys.readouterr().err


def test_a_run_without_a_head_gets_none_on_its_way(trained, capsys):
    assert main(["--resume", str(trained), "--steps", "5", "--advantage", "gae"]) == 2
    told = capsys.readouterr().err
    assert "was started with grpo: it has none" in told and "--adapter" in told


@pytest.mark.slow
def test_one_completion_of_a_prompt_will_do(tmp_path):
    flags = [*FLAGS, "--group-size", "1", "--prompts-per-step", "4", "--steps", "2", "--run-dir", str(tmp_path / "run")]
    assert main([write_task(tmp_path), *flags]) == 0
    assert [line["groups/zero_variance"] for line in metrics_of(tmp_path / "run") if "value/loss" in line] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--gae-lambda", "0.9", "--tokens-per-batch", "40", "--kl-coef", "0.1"]])
def test_ranks_train_the_policy_and_the_head_of_one_process(flags, tmp_path):
    argv = [write_task(tmp_path), *FLAGS, *flags, "--steps", "3", "--prompts-per-step", "3", "--learning-rate", "1e-4"]
    assert main([*argv, "--run-dir", str(tmp_path / "one")]) == 0
    codes, logs = run_ranks(2, tmp_path, [*argv, "--run-dir", "two"])
    assert codes == [0, 0], logs
    for first, second in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        names = [name for name in first if not name.startswith(("sync/", "mismatch/"))]
        assert {n: second[n] for n in names} == pytest.approx(
            {n: first[n] for n in names}, rel=1e-4, abs=1e-5, nan_ok=True
        )
    heads = [
        load_file(tmp_path / run / "checkpoints" / "step-000003" / "optimizer.safetensors")["value_head"]
        for run in ("one", "two")
    ]
    assert heads[0].abs().max() > 1e-2
    torch.testing.assert_close(heads[1], heads[0], atol=1e-5, rtol=0)
