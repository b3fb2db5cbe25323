"""Which implementation runs, the Triton kernel or its torch twin: decided from the tensors, early and in one place.
Knows nothing of any operation.

The rule of `impl`:
    "torch"   the twin, anywhere.
    "triton"  the kernel, or an error that says why it cannot run. On a CPU that needs TRITON_INTERPRET=1, set before
              the first import of this package: Triton reads it when a kernel is defined.
    "auto"    the kernel on a CUDA device that can run it, else the twin, with one log line for an operation and reason.
              On a CPU the twin is what was meant, so nothing is logged, and the interpreter is never chosen.

Two rules of the kernels that import this file:
    - Offsets are int64 wherever a tensor may hold 2**31 elements or more: `row.to(tl.int64) * stride`.
    - They take `triton` and `tl` from here, so that the package imports, and its twins run, where Triton is missing.
"""

import functools
import logging
import os
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:

    def _jit(function: Any = None, **_options: Any) -> Any:
        return function if function is not None else _jit

    triton: Any = SimpleNamespace(
        jit=_jit, cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length()
    )
    tl: Any = SimpleNamespace(constexpr=lambda value: value)
    TensorDescriptor: Any = None

Impl = Literal["auto", "triton", "torch"]
Chosen = Literal["triton", "torch"]

HAS_TRITON = not isinstance(triton, SimpleNamespace)
SMALLEST_CAPABILITY = (7, 0)
BFLOAT16_CAPABILITY = (8, 0)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_logger = logging.getLogger("grpo_kernels")


def choose(operation: str, impl: Impl, *tensors: Tensor) -> Chosen:
    """The implementation that `operation` runs on floating-point `tensors`, which share a device.

    Raises ValueError for an unknown `impl`, and for impl="triton" where the kernel cannot run.
    """
    dtypes = tuple(sorted({str(tensor.dtype) for tensor in tensors}))
    return _choose(operation, impl, str(tensors[0].device), dtypes)


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (0, 0) for any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; elsewhere 2, so that an interpreted persistent kernel still loops."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


# Under torch.compile the answer is a constant of the graph; `operation`, `impl`, device and dtypes are its guards.
@torch.compiler.assume_constant_result
def _choose(operation: str, impl: str, device: str, dtypes: tuple[str, ...]) -> Chosen:
    return _decide(operation, impl, device, dtypes)


@functools.cache
def _decide(operation: str, impl: str, device: str, dtypes: tuple[str, ...]) -> Chosen:
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl is {impl!r}. Use 'auto', 'triton' or 'torch'.")
    if impl == "torch":
        return "torch"
    obstacle = _obstacle(torch.device(device), dtypes)
    if impl == "triton":
        if obstacle is not None:
            raise ValueError(f"{operation} cannot run its Triton kernel: {obstacle}. Use impl='auto' or 'torch'.")
        return "triton"
    if device == "cpu":
        return "torch"
    if obstacle is not None:
        _logger.warning("%s runs in plain torch, slower: %s", operation, obstacle)
        return "torch"
    return "triton"


def _obstacle(device: torch.device, dtypes: tuple[str, ...]) -> str | None:
    """Why a kernel cannot run on tensors of this device and these dtypes, or None."""
    if not HAS_TRITON:
        return "Triton is not installed"
    unknown = sorted(set(dtypes) - {str(dtype) for dtype in KERNEL_DTYPES})
    if unknown:
        return f"it has no kernel for {', '.join(unknown)}"
    if device.type == "cpu":
        return None if interpreting() else "the tensors are on the CPU, and TRITON_INTERPRET is not 1"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a CUDA device"
    found = capability(device)
    name = torch.cuda.get_device_name(device)
    if found < SMALLEST_CAPABILITY:
        return f"{name} has compute capability {found[0]}.{found[1]}, the kernels need 7.0"
    if "torch.bfloat16" in dtypes and found < BFLOAT16_CAPABILITY:
        return f"{name} has no bfloat16 arithmetic; float16 would use the kernel"
    return None
