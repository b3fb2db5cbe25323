"""Log-probability of the target, and entropy, of a linear head, without the [M, V] logits ever existing at once.
Knows nothing of losses: it returns both with the gradients that any loss on them needs.

Axes: M rows, D hidden size, V vocabulary, C rows of a chunk.

For a row h [D] with target y, head W [V, D], soft cap k and temperature t:

    x_v = W_v . h        s_v = k tanh(x_v / k)  (or x_v)        z_v = s_v / t           soft cap first, then temperature
    logprob = z_y - lse(z)                                      p = softmax(z)
    entropy = lse(z) - sum_v p_v z_v

The head being frozen, a loss reaches h only through those two numbers, so with c = dL/dlogprob and e = dL/dentropy

    dL/dh = c u + e w
    u = sum_v (1[v = y] - p_v) s'_v W_v / t        w = -sum_v p_v (log p_v + entropy) s'_v W_v / t

u does not depend on the loss: the forward builds it while a chunk of logits is alive ("unit gradient") and the backward
is a scaling. That is two products with the head, where recomputing the logits takes three. w needs one more.

The sums run over exp(z - r), r a reference of the row, and leave out the target, which is added in closed form:

    a = exp(z_y - r)    R = sum_{v != y} exp(z_v - r)    Z = a + R    1 - p_y = R / Z
    t u = (R s'_y W_y - sum_{v != y} exp(z_v - r) s'_v W_v) / Z

so that nothing cancels when p_y is close to 1, and r may be any number that keeps exp in range. r = z_y does, unless
the target is more than 60 nats below the largest logit, and it is known before the logits are: one pass suffices.

Two routes compute it on a GPU:
    "tiles"  Hopper and later, bfloat16: one kernel multiplies and writes exp(z - r) s' in bfloat16 as its epilogue, so
             the float32 logits never leave the registers. cuBLAS multiplies that with the head. A row outside the
             range of exp is found from the tiles' maxima and its block of rows is multiplied again with a better r.
    "rows"   everything else: cuBLAS writes float32 logits, one program a row turns them into coefficients.
"""

from typing import Literal

import torch
from torch import Tensor

from grpo_kernels.dispatch import Impl, Operator, choose, isolated
from grpo_kernels.logprob_head import allocate, value_dtype
from grpo_kernels.logprob_rows import rows_forward
from grpo_kernels.logprob_tiles import fits_tiles, tiles_forward
from grpo_kernels.logprob_torch import torch_forward, torch_recompute

# "values" keeps nothing for a backward, "unit" builds u, "unit_entropy" u and w, "recompute" serves a trained head.
Form = Literal["values", "unit", "unit_entropy", "recompute"]


@isolated
def linear_logprob(
    hidden: Tensor,  # [M, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [M] int64
    temperature: float = 1.0,
    softcap: float | None = None,
    *,
    impl: Impl = "auto",
    differentiable_entropy: bool = False,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:  # [M], [M]
    """log p(targets) and entropy, in nats, of softmax(softcap(hidden @ weight.T) / temperature).

    Both are float32 (float64 for float64 inputs), from logits accumulated in float32. Gradients flow to `hidden`, and
    to `weight` where it requires them; through the entropy only with `differentiable_entropy`, which costs one more
    product, and else the entropy is returned detached. `chunk_rows` trades speed for memory: 2 to 8 bytes of V a row.

    Raises ValueError for shapes that do not belong together, a temperature or soft cap that is not positive, and
    impl="triton" where no kernel can run. A target outside [0, V) is undefined behaviour on a GPU.
    """
    _check(hidden, weight, targets, temperature, softcap, chunk_rows)
    form = _form(hidden, weight, differentiable_entropy)
    chosen = choose("linear_logprob", impl, hidden, weight)
    logprobs, entropy, _, _, _ = _forward_op(
        hidden, weight, targets.contiguous(), temperature, softcap or 0.0, form, differentiable_entropy, chosen,
        chunk_rows or 0,
    )  # fmt: skip
    return logprobs, entropy if differentiable_entropy else entropy.detach()


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None, chunk_rows: int | None
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}; give [M, D] and [V, D].")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets is {list(targets.shape)}; give one target for each of {hidden.shape[0]} rows.")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype}; give int64, as torch.gather takes.")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; give both the same dtype.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it divides the logits, so give a positive number.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; give a positive number, or None for no cap.")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; give 1 or more, or None to have it chosen.")


