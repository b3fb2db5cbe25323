"""Rollouts a step ahead of the update (--staleness 1) on a real `vllm serve`, behind a relay that notes what was asked:
what is learnt from completions of an older policy, against transformers and PEFT in float64."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch
from peft import PeftModel
from real_server import AS_IT_MUST_BE, KEY, PROCESSED
from relay import LOAD, RESTART, Passed, Relay
from test_ranks import LETTERS, REWARDS, adapter, lines
from toy_task import SMALL, TASK
from transformers import AutoModelForCausalLM

from grpo.policy.load import model_source
from grpo.run import main

STEPS = 5
# Some ratios of a step of this size are above the cap of the correction.
AHEAD = [*SMALL, "--steps", str(STEPS), "--save-every", "1", "--keep", "9", "--eval-every", "2", "--staleness", "1",
         "--learning-rate", "1e-2", "--engine", "server"]  # fmt: skip
CAP = 2.0  # --correction-cap
NUMERICS = 1e-4  # of vLLM's float32 log-probabilities


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("GRPO_SERVER_KEY", KEY)


@pytest.fixture
def relay(url):
    relay = Relay(url)
    yield relay
    relay.close()


@pytest.fixture(scope="module")
def whole(url, tmp_path_factory):
    """A run that nothing happens to, and the relay that it went through."""
    os.environ["GRPO_SERVER_KEY"] = KEY
    relay, folder = Relay(url), tmp_path_factory.mktemp("whole")
    assert main([write_task(folder), *AHEAD, "--servers", relay.url, "--run-dir", str(folder / "run")]) == 0
    yield folder / "run", relay
    relay.close()


def write_task(folder, rewards=REWARDS):
    path = folder / "toy.py"
    path.write_text(TASK.format(rewards=rewards, extra=LETTERS))
    return str(path)


def version_at(folder, step):
    """Of the policy that this step trains."""
    if step == 0:
        return 0
    return json.loads((folder / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())["progress"]["version"]


def policy_at(folder, step):
    """The policy that this step trains, in float64 by PEFT."""
    base = AutoModelForCausalLM.from_pretrained(model_source("embedded"), dtype=torch.float64)
    if step == 0:  # no adapter does anything yet
        return base
    return PeftModel.from_pretrained(base, str(folder / "checkpoints" / f"step-{step:06d}"), is_trainable=True)


def read(model, written):
    """log p [T] of a completion."""
    tokens = written.choice["token_ids"]
    logits = model(input_ids=torch.tensor([written.prompt + tokens])).logits[0, len(written.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def check_who_wrote_what(folder, relays):
    """Each completion of the run was written once, by the adapter of the version that it says, and a server never had
    more than two adapters of a process, and has none in the end."""
    written = {(each.seed, each.version): each for relay in relays for each in relay.rollouts()}
    records = [*lines(folder, "completions.jsonl"), *lines(folder, "held_out.jsonl")]
    assert {(record["seed"], record["policy_version"]) for record in records} <= written.keys()
    for relay in relays:
        for names in relay.adapters():
            assert max(Counter(name.split("-")[1] for name in names).values(), default=0) <= 2
        assert relay.adapters()[-1] == []
    return written


def check_steps(folder, relays):
    """Every step's numbers follow from what went over the wire, by the formulas in float64."""
    written = check_who_wrote_what(folder, relays)
    metrics = {record["step"]: record for record in lines(folder, "metrics.jsonl") if "rollout/age" in record}
    policies = [policy_at(folder, step) for step in range(len(metrics))]
    versions = [version_at(folder, step) for step in range(len(metrics))]
    for step, told in metrics.items():
        records = [record for record in lines(folder, "completions.jsonl") if record["step"] == step]
        assert told["rollout/age"] == sum(versions[step] - r["policy_version"] for r in records) / len(records)
        sampled_by = policies[versions.index(records[0]["policy_version"])]
        wire = [written[record["seed"], record["policy_version"]] for record in records]
        q = [torch.tensor(each.choice["logprobs"]["token_logprobs"]).double() for each in wire]
        with torch.no_grad():
            torch.testing.assert_close(read(sampled_by, wire[0]), q[0], atol=NUMERICS, rtol=0)
        assert told["sync/gap"] < NUMERICS
        check_update(told, policies[step], records, wire, q)
    return metrics


