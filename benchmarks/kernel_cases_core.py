"""Benchmark cases of the LM head, the elementwise kernels and attention.
Knows nothing of how contests are run or reported.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from contest import Case, Contest, Run, relative_error
from grpo_kernels import GroupLayout, add_rms_norm, group_attention, linear_logprob, rms_norm, rope
from grpo_kernels.dispatch import Impl
from grpo_kernels.gates import Activation, gated
from torch import Tensor

BFLOAT16_BYTES = 2
CHECKED_ROWS = 512


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device="cuda")).bfloat16()


# LM head: frozen, log-probability of the target of each row.


def prepare_head(N: int, D: int, V: int, with_gradient: bool) -> Contest:
    hidden, weight = randn(N, D), randn(V, D, scale=1 / math.sqrt(D))
    targets, grad = torch.randint(0, V, (N,), device="cuda"), torch.randn(N, device="cuda")

    def differentiate(logprobs_of: Callable[[Tensor], Tensor]) -> Run:
        if not with_gradient:
            return lambda: (logprobs_of(hidden).detach(),)

        def run() -> tuple[Tensor, Tensor]:
            leaf = hidden.detach().requires_grad_()
            logprobs = logprobs_of(leaf)
            (logprobs * grad).sum().backward()
            assert leaf.grad is not None
            return logprobs.detach(), leaf.grad

        return run

    def ours(chunk_rows: int | None) -> Run:
        return differentiate(lambda leaf: linear_logprob(leaf, weight, targets, chunk_rows=chunk_rows)[0])

    def torch_rows(leaf: Tensor, rows: slice) -> Tensor:
        logits = (leaf[rows] @ weight.T).float()
        return logits.gather(1, targets[rows, None]).squeeze(1) - logits.logsumexp(1)

    def torch_chunks() -> Run:
        """Recomputes a chunk's logits in the backward, as most trainers' chunked heads do."""
        chunks = [slice(start, start + 1024) for start in range(0, N, 1024)]
        checkpoint = partial(torch.utils.checkpoint.checkpoint, torch_rows, use_reentrant=False)
        return differentiate(lambda leaf: torch.cat([checkpoint(leaf, rows) for rows in chunks]))

    def cut_cross_entropy() -> Run:
        from cut_cross_entropy import linear_cross_entropy

        return differentiate(lambda leaf: -linear_cross_entropy(leaf, weight, targets, reduction="none").float())

    def unsloth() -> Run:
        import unsloth  # noqa: F401  # it patches what the next import reads
        from unsloth_zoo.fused_losses.fused_linear import fused_linear_logprobs

        return differentiate(lambda leaf: fused_linear_logprobs(leaf, weight, targets))

    def liger() -> Run:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", temperature=1.0)
        shape = (8, N // 8)
        mask, advantages = torch.ones(shape, device="cuda"), torch.randn(8, device="cuda")

        def run() -> None:
            leaf = hidden.view(*shape, D).detach().requires_grad_()
            loss(leaf, weight, targets.view(shape), mask, advantages, old_per_token_logps=None)[0].backward()

        return run

    logits = hidden[:CHECKED_ROWS].double() @ weight.double().T
    true_logprobs = logits.log_softmax(1).gather(1, targets[:CHECKED_ROWS, None]).squeeze(1)
    true_grad = grad[:CHECKED_ROWS, None] * (
        weight[targets[:CHECKED_ROWS]].double() - logits.softmax(1) @ weight.double()
    )
    del logits

    def errors(outputs: Any) -> dict[str, float]:
        if outputs is None:
            return {}
        names = ("logprobs", "gradient")
        truths = (true_logprobs, true_grad)
        return {
            name: relative_error(output[:CHECKED_ROWS], truth)
            for name, output, truth in zip(names, outputs, truths, strict=False)
        }

    peers: dict[str, Callable[[], Run]] = {
        "torch, chunks of 1024": torch_chunks,
        "cut-cross-entropy": cut_cross_entropy,
        "Unsloth fused_linear_logprobs": unsloth,
    }
    entries = {"ours": ours(None)}
    if with_gradient:
        entries["ours, chunk_rows=768"] = ours(768)
        peers["Liger fused linear GRPO"] = liger
    return Contest(
        entries, "one product with the head", floor_run=lambda: hidden @ weight.T, peers=peers, errors=errors
    )


# Elementwise: what a run reads and writes once, over the copy bandwidth.


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


def liger_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)


def liger_add_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, residual, w: LigerFusedAddRMSNormFunction.apply(x, residual, w, 1e-6, 0.0, "llama", False)


def liger_swiglu() -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


def liger_geglu() -> Callable[..., Any]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return lambda gate, up: LigerGELUMulFunction.apply(gate, up)


def norm_case(N: int, D: int, adds: bool, backward: bool) -> Case:
    def frozen(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """With a norm's weight that gets no gradient, as LoRA training has it."""
        weights = {dtype: torch.ones(D, device="cuda", dtype=dtype) for dtype in (torch.bfloat16, torch.float64)}
        return lambda *inputs: function(*inputs, weights[inputs[0].dtype], **options)

    function = add_rms_norm if adds else rms_norm
    peer = liger_add_rms_norm if adds else liger_rms_norm
    forward_elements, backward_elements = (4, 4) if adds else (2, 3)
    return Case(
        f"{function.__name__} {'backward' if backward else 'forward'}",
        f"{N} x {D}",
        "1.18",
        lambda: prepare_elementwise(
            lambda: [randn(N, D) for _ in range(1 + adds)],
            lambda: frozen(function),
            lambda: frozen(function, impl="torch"),
            lambda: frozen(peer()),
            N * D * (backward_elements if backward else forward_elements),
            backward,
        ),
    )


