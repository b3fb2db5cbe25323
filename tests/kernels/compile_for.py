"""Compiles every kernel for a GPU that need not be there: `python compile_for.py 8.9 bfloat16`.
Knows nothing of what kernels compute.

Operations are called as they are, on CPU tensors, with a driver that says it has that GPU and launches that only
compile. In a process of its own, because without a GPU the package else has its kernels interpreted. Prints a line a
kernel: its name and the most shared memory, in bytes, that a variant of it takes; "-" where no call launched it. Exits
with an error where one does not compile or takes more than the GPU has.
"""

import sys
from collections.abc import Callable
from types import ModuleType

import torch
import triton  # noqa: F401  # before grpo_kernels
from grpo_kernels import (
    NF4,
    GroupLayout,
    LoraFactors,
    add_rms_norm,
    linear_logprob,
    lora_linear,
    lora_linear_inference,
    lora_mlp,
    nf4_dequantize,
    nf4_linear,
    rms_norm,
    rope,
    take_rows,
)
from grpo_kernels.attention import _merge, sum_of_copies
from grpo_kernels.attention_tiles import tiled_attention
from grpo_kernels.gates import ACTIVATIONS, gated
from grpo_kernels.grouped_nf4 import grouped_nf4_linear
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CAPABILITY = tuple(map(int, sys.argv[1].split(".")))
DTYPE = getattr(torch, sys.argv[2])
# KiB that a program can have, by compute capability (CUDA C++ Programming Guide, technical specifications).
SHARED_KIB = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}


class Driver:
    """The GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


shared: dict[str, int] = {}
run = JITFunction.run


def compile_only(kernel: JITFunction, *arguments, grid, warmup, **options):
    compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
    name = name_of(kernel)
    shared[name] = max(shared.get(name, 0), compiled.metadata.shared)
    return compiled


def name_of(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"


def package() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith("grpo_kernels")]


def pretend() -> None:
    """What the package asks of a device is answered for that GPU."""
    answers: dict[str, Callable] = {
        "_obstacle": lambda device, dtypes: None,
        "capability": lambda device: CAPABILITY,
        "num_multiprocessors": lambda device: 100,
        "shared_memory": lambda device: 1024 * SHARED_KIB[CAPABILITY],
    }
    for module in package():
        for name, answer in answers.items():
            if hasattr(module, name):
                setattr(module, name, answer)


def kernels() -> list[str]:
    """Those of the package; other functions of Triton are parts of them."""
    defined = [value for module in package() for value in vars(module).values() if isinstance(value, JITFunction)]
    return sorted({name_of(function) for function in defined if function.__name__.endswith("_kernel")})


def zeros(*shape: int, requires_grad: bool = True) -> torch.Tensor:
    return torch.zeros(shape, dtype=DTYPE, requires_grad=requires_grad)


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward([output.float().sum() for output in outputs])


def norms() -> None:
    for columns in (64, 4096):
        backward(rms_norm(zeros(5, columns), zeros(columns), impl="triton"))
        backward(*add_rms_norm(zeros(5, columns), zeros(5, columns), zeros(columns), impl="triton"))


def rotary() -> None:
    for norm in (None, zeros(128)):
        for half, interleaved in ((64, False), (32, True)):
            angles = [torch.zeros(5, half) for _ in range(2)]
            settings = {"q_norm": norm, "k_norm": norm, "interleaved": interleaved}
            backward(*rope(zeros(5, 8, 128), zeros(5, 2, 128), *angles, **settings, impl="triton"))


def activations() -> None:
    for activation in ACTIVATIONS:
        backward(gated(zeros(5, 256), zeros(5, 256), activation, impl="triton"))


def head() -> None:
    targets = torch.zeros(300, dtype=torch.long)
    for softcap in (None, 30.0):
        for trained in (False, True):
            for entropy in (False, True):
                logprobs, entropies = linear_logprob(
                    zeros(300, 128), zeros(1000, 128, requires_grad=trained), targets, softcap=softcap,
                    differentiable_entropy=entropy, impl="triton",
                )  # fmt: skip
                backward(logprobs, *([entropies] if entropy else []))
        with torch.no_grad():
            linear_logprob(zeros(300, 128), zeros(1000, 128), targets, softcap=softcap, impl="triton")


def quantized(num_rows: int, num_columns: int, nested: bool) -> NF4:
    blocks = num_rows * num_columns // 64
    packed = torch.zeros(num_rows * num_columns // 2, dtype=torch.uint8)
    if not nested:
        return NF4(packed, torch.zeros(blocks), (num_rows, num_columns))
    outer = torch.zeros(-(-blocks // 256))
    return NF4(packed, torch.zeros(blocks, dtype=torch.uint8), (num_rows, num_columns), outer, outer)


def nf4() -> None:
    for nested in (False, True):
        nf4_dequantize(quantized(64, 128, nested), DTYPE, impl="triton")
        # Each way to cut a product up.
        for num_rows, num_columns, x_rows in ((128, 256, 1), (128, 256, 20), (128, 4096, 64), (128, 256, 128)):
            with_a(zeros(x_rows, num_columns, requires_grad=False), quantized(num_rows, num_columns, nested))
        for x_rows in (64, 128, 256):
            with_a(zeros(x_rows, 4096, requires_grad=False), quantized(6144, 4096, nested))
        for bias in (None, zeros(128)):
            nf4_linear(zeros(1, 256), quantized(128, 256, nested), bias, impl="triton")

        ends = torch.zeros(4, dtype=torch.int32)
        for x_rows in (4, 40, 120):  # each number of rows that a pass can have
            grouped_nf4_linear(zeros(x_rows, 256, requires_grad=False), quantized(256, 256, nested), ends)


def with_a(x: torch.Tensor, weight: NF4) -> None:
    """nf4_linear's kernel with all that it can do but a bias."""
    num_rows, num_columns = weight.shape
    lora_linear_inference(x, weight, factors(num_rows, num_inputs=num_columns), impl="triton")


