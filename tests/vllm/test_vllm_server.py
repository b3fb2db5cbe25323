"""Rollouts on a real `vllm serve`, by its CPU build: one process of it serves the embedded model for all of these."""

import json
import os
import urllib.request
from dataclasses import replace

import pytest
import torch
from real_server import AS_IT_MUST_BE, KEY, LONGEST
from tiny_engines import batch_of, contexts, learn, prompts, rollout, surprise_z, tokens_of
from tiny_models import randomise
from toy_task import SMALL, TASK

from grpo.build import build_policy
from grpo.config import Config
from grpo.errors import UserError
from grpo.policy import load_tokenizer
from grpo.rollout.server import ServerEngine
from grpo.rollout.torch_engine import TorchEngine
from grpo.run import main

FLOAT32 = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("GRPO_SERVER_KEY", KEY)


def settings(url):
    return Config(model="embedded", base="float32", device="cpu", engine="server", servers=(url,), lora_rank=4,
                  temperature=0.8, max_completion_tokens=23, mask_truncated=False, threads=1)  # fmt: skip


@pytest.fixture(scope="module")
def built(url):
    """A policy with a random adapter, and the engine on the server."""
    os.environ["GRPO_SERVER_KEY"] = KEY
    config = settings(url)
    policy = build_policy(config, load_tokenizer(config.model), LONGEST)
    randomise(policy, size=0.05)
    engine = ServerEngine(policy, load_tokenizer(config.model), contexts(prompts()), config, LONGEST)
    yield policy, engine, config
    engine.close()


def adapters(url):
    asked = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asked) as answer:
        return [card["id"] for card in json.load(answer)["data"] if card["parent"]]


def test_what_is_sampled_has_the_policys_log_probabilities_version_after_version(built, url):
    policy, engine, config = built
    seen = []
    for version in range(3):
        groups = rollout(engine, prompts(), 4, seed=7)
        batch = batch_of(groups, config)
        by_policy = policy.logprobs(batch)[0][batch.mask]
        torch.testing.assert_close(batch.sampler_logprobs[batch.mask], by_policy, **FLOAT32)
        rows = engine.logprobs([g.prompt.tokens for g in groups for _ in g.completions], tokens_of(groups))
        torch.testing.assert_close(torch.tensor([p for row in rows for p in row]), by_policy, **FLOAT32)
        assert tokens_of(groups) not in seen
        seen.append(tokens_of(groups))
        [name] = adapters(url)
        assert f"-v{policy.version}-" in name
        learn(policy, 20 + version, size=0.05)
        metrics = engine.sync()
        assert metrics["sync/gap"] < 1e-4 < metrics["sync/moved"]


def test_greedy_tokens_are_those_of_the_torch_engine(built):
    policy, engine, config = built
    own = TorchEngine(policy, engine.tokenizer, contexts(prompts()), config.temperature)
    own.temperature = 1e-4  # it knows no 0, which is vLLM's greedy
    sampling, engine.sampling = engine.sampling, replace(engine.sampling, temperature=0.0)
    try:
        assert tokens_of(rollout(engine, prompts(), 1, seed=0)) == tokens_of(rollout(own, prompts(), 1, seed=0))
    finally:
        engine.sampling = sampling


def test_tokens_are_drawn_from_the_policy(built):
    policy, engine, config = built
    assert abs(surprise_z(rollout(engine, prompts(), 32, seed=3), policy, config)) < 4


def test_the_reference_policy_is_the_servers_base_model(built, url):
    policy, engine, config = built
    with policy.store.reference():
        engine.take_up()
        batch = batch_of(rollout(engine, prompts(), 2, seed=5), config)
        reference = policy.logprobs(batch)[0]
    torch.testing.assert_close(batch.sampler_logprobs, reference, **FLOAT32)
    engine.sync()


def test_three_steps_of_training(url, tmp_path, capsys):
    task, folder = tmp_path / "toy.py", tmp_path / "run"
    task.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    before = adapters(url)
    flags = [*SMALL, "--engine", "server", "--servers", url, "--steps", "3", "--run-dir", str(folder)]
    assert main([str(task), *flags]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "sync/gap" in line]
    assert len(steps) == 3
    assert all(step["sync/gap"] < 1e-4 and step["sync/moved"] > 0 and abs(step["mismatch/kl"]) < 1e-5 for step in steps)
    assert adapters(url) == before
    assert f"engine: vLLM 0.32.0, at {url}" in capsys.readouterr().out
    written = "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())
    assert KEY not in written
    assert main(["--eval", str(folder)]) == 0
    assert adapters(url) == before


def test_raw_log_probabilities_are_found_out(serve):
    raw = serve(*AS_IT_MUST_BE, "--logprobs-mode", "raw_logprobs").url
    config = settings(raw)
    policy = build_policy(config, load_tokenizer(config.model), LONGEST)
    with pytest.raises(UserError, match=f"{raw} tells other log-probabilities than it samples by"):
        ServerEngine(policy, load_tokenizer(config.model), contexts(prompts()), config, LONGEST)
