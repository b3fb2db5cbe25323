"""The wheel by itself, in an empty folder: what ships in it is all that the first commands need."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUICK = """--steps 1 --prompts-per-step 2 --group-size 2 --max-completion-tokens 8 --eval-prompts 2 --eval-samples 1
--eval-k 1 --threads 1 --run-dir first""".split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's file, built from a copy of the sources: a build leaves its traces beside them."""
    source, out = tmp_path_factory.mktemp("source") / "grpo", tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True)  # fmt: skip
    if tracked.returncode:
        pytest.skip("this is no clone, so nothing says which files are the package's")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("docs/", "tests/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(build, check=True)
    return next(out.glob("grpo-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """command -> what it printed, in an empty folder, with the package of the wheel and no other."""
    place, folder = tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("empty")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(place),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*words):
        made = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-3000:]
        return made.stdout

    assert str(place) in run("-c", "import grpo, grpo_kernels; print(grpo.__file__, grpo_kernels.__file__)")
    return run, place, folder


@pytest.mark.slow
def test_what_ships(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"grpo/tasks/gsm8k.py", "grpo/embedded/model/model.safetensors", "grpo/report/page.html"} <= names
    assert {"grpo_kernels/nf4.py", "grpo/__main__.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "benchmarks", "kernels/"))]


@pytest.mark.slow
def test_the_first_commands_of_a_newcomer(installed):
    run, place, folder = installed
    assert "EMBEDDED DEFAULT" in run("-m", "grpo.run", "gsm8k", *QUICK)
    assert (folder / "first" / "report.html").stat().st_size > 10_000
    assert "held-out prompts" in run("-m", "grpo.run", "--eval", "first", "--eval-prompts", "2")
    assert "page.html" in run("-m", "grpo.report", "first", "--out", "page.html")
    assert "trained" in run("-m", "grpo.chat", "first", "--prompt", "2 + 2?", "--temperature", "0")
    run("-m", "grpo.export", "first", "--to", "adapter")
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    script = place / "bin" / "grpo"
    assert "grpo chat RUN" in run(str(script), "--help")
    assert "would start" in run(str(script), "doctor")
    assert "correctness" in run(str(script), "rewards")
