"""python -m grpo.doctor: what it says of a machine and of a task is what a run there would do; whatever is broken is a
finding in a sentence, never a traceback."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from packaging.specifiers import SpecifierSet
from test_pins import PROJECT
from tiny_models import FUSED, GENERIC
from toy_task import TASK

from grpo.config import Config
from grpo.doctor import choice
from grpo.doctor.__main__ import lines_of, main
from grpo.doctor.findings import Finding, ordered
from grpo.doctor.machine import Hub, cards, look_at_disk, look_at_gpu
from grpo.doctor.trial import Trial
from grpo.doctor.versions import TESTED, requirements_of
from grpo.policy import load_model

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
GOOD = TASK.format(rewards="{letters: 1.0, says: 1.0}", extra="")


def examined(capsys, *words):
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def of(said, subject):
    return [each for each in said["findings"] if each["subject"] == subject]


def in_a_process(folder, *words, packages=None):
    """The command in an empty folder, with packages that come before the installed ones."""
    paths = [str(packages)] if packages else []
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "grpo.doctor", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def package(folder, name, source, version="1.0", requires=()):
    """A package as pip leaves it."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {each}" for each in requires)]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, "", ""]))
    return folder


# ---- what a run would do


@pytest.mark.parametrize("name", [*FUSED, *GENERIC])
def test_how_layers_are_run_is_what_loading_says(checkpoint, name):
    config = Config(model=checkpoint(name), base="float32", device="cpu")
    told = []
    load_model(config, CPU, 64, note=told.append)
    findings, _ = choice.look_at_model(config, CPU)
    [layers] = [each for each in findings if each.subject == "layers"]
    [loaded] = [each for each in told if each.startswith("layers: ")]
    assert loaded[loaded.index("(") :] == layers.told[layers.told.index("(") : -1]  # which class, or why not
    assert (layers.weight == "fine") == (name in FUSED) == loaded.startswith("layers: fused")


def test_the_sizes_are_the_checkpoint_s(checkpoint):
    from safetensors.torch import load_file

    folder = Path(checkpoint("llama"))
    weights = load_file(folder / "model.safetensors")
    linears = {name for name in weights if name.endswith("proj.weight")}
    _, sizes = choice.look_at_model(Config(model=str(folder), base="float32", device="cpu"), CPU)
    assert sizes and sizes.linears == sum(weights[name].numel() for name in linears)
    assert sizes.linears + sizes.others == sum(each.numel() for each in weights.values())
    assert sizes.of_adapter == sum(sum(weights[name].shape) for name in linears)


def test_a_task_that_would_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(GOOD)
    code, said = examined(capsys, "toy.py")
    assert code == 0 and said["would_start"]
    assert said["chosen"] == {
        "model": "embedded", "base": "float32", "device": "cpu", "engine": "torch", "data": "embedded",
    }  # fmt: skip
    assert "org/does-not-exist" in of(said, "task")[0]["told"] and of(said, "task")[0]["remedy"]
    weights = [each["weight"] for each in said["findings"]]
    assert weights == sorted(weights, key=["stops", "hinders", "note", "fine"].index)
    assert not list(tmp_path.glob("runs*")), "it writes nothing"


@pytest.mark.parametrize(
    "source, words, told",
    [
        (GOOD + "\nnothing.there", (), "raised NameError"),
        ("task = 3", (), "must define `task = Task(...)`"),
        ("def f(:", (), "is not Python"),
        ("raise SystemExit(0)", (), "SystemExit"),
        (GOOD, ("--data", "gone.jsonl"), "There is no file or folder gone.jsonl"),
        (GOOD, ("--model", "gone/model"), "neither a folder here nor to be had from the hub"),
        (GOOD, ("--engine", "vllm", "--base", "float32"), "vLLM"),
        (GOOD, ("--group-size", "1"), "group_size is 1"),
        (GOOD, ("--adapter", "gone/adapter"), "The adapter gone/adapter"),
    ],
)
def test_what_stops_a_run_is_a_finding(tmp_path, monkeypatch, capsys, source, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(source)
    code, said = examined(capsys, "toy.py", *words)
    assert code == 1 and not said["would_start"]
    assert said["findings"][0]["weight"] == "stops"
    assert any(told in each["told"] for each in said["findings"] if each["weight"] == "stops"), said["findings"][0]


@pytest.mark.parametrize(
    "words, told",
    [
        (["gone.py"], "There is no task file gone.py"),
        (["--nonsense"], "There is no flag --nonsense"),
        (["gsm8k", "--resume", "x"], "--resume is of grpo.run"),
        (["--model", "x"], "give the task too"),
        (["a\0b"], "There is no task file"),
    ],
)
def test_bad_input(capsys, words, told):
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_a_damaged_model_is_told_and_a_quantised_one_of_another_kind(tmp_path, checkpoint):
    import shutil

    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}}))
    findings, _ = choice.look_at_model(Config(model=str(folder), base="bf16"), CPU)
    assert findings[0].weight == "stops" and "quantised by gptq" in findings[0].told
    (folder / "config.json").write_text("{")
    findings, _ = choice.look_at_model(Config(model=str(folder), base="bf16"), CPU)
    assert findings[0].weight == "stops" and "cannot be loaded" in findings[0].told


# ---- machines that are not as they should be


