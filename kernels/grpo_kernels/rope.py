"""Rotary position embedding of queries and keys, fused with their optional RMSNorm (QK-norm).
Knows nothing of attention or of how the angles are chosen.

Axes: N tokens, H heads, E head size, R <= E rotated elements. The rotation pairs element i with i + R / 2:

    y_i = n_i cos_i - n_{i+R/2} sin_i        y_{i+R/2} = n_{i+R/2} cos_i + n_i sin_i
    n = x, or the RMSNorm of a head's E elements, x / sqrt(mean(x^2) + eps) (weight + offset); elements from R on: y = n

(Su et al. 2021, arXiv:2104.09864, equation 34, with the pairs of Hugging Face's models.)
The gradient of a rotation is the opposite rotation, of the norm that of `rms_norm`; the norm is computed again from x.
All in float32, rounded once. Inputs are read where they lie, e.g. as columns of a fused projection's output.

Floor in elements: 2 N H E forward; 2 N H E backward, 3 N H E with the norm.
"""

import torch
from torch import Tensor

from grpo_kernels.dispatch import Impl, choose, num_multiprocessors, tl, triton


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
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # [N, Hq, E], [N, Hk, E]
    """Queries and keys, normed where a norm's weight is given, rotated by each token's angles.

    Differentiable in q, k and the norms' weights. Hugging Face's cos and sin [1, N, R] repeat their halves: give
    `cos[0, :, : R // 2]`.
    """
    _check(q, k, cos, sin, q_norm, k_norm)
    tensors = [tensor for tensor in (q, k, q_norm, k_norm) if tensor is not None]
    if choose("rope", impl, *tensors) == "torch":
        return _torch_rope(q, cos, sin, q_norm, eps, offset), _torch_rope(k, cos, sin, k_norm, eps, offset)
    return _rope_op(q, cos, sin, q_norm, eps, offset), _rope_op(k, cos, sin, k_norm, eps, offset)


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


def _torch_rope(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    n = x.to(compute)
    if weight is not None:
        n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps) * (weight.to(compute) + offset)
    half = cos.shape[1]
    cos, sin = cos.to(compute)[:, None, :], sin.to(compute)[:, None, :]
    first, second, rest = n[..., :half], n[..., half : 2 * half], n[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)


# The kernel, as autograd and torch.compile see it.


