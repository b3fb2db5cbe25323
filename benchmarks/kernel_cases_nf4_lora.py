"""Benchmark cases of NF4 weights and of the LoRA projections.
Knows nothing of how contests are run or reported.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from contest import Case, Contest, Run, relative_error
from grpo_kernels.dispatch import Impl, cdiv
from grpo_kernels.lora import LoraFactors, empty_with_room, lora_linear, lora_linear_inference
from grpo_kernels.mlp import Activation, lora_mlp
from grpo_kernels.nf4 import NF4, nf4_concat, nf4_dequantize, nf4_quantize
from grpo_kernels.nf4_product import nf4_linear
from torch import Tensor

RANK = 32
CHECKED_ROWS = 256


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device="cuda")).bfloat16()


# NF4: dequantised at memory speed, multiplied by few rows while it stays in 4 bits.


def prepare_dequantize(N: int, K: int, double_quant: bool) -> Contest:
    weight = randn(N, K)
    nf4 = nf4_quantize(weight, double_quant)
    truth = nf4_dequantize(nf4, torch.bfloat16, impl="torch")

    def bitsandbytes() -> Run:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
        return lambda: functional.dequantize_4bit(packed, state)

    return Contest(
        {"ours": lambda: nf4_dequantize(nf4, torch.bfloat16)},
        "bytes read and written once",
        floor_bytes=nf4.nbytes + truth.nbytes,
        peers={"bitsandbytes": bitsandbytes},
        errors=lambda got: {"weight": relative_error(got, truth)},
    )


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


def one_after_the_other(product: Callable[..., Tensor], weights: list[Any]) -> Run:
    """Products with one weight after the other, as in decoding."""
    return in_graph(lambda: [product(weight) for weight in weights])


def more_than_the_cache(N: int, K: int) -> int:
    """How many weights [N, K] in 4 bits the L2 cache does not hold. Products with one after the other read each from
    memory, and leave the cache no bytes that have to be written back, as a flush before each does."""
    return max(8, cdiv(3 * torch.cuda.get_device_properties().L2_cache_size, N * K // 2))


def prepare_linear(M: int, N: int, K: int, double_quant: bool) -> Contest:
    x, dense = randn(M, K), [randn(N, K) for _ in range(more_than_the_cache(N, K))]
    nf4 = [nf4_quantize(weight, double_quant) for weight in dense]
    truth = x.double() @ nf4_dequantize(nf4[0], torch.bfloat16, impl="torch").double().T

    def bitsandbytes() -> Run:
        import bitsandbytes

        quantize = partial(bitsandbytes.functional.quantize_4bit, quant_type="nf4", compress_statistics=double_quant)
        weights = [quantize(weight) for weight in dense]
        return one_after_the_other(
            lambda weight: bitsandbytes.matmul_4bit(x, weight[0].t(), quant_state=weight[1]), weights
        )

    return Contest(
        {
            "ours": one_after_the_other(lambda weight: nf4_linear(x, weight), nf4),
            "dequantise, then a product": one_after_the_other(
                lambda weight: x @ nf4_dequantize(weight, torch.bfloat16).T, nf4
            ),
        },
        "one product with the bfloat16 weight",
        floor_run=one_after_the_other(lambda weight: x @ weight.T, dense),
        times=len(dense),
        peers={"bitsandbytes": bitsandbytes},
        errors=lambda got: {"output": relative_error(got[0], truth)},
    )


# LoRA: forward and backward, over the plain products that any version contains.


def random_factors(sizes: list[int], num_inputs: int) -> LoraFactors:
    a = torch.randn(len(sizes) * RANK, num_inputs, device="cuda").div_(num_inputs**0.5).requires_grad_()
    b = tuple(torch.randn(size, RANK, device="cuda").mul_(0.02).requires_grad_() for size in sizes)
    return LoraFactors(
        a, b, a.detach().bfloat16(), tuple(part.detach().bfloat16() for part in b), torch.ones(1, device="cuda")
    )


def with_a_below(weight: Tensor, factors: LoraFactors) -> tuple[Tensor, LoraFactors]:
    """A dense base and its factors as a policy holds them."""
    base, a = empty_with_room(weight.shape[0], *factors.a_mirror.shape, weight.dtype, weight.device)
    return base.copy_(weight), replace(factors, a_mirror=a.copy_(factors.a_mirror))


def forward_and_backward(forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Run:
    leaf = x.detach().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        leaf.grad = None
        out = forward(leaf)
        out.backward(grad)
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    return run


def dense_products(base: Tensor | NF4, factors: LoraFactors) -> Tensor:
    """W + B A in float64, part below part."""
    weight = (nf4_dequantize(base, torch.bfloat16) if isinstance(base, NF4) else base).double()
    low_rank = [b.double() @ a.double() for a, b in zip(factors.a_mirror.split(RANK), factors.b_mirror, strict=True)]
    return weight + torch.cat(low_rank)


def errors_against(truths: tuple[Tensor, Tensor]) -> Callable[[Any], dict[str, float]]:
    def errors(outputs: Any) -> dict[str, float]:
        pairs = zip(("output", "gradient"), outputs, truths, strict=True)
        return {name: relative_error(output[:CHECKED_ROWS], truth) for name, output, truth in pairs}

    return errors


class KExtended(torch.autograd.Function):
    """The form of LoRA that extends K, [x | x A^T] [W | B]^T: one product, for a copy of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, extended: Tensor, a_mirror: Tensor, _a: Tensor, *b: Tensor) -> Tensor:
        """x [T, K], extended [N, K + R], A [R, K], the parts' B [N_j, RANK] -> [T, N]"""
        low = x @ a_mirror.T
        ctx.save_for_backward(x, low, extended, a_mirror)
        ctx.sizes = [part.shape[0] for part in b]
        return torch.cat([x, low], dim=1) @ extended.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad [T, N] -> gradients of x in its dtype, of A and B in float32"""
        x, low, extended, a_mirror = ctx.saved_tensors
        grad_x, grad_low = (grad @ extended).tensor_split([x.shape[1]], dim=1)
        parts = zip(grad.split(ctx.sizes, dim=1), low.split(RANK, dim=1), strict=True)
        grads_b = [(part.T @ own).float() for part, own in parts]
        return torch.addmm(grad_x, grad_low, a_mirror), None, None, (grad_low.T @ x).float(), *grads_b


def with_b_beside(weight: Tensor, factors: LoraFactors) -> Tensor:
    """[W | B], each part's B in columns of its own: [N, K + R]."""
    return torch.cat([weight, torch.block_diag(*factors.b_mirror)], dim=1)


