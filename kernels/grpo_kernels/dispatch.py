"""Which implementation runs, the Triton kernel or its torch twin: decided from the tensors, early and in one place.
Knows nothing of any operation.

The rule of `impl`:
    "torch"   the twin, anywhere.
    "triton"  the kernel, or an error that says why it cannot run. Where there is no GPU it runs on CPU tensors in
              Triton's interpreter, slowly, and right in float32 and float16 only.
    "auto"    the kernel on a CUDA device that can run it, else the twin, with one log line for an operation and reason.
              On a CPU the twin is what was meant, so nothing is logged, and the interpreter is never chosen.

Kernels are launched by an `Operator`, which torch.compile keeps whole. Three rules of the files that define them:
    - Offsets are int64 wherever a tensor may hold 2**31 elements or more: `row.to(tl.int64) * stride`.
    - Counts of tokens are not specialised, or new batches would compile: `@triton.jit(do_not_specialize=["N"])`.
    - They take `triton` and `tl` from here, so that the package imports, and its twins run, where Triton is missing.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Literal, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Triton reads this variable when a kernel, its own included, is defined; without a GPU kernels can only be interpreted.
# It is not left set, because child processes would inherit it and may see a GPU.
_INTERPRET = {} if torch.cuda.is_available() or "triton" in sys.modules else {"TRITON_INTERPRET": "1"}

try:
    with patch.dict(os.environ, _INTERPRET):
        import triton
        import triton.language as tl
        from triton.tools.tensor_descriptor import TensorDescriptor
    if _INTERPRET:
        triton.knobs.runtime.interpret = True
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

Function = TypeVar("Function", bound=Callable[..., Any])


def isolated(function: Function) -> Function:
    """A public operation with the device of its first argument current, where Triton launches, and with autocast off:
    operations say themselves what they compute in. A compiler sees to both in its own way."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*arguments, **options)
        device = (arguments[0] if arguments else next(iter(options.values()))).device
        is_cuda = device.type == "cuda"
        is_elsewhere = is_cuda and device.index != torch.cuda.current_device()
        is_cast = (is_cuda or device.type == "cpu") and torch.is_autocast_enabled(device.type)
        if not is_elsewhere and not is_cast:
            return function(*arguments, **options)
        on_device = torch.cuda.device(device) if is_elsewhere else nullcontext()
        uncast = torch.autocast(device.type, enabled=False) if is_cast else nullcontext()
        with on_device, uncast:
            return function(*arguments, **options)

    return run  # pyright: ignore[reportReturnType]


def choose(operation: str, impl: Impl, *tensors: Tensor) -> Chosen:
    """The implementation that `operation` runs on floating-point `tensors`, which share a device.

    Raises ValueError for an unknown `impl`, and for impl="triton" where the kernel cannot run.
    """
    dtypes = tuple(sorted({str(tensor.dtype) for tensor in tensors}))
    return _choose(operation, impl, str(tensors[0].device), dtypes)


class Operator:
    """A function of tensors that launches kernels; differentiable once `differentiate` has told it how.

    Under torch.compile it is a custom operator with a fake kernel. Called eagerly it is the function itself, in a plain
    autograd node, because a custom operator costs the CPU more than a small kernel costs the GPU.

    `launch` has the annotations that torch.library.custom_op infers a schema from, returns no argument or view of one,
    and is called with positional arguments, a tensor first. `fake` returns empty tensors of the right shapes.
    """

    def __init__(self, name: str, launch: Callable[..., Any], fake: Callable[..., Any]):
        self._launch = launch
        self._function: type[torch.autograd.Function] | None = None
        self._operator = torch.library.custom_op(f"grpo_kernels::{name}", launch, mutates_args=())
        self._operator.register_fake(fake)

    def differentiate(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
        """The two functions of torch.library.register_autograd; `backward` launches through Operators too, which have
        no gradient of their own, so that a second backward says so."""
        self._operator.register_autograd(backward, setup_context=setup_context)
        launch = self._launch

        # Not a `setup_context` method: with one, apply() binds its arguments to a signature, at 40 microseconds a call.
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = launch(*arguments)
            setup_context(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
        self._function = type(launch.__name__, (torch.autograd.Function,), methods)

    def __call__(self, *arguments: Any) -> Any:
        # A compiler traces with tensors of its own kinds, in the backward too.
        if torch.compiler.is_compiling() or type(arguments[0]) not in (Tensor, torch.nn.Parameter):
            return self._operator(*arguments)
        if self._function is None or not torch.is_grad_enabled():
            return self._launch(*arguments)
        return self._function.apply(*arguments)


# Triton's own two are written for use inside kernels, and cost a caller outside 10 microseconds each.


def cdiv(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not smaller than `number`, which is positive."""
    return 1 << (number - 1).bit_length()


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter, on CPU tensors."""
    return HAS_TRITON and triton.knobs.runtime.interpret


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (0, 0) for any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def has_descriptors(device: torch.device) -> bool:
    """Whether kernels for it may fetch by tensor descriptors: a data centre GPU, Hopper or later."""
    return capability(device) in ((9, 0), (10, 0), (10, 3))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program on a CUDA device can have; elsewhere without bound."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 2**31


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
        return None if interpreting() else "the tensors are on the CPU, and kernels were compiled for a GPU"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a CUDA device"
    found = capability(device)
    name = torch.cuda.get_device_name(device)
    if found < SMALLEST_CAPABILITY:
        return f"{name} has compute capability {found[0]}.{found[1]}, the kernels need 7.0"
    if "torch.bfloat16" in dtypes and found < BFLOAT16_CAPABILITY:
        return f"{name} has no bfloat16 arithmetic; float16 would use the kernel"
    return None
