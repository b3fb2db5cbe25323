"""Rotary position embedding of queries and keys, fused with their optional RMSNorm (QK-norm).
Knows nothing of attention or of how the angles are chosen.

Axes: N tokens, H heads, E head size, R <= E rotated elements. The rotation pairs element i with i + R / 2:

    y_i = n_i cos_i - n_{i+R/2} sin_i        y_{i+R/2} = n_{i+R/2} cos_i + n_i sin_i
    n = x, or the RMSNorm of a head's E elements, x / sqrt(mean(x^2) + eps) (weight + offset); elements from R on: y = n

(Su et al. 2021, arXiv:2104.09864, equation 34, with the pairs of most of Hugging Face's models.) Interleaved, as in the
paper and in GLM, the pairs are the elements 2 i and 2 i + 1.
The gradient of a rotation is the opposite rotation, of the norm that of `rms_norm`; the norm is computed again from x.
All in float32, rounded once. Inputs are read where they lie, e.g. as columns of a fused projection's output.

Floor in elements: 2 N H E forward; 2 N H E backward, 3 N H E with the norm.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from grpo_kernels.dispatch import (
    Impl,
    Operator,
    cdiv,
    choose,
    isolated,
    next_power_of_2,
    num_multiprocessors,
    tl,
    triton,
)


@isolated
def rope(
    q: Tensor,  # [N, Hq, E]
    k: Tensor,  # [N, Hk, E]
    cos: Tensor,  # [N, R / 2]
    sin: Tensor,  # [N, R / 2]
    *,
    q_norm: Tensor | None = None,  # [E]
    k_norm: Tensor | None = None,  # [E]
    eps: float = 1e-6,
    offset: float = 0.0,
    interleaved: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # [N, Hq, E], [N, Hk, E]
    """Queries and keys, normed where a norm's weight is given, rotated by each token's angles.

    Differentiable in q, k and the norms' weights. Hugging Face's cos and sin [1, N, R] repeat their halves: give
    `cos[0, :, : R // 2]`.
    """
    _check(q, k, cos, sin, q_norm, k_norm)
    tensors = [tensor for tensor in (q, k, q_norm, k_norm) if tensor is not None]
    if choose("rope", impl, *tensors) == "torch":
        spread, swapped = (_both_of_pairs, _pairs_swapped) if interleaved else (_both_halves, _halves_swapped)
        angles = spread(cos, sin, torch.float64 if q.dtype == torch.float64 else torch.float32)
        settings = swapped, eps, offset
        return _torch_rope(q, *angles, q_norm, *settings), _torch_rope(k, *angles, k_norm, *settings)
    return _rope_op(q, k, cos, sin, q_norm, k_norm, eps, offset, interleaved)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"q is {list(q.shape)} and k {list(k.shape)}; give [N, Hq, E] and [N, Hk, E].")
    N, _, E = q.shape
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[0] != N or not 0 < 2 * cos.shape[1] <= E:
        raise ValueError(
            f"cos is {list(cos.shape)} and sin {list(sin.shape)}; give both [{N}, R / 2] with R at most {E}."
        )
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and norm.shape != (E,):
            raise ValueError(f"{name} is {list(norm.shape)}; give [{E}].")


def _torch_rope(
    x: Tensor,
    both_cos: Tensor,
    both_sin: Tensor,
    weight: Tensor | None,
    swapped: Callable[[Tensor], Tensor],
    eps: float,
    offset: float,
) -> Tensor:
    """x [N, H, E] with what its elements, and those that `swapped` gives in their places, are multiplied by."""
    n = x.to(both_cos.dtype)
    if weight is not None:
        n = torch.nn.functional.rms_norm(n, n.shape[-1:], weight.to(n.dtype) + offset, eps)
    num_passed = n.shape[-1] - both_cos.shape[-1]
    if num_passed == 0:
        return (n * both_cos + swapped(n) * both_sin).to(x.dtype)
    rotated, passed = n.split([both_cos.shape[-1], num_passed], dim=-1)
    return torch.cat([rotated * both_cos + swapped(rotated) * both_sin, passed], -1).to(x.dtype)


def _both_halves(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a head's R rotated elements, and they with their halves exchanged, are multiplied by, each [N, 1, R]."""
    cos, sin = cos.to(dtype), sin.to(dtype)
    return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


def _halves_swapped(x: Tensor) -> Tensor:
    """The last axis with its halves exchanged."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], -1)


def _both_of_pairs(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`_both_halves` where the elements of a pair are beside each other."""
    cos, sin = cos.to(dtype), sin.to(dtype)
    return cos.repeat_interleave(2, -1)[:, None], torch.stack([-sin, sin], -1).flatten(-2)[:, None]