def prepare_lora_linear(T: int, sizes: list[int], K: int) -> Contest:
    factors, parts = random_factors(sizes, K), [randn(size, K, scale=K**-0.5) for size in sizes]
    base, weight = quantized(parts), torch.cat(parts)
    x, grad = randn(T, K), randn(T, sum(sizes))
    merged = dense_products(base, factors)
    truths = (x[:CHECKED_ROWS].double() @ merged.T, grad[:CHECKED_ROWS].double() @ merged)

    plain = nf4_dequantize(base, torch.bfloat16)
    dense, extended = with_a_below(plain, factors), with_b_beside(plain, factors)

    def ours(impl: Impl, base: Tensor | NF4, factors: LoraFactors) -> Run:
        return forward_and_backward(lambda leaf: lora_linear(leaf, base, factors, impl=impl), x, grad)

    def k_extended(leaf: Tensor) -> Tensor:
        out = KExtended.apply(leaf, extended, factors.a_mirror, factors.a, *factors.b)
        assert isinstance(out, Tensor)
        return out

    def peft() -> Run:
        layers = peft_layers(parts, factors)
        return forward_and_backward(lambda leaf: torch.cat([layer(leaf) for layer in layers], dim=-1), x, grad)

    return Contest(
        {
            "ours": ours("auto", base, factors),
            "ours, bfloat16 base": ours("auto", *dense),
            "ours, torch twin": ours("torch", base, factors),
            "K extended, bfloat16 base": forward_and_backward(k_extended, x, grad),
        },
        "the two products with the bfloat16 weight",
        floor_run=lambda: (x @ weight.T, grad @ weight),
        peers={"PEFT + bitsandbytes": peft},
        errors=errors_against(truths),
    )


