"""PyTorch's options of a GPU's memory: segments that grow, unless the user or the platform has it otherwise."""

import os
import platform
import sys

import pytest
import torch

from grpo.policy.allocator import VARIABLES, grow_segments, restore_options


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
