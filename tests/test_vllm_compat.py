"""What `--engine vllm` says where vLLM is missing, broken or made for another device. No vLLM is needed here.

The packages that are called vllm below are folders of a test; each is gone from `sys.modules` afterwards.
"""

import sys
from importlib.machinery import PathFinder

import pytest
import torch
from toy_task import SMALL, TASK

from grpo.rollout import vllm_compat
from grpo.run import main

# Everything that is needed, on a platform that is no CPU.
COMPLETE = {
    "__init__": "LLM = SamplingParams = object",
    "inputs": "TokensPrompt = dict",
    "platforms": "class current_platform:\n    is_cpu = staticmethod(lambda: False)",
    "model_executor/__init__": "",
    "model_executor/layers/__init__": "",
    "model_executor/layers/quantization": "register_quantization_config = print",
    "model_executor/layers/vocab_parallel_embedding": "UnquantizedEmbeddingMethod = object",
    "model_executor/model_loader": "register_model_loader = print",
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """(modules of a package called vllm, version) -> it is what `import vllm` finds until the end of the test."""
    for name in [*vllm_compat.FORCED, *vllm_compat.DEFAULTS]:
        monkeypatch.setenv(name, "")  # so that what is set in the test goes with it
        monkeypatch.delenv(name)

    def write(modules, version="9.9.9"):
        for name, text in modules.items():
            path = tmp_path / "site" / "vllm" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        information = tmp_path / "site" / f"vllm-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path / "site")

    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}
    for name in before:
        del sys.modules[name]
    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.update(before)


def outcome(tmp_path, capsys, *flags):
    """The exit code of a short run, and what it wrote to stderr."""
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    code = main([str(tmp_path / "toy.py"), *SMALL, "--steps", "1", "--run-dir", str(tmp_path / "run"), *flags])
    return code, capsys.readouterr().err


def refused(tmp_path, capsys, *words):
    code, error = outcome(tmp_path, capsys, "--engine", "vllm")
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(vllm_compat.is_installed(), reason="vLLM is installed here")
def test_without_vllm_the_sentence_says_what_to_install(tmp_path, capsys):
    refused(tmp_path, capsys, "not installed", 'pip install "grpo[gpu]"', "0.24 to 0.27", "0.28 to 0.32")


def test_a_folder_called_vllm_is_no_vllm(tmp_path, monkeypatch):
    """Such as a clone of its repository in the working directory, or tests/vllm."""
    (tmp_path / "vllm").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert PathFinder.find_spec("vllm") is not None
    assert not vllm_compat.is_installed()


@pytest.mark.parametrize("name", ["inputs", "model_executor/layers/quantization", "model_executor/model_loader"])
def test_a_version_that_lacks_what_is_needed_is_named_beside_those_that_have_it(name, install, tmp_path, capsys):
    install(COMPLETE | {name: ""}, version="0.19.1")
    refused(tmp_path, capsys, "vLLM 0.19.1", torch.__version__, "0.24 to 0.27", "0.28 to 0.32", "pip install")


def test_a_package_that_cannot_be_loaded_is_told_with_its_own_words(install, tmp_path, capsys):
    """As when it was compiled for another torch."""
    install({"__init__": "raise ImportError('undefined symbol: _ZN3c104cuda')"})
    refused(tmp_path, capsys, "vLLM 9.9.9", "undefined symbol: _ZN3c104cuda")


def test_a_build_for_gpus_is_refused_on_a_cpu(install, tmp_path, capsys):
    install(COMPLETE)
    refused(tmp_path, capsys, "on cpu", "built for GPUs", "--engine torch")


def test_auto_needs_no_vllm_on_a_cpu_even_where_a_broken_one_is_installed(install, tmp_path, capsys):
    install({"__init__": "raise ImportError"})
    assert outcome(tmp_path, capsys, "--engine", "auto", "--device", "cpu")[0] == 0
    assert "vllm" not in sys.modules
