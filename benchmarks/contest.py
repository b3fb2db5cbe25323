"""What a kernel benchmark is: a case is one operation at one shape, a contest its entries, their floor and the truth.
Knows nothing of any kernel; `kernels.py` runs contests, the files `kernel_cases_*.py` list them.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

Run = Callable[[], Any]


@dataclass
class Contest:
    """Entries that compute the same thing, ours first. Each is a function without arguments.

    A floor is a time that no version runs much faster than: bytes that have to move through memory, or a run (a plain
    matrix product, say) that any version contains. A peer is built only when it is asked for; ImportError skips it.
    """

    entries: dict[str, Run]
    floor_note: str
    floor_bytes: int = 0
    floor_run: Run | None = None
    peers: dict[str, Callable[[], Run]] = field(default_factory=dict)
    # What a run returned -> {name of an output: relative error against the truth}
    errors: Callable[[Any], dict[str, float]] | None = None


@dataclass(frozen=True)
class Case:
    operation: str
    shape: str
    target: str  # what the ratio to the floor should be at most, in words; "" for none
    prepare: Callable[[], Contest]


def milliseconds(run: Run, repeat_ms: int = 150) -> float:
    """Median time of a run, the L2 cache flushed before each."""
    return do_bench(run, warmup=40, rep=repeat_ms, return_mode="median")


def peak_gib(run: Run) -> float:
    """Memory that a run takes at its height beyond what was allocated before it, its results included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def relative_error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read and written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (milliseconds(lambda: target.copy_(source)) / 1e3)


def matmul_rate() -> float:
    """Floating-point operations per second of an 8192-cubed bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (milliseconds(lambda: a @ b) / 1e3)
