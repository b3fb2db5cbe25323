"""Benchmark cases of `linear_logprob`: a frozen LM head, the log-probability of each row's target.
Knows nothing of how contests are run or reported.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from contest import Case, Contest, Run, relative_error
from grpo_kernels import linear_logprob
from torch import Tensor

from kernel_cases.shared import (
    randn,
)

CHECKED_ROWS = 512


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


CASES = [
    *(
        Case(f"linear_logprob {name}", f"{N} x {D} x {V}", target, partial(prepare_head, N, D, V, with_gradient))
        for name, with_gradient, targets in (
            ("forward + backward", True, ("2.1", "2.3")),
            ("no gradient", False, ("1.12", "1.3")),
        )
        for (N, D, V), target in zip([(8192, 4096, 128256), (8192, 1024, 151936)], targets, strict=True)
    ),
]
