"""Where the time of a call goes, printed: Python's functions, then the GPU's kernels. Knows nothing of the call."""

import cProfile
import pstats
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile


def profile(call: Callable[[], object], steps: int) -> None:
    """Make the call once for the functions and, where there is a GPU, once for its kernels, in milliseconds a step.

    steps: that a call makes.
    """
    python = cProfile.Profile()
    python.enable()
    call()
    python.disable()
    pstats.Stats(python, stream=sys.stdout).sort_stats("tottime").print_stats(28)
    if not torch.cuda.is_available():
        return
    with torch_profile(activities=[ProfilerActivity.CUDA]) as kernels:
        call()
    rows = sorted(kernels.key_averages(), key=lambda row: -row.self_device_time_total)
    busy = sum(row.self_device_time_total for row in rows)
    print(f"GPU busy {busy / 1e3 / steps:.2f} ms a step")
    for row in rows[:24]:
        print(f"{row.self_device_time_total / 1e3 / steps:8.3f} ms {row.count / steps:7.1f} x  {row.key[:90]}")
