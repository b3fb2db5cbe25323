"""Saving: what a backward pass reads, kept in the middle of an operation's forward pass. Knows no operation.

`ctx.save_for_backward` keeps tensors when a forward pass has ended. Under `torch.utils.checkpoint` a layer's forward
pass is run once more for its backward pass, as far as the last tensor that was kept: what comes behind that is not
computed again. So an operation that ends with a product, and has by then all that its backward pass reads, keeps it
before:

    ctx.kept = kept_now(x, ...)     in forward
    x, ... = ctx.kept.saved_tensors in backward, once; then ctx.kept = None, or it lives as long as the graph
"""

from typing import Any

import torch
from torch import Tensor


def kept_now(*tensors: Tensor) -> Any:
    """Something with the tensors as its `saved_tensors`, kept as autograd keeps an operation's: by the hooks in force
    (`torch.autograd.graph.saved_tensors_hooks`)."""
    with torch.enable_grad():
        return _Kept.apply(torch.zeros(0, requires_grad=True), *tensors).grad_fn


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, *tensors):
        ctx.save_for_backward(*tensors)
        return anchor.new_zeros(0)

    @staticmethod
    def backward(ctx, _grad):
        raise AssertionError("nothing is computed from what it returns")