def factors(*sizes: int, num_inputs: int = 128, rank: int = 16) -> LoraFactors:
    a = torch.zeros(len(sizes) * rank, num_inputs, requires_grad=True)
    b = tuple(torch.zeros(size, rank, requires_grad=True) for size in sizes)
    return LoraFactors(a, b, a.detach().to(DTYPE), tuple(part.detach().to(DTYPE) for part in b), torch.ones(1))


def lora() -> None:
    for base in (quantized(256, 128, False), zeros(256, 128, requires_grad=False)):
        backward(lora_linear(zeros(300, 128), base, factors(256), impl="triton"))
        backward(lora_linear(zeros(300, 128), base, factors(128, 64, 64), impl="triton"))
        for rows in (5, 300):
            lora_linear_inference(zeros(rows, 128, requires_grad=False), base, factors(128, 64, 64), impl="triton")
    bases = quantized(256, 128, False), quantized(128, 128, False)
    for activation in ("silu", "gelu", "gelu_tanh"):
        out = lora_mlp(zeros(300, 128), bases[0], factors(128, 128), bases[1], factors(128), activation, impl="triton")
        backward(out)
    for rank in (64, 256):
        backward(lora_linear(zeros(300, 128), bases[0], factors(128, 64, 64, rank=rank), impl="triton"))
        both = factors(128, 128, rank=rank), factors(128, rank=rank)
        backward(lora_mlp(zeros(300, 128), bases[0], both[0], bases[1], both[1], impl="triton"))


def attention() -> None:
    """Its own kernels: flash attention is PyTorch's."""
    layout = GroupLayout.of([5], [[3, 4]])
    assert layout.gathered is not None
    copies = zeros(len(layout.gathered.keys), 2, 128, requires_grad=False)
    sum_of_copies(copies, layout.gathered.copies, layout.gathered.copy_starts)
    for E in (64, 128, 256):
        for softcap in (None, 50.0):
            q, k = zeros(12, 4, E), zeros(12, 2, E)
            backward(tiled_attention(q, k, k, layout, 1.0, 4, softcap))
    _merge(zeros(12, 4, 128), torch.zeros(4, 12), zeros(7, 4, 128), torch.zeros(4, 7), 5)


def tables() -> None:
    for index in (torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)):
        take_rows(index, zeros(8, 128, requires_grad=False), "triton")


if __name__ == "__main__":
    driver.set_active(Driver())
    JITFunction.run = compile_only
    pretend()
    for compile_all in (norms, rotary, activations, head, nf4, lora, attention, tables):
        compile_all()
    for name in kernels():
        print(name, shared.get(name, "-"))
    limit = 1024 * SHARED_KIB[CAPABILITY]
    too_large = {name: size for name, size in shared.items() if size > limit}
    sys.exit(f"of {limit} bytes of shared memory: {too_large}" if too_large else 0)
