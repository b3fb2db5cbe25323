"""Whole runs with `--engine server` on a small server (fake_server.py), whose draws are those of the torch engine."""

import json

import pytest
from fake_server import embedded_server
from several import run_ranks
from toy_task import SMALL, TASK

from grpo.doctor.__main__ import main as doctor
from grpo.run import main

# A server samples each completion, and reads each token of its canary, by itself.
SERVED = [*SMALL, "--max-completion-tokens", "4", "--eval-prompts", "2"]


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    return str(path)


@pytest.fixture
def server():
    """A fake server of the embedded model."""
    with embedded_server("float32") as fake:
        yield fake


def said(folder):
    return [
        [record[name] for name in ("step", "prompt", "member", "text", "reward")]
        for record in map(json.loads, (folder / "completions.jsonl").read_text().splitlines())
    ]


@pytest.mark.slow
def test_a_run_whose_server_dies_ends_saved_and_goes_on_with_another_one(toy, server, tmp_path, capsys):
    flags = [toy, *SERVED, "--steps", "4", "--save-every", "1"]
    theirs, ours = tmp_path / "torch", tmp_path / "server"
    assert main([*flags, "--engine", "torch", "--run-dir", str(theirs)]) == 0
    steps = []

    def dies_in_the_third(fake):
        steps.append(fake.present)
        if len(set(steps)) == 3:
            fake.die()

    server.after.append(dies_in_the_third)
    servers = ["--engine", "server", "--servers", server.url, "--servers-patience", "1"]
    assert main([*flags, *servers, "--run-dir", str(ours)]) == 2
    told = capsys.readouterr()
    assert f"engine: vLLM 0.32.0, at {server.url}" in told.out
    assert "No rollout server has answered" in told.err and f"--resume {ours}" in told.err
    server.after.clear()
    server.start()
    assert main(["--resume", str(ours)]) == 0
    assert said(ours) == said(theirs)
    assert not server.names()
    assert main(["--eval", str(ours)]) == 0
    assert not server.names()


KINDS = """
def kinds(completion):
    return len(set(completion)) / 10
"""


@pytest.mark.slow
def test_two_processes_on_a_server_sample_what_one_does(server, tmp_path):
    """Each has an adapter of its own there, and takes it away."""
    task = tmp_path / "toy.py"
    task.write_text(TASK.format(rewards="{kinds: 1.0, says: 1.0}", extra=KINDS))
    flags = [str(task), *SERVED, "--steps", "3"]
    assert main([*flags, "--engine", "torch", "--run-dir", str(tmp_path / "one")]) == 0
    flags += ["--engine", "server", "--servers", server.url, "--run-dir", "two"]
    codes, logs = run_ranks(2, tmp_path, flags, seconds=300)
    assert codes == [0, 0], logs
    assert said(tmp_path / "two") == said(tmp_path / "one")
    assert len(set(server.loads)) == 2 * 4, "of each process an adapter before the first step, and one after each"
    assert not server.names()


@pytest.mark.slow
def test_the_doctor_looks_for_the_servers(toy, server, capsys):
    flags = [toy, "--json", "--engine", "server", "--servers", server.url]
    doctor(flags)
    seen = json.loads(capsys.readouterr().out)
    assert seen["chosen"]["engine"] == "server"
    assert not [each for each in seen["findings"] if each["subject"] == "servers"]
    server.die()
    assert doctor(flags) != 0
    seen = json.loads(capsys.readouterr().out)
    [found] = [each for each in seen["findings"] if each["subject"] == "servers"]
    assert found["weight"] == "stops" and server.url in found["told"]
