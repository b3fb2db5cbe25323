"""Saving: what a backward pass reads, kept in the middle of an operation's forward pass. Knows no operation.

`ctx.save_for_backward` keeps tensors when a forward pass has ended. Under `torch.utils.checkpoint` a layer's forward
pass is run once more for its backward pass, as far as the last tensor that was kept: what comes behind that is not
computed again. So an operation that ends with a product, and has by then all that its backward pass reads, keeps it
before:

    ctx.kept = kept_now(x, ...)     in forward
    x, ... = tensors_of(ctx.kept)   in backward, once; then ctx.kept = None, or they live as long as the graph
"""

import torch
from torch import Tensor


def kept_now(*tensors: Tensor) -> Tensor:
    """An empty tensor that has them, kept as autograd keeps an operation's: by the hooks in force
    (`torch.autograd.graph.saved_tensors_hooks`)."""
    with torch.enable_grad():
        return _Kept.apply(torch.zeros(0, requires_grad=True), *tensors)


def tensors_of(kept: Tensor) -> tuple[Tensor, ...]:
    """What `kept_now` was given."""
    # Held by the tensor, not by its grad_fn alone: in PyTorch 2.11 that is a shell once the tensor is gone.
    return kept.grad_fn.saved_tensors  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, *tensors):
        ctx.save_for_backward(*tensors)
        return anchor.new_zeros(0)

    @staticmethod
    def backward(ctx, _grad):
        raise AssertionError("nothing is computed from what it returns")
