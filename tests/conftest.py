"""Fixtures: tiny random models of several architectures, written as checkpoints, and groups of random completions."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite needs no network and must not wait for one
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: as many processes as cores, so each has one
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import shutil
import sys
from collections import Counter

import grpo_kernels.dispatch  # noqa: F401  # before another package imports Triton, which then could not interpret kernels
import pytest
import torch
from tiny_models import FUSED, GENERIC, MIXTURES, VOCABULARY, write_checkpoint
from toy_task import SMALL, TASK

from grpo.config import Config
from grpo.rewards.staff import num_cores
from grpo.types import Completion, Group, Prompt

# Files whose few tests take minutes. What begins last should be short, or one process works on alone.
LONG = (
    "test_portability",  # kernels compiled for one GPU after the other
    # Of several processes each, and others in between.
    *("test_ranks_end", "test_notebook", "test_docs_code", "test_chat_terminal", "test_ranks_sharded", "test_wheel"),
    *("test_ranks", "test_failures", "test_server_run", "test_guards", "test_hosts", "test_benchmarks"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """With `-n`, the tests of a file stay together: what they share is made once."""
    if getattr(config.option, "numprocesses", None):
        config.option.dist = "loadfile" if config.option.dist == "no" else config.option.dist
        config.option.loadscopereorder = False  # the order is ours


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Whole files: the long ones, then those of many tests."""
    counts = Counter(item.path.stem for item in items)
    order = {stem: place for place, stem in enumerate(LONG)}
    items.sort(key=lambda item: (order.get(item.path.stem, len(LONG)), -counts[item.path.stem], item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """`-n auto`: a process a core, of 2 GiB each; what is made once a process makes more than these few slow. The slow
    tests wait for other processes as often as they compute: one more."""
    return min(8, num_cores()) + (config.option.markexpr == "slow")


@pytest.fixture(autouse=True, scope="module")
def what_is_imported_is_no_garbage():
    """Each model that is loaded collects garbage, which takes half a second among all that the libraries hold."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def path_as_before():
    """A task file's folder is on the path of the process that loads it: not on that of the tests after it."""
    before = sys.path[:]
    yield
    sys.path[:] = before


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """name of an architecture -> folder of its checkpoint, written once."""
    written = {}

    def folder(name):
        if name not in written:
            path = tmp_path_factory.mktemp(name)
            written[name] = str(write_checkpoint(path, (FUSED | GENERIC | MIXTURES)[name](), vary_norms=True))
        return written[name]

    return folder


@pytest.fixture
def tiny_config(checkpoint):
    """A Config over a tiny checkpoint; keyword arguments override."""

    def build(name="qwen3", **overrides):
        defaults = dict(model=checkpoint(name), base="float32", device="cpu", lora_rank=3, lora_alpha=6.0)
        return Config(**(defaults | overrides))

    return build


@pytest.fixture
def groups():
    """Three groups of random completions, of odd and unequal lengths, one token among them."""
    generator = torch.Generator().manual_seed(5)

    def random_tokens(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    def completion(length):
        sampler = (torch.randn(length, generator=generator) * 0.3 - 4.0).tolist()
        return Completion(random_tokens(length), sampler, "", "stop", 0)

    lengths = [(7, (5, 1, 13)), (1, (3, 3, 2)), (12, (9, 4, 6))]
    made = []
    for index, (prompt, completions) in enumerate(lengths):
        group = Group(Prompt(index, "", random_tokens(prompt), {}), [completion(n) for n in completions])
        group.rewards = torch.randn(3, generator=generator)
        group.advantages = torch.randn(3, generator=generator)
        made.append(group)
    return made


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run of the toy task: four steps, checkpoints after the second and the fourth. Only to be read."""
    from grpo.run import main

    folder = tmp_path_factory.mktemp("trained")
    (folder / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    flags = [*SMALL, "--steps", "4", "--save-every", "2", "--run-dir", str(folder / "run")]
    assert main([str(folder / "toy.py"), *flags]) == 0
    return folder / "run"


@pytest.fixture
def toy_run(trained, tmp_path):
    """A copy of that run, to be gone on with or damaged."""
    return shutil.copytree(trained, tmp_path / "run")