def _pairs_swapped(x: Tensor) -> Tensor:
    """The last axis with the elements of each pair exchanged."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


# The kernel, as autograd and torch.compile see it.


def _launch_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    settings = eps, offset, interleaved
    return _rotate(q, cos, sin, q_norm, *settings), _rotate(k, cos, sin, k_norm, *settings)


def _fake_rope(q, k, cos, sin, q_norm, k_norm, eps, offset, interleaved):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _launch_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    offset: float,
    interleaved: bool,
    norms_are_trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q [N, Hq, E], k [N, Hk, E] and of their norms' weights, [0] unless these are given and trained."""
    settings = eps, offset, interleaved, norms_are_trained
    q_grads = _rotate_back(grad_q, q, cos, sin, q_norm, *settings)
    k_grads = _rotate_back(grad_k, k, cos, sin, k_norm, *settings)
    return q_grads[0], k_grads[0], q_grads[1], k_grads[1]


def _fake_rope_backward(grad_q, grad_k, q, k, cos, sin, q_norm, k_norm, eps, offset, interleaved, norms_are_trained):
    grads = grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)
    norms = (q_norm if norms_are_trained else None), (k_norm if norms_are_trained else None)
    pairs = zip(grads, norms, strict=True)
    return *grads, *(grad.new_empty(0) if norm is None else norm.new_empty(norm.shape) for grad, norm in pairs)


def _setup_context(ctx, inputs, output) -> None:
    q, k, cos, sin, q_norm, k_norm, *ctx.settings = inputs
    # A rotation needs no input for its gradient, a norm does.
    ctx.save_for_backward(None if q_norm is None else q, None if k_norm is None else k, cos, sin, q_norm, k_norm)


def _backward(ctx, grad_q: Tensor, grad_k: Tensor):
    trained = ctx.needs_input_grad[4:6]
    grads = _rope_backward_op(grad_q, grad_k, *ctx.saved_tensors, *ctx.settings, any(trained))
    grad_norms = [grad if is_trained else None for grad, is_trained in zip(grads[2:], trained, strict=True)]
    return grads[0], grads[1], None, None, *grad_norms, None, None, None


_rope_op = Operator("rope", _launch_rope, _fake_rope)
_rope_backward_op = Operator("rope_backward", _launch_rope_backward, _fake_rope_backward)
_rope_op.differentiate(_setup_context, _backward)


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, offset: float, interleaved: bool
) -> Tensor:
    rotated = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        x, cos, sin = (_last_contiguous(tensor) for tensor in (x, cos, sin))
        weight = None if weight is None else weight.contiguous()
        shape = _shape(x.shape[2], cos.shape[1])
        _forward_kernel[(cdiv(x.shape[0] * x.shape[1], shape["ROWS"]),)](
            x, cos, sin, cos if weight is None else weight, rotated, *_sizes(x, cos, sin), eps, offset,
            NORM=weight is not None, INTERLEAVED=interleaved, **shape,
        )  # fmt: skip
    return rotated