def prepare_inference(M: int, sizes: list[int], K: int) -> Contest:
    x, count = randn(M, K), more_than_the_cache(sum(sizes), K)
    factors = [random_factors(sizes, K) for _ in range(count)]
    bases = [quantized([randn(size, K, scale=K**-0.5) for size in sizes]) for _ in range(count)]
    weights = [nf4_dequantize(base, torch.bfloat16) for base in bases]
    dense = list(zip(weights, factors, strict=True))
    truth = x.double() @ dense_products(bases[0], factors[0]).T

    def ours(projection: tuple[Tensor | NF4, LoraFactors]) -> Tensor:
        return lora_linear_inference(x, *projection)

    def separately(projection: tuple[Tensor, LoraFactors]) -> Tensor:
        with torch.no_grad():
            return lora_linear(x, *projection, impl="torch")

    def k_extended(projection: tuple[Tensor, Tensor]) -> Tensor:
        extended, a = projection
        return torch.cat([x, x @ a.T], dim=1) @ extended.T

    return Contest(
        {
            "ours": one_after_the_other(ours, list(zip(bases, factors, strict=True))),
            "ours, bfloat16 base": one_after_the_other(ours, [with_a_below(*projection) for projection in dense]),
            "ours, bfloat16 base, A elsewhere": one_after_the_other(ours, dense),
            "separate products, bfloat16 base": one_after_the_other(separately, dense),
            "K extended, bfloat16 base": one_after_the_other(
                k_extended, [(with_b_beside(weight, own), own.a_mirror) for weight, own in dense]
            ),
        },
        "one product with the bfloat16 weight",
        floor_run=one_after_the_other(lambda weight: x @ weight.T, weights),
        times=count,
        errors=lambda got: {"output": relative_error(got[0], truth)},
    )


def prepare_mlp(T: int, D: int, I: int, activation: Activation) -> Contest:
    gate, up, down = randn(I, D, scale=D**-0.5), randn(I, D, scale=D**-0.5), randn(D, I, scale=I**-0.5)
    bases = quantized([gate, up]), quantized([down])
    factors = random_factors([I, I], D), random_factors([D], I)
    dense = [with_a_below(nf4_dequantize(base, torch.bfloat16), own) for base, own in zip(bases, factors, strict=True)]
    x, grad = randn(T, D), randn(T, D)
    truths = mlp_in_float64(x[:CHECKED_ROWS], grad[:CHECKED_ROWS], bases, factors, activation)

    def ours(impl: Impl, *bases_and_factors: Any) -> Run:
        def forward(leaf: Tensor) -> Tensor:
            return lora_mlp(leaf, *bases_and_factors, activation, impl=impl)

        return forward_and_backward(forward, x, grad)

    def peft() -> Run:
        gates, ups = peft_layers([gate, up], factors[0])
        (downs,) = peft_layers([down], factors[1])
        return forward_and_backward(lambda leaf: downs(torch.nn.functional.silu(gates(leaf)) * ups(leaf)), x, grad)

    def unsloth() -> Run:
        import unsloth  # noqa: F401  # it patches what the next import reads
        from unsloth.kernels.fast_lora import apply_lora_mlp_swiglu

        block = torch.nn.Module()
        block.gate_proj, block.up_proj = peft_layers([gate, up], factors[0])
        (block.down_proj,) = peft_layers([down], factors[1])

        def forward(leaf: Tensor) -> Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return apply_lora_mlp_swiglu(block, leaf[None])[0]

        return forward_and_backward(forward, x, grad)

    quantized_and_factors = bases[0], factors[0], bases[1], factors[1]
    inner = randn(T, I)

    def six_products() -> None:
        for _ in range(2):
            x @ gate.T, inner @ gate
        inner @ down.T, grad @ down

    return Contest(
        {
            "ours": ours("auto", *quantized_and_factors),
            "ours, bfloat16 base": ours("auto", *dense[0], *dense[1]),
            "ours, torch twin": ours("torch", *quantized_and_factors),
        },
        "the six products with bfloat16 weights",
        floor_run=six_products,
        peers={"PEFT + bitsandbytes": peft, "Unsloth": unsloth} if activation == "silu" else {},
        errors=errors_against(truths),
    )


