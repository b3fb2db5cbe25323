"""The memory of vLLM's KV cache: what PyTorch does not use any more makes way for it. With vLLM's parts played."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from grpo.rollout.vllm_memory import KvMemory, SleepingKvMemory, find_kv_memory


@pytest.fixture
def calls(monkeypatch):
    """What was called, in order."""
    calls = []
    for name in ("empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, partial(calls.append, name))
    return calls


def old_vllm(calls):
    return SimpleNamespace(
        sleep=lambda level: calls.append(f"sleep {level}"), wake_up=lambda tags=None: calls.append(f"wake {tags}")
    )


def new_vllm(calls):
    llm = old_vllm(calls)
    llm.release_kv_cache_memory = lambda: calls.append("release")
    return llm


@pytest.mark.parametrize(
    ("vllm", "released", "restored"),
    [(old_vllm, ["sleep 1"], "wake None"), (new_vllm, ["sleep 0", "release"], "wake ['kv_cache']")],
)
def test_pytorch_gives_up_what_it_does_not_use_before_the_cache_is_taken_back(vllm, released, restored, calls):
    memory = find_kv_memory(vllm(calls), can_sleep=True)
    memory.release()
    assert calls == ["synchronize", *released]
    calls.clear()
    memory.restore()
    assert calls == ["empty_cache", restored]


def test_a_cache_that_stays_is_left_alone(calls):
    memory = find_kv_memory(new_vllm(calls), can_sleep=False)
    memory.release()
    memory.restore()
    assert not calls and type(memory) is KvMemory and not isinstance(memory, SleepingKvMemory)