def _rotate_back(
    grad_rotated: Tensor,
    x: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    interleaved: bool,
    norm_is_trained: bool,
) -> tuple[Tensor, Tensor]:
    E = grad_rotated.shape[2]
    sums_weight = norm_is_trained and weight is not None
    grad = torch.empty_like(grad_rotated, memory_format=torch.contiguous_format)
    if grad_rotated.numel() == 0:
        return grad, grad.new_empty(0) if weight is None or not norm_is_trained else weight.new_zeros(E)
    grad_rotated, cos, sin = (_last_contiguous(tensor) for tensor in (grad_rotated, cos, sin))
    weight = None if weight is None else weight.contiguous()
    x = grad_rotated if x is None else _last_contiguous(x)
    shape = _shape(E, cos.shape[1])
    programs = cdiv(x.shape[0] * x.shape[1], shape["ROWS"])
    if sums_weight:
        programs = min(programs, 4 * num_multiprocessors(x.device))
    partial_sums = torch.empty(programs if sums_weight else 0, E, dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        grad_rotated, x, cos, sin, cos if weight is None else weight, grad, partial_sums,
        *_sizes(x, cos, sin), grad_rotated.stride(0), grad_rotated.stride(1), programs, eps, offset,
        NORM=weight is not None, WEIGHT=sums_weight, INTERLEAVED=interleaved, **shape,
    )  # fmt: skip
    if weight is None or not norm_is_trained:
        return grad, grad.new_empty(0)
    return grad, partial_sums.sum(0).to(weight.dtype)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _shape(E: int, half: int) -> dict[str, int]:
    """Blocks for the rotated half and for what is passed through, and heads to a program: about 2048 elements."""
    passed = E - 2 * half
    block = next_power_of_2(half)
    return {
        "HALF": block,
        "PASSED": next_power_of_2(passed) if passed > 0 else 0,
        "ROWS": max(1, 1024 // block),
        "num_warps": 4,
    }


def _sizes(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[int, ...]:
    N, H, E = x.shape
    return N * H, H, E, cos.shape[1], x.stride(0), x.stride(1), cos.stride(0), sin.stride(0)


@triton.jit
def _load(x, offsets, mask):
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x, cos, sin, weight, rotated,
    num_rows, H, E, half, token_stride, head_stride, cos_stride, sin_stride, eps, offset,
    NORM: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, PASSED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # A row is one head of one token.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = rows // H, rows % H
    x += token * token_stride + head * head_stride
    rotated += rows * E
    columns = tl.arange(0, HALF)[None, :]
    one = 2 * columns if INTERLEAVED else columns
    other = one + 1 if INTERLEAVED else half + columns
    mask = (rows < num_rows) & (columns < half)
    first = _load(x, one, mask)
    second = _load(x, other, mask)
    squares = tl.sum(first * first + second * second, 1)
    if PASSED > 0:
        passed_columns = 2 * half + tl.arange(0, PASSED)[None, :]
        passed_mask = (rows < num_rows) & (passed_columns < E)
        passed = _load(x, passed_columns, passed_mask)
        squares += tl.sum(passed * passed, 1)
    if NORM:
        scale = (1.0 / tl.sqrt(squares / E + eps))[:, None]
        first *= scale * (_load(weight, one, columns < half) + offset)
        second *= scale * (_load(weight, other, columns < half) + offset)
    c = _load(cos, token * cos_stride + columns, mask)
    s = _load(sin, token * sin_stride + columns, mask)
    dtype = rotated.dtype.element_ty
    tl.store(rotated + one, (first * c - second * s).to(dtype), mask=mask)
    tl.store(rotated + other, (second * c + first * s).to(dtype), mask=mask)
    if PASSED > 0:
        if NORM:
            passed *= scale * (_load(weight, passed_columns, passed_columns < E) + offset)
        tl.store(rotated + passed_columns, passed.to(dtype), mask=passed_mask)


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def _backward_kernel(
    grad_rotated, x, cos, sin, weight, grad, partial_sums,
    num_rows, H, E, half, token_stride, head_stride, cos_stride, sin_stride,
    grad_token_stride, grad_head_stride, num_programs, eps, offset,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr, PASSED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    PASSED_OR_ONE: tl.constexpr = PASSED if PASSED > 0 else 1
    columns = tl.arange(0, HALF)[None, :]
    one = 2 * columns if INTERLEAVED else columns
    other = one + 1 if INTERLEAVED else half + columns
    passed_columns = 2 * half + tl.arange(0, PASSED_OR_ONE)[None, :]
    first_sum = tl.zeros([ROWS, HALF], tl.float32)
    second_sum = tl.zeros([ROWS, HALF], tl.float32)
    passed_sum = tl.zeros([ROWS, PASSED_OR_ONE], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), num_programs):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        token, head = rows // H, rows % H
        mask = (rows < num_rows) & (columns < half)
        passed_mask = (rows < num_rows) & (passed_columns < E)
        from_grad = grad_rotated + token * grad_token_stride + head * grad_head_stride
        to_grad = grad + rows * E
        c = _load(cos, token * cos_stride + columns, mask)
        s = _load(sin, token * sin_stride + columns, mask)
        grad_first = _load(from_grad, one, mask)
        grad_second = _load(from_grad, other, mask)
        first_grad = grad_first * c + grad_second * s
        second_grad = grad_second * c - grad_first * s
        if PASSED > 0:
            passed_grad = _load(from_grad, passed_columns, passed_mask)
        if NORM:
            from_x = x + token * token_stride + head * head_stride
            first = _load(from_x, one, mask)
            second = _load(from_x, other, mask)
            squares = tl.sum(first * first + second * second, 1)
            if PASSED > 0:
                passed = _load(from_x, passed_columns, passed_mask)
                squares += tl.sum(passed * passed, 1)
            scale = (1.0 / tl.sqrt(squares / E + eps))[:, None]
            first *= scale
            second *= scale
            if WEIGHT:
                first_sum += first_grad * first
                second_sum += second_grad * second
            first_grad *= _load(weight, one, columns < half) + offset
            second_grad *= _load(weight, other, columns < half) + offset
            along = tl.sum(first_grad * first + second_grad * second, 1)
            if PASSED > 0:
                passed *= scale
                if WEIGHT:
                    passed_sum += passed_grad * passed
                passed_grad *= _load(weight, passed_columns, passed_columns < E) + offset
                along += tl.sum(passed_grad * passed, 1)
            mean = (along / E)[:, None]
            first_grad = scale * (first_grad - first * mean)
            second_grad = scale * (second_grad - second * mean)
            if PASSED > 0:
                passed_grad = scale * (passed_grad - passed * mean)
        dtype = grad.dtype.element_ty
        tl.store(to_grad + one, first_grad.to(dtype), mask=mask)
        tl.store(to_grad + other, second_grad.to(dtype), mask=mask)
        if PASSED > 0:
            tl.store(to_grad + passed_columns, passed_grad.to(dtype), mask=passed_mask)
    if WEIGHT:
        partial_sums += tl.program_id(0) * E
        tl.store(partial_sums + one, tl.sum(first_sum, 0)[None, :], mask=columns < half)
        tl.store(partial_sums + other, tl.sum(second_sum, 0)[None, :], mask=columns < half)
        if PASSED > 0:
            tl.store(partial_sums + passed_columns, tl.sum(passed_sum, 0)[None, :], mask=passed_columns < E)