def mlp_in_float64(
    x: Tensor, grad: Tensor, bases: tuple[NF4, NF4], factors: tuple[LoraFactors, LoraFactors], activation: Activation
) -> tuple[Tensor, Tensor]:
    x = x.double().requires_grad_()
    gate, up = (x @ dense_products(bases[0], factors[0]).T).chunk(2, dim=1)
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    }
    out = (functions[activation](gate) * up) @ dense_products(bases[1], factors[1]).T
    return out.detach(), torch.autograd.grad(out, x, grad.double())[0]


def quantized(parts: list[Tensor]) -> NF4:
    """The parts quantised one by one, as rivals hold them, and joined."""
    return nf4_concat([nf4_quantize(part, double_quant=True) for part in parts])


def peft_layers(weights: list[Tensor], factors: LoraFactors) -> list[torch.nn.Module]:
    """bitsandbytes' 4-bit linears under PEFT's LoRA, with these weights [N_j, K] and these factors, in bfloat16."""
    import bitsandbytes
    import peft

    holder = torch.nn.Module()
    for j, weight in enumerate(weights):
        layer = bitsandbytes.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16)
        layer.weight = bitsandbytes.nn.Params4bit(
            weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        holder.add_module(f"part_{j}", layer.cuda())
    names = [f"part_{j}" for j in range(len(weights))]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, lora_dropout=0.0)
    peft.inject_adapter_in_model(config, holder)
    layers = [getattr(holder, name) for name in names]
    for layer, a, b in zip(layers, factors.a_mirror.split(RANK), factors.b_mirror, strict=True):
        layer.lora_A["default"].weight = torch.nn.Parameter(a.clone())
        layer.lora_B["default"].weight = torch.nn.Parameter(b.clone())
    return layers


CASES = [
    *(
        Case(
            f"nf4_dequantize{', double quantisation' if double_quant else ''}",
            f"{N} x {K}",
            target,
            partial(prepare_dequantize, N, K, double_quant),
        )
        for (N, K), target in (((14336, 4096), "1.18"), ((4096, 4096), "1.43"))
        for double_quant in (False, True)
    ),
    *(
        Case(
            f"nf4_linear, {M} rows{', double quantisation' if double_quant else ''}",
            f"{K} -> {N}",
            "0.75" if M <= 64 else "",
            partial(prepare_linear, M, N, K, double_quant),
        )
        for N, K in ((14336, 4096), (4096, 4096), (4096, 14336))
        for double_quant, rows in ((False, (1, 8, 16, 32, 64, 128, 256, 512)), (True, (1, 8, 32, 64)))
        for M in rows
    ),
    *(
        Case(
            f"lora_linear_inference, {M} rows",
            f"{K} -> {'+'.join(map(str, sizes))}",
            "",
            partial(prepare_inference, M, sizes, K),
        )
        for sizes, K in (([4096, 1024, 1024], 4096), ([14336, 14336], 4096), ([4096], 14336))
        for M in (1, 16, 64, 256)
    ),
    *(
        Case(
            f"lora_linear_inference, {M} rows",
            f"{K} -> {'+'.join(map(str, sizes))}",
            "",
            partial(prepare_inference, M, sizes, K),
        )
        for sizes, K in (([2048, 1024, 1024], 2048), ([6144, 6144], 2048), ([2048], 6144), ([2048], 2048))
        for M in (64, 256)
    ),
    *(
        Case(
            "lora_linear forward + backward",
            f"{T} x {K} -> {'+'.join(map(str, sizes))}",
            "",
            partial(prepare_lora_linear, T, sizes, K),
        )
        for T in (1024, 8192)
        for sizes, K in (([4096], 4096), ([4096, 1024, 1024], 4096))
    ),
    *(
        Case(
            f"lora_mlp {activation} forward + backward",
            f"{T} x {D} / {I}",
            target,
            partial(prepare_mlp, T, D, I, activation),
        )
        for T, D, I, activation, target in (
            (1024, 4096, 14336, "silu", "1.6"),
            (4096, 4096, 14336, "silu", "1.25"),
            (8192, 4096, 14336, "silu", "1.12"),
            (16384, 4096, 14336, "silu", "1.10"),
            (8192, 4096, 14336, "gelu_tanh", ""),
        )
    ),
]