def _form(hidden: Tensor, weight: Tensor, differentiable_entropy: bool) -> Form:
    if not torch.is_grad_enabled():
        return "values"
    if weight.requires_grad:
        return "recompute"
    if hidden.requires_grad:
        return "unit_entropy" if differentiable_entropy else "unit"
    return "values"


# The two operators, as torch.compile and autograd see them. `softcap` 0 means none, `chunk_rows` 0 means "choose".


def _launch_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    form: str,
    differentiable_entropy: bool,
    chosen: str,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [M], entropy [M], and what the backward needs, empty in forms that do not need it:
    t u [M, D] up to a factor of its row, that factor [M], and t w [M, D].
    """
    if chosen == "torch":
        forward = torch_forward
    else:
        forward = tiles_forward if fits_tiles(hidden, weight, form) else rows_forward
    return forward(hidden, weight, targets, temperature, softcap, form, chunk_rows)


def _fake_forward(hidden, weight, targets, temperature, softcap, form, differentiable_entropy, chosen, chunk_rows):
    return allocate(hidden, form)


def _fake_recompute(hidden, weight, targets, grad_logprobs, grad_entropy, temperature, softcap, chunk_rows):
    return torch.empty_like(hidden), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, temperature, softcap, form, differentiable_entropy, _, chunk_rows = inputs
    _, _, unit, unit_scale, unit_entropy = output
    ctx.mark_non_differentiable(unit, unit_scale, unit_entropy)
    ctx.set_materialize_grads(False)
    ctx.form, ctx.temperature, ctx.softcap, ctx.chunk_rows = form, temperature, softcap, chunk_rows
    ctx.differentiable_entropy = differentiable_entropy
    if form == "recompute":
        ctx.save_for_backward(hidden, weight, targets)
    else:
        ctx.save_for_backward(unit, unit_scale, unit_entropy)


def _backward(ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_not_differentiable):
    grad_hidden = grad_weight = None
    if ctx.form == "recompute":
        hidden, weight, targets = ctx.saved_tensors
        zero = torch.zeros(len(hidden), dtype=value_dtype(hidden), device=hidden.device)
        grad_logprobs = zero if grad_logprobs is None else grad_logprobs
        if grad_entropy is None or not ctx.differentiable_entropy:
            grad_entropy = zero
        grad_hidden, grad_weight = _recompute_op(
            hidden, weight, targets, grad_logprobs, grad_entropy, ctx.temperature, ctx.softcap, ctx.chunk_rows
        )
    else:
        unit, unit_scale, unit_entropy = ctx.saved_tensors
        if grad_logprobs is not None:
            grad_hidden = _scale_rows(unit, grad_logprobs * unit_scale / ctx.temperature)
        if grad_entropy is not None and ctx.form == "unit_entropy":
            through_entropy = _scale_rows(unit_entropy, grad_entropy / ctx.temperature)
            grad_hidden = through_entropy if grad_hidden is None else grad_hidden + through_entropy
    return grad_hidden, grad_weight, None, None, None, None, None, None, None


_forward_op = Operator("linear_logprob", _launch_forward, _fake_forward)
_recompute_op = Operator("linear_logprob_recompute", torch_recompute, _fake_recompute)
_forward_op.differentiate(_setup_context, _backward)


def _scale_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """rows [M, D] times scale [M], multiplied in the type of `scale` and rounded once."""
    return torch.mul(rows, scale[:, None], out=torch.empty_like(rows))