@torch.library.custom_op("grpo_kernels::rope", mutates_args=())
def _rope_op(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    rotated = x.new_empty(x.shape)
    if x.numel() > 0:
        x = _last_contiguous(x)
        shape = _shape(x, cos)
        _forward_kernel[(triton.cdiv(x.shape[0] * x.shape[1], shape["ROWS"]),)](
            x, cos, sin, cos if weight is None else weight, rotated, *_sizes(x, cos, sin), eps, offset,
            NORM=weight is not None, **shape,
        )  # fmt: skip
    return rotated


@_rope_op.register_fake
def _(x, cos, sin, weight, eps, offset):
    return x.new_empty(x.shape)


@torch.library.custom_op("grpo_kernels::rope_backward", mutates_args=())
def _rope_backward_op(
    grad_rotated: Tensor,
    x: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    weight_is_trained: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, H, E] and of the weight [E], the latter empty unless it is trained."""
    E = grad_rotated.shape[2]
    grad = grad_rotated.new_empty(grad_rotated.shape)
    if grad_rotated.numel() == 0:
        return grad, grad.new_zeros(E if weight_is_trained else 0)
    grad_rotated = _last_contiguous(grad_rotated)
    x = grad_rotated if x is None else _last_contiguous(x)
    shape = _shape(x, cos)
    programs = triton.cdiv(x.shape[0] * x.shape[1], shape["ROWS"])
    if weight_is_trained:
        programs = min(programs, 4 * num_multiprocessors(x.device))
    partial_sums = torch.zeros(programs if weight_is_trained else 0, E, dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        grad_rotated, x, cos, sin, cos if weight is None else weight, grad, partial_sums,
        *_sizes(x, cos, sin), grad_rotated.stride(0), grad_rotated.stride(1), programs, eps, offset,
        NORM=weight is not None, WEIGHT=weight_is_trained, **shape,
    )  # fmt: skip
    return grad, partial_sums.sum(0).to(grad.dtype)


@_rope_backward_op.register_fake
def _(grad_rotated, x, cos, sin, weight, eps, offset, weight_is_trained):
    return grad_rotated.new_empty(grad_rotated.shape), grad_rotated.new_empty(
        grad_rotated.shape[2] if weight_is_trained else 0
    )


def _setup_context(ctx, inputs, output) -> None:
    x, cos, sin, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(None if weight is None else x, cos, sin, weight)


def _backward(ctx, grad_rotated: Tensor):
    x, cos, sin, weight = ctx.saved_tensors
    weight_is_trained = weight is not None and ctx.needs_input_grad[3]
    grad, grad_weight = _rope_backward_op(grad_rotated, x, cos, sin, weight, ctx.eps, ctx.offset, weight_is_trained)
    return grad, None, None, grad_weight.to(weight.dtype) if weight_is_trained else None, None, None


_rope_op.register_autograd(_backward, setup_context=_setup_context)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _shape(x: Tensor, cos: Tensor) -> dict[str, int]:
    """Blocks for the rotated half and for what is passed through, and heads to a program: about 2048 elements."""
    half, passed = cos.shape[1], x.shape[2] - 2 * cos.shape[1]
    block = triton.next_power_of_2(half)
    return {
        "HALF": block,
        "PASSED": triton.next_power_of_2(passed) if passed > 0 else 0,
        "ROWS": max(1, 1024 // block),
        "num_warps": 4,
    }


def _sizes(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[int, ...]:
    N, H, E = x.shape
    return N * H, H, E, cos.shape[1], x.stride(0), x.stride(1), cos.stride(0), sin.stride(0)


@triton.jit
def _load(x, offsets, mask):
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x, cos, sin, weight, rotated,
    num_rows, H, E, half, token_stride, head_stride, cos_stride, sin_stride, eps, offset,
    NORM: tl.constexpr, HALF: tl.constexpr, PASSED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # A row is one head of one token.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = rows // H, rows % H
    x += token * token_stride + head * head_stride
    rotated += rows * E
    columns = tl.arange(0, HALF)[None, :]
    mask = (rows < num_rows) & (columns < half)
    first = _load(x, columns, mask)
    second = _load(x, half + columns, mask)
    squares = tl.sum(first * first + second * second, 1)
    if PASSED > 0:
        passed_columns = 2 * half + tl.arange(0, PASSED)[None, :]
        passed_mask = (rows < num_rows) & (passed_columns < E)
        passed = _load(x, passed_columns, passed_mask)
        squares += tl.sum(passed * passed, 1)
    if NORM:
        scale = (1.0 / tl.sqrt(squares / E + eps))[:, None]
        first *= scale * (_load(weight, columns, columns < half) + offset)
        second *= scale * (_load(weight, half + columns, columns < half) + offset)
    c = _load(cos, token * cos_stride + columns, mask)
    s = _load(sin, token * sin_stride + columns, mask)
    dtype = rotated.dtype.element_ty
    tl.store(rotated + columns, (first * c - second * s).to(dtype), mask=mask)
    tl.store(rotated + half + columns, (second * c + first * s).to(dtype), mask=mask)
    if PASSED > 0:
        if NORM:
            passed *= scale * (_load(weight, passed_columns, passed_columns < E) + offset)
        tl.store(rotated + passed_columns, passed.to(dtype), mask=passed_mask)


@triton.jit
def _backward_kernel(
    grad_rotated, x, cos, sin, weight, grad, partial_sums,
    num_rows, H, E, half, token_stride, head_stride, cos_stride, sin_stride,
    grad_token_stride, grad_head_stride, num_programs, eps, offset,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, HALF: tl.constexpr, PASSED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    PASSED_OR_ONE: tl.constexpr = PASSED if PASSED > 0 else 1
    columns = tl.arange(0, HALF)[None, :]
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
        grad_first = _load(from_grad, columns, mask)
        grad_second = _load(from_grad, half + columns, mask)
        first_grad = grad_first * c + grad_second * s
        second_grad = grad_second * c - grad_first * s
        if PASSED > 0:
            passed_grad = _load(from_grad, passed_columns, passed_mask)
        if NORM:
            from_x = x + token * token_stride + head * head_stride
            first = _load(from_x, columns, mask)
            second = _load(from_x, half + columns, mask)
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
            first_grad *= _load(weight, columns, columns < half) + offset
            second_grad *= _load(weight, half + columns, columns < half) + offset
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
        tl.store(to_grad + columns, first_grad.to(dtype), mask=mask)
        tl.store(to_grad + half + columns, second_grad.to(dtype), mask=mask)
        if PASSED > 0:
            tl.store(to_grad + passed_columns, passed_grad.to(dtype), mask=passed_mask)
    if WEIGHT:
        partial_sums += tl.program_id(0) * E
        tl.store(partial_sums + columns, tl.sum(first_sum, 0)[None, :], mask=columns < half)
        tl.store(partial_sums + half + columns, tl.sum(second_sum, 0)[None, :], mask=columns < half)
        if PASSED > 0:
            tl.store(partial_sums + passed_columns, tl.sum(passed_sum, 0)[None, :], mask=passed_columns < E)
