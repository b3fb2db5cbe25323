"""What the cases of several kernels share: inputs, passes forward and backward, and products replayed from a graph.
Knows nothing of how contests are run or reported.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contest import Contest, Run, relative_error
from grpo_kernels.dispatch import cdiv
from torch import Tensor

BFLOAT16_BYTES = 2


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device="cuda")).bfloat16()


def forward_and_backward(forward: Callable[..., Any], inputs: list[Tensor]) -> tuple[Run, Run]:
    """Runs of the forward alone, without autograd, and of the backward alone, with a random gradient of each output."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def forward_only() -> Any:
        with torch.no_grad():
            return forward(*inputs)

    outputs = forward(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(output) for output in outputs]
    return forward_only, lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def prepare_elementwise(
    make_inputs: Callable[[], list[Tensor]],
    build_ours: Callable[[], Callable[..., Any]],
    build_twin: Callable[[], Callable[..., Any]],
    peer: Callable[[], Callable[..., Any]] | None,
    elements: int,
    backward: bool,
) -> Contest:
    inputs = make_inputs()
    side = int(backward)
    twin = build_twin()

    def compiled() -> Run:
        torch.compiler.reset()
        return forward_and_backward(torch.compile(twin, dynamic=False), inputs)[side]

    peers: dict[str, Callable[[], Run]] = {"torch.compile": compiled}
    if peer is not None:
        peers["Liger"] = lambda: forward_and_backward(peer(), inputs)[side]

    def errors(outputs: Any) -> dict[str, float]:
        # Backward runs draw their own gradients; the tests compare those.
        if backward:
            return {}
        true_outputs = twin(*(tensor.double() for tensor in inputs))
        first, true_first = (value[0] if isinstance(value, tuple) else value for value in (outputs, true_outputs))
        return {"output": relative_error(first, true_first)}

    return Contest(
        {"ours": forward_and_backward(build_ours(), inputs)[side]},
        "bytes moved once",
        floor_bytes=elements * BFLOAT16_BYTES,
        peers=peers,
        errors=errors,
    )


def one_after_the_other(product: Callable[..., Tensor], weights: list[Any]) -> Run:
    """Products with one weight after the other, as in decoding."""
    return in_graph(lambda: [product(weight) for weight in weights])


def in_graph(function: Callable[[], Any]) -> Run:
    """The function as a rollout engine runs it, replayed from a CUDA graph: launches outlast these products."""
    for _ in range(3):
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    # It reads the memory of what the function closed over, so the function has to live as long.
    return partial(replay, graph, out, function)


def replay(graph: torch.cuda.CUDAGraph, out: Any, _captured: Callable[[], Any]) -> Any:
    graph.replay()
    return out


def more_than_the_cache(N: int, K: int) -> int:
    """How many weights [N, K] in 4 bits the L2 cache does not hold. Products with one after the other read each from
    memory, and leave the cache no bytes that have to be written back, as a flush before each does."""
    return max(8, cdiv(3 * torch.cuda.get_device_properties().L2_cache_size, N * K // 2))
