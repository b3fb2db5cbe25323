"""PyTorch's options of a GPU's memory: segments that grow, unless the user or the platform has it otherwise."""

import os
import platform
import sys
from types import SimpleNamespace

import pytest
import torch

from grpo.policy.allocator import VARIABLES, grow_segments, hold_to, let_loose, restore_options


@pytest.fixture
def told(monkeypatch):
    """What PyTorch is told; on a Linux with one of NVIDIA's GPUs, where nobody has set anything."""
    given = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", given.append)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-31-generic")
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # noted by monkeypatch, which takes away what is set later
        monkeypatch.delenv(name)
    return given


def test_segments_grow_and_vllm_finds_it_where_it_looks(told):
    grow_segments()
    assert told == ["expandable_segments:True"]
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    restore_options()
    assert told == ["expandable_segments:True"] * 2


@pytest.mark.parametrize("name", VARIABLES)
def test_a_users_options_stay_and_are_brought_back_whole(name, told, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    grow_segments()
    assert told == [] and [os.environ.get(each) for each in VARIABLES].count(None) == 1
    restore_options()
    assert told == ["max_split_size_mb:512"]


def test_the_variable_that_pytorch_reads_first_is_what_is_brought_back(told, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    restore_options()
    assert told == ["expandable_segments:False"]


@pytest.mark.parametrize(
    "elsewhere",
    [
        lambda patch: patch.setattr(sys, "platform", "win32"),
        lambda patch: patch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2"),
        lambda patch: patch.setattr(torch.version, "cuda", None),
    ],
    ids=["windows", "wsl", "amd"],
)
def test_where_there_is_no_such_memory_nothing_is_set(elsewhere, told, monkeypatch):
    elsewhere(monkeypatch)
    grow_segments()
    restore_options()
    assert told == [] and not any(name in os.environ for name in VARIABLES)


@pytest.mark.parametrize("users", [1.0, 0.5])
def test_pytorch_is_held_to_what_a_run_may_take_and_let_loose_behind_it(users, monkeypatch):
    """Never to more than the user allowed it; and what one run was held to is not what the next one is."""
    shares = {"cuda:0": users, "cuda:1": 1.0}
    for name, instead in {
        "get_device_properties": lambda device: SimpleNamespace(total_memory=80),
        "get_per_process_memory_fraction": lambda device: shares[str(device)],
        "set_per_process_memory_fraction": lambda share, device: shares.update({str(device): share}),
    }.items():
        monkeypatch.setattr(torch.cuda, name, instead)
    one, other = torch.device("cuda:0"), torch.device("cuda:1")
    hold_to(20, one)
    assert shares == {"cuda:0": 0.25, "cuda:1": 1.0}
    hold_to(60, one)
    assert shares["cuda:0"] == min(users, 0.75)
    hold_to(-5, other)
    assert shares["cuda:1"] == 0
    hold_to(100, other)
    assert shares["cuda:1"] == 1
    for _ in range(2):
        let_loose()
        assert shares == {"cuda:0": users, "cuda:1": 1.0}
    hold_to(8, one)
    assert shares["cuda:0"] == 0.1
    let_loose()
