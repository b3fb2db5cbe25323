"""The canary and the audit: silent over honest updates and samples, loud about an engine that is not the policy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_engines import Letters, contexts, learn, prompts, rollout
from tiny_models import build_policy, randomise

from grpo.errors import UserError
from grpo.rollout import audit
from grpo.rollout.audit import Audit
from grpo.rollout.canary import Canary, follows
from grpo.rollout.torch_engine import TorchEngine


def build_engine(config, seed=1):
    policy = build_policy(config)
    randomise(policy, seed)
    return policy, TorchEngine(policy, Letters(), contexts(prompts(4)), config.temperature)


def test_silent_over_honest_updates_and_proved_by_each(tiny_config):
    policy, engine = build_engine(tiny_config())
    for seed in range(2, 12):
        learn(policy, seed)
        measured = engine.sync()
        assert measured["sync/gap"] < 1e-5
        assert measured["sync/moved"] > 1e-3
        assert measured["sync/unproved"] == 0


def test_trips_when_the_engine_has_other_weights(tiny_config):
    policy, engine = build_engine(tiny_config())
    _, stale = build_engine(tiny_config())
    engine.canary.logprobs = stale.logprobs
    engine.sync()
    learn(policy, 3)
    with pytest.raises(UserError, match="is not the policy"):
        engine.sync()


def test_refuses_an_engine_that_is_another_model_from_the_start(tiny_config):
    policy, engine = build_engine(tiny_config())
    other, _ = build_engine(tiny_config(), seed=2)
    completions = [group.completions for group in rollout(engine, prompts(2), 3, seed=0, max_tokens=8)]
    Canary(policy, engine.logprobs, contexts(prompts(2)), completions)
    with pytest.raises(UserError, match="before any update"):
        Canary(other, engine.logprobs, contexts(prompts(2)), completions)


def test_its_completions_are_those_of_the_base_model(tiny_config):
    policy, _ = build_engine(tiny_config(max_completion_tokens=23))
    again = TorchEngine(policy, Letters(), contexts(prompts(4)), 1.0).canary.completions
    randomise(policy, 7)
    assert TorchEngine(policy, Letters(), contexts(prompts(4)), 1.0).canary.completions == again
    assert len(again) == 32 and all(1 <= len(tokens) <= 4 for tokens in again)


def nudge(policy, size):
    with torch.no_grad():
        policy.store.parameters()[0].add_(size)
    policy.version += 1


def test_small_steps_add_up_until_the_engine_is_proved(tiny_config):
    """Noise of 0.02 and updates that each move less: nothing is said of them one by one."""
    policy, engine = build_engine(tiny_config())
    engine.canary.noise = 0.05
    unproved = []
    for _ in range(60):
        nudge(policy, 0.002)
        unproved.append(engine.sync()["sync/unproved"])
    assert unproved[:3] == [1, 2, 3]
    assert 0 in unproved
    assert max(unproved) < 50


def test_trips_when_the_engine_stands_still_within_the_bound_over_many_small_steps(tiny_config):
    policy, engine = build_engine(tiny_config())
    _, stale = build_engine(tiny_config())
    canary = engine.canary
    canary.noise = 0.05
    canary.logprobs = stale.logprobs
    with pytest.raises(UserError, match=r"stood still: from version 0 to \d+"):
        for _ in range(200):
            nudge(policy, 0.002)
            engine.sync()
    assert policy.version > 3


def test_a_policy_that_has_diverged_is_told_as_that(tiny_config):
    policy, engine = build_engine(tiny_config())
    nudge(policy, float("inf"))
    with pytest.raises(UserError, match=r"diverged.*lower --learning-rate"):
        engine.sync()


def test_a_state_restored_goes_on_from_the_last_proof(tiny_config):
    policy, engine = build_engine(tiny_config())
    engine.canary.noise = 0.05
    nudge(policy, 0.002)
    engine.sync()
    fresh = TorchEngine(policy, Letters(), contexts(prompts(4)), 1.0)
    assert fresh.canary.restore(engine.canary.state())
    nudge(policy, 0.002)
    assert fresh.sync() == engine.sync()
    assert fresh.canary.state() == engine.canary.state()
    assert engine.canary.proved.version == 0


def test_a_state_of_another_engine_or_model_is_not_taken(tiny_config):
    """Its noise is another: a run that was begun in float32 would be stopped when it goes on in bf16."""
    _, engine = build_engine(tiny_config())
    _, other = build_engine(tiny_config("llama"))
    noise = engine.canary.noise
    other.canary.noise = 0.1
    assert not engine.canary.restore(other.canary.state())
    assert not engine.canary.restore({})
    assert engine.canary.noise == noise


def simulate(rng, tokens, noise, step, share, heavy):
    """100 updates: the policy walks with some drift, the engine follows by `share`; both are read with noise whose root
    mean square difference at equal weights is `noise`. -> (a wrong verdict of an honest engine or a right one of
    another came, a proof came)"""

    def read(values):
        drawn = rng.standard_t(5, tokens) * (3 / 5) ** 0.5 if heavy else rng.standard_normal(tokens)
        return torch.tensor(values + noise / 2**0.5 * drawn)

    policy, engine = np.zeros(tokens), np.zeros(tokens)
    at_policy, at_engine = read(policy), read(engine)
    proved = False
    for _ in range(100):
        move = step * (rng.standard_normal(tokens) + 0.5)
        policy, engine = policy + move, engine + share * move
        now_policy, now_engine = read(policy), read(engine)
        verdict = follows(now_policy - at_policy, now_engine - at_engine, noise)
        if verdict is False:
            return True, proved
        if verdict:
            at_policy, at_engine, proved = now_policy, now_engine, True
    return False, proved


@pytest.mark.parametrize("heavy", [False, True])
def test_no_false_alarm_whatever_noise_and_movement_are(heavy):
    rng = np.random.default_rng(0)
    outcomes = [
        simulate(
            rng, int(rng.choice([8, 32, 64, 256])), 10 ** rng.uniform(-5, -1), 10 ** rng.uniform(-5, 0), 1.0, heavy
        )
        for _ in range(300)
    ]
    assert not any(alarm for alarm, _ in outcomes)
    assert sum(proved for _, proved in outcomes) > 100


@pytest.mark.parametrize("tokens", [32, 64])
def test_an_engine_that_stands_still_is_found_once_the_movement_is_told_from_noise(tokens):
    rng = np.random.default_rng(1)
    for _ in range(50):
        alarm, proved = simulate(rng, tokens, 0.03, 0.02, 0.0, heavy=True)
        assert alarm and not proved


# ---- the audit


class Wrong:
    """An engine with one fault."""

    def __init__(self, engine, **faults):
        self.engine, self.policy, self.faults = engine, engine.policy, faults

    def sample(self, requests, finished):
        completions = self.faults["sample"](self.engine, requests)
        for index, completion in enumerate(completions):
            finished(index, completion)
        return completions


def shifted(engine, requests):
    """Log-probabilities of the token before."""
    return [replace(c, sampler_logprobs=[0.0, *c.sampler_logprobs[:-1]]) for c in engine.sample(requests)]


def swapped(engine, requests):
    """Each prompt is answered for its neighbour."""
    moved = [replace(r, context=other.context) for r, other in zip(requests, requests[4:] + requests[:4], strict=True)]
    return engine.sample(moved)


def base_model(engine, requests):
    with engine.policy.store.reference():
        return engine.sample(requests)


def off_by_one(engine, requests):
    """Positions of written tokens are one too high, as a wrong RoPE in decoding makes them."""
    model = engine.policy.model
    decode, rotate = model.decode, model.rope.forward

    def wrong(tokens, cache):
        model.rope.forward = lambda x, positions: rotate(x, positions + 1)
        try:
            return decode(tokens, cache)
        finally:
            model.rope.forward = rotate

    model.decode = wrong
    try:
        return engine.sample(requests)
    finally:
        del model.decode


@pytest.mark.parametrize("fault", [shifted, swapped, base_model, off_by_one])
def test_log_probabilities_that_are_not_the_policys_are_told_at_the_first_step(fault, tiny_config):
    policy, engine = build_engine(tiny_config(max_completion_tokens=23))
    looker = Audit(policy, engine.canary.noise)
    looker(rollout(engine, prompts(), 4, seed=0), 0)
    with pytest.raises(UserError, match="differ from the policy's"):
        looker(rollout(Wrong(engine, sample=fault), prompts(), 4, seed=0), 0)


def drawn_from(change):
    """Tokens from a changed distribution, with the log-probabilities of the right one."""

    def sample(engine, requests):
        right = engine._distribution
        engine._distribution = lambda hidden: change(right(hidden))
        try:
            written = engine.sample(requests)
        finally:
            engine._distribution = right
        told = engine.logprobs([r.context for r in requests], [c.tokens for c in written])
        return [replace(c, sampler_logprobs=row) for c, row in zip(written, told, strict=True)]

    return sample


def top(k):
    return lambda logprobs: torch.where(logprobs >= logprobs.topk(k).values[:, -1:], logprobs, -torch.inf).log_softmax(
        -1
    )


WRONG_DRAWS = {
    "greedy": lambda logprobs: (1e4 * logprobs).log_softmax(-1),
    "colder": lambda logprobs: (1.5 * logprobs).log_softmax(-1),
    "warmer": lambda logprobs: (0.7 * logprobs).log_softmax(-1),
    "top 20 of 101": top(20),
}


@pytest.mark.parametrize("name", WRONG_DRAWS)
def test_tokens_drawn_from_another_distribution_are_told_within_a_few_steps(name, tiny_config):
    policy, engine = build_engine(tiny_config(max_completion_tokens=23))
    looker, wrong = Audit(policy, engine.canary.noise), Wrong(engine, sample=drawn_from(WRONG_DRAWS[name]))
    with pytest.raises(UserError, match="not drawn from the policy"):
        for step in range(60):
            looker(rollout(wrong, prompts(), 2, seed=step), step)


@pytest.mark.parametrize(
    ("name", "temperature", "steps"),
    [pytest.param("qwen3", 1.0, 50, marks=pytest.mark.slow), ("qwen3", 0.3, 20), ("gpt2", 0.8, 10)],
)
def test_silent_over_many_honest_steps_and_resumed_where_it_was(name, temperature, steps, tiny_config, monkeypatch):
    monkeypatch.setattr(audit, "WINDOW", 40)
    policy, engine = build_engine(tiny_config(name, temperature=temperature, max_completion_tokens=23))
    looker = Audit(policy, engine.canary.noise)
    ranks = [looker(rollout(engine, prompts(2), 2, seed), seed)["mismatch/rank"] for seed in range(steps)]
    assert abs(np.mean(ranks) - 0.5) < 0.06
    resumed = Audit(policy, engine.canary.noise, looker.state())
    groups = rollout(engine, prompts(2), 2, seed=steps)
    assert resumed(groups, steps) == looker(groups, steps)
    assert resumed.state() == looker.state()
    assert len(looker.state()) == min(40, steps + 1)


def test_ranks_are_those_of_the_distribution_written_out(tiny_config, groups):
    """Against float64 softmax of transformers' own logits, for one sequence."""
    import transformers

    from grpo.packing import lay_out

    config = tiny_config(temperature=0.7)
    policy = build_policy(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model).eval()
    batch = lay_out([(groups[0], [2])], lambda length: 0.0, policy.device)
    draws = torch.rand(13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logprobs, ranks, doubts = policy.ranks(batch, draws)
    prompt, tokens = groups[0].prompt.tokens, groups[0].completions[2].tokens
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
    p = (logits / 0.7).softmax(-1)
    for t, token in enumerate(tokens):
        own = p[t, token]
        expected = p[t][p[t] > own].sum() + draws[t] * own
        assert float(ranks[t]) == pytest.approx(float(expected), abs=1e-5)
        assert float(logprobs[t]) == pytest.approx(float(own.log()), abs=1e-5)
        assert float(doubts[t]) == pytest.approx(float(1 - p[t].max()), abs=1e-5)
