"""The choice between kernel and twin, and the package without Triton.
Knows nothing of any kernel's mathematics.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grpo_kernels.dispatch import cdiv, choose, next_power_of_2

ROOT = Path(__file__).parents[2]

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from grpo_kernels import linear_logprob, rms_norm
hidden = torch.randn(4, 8, requires_grad=True)
logprobs, _ = linear_logprob(rms_norm(hidden, torch.ones(8)), torch.randn(16, 8), torch.arange(4))
logprobs.sum().backward()
assert hidden.grad.isfinite().all()
try:
    rms_norm(hidden, torch.ones(8), impl="triton")
except ValueError as refused:
    print(refused)
"""


def test_a_cpu_runs_the_twin_and_says_nothing(caplog):
    assert choose("an operation", "auto", torch.zeros(2)) == "torch"
    assert choose("an operation", "torch", torch.zeros(2)) == "torch"
    assert not caplog.records


def test_a_fallback_is_logged_once(caplog):
    elsewhere = torch.zeros(2, device="meta")
    for _ in range(3):
        assert choose("an operation", "auto", elsewhere) == "torch"
    assert [record.message for record in caplog.records] == [
        "an operation runs in plain torch, slower: the tensors are on meta, not on a CUDA device"
    ]


def test_what_cannot_run_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="impl is 'fast'"):
        choose("an operation", "fast", torch.zeros(2))
    with pytest.raises(ValueError, match=r"an operation cannot run its Triton kernel: it has no kernel for torch.int8"):
        choose("an operation", "triton", torch.zeros(2, dtype=torch.int8))


def test_without_triton_the_twins_run():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, cwd=ROOT / "kernels", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed" in done.stdout


def test_whole_numbers():
    assert [cdiv(number, 4) for number in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power_of_2(number) for number in (1, 2, 3, 1024, 1025)] == [1, 2, 4, 1024, 2048]


def test_a_device_is_meant_while_empty_memory_is_poisoned():
    """Else a model that a later test makes on "meta" takes real memory (conftest.py)."""
    with torch.device("meta"):
        assert torch.empty(2).is_meta and torch.nn.Linear(2, 2).weight.is_meta
