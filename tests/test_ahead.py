"""Rollouts a step ahead of the update (--staleness 1), in whole runs on a small server (fake_server.py) that notes by
which adapter it has written what."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
from fake_server import FakeServer
from test_ranks import LETTERS, REWARDS, adapter, lines
from test_server_run import server  # noqa: F401
from toy_task import SMALL, TASK

from grpo.ahead import Ahead
from grpo.config import Config
from grpo.errors import UserError
from grpo.run import main
from grpo.stream import Stream

AHEAD = ["--steps", "5", "--save-every", "1", "--keep", "9", "--eval-every", "2", "--staleness", "1"]


@pytest.fixture
def flags(server, tmp_path):  # noqa: F811
    task = tmp_path / "toy.py"
    task.write_text(TASK.format(rewards=REWARDS, extra=LETTERS))
    return [str(task), *SMALL, *AHEAD, "--engine", "server", "--servers", server.url, "--servers-patience", "2"]


@pytest.fixture
def wrote(server):  # noqa: F811
    """seed of a completion -> the version of the adapter that the server has written it by, last."""
    versions = {}

    def note(fake):
        _, seed = fake.sampled[-1]
        versions[seed] = int(re.search(r"-v(\d+)-", fake.present)[1])

    server.after.append(note)
    return versions


def test_a_stream_shows_what_comes_without_handing_it_out():
    stream = Stream(list(range(5)), seed=3, cursor=3)
    comes = stream.peek(4)
    assert (stream.cursor, stream.take(4), stream.cursor) == (3, comes, 7)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(engine="torch"), "engine torch samples in this process"),
        ({}, "engine auto samples in this process"),
        (dict(engine="server", servers=("http://a:1",), correction="none"), "correction none"),
        (dict(engine="server", servers=("http://a:1",), method="sft"), "method sft"),
        (dict(engine="server", servers=("http://a:1",), staleness=2), "staleness"),
    ],
)
def test_where_nobody_can_sample_meanwhile_it_is_refused(given, told):
    with pytest.raises(UserError, match=told):
        Config(**(dict(staleness=1) | given))


def ages(folder):
    return {
        record["step"]: record["rollout/age"] for record in lines(folder, "metrics.jsonl") if "rollout/age" in record
    }


def check_versions(folder, wrote):
    """Each step was written by the adapter before the last update, and says so."""
    completions = lines(folder, "completions.jsonl")
    assert len({(record["step"], record["prompt"], record["member"]) for record in completions}) == len(completions)
    for record in completions:
        assert record["policy_version"] == max(0, record["step"] - 1) == wrote[record["seed"]]
    for record in lines(folder, "held_out.jsonl"):
        assert record["policy_version"] == record["step"]
    assert ages(folder) == {step: float(step > 0) for step in range(5)}


def check_same(one, other):
    for name, tensor in adapter(one, 5).items():
        assert torch.equal(tensor, adapter(other, 5)[name]), name
    for name in ("completions.jsonl", "held_out.jsonl", "prompts.jsonl"):
        assert lines(one, name) == lines(other, name)


@pytest.mark.slow
def test_a_step_is_written_by_the_adapter_before_the_last_update_and_goes_on_to_the_bit(flags, wrote, server, tmp_path):  # noqa: F811
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*flags, "--run-dir", str(whole)]) == 0
    check_versions(whole, wrote)
    assert not server.names()
    asked = len(server.sampled)
    # From each checkpoint on, of the same run: what was there already is not asked for again.
    assert main([*flags, "--run-dir", str(parts), "--steps", "5"]) == 0
    for step in (1, 3):
        before = len(server.sampled)
        assert main(["--resume", str(parts / "checkpoints" / f"step-{step:06d}")]) == 0
        check_same(whole, parts)
        assert len(server.sampled) - before < asked
    check_versions(parts, wrote)


@pytest.mark.slow
def test_what_dynamic_sampling_asks_for_is_of_the_present_adapter(flags, wrote, tmp_path):
    more = ["--dynamic-sampling", "--max-refills", "2", "--advantage", "lite_ppo"]
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{seldom: 1.0, says: 1.0}", extra=LETTERS))
    assert main([*flags, *more, "--run-dir", str(tmp_path / "run")]) == 0
    found = {(r["step"], r["policy_version"]) for r in lines(tmp_path / "run", "completions.jsonl")}
    assert all(version in (step, max(0, step - 1)) for step, version in found)
    assert all(r["policy_version"] == wrote[r["seed"]] for r in lines(tmp_path / "run", "completions.jsonl"))


KILLED = """
import sys
from grpo.run import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_while_a_rollout_is_under_way_loses_nothing(number, flags, wrote, server, tmp_path):  # noqa: F811
    """The server holds back an answer of the step after the second, until the run has been ended in its update."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([*flags, "--run-dir", str(whole)]) == 0
    held = threading.Event()

    def holds_back(fake):
        if "-v2-" in fake.present and not held.is_set():
            held.set()
            fake.goes_on.clear()

    server.after.append(holds_back)
    process = subprocess.Popen([sys.executable, "-c", KILLED, *flags, "--run-dir", str(run)], env=os.environ)
    held.wait(120)
    process.send_signal(number)
    if number == signal.SIGINT:
        process.send_signal(number)
    server.after.remove(holds_back)
    server.goes_on.set()
    assert process.wait(60) != 0
    assert main(["--resume", str(run)]) == 0
    check_same(whole, run)
    check_versions(run, wrote)


def test_groups_that_go_with_another_run_are_left(tmp_path):
    config = Config(engine="server", servers=("http://a:1",), staleness=1, prompts_per_step=1, group_size=2)

    class Asked:
        tokens = (1, 2)

    ahead = Ahead(config, None, None, Stream([Asked], 0), None, None)
    groups = [[[[5], [-0.1], "f", "stop", 3, 7], [[6, 7], [-0.2, -1 / 3], "g\ud800", "length", 3, 8]]]
    state = {"key": ahead.key(), "read": [0.1, 0.2, 0.3], "seconds": 1.5, "completions": groups}
    ahead.restore(json.loads(json.dumps(state)))
    assert ahead.state() == state
    ahead.ready = None
    for other in ({}, state | {"key": "another"}):
        ahead.restore(other)
        assert ahead.state() == {}


assert FakeServer