def check_update(told, policy, records, wire, q):
    """The correction, loss and gradient of GRPO's update."""
    taught = {r["group"] for r in records if r["advantage"]}
    of_step = sum(len(each) for each in q)
    loss, gaps = torch.zeros((), dtype=torch.float64), []
    for record, each, sampler in zip(records, wire, q, strict=True):
        if record["group"] in taught:
            p = read(policy, each)
            gap = p.detach() - sampler
            weight = gap.exp().clamp(max=CAP)
            loss = loss - record["advantage"] * (weight * (p - p.detach()).exp()).sum() / of_step
            gaps.append(gap)
    if not gaps:
        assert told["mismatch/kl"] is None and told["optim/grad_norm"] == 0
        return
    gap = torch.cat(gaps)
    assert told["mismatch/kl"] == pytest.approx(float((gap.exp() - 1 - gap).mean()), rel=1e-3, abs=1e-8)
    assert told["mismatch/gap"] == pytest.approx(float(gap.abs().mean()), rel=1e-3, abs=NUMERICS)
    assert told["mismatch/correction"] == pytest.approx(float(gap.exp().clamp(max=CAP).mean()), abs=NUMERICS)
    assert told["policy/loss"] == pytest.approx(float(loss), abs=NUMERICS)
    if hasattr(policy, "peft_config"):
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
        assert told["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-3)


def check_same(one, other, step=STEPS):
    """Completions to the letter. vLLM's sums depend on what is computed together, so adapters are the same but for
    that: what Adam makes of a gradient of nothing but rounding may be another step."""
    for name in ("completions.jsonl", "held_out.jsonl"):
        texts = [[(r["step"], r["seed"], r["policy_version"], r["text"]) for r in lines(f, name)] for f in (one, other)]
        assert texts[0] == texts[1]
    pairs = [(tensor, adapter(other, step)[name]) for name, tensor in adapter(one, step).items()]
    apart = torch.cat([(mine - theirs).abs().flatten() for mine, theirs in pairs])
    assert (apart > 1e-4).double().mean() < 0.01


def test_what_is_learnt_from_an_older_policys_completions(whole):
    folder, relay = whole
    metrics = check_steps(folder, [relay])
    assert [metrics[step]["rollout/age"] for step in range(STEPS)][:2] == [0, 1]
    assert max(told["mismatch/kl"] or 0 for told in metrics.values()) > 1e-2  # there was something to correct
    assert set(Counter((each.seed, each.version) for each in relay.rollouts()).values()) == {1}


def test_a_run_goes_on_in_the_middle_with_the_groups_that_it_has(whole, tmp_path):
    folder, relay = whole
    parts = tmp_path / "run"
    shutil.copytree(folder, parts)
    asked = len(relay.rollouts())
    assert main(["--resume", str(parts / "checkpoints" / "step-000002")]) == 0
    check_same(folder, parts)
    had = {record["seed"] for record in lines(folder, "completions.jsonl") if record["step"] <= 2}
    assert not had & {each.seed for each in relay.rollouts()[asked:]}


@pytest.mark.parametrize("more", [["--mini-batches", "2"], ["--advantage", "gae"]], ids=["two optimizer steps", "ppo"])
def test_other_updates_say_how_old_their_completions_are(more, relay, tmp_path):
    folder = tmp_path / "run"
    assert main([write_task(tmp_path), *AHEAD, *more, "--servers", relay.url, "--run-dir", str(folder)]) == 0
    check_who_wrote_what(folder, [relay])
    metrics = [record for record in lines(folder, "metrics.jsonl") if "rollout/age" in record]
    ages = [version_at(folder, step) - version_at(folder, max(0, step - 1)) for step in range(STEPS)]
    assert [record["rollout/age"] for record in metrics] == ages
    assert ages[1] == 1 + ("--mini-batches" in more)
    assert metrics[0]["mismatch/kl"] < NUMERICS < metrics[1]["mismatch/kl"]


def test_what_is_asked_for_beside_them_is_of_the_present_policy(relay, tmp_path):
    more, folder = ["--dynamic-sampling", "--max-refills", "2", "--steps", "3"], tmp_path / "run"
    task = write_task(tmp_path, "{seldom: 1.0, says: 1.0}")
    assert main([task, *AHEAD, *more, "--servers", relay.url, "--run-dir", str(folder)]) == 0
    ages = [told["rollout/age"] for told in check_steps(folder, [relay]).values()]
    assert any(0 < age < 1 for age in ages)


def test_two_processes_sample_ahead_what_one_does(whole, relay, tmp_path):
    """Each with adapters of its own, on a server that holds two at a time."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    flags = [write_task(tmp_path), *AHEAD, "--servers", relay.url, "--run-dir", "run"]
    done = subprocess.run([*torchrun, "grpo.run", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_same(whole[0], tmp_path / "run")
    check_who_wrote_what(tmp_path / "run", [relay])
    assert len({each.model.split("-")[1] for each in relay.rollouts()}) == 2


def test_one_of_two_servers_dies_while_the_update_runs_and_comes_back(whole, relay, serve, tmp_path):
    """The second by kill -9, at the first completion that it is asked for beside an update. It is started again while
    the first holds an answer back, until it has the present adapter."""
    server = serve(*AS_IT_MUST_BE, *PROCESSED)
    other, is_back = Relay(server.url), threading.Event()
    death, return_ = iter([True]), iter([True])  # once each, whichever request is the first

    def is_rollout(body, version):
        return version in body.get("model", "") and "stop_token_ids" in body

    def dies(method, path, body):
        if is_rollout(body, "-v1-") and next(death, False):
            server.signal(signal.SIGKILL)
            server.process.wait()
            other.note(Passed(RESTART, {}, 0, b""))
        if path == LOAD and "-v3-" in body["lora_name"]:
            is_back.set()

    def waits(method, path, body):
        if is_rollout(body, "-v3-") and next(return_, False):
            server.start()
            server.wait()
            assert is_back.wait(120)

    other.before, relay.before = dies, waits
    flags = [write_task(tmp_path), *AHEAD, "--servers", relay.url, other.url]
    assert main([*flags, "--run-dir", str(tmp_path / "run")]) == 0
    check_same(whole[0], tmp_path / "run")
    check_who_wrote_what(tmp_path / "run", [relay, other])
    versions = {each.version for each in other.rollouts()}
    assert versions >= {0, 4} and not versions & {1, 2}
    other.close()