def test_a_torch_that_cannot_be_imported(tmp_path):
    packages = package(tmp_path / "packages", "torch", "raise OSError('libcudart.so.13: cannot open')", "2.10.0")
    (tmp_path / "toy.py").write_text(GOOD + "\nnothing.there")
    done = in_a_process(tmp_path, "toy.py", packages=packages)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "libcudart.so.13" in done.stdout and "torch is 2.10.0, and grpo " in done.stdout
    assert "NameError" in done.stdout, "the task file is looked at all the same"


@pytest.mark.parametrize(
    "source, told",
    [
        ("import os; os._exit(3)", "ended the process (exit code 3)"),
        pytest.param("raise ImportError('undefined symbol: _ZN2at')", "undefined symbol", marks=pytest.mark.slow),
        pytest.param("raise SystemExit", "cannot be imported", marks=pytest.mark.slow),
    ],
)
def test_a_vllm_that_is_broken_is_tried_apart(tmp_path, monkeypatch, source, told):
    packages = package(tmp_path, "vllm", source)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]))
    found = Trial("cuda").finding()
    assert found.weight == "stops" and told in found.told and "--engine torch" in found.remedy
    assert "vllm" not in sys.modules


def test_a_vllm_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    packages = package(tmp_path, "vllm", "import threading; threading.Event().wait()")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]))
    trial = Trial("cuda", seconds=0.5)
    assert "not imported within 0.5 s" in trial.finding().told and trial.process.returncode is not None


def test_a_vllm_that_is_made_for_another_torch(tmp_path):
    packages = package(tmp_path / "packages", "vllm", "", "0.26.0", ["torch==2.11.0", "bitsandbytes>=0.1; extra=='x'"])
    done = in_a_process(tmp_path, "--json", packages=packages)
    told = [each["told"] for each in of(json.loads(done.stdout), "versions")]
    assert any("vllm 0.26.0 is for torch ==2.11.0" in each for each in told), told
    assert done.returncode == 0, "PyTorch's engine does without"


def test_an_empty_folder_and_no_task(tmp_path):
    done = in_a_process(tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("A run would start") and not done.stderr


class Card:
    """What torch says of CUDA: a stand-in for machines that this is not."""

    __version__ = "2.13.0"

    class version:
        cuda = None

    class cuda:
        @staticmethod
        def is_available():
            return False


def test_a_gpu_that_torch_does_not_see(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, 8.9, 24564, 24000, 550.54'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    [card] = cards()
    assert (card.name, card.capability, card.driver) == ("NVIDIA GeForce RTX 4090", "8.9", "550.54")
    assert abs(card.total - 23.99) < 0.01
    [found] = look_at_gpu(Card, [card])
    assert "RTX 4090" in found.told and "built without CUDA" in found.told and found.remedy
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert cards() == [] and "no NVIDIA GPU" in look_at_gpu(Card, [])[0].told


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    assert look_at_disk(tmp_path / "file" / "runs")[0].weight == "stops"
    assert look_at_disk(tmp_path / "not" / "there")[0].weight == "fine"
    assert look_at_disk(tmp_path, needed=2**60)[0].weight == "hinders"


class _Answering(BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("status, weight", [(200, "fine"), (403, "fine"), (502, "note")])
def test_the_hub_is_asked(monkeypatch, status, weight):
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (_Answering,), {"status": status}))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "*")
    found = Hub().finding()
    server.shutdown()
    server.server_close()
    assert found.weight == weight
    assert weight == "fine" or "502" in found.told


def test_a_hub_that_is_not_there_is_no_fault(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    assert Hub().finding().weight == "note"
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    assert Hub().finding().weight == "note"


# ---- what is said


def test_what_was_tested_is_allowed():
    asked = {each.requirement.name: each.requirement.specifier for each in requirements_of("grpo")}
    for row in TESTED:
        assert SpecifierSet(PROJECT["requires-python"]).contains(row["python"])
        for name in asked.keys() & row.keys():
            assert asked[name].contains(row[name]), (name, row[name])
    assert {"torch", "transformers", "vllm", "bitsandbytes"} <= asked.keys()


def test_the_lines_say_the_heaviest_first_and_no_control_codes(capsys):
    findings = [Finding("fine", "disk", "room"), Finding("stops", "task", "\x1b[31mred", "mend it")]
    assert [each.weight for each in ordered(findings)] == ["stops", "fine"]
    lines = lines_of(findings)
    assert lines[0] == "A run would not start: 1 to mend." and lines[1].startswith("STOPS") and "mend it" in lines[2]
    assert main(["\x1b[31mred.py"]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the document shows a machine without a GPU")
def test_the_document_shows_what_is_printed(monkeypatch, capsys, tmp_path):
    """Line by line, but for what differs from machine to machine."""
    page = (ROOT / "docs" / "doctor.md").read_text()
    shown = page.split("<!-- output begin -->")[1].split("<!-- output end -->")[0].strip().strip("`").strip()
    monkeypatch.chdir(tmp_path)
    assert main(["gsm8k"]) == 0
    printed = capsys.readouterr().out
    fixed = {"task", "data", "engine", "kernels", "layers", "memory"}
    kept = [line for line in shown.splitlines() if line.startswith("fine") and line.split()[1] in fixed]
    assert len(kept) >= len(fixed)
    for line in kept:
        assert line.replace("/home/you/grpo", str(ROOT)) in printed, line
