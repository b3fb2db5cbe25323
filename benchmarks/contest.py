"""What a kernel benchmark is: a case is one operation at one shape, a contest its entries, their floor and the truth.
Knows nothing of any kernel; `kernels.py` runs contests, the files of `kernel_cases/` list them.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]

WAIT_MS = 6.0  # longer than a host takes to queue what is compared here
CYCLES_PER_MS = 2_000_000  # of a GPU at 2 GHz; a slower one waits longer
MOST_REPEATS = 50


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
    times: int = 1  # that a run does it; what is reported is the time of one
    # What a run returned -> {name of an output: relative error against the truth}
    errors: Callable[[Any], dict[str, float]] | None = None


@dataclass(frozen=True)
class Case:
    operation: str
    shape: str
    target: str  # what the ratio to the floor should be at most, in words; "" for none
    prepare: Callable[[], Contest]


def milliseconds(run: Run, waits: bool = True, repeat_ms: float = 150) -> float:
    """Median GPU time of a run, the L2 cache flushed before each.

    The GPU `waits` while the host queues a short run, so that what is timed is kernels and the gaps between them, and
    not the host, whose speed differs between machines with one kind of GPU. Before long runs, where the host is ahead
    anyway, it must not: a GPU that has rested has a higher clock, for the first milliseconds.
    """
    flushed = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")
    repeats = max(5, min(MOST_REPEATS, int(repeat_ms / rough_milliseconds(run))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flushed.zero_()
        if waits:
            torch.cuda._sleep(int(WAIT_MS * CYCLES_PER_MS))
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events)


def rough_milliseconds(run: Run) -> float:
    """One warm run, host and GPU together."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    started = perf_counter()
    run()
    torch.cuda.synchronize()
    return (perf_counter() - started) * 1e3


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