def gated_case(N: int, I: int, activation: Activation, backward: bool) -> Case:
    return Case(
        f"{'swiglu' if activation == 'silu' else 'geglu'} {'backward' if backward else 'forward'}",
        f"{N} x {I}",
        "1.18",
        lambda: prepare_elementwise(
            lambda: [randn(N, I), randn(N, I)],
            lambda: partial(gated, activation=activation),
            lambda: partial(gated, activation=activation, impl="torch"),
            liger_swiglu if activation == "silu" else liger_geglu,
            N * I * (5 if backward else 3),
            backward,
        ),
    )


def rope_case(N: int, Hq: int, Hk: int, E: int, normed: bool, backward: bool) -> Case:
    def build(impl: Impl) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        frequencies = 10000.0 ** -(torch.arange(0, E, 2, device="cuda") / E)
        angles = torch.arange(N, device="cuda")[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        norm = torch.ones(E, device="cuda", dtype=torch.bfloat16) if normed else None
        return lambda q, k: rope(q, k, cos, sin, q_norm=norm, k_norm=norm, impl=impl)

    elements = N * (Hq + Hk) * E * (3 if normed and backward else 2)
    return Case(
        f"rope{' + QK-norm' if normed else ''} {'backward' if backward else 'forward'}",
        f"{N} x ({Hq} + {Hk}) x {E}",
        "1.18",
        lambda: prepare_elementwise(
            lambda: [randn(N, Hq, E), randn(N, Hk, E)],
            partial(build, "auto"),
            partial(build, "torch"),
            None,
            elements,
            backward,
        ),
    )


# Attention: one copy of each prompt against packed whole sequences.


def prepare_attention(prompt: int, completion: int, size: int, Hq: int, Hk: int, E: int, backward: bool) -> Contest:
    shared = GroupLayout.of([prompt], [[completion] * size], device="cuda")
    gathered, merged = (
        GroupLayout.of([prompt], [[completion] * size], device="cuda", most_copies=most) for most in (math.inf, 0)
    )
    whole = GroupLayout.of([prompt + completion] * size, device="cuda")

    def attend(layout: GroupLayout) -> tuple[Run, Run]:
        N = layout.num_tokens
        inputs = [randn(N, Hq, E), randn(N, Hk, E), randn(N, Hk, E)]
        return forward_and_backward(lambda q, k, v: group_attention(q, k, v, layout), inputs)

    def flex() -> Run:
        """The same tokens, one copy of the prompt, by a mask; compiled for this shape."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        N = shared.num_tokens
        segment = torch.arange(1 + size, device="cuda").repeat_interleave(shared.segments.diff())

        def visible(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & ((segment[i] == segment[j]) | (segment[j] == 0))

        mask = create_block_mask(visible, None, None, N, N, device="cuda")
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        inputs = [randn(1, heads, N, E) for heads in (Hq, Hk, Hk)]
        return forward_and_backward(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True), inputs)[
            backward
        ]

    return Contest(
        {
            "ours": attend(shared)[backward],
            "ours, gathered": attend(gathered)[backward],
            "ours, merged": attend(merged)[backward],
        },
        "packed whole sequences, flash attention",
        floor_run=attend(whole)[backward],
        peers={"packed whole sequences": lambda: attend(whole)[backward], "FlexAttention, shared prompt": flex},
    )


CASES = [
    *(
        Case(f"linear_logprob {name}", f"{N} x {D} x {V}", target, partial(prepare_head, N, D, V, with_gradient))
        for name, with_gradient, targets in (
            ("forward + backward", True, ("2.1", "2.3")),
            ("no gradient", False, ("1.12", "1.3")),
        )
        for (N, D, V), target in zip([(8192, 4096, 128256), (8192, 1024, 151936)], targets, strict=True)
    ),
    *(
        norm_case(N, D, adds, backward)
        for N, D in ((16384, 4096), (16384, 2048))
        for adds in (False, True)
        for backward in (False, True)
    ),
    *(
        rope_case(N, Hq, Hk, 128, normed, backward)
        for N, Hq, Hk in ((16384, 32, 8),)
        for normed in (False, True)
        for backward in (False, True)
    ),
    *(
        gated_case(N, I, activation, backward)
        for N, I in ((16384, 14336), (16384, 6144))
        for activation in ("silu", "gelu_tanh")
        for backward in (False, True)
    ),
    *(
        Case(
            f"group_attention {'backward' if backward else 'forward'}",
            f"{prompt} + {size} x {completion}, {Hq}/{Hk} x {E}",
            "0.77" if (prompt, completion) == (1024, 512) else "",
            partial(prepare_attention, prompt, completion, size, Hq, Hk, E, backward),
        )
        for prompt, completion, size in ((1024, 512, 8), (256, 512, 8), (128, 256, 16), (3072, 512, 8))
        for Hq, Hk, E in ((32, 8, 128),)
        for backward in (False, True)
    ),
]
