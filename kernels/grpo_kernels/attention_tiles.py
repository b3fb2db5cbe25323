"""Group attention with a sliding window or a soft cap on its scores: one Triton kernel forward, two backward.
Knows nothing of projections or positions' embedding.

Axes: N packed tokens, Hq query heads, Hk key heads, E head size. For a query at position i of its sequence and a key at
position j <= i, with w the window and c the cap:

    s_ij = a q_i . k_j        t_ij = c tanh(s_ij / c)  (or s_ij)        allowed where i - j < w
    p_ij = exp(t_ij - l_i)    out_i = sum_j p_ij v_j                    l_i = log sum_j exp(t_ij)
    dt_ij = p_ij (dout_i . v_j - dout_i . out_i)                        ds_ij = dt_ij (1 - (t_ij / c)^2)
    dq_i = a sum_j ds_ij k_j          dk_j = a sum_i ds_ij q_i          dv_j = sum_i p_ij dout_i

(Dao 2023, arXiv:2307.08691, algorithms 1 and 2; the cap: Gemma Team 2024, arXiv:2408.00118, section 2.)

A completion's queries go over the keys of its prompt, where they lie, and over its own; a prompt's keys gather their
gradient from the prompt's queries and from those of all completions of its group, in one order, without atomics. So no
key is copied, and tiles out of the window are passed over.
"""

from typing import Any

import torch
from torch import Tensor

from grpo_kernels.dispatch import Operator, cdiv, next_power_of_2, shared_memory, tl, triton
from grpo_kernels.layout import GroupLayout
from grpo_kernels.logprob_head import tanh

NO_WINDOW = 2**30  # tokens, more than any sequence has
SMALL_SHARED_MEMORY = 96 * 1024  # bytes of a program; Turing has 64 KiB
LAST_POSITION = tl.constexpr(2**30)


def tiled_attention(
    q: Tensor,  # [N, Hq, E]
    k: Tensor,  # [N, Hk, E]
    v: Tensor,  # [N, Hk, E]
    layout: GroupLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # [N, Hq, E]
    """`group_attention` by the kernels of this file."""
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    segments = layout.spans, layout.positions_of_tokens, layout.longest[0]
    return _tiled_op(q, k, v, *segments, scale, NO_WINDOW if window is None else window, softcap or 0.0)[0]


# The kernels, as autograd and torch.compile see them. spans: GroupLayout.spans [S, 6]; positions [N]; longest: tokens
# of the longest prompt or completion; softcap: 0 for none.


def _launch_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    positions: Tensor,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The attention [N, Hq, E] and l [Hq, N] in float32."""
    N, Hq, E = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(Hq, N, dtype=torch.float32, device=q.device)
    tiles = _tiles(E, q.device, backward=False)
    blocks = cdiv(longest, tiles["QUERIES"])
    _forward_kernel[(blocks * len(spans), Hq)](
        q, k, v, out, lse, spans, N, E, Hq // k.shape[1], blocks, *_strides(q, k, v),
        scale, window, softcap, CAPPED=softcap != 0.0, **tiles,
    )  # fmt: skip
    return out, lse


def _fake_tiled(q, k, v, spans, positions, longest, scale, window, softcap):
    return q.new_empty(q.shape), torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


def _launch_tiled_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spans: Tensor,
    positions: Tensor,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    N, Hq, E = q.shape
    grad = grad.contiguous()
    along = (grad.float() * out.float()).sum(-1).t().contiguous()  # dout . out, [Hq, N]
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    tiles, group = _tiles(E, q.device, backward=True), Hq // k.shape[1]
    settings = scale, window, softcap
    blocks = cdiv(longest, tiles["QUERIES"])
    _query_gradient_kernel[(blocks * len(spans), Hq)](
        q, k, v, grad, lse, along, grad_q, spans, N, E, group, blocks, *_strides(q, k, v), *settings,
        CAPPED=softcap != 0.0, **tiles,
    )  # fmt: skip
    blocks = cdiv(longest, tiles["KEYS"])
    _key_gradient_kernel[(blocks * len(spans), k.shape[1])](
        q, k, v, grad, lse, along, grad_k, grad_v, spans, positions, N, E, group, blocks, *_strides(q, k, v), *settings,
        CAPPED=softcap != 0.0, **tiles,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def _fake_tiled_backward(grad, q, k, v, out, lse, spans, positions, longest, scale, window, softcap):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, spans, positions, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, spans, positions)


def _backward(ctx: Any, grad: Tensor | None, _lse: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 9
    return (*_tiled_backward_op(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 6)


_tiled_op = Operator("tiled_attention", _launch_tiled, _fake_tiled)
_tiled_backward_op = Operator("tiled_attention_backward", _launch_tiled_backward, _fake_tiled_backward)
_tiled_op.differentiate(_setup_context, _backward)


def _tiles(E: int, device: torch.device, backward: bool) -> dict[str, int]:
    """Tokens of a tile of queries and of keys, by what registers and shared memory hold of E columns."""
    block = max(16, next_power_of_2(E))
    queries, keys = (64, 64) if block <= 64 else (64, 32) if block <= 128 else (32, 32)
    if backward:
        queries = min(queries, 32)
    if shared_memory(device) < SMALL_SHARED_MEMORY and block > 64:
        queries, keys = 16, 16
    launched = {"num_warps": 4, "num_stages": 2} if block <= 128 else {"num_warps": 8, "num_stages": 1}
    return {"COLUMNS": block, "QUERIES": queries, "KEYS": keys, **launched}


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


@triton.jit
def _rows(x, tokens, inside, columns, E, token_stride):
    """x's rows of these tokens, [T, COLUMNS], 0 where there is none."""
    offsets = tokens.to(tl.int64)[:, None] * token_stride + columns[None, :]
    return tl.load(x + offsets, mask=inside[:, None] & (columns < E)[None, :], other=0.0)


@triton.jit
def _scores(q, k, distance, inside, scale, window, softcap, CAPPED: tl.constexpr):
    """t [Q, K], -inf where a pair is not allowed; distance: i - j of each pair."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:
        s = softcap * tanh(s / softcap)
    return tl.where(inside & (distance >= 0) & (distance < window), s, float("-inf"))


@triton.jit
def _gradient_of_scores(t, p, grad, v, along, softcap, CAPPED: tl.constexpr):
    """ds [Q, K] of t and p [Q, K], dout [Q, E], v [K, E] and dout . out [Q]."""
    d = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - along[:, None])
    if CAPPED:
        # Where a pair is not allowed t is -inf and p 0: the slope there is of no meaning, and must not be NaN.
        bent = tl.where(p > 0, t / softcap, 0.0)
        d = d * (1.0 - bent * bent)
    return d


@triton.jit
def _attend(
    q, positions, k, v, first, num_keys, low, high, highest, total, gathered, columns, E, k_stride, v_stride,
    scale, window, softcap, CAPPED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Go on over keys low to high of num_keys, whose tokens begin at `first`. positions [Q]: of queries, counted from
    the first of these keys."""
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        there = key < num_keys
        keys = _rows(k, first + key, there, columns, E, k_stride)
        values = _rows(v, first + key, there, columns, E, v_stride)
        t = _scores(q, keys, positions[:, None] - key[None, :], there[None, :], scale, window, softcap, CAPPED)
        higher = tl.maximum(highest, tl.max(t, 1))
        p = tl.exp(t - higher[:, None])
        fading = tl.exp(highest - higher)
        total = total * fading + tl.sum(p, 1)
        gathered = gathered * fading[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        highest = higher
    return highest, total, gathered


@triton.jit(do_not_specialize=["N", "blocks", "window"])
def _forward_kernel(
    q, k, v, out, lse, spans, N, E, group, blocks,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, window, softcap,
    CAPPED: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    span = spans + (tl.program_id(0) // blocks) * 6
    begin = (tl.program_id(0) % blocks) * QUERIES  # of this tile's queries, in their segment
    first, length = tl.load(span), tl.load(span + 1)
    prompt, prompt_length = tl.load(span + 2), tl.load(span + 3)
    head = tl.program_id(1).to(tl.int64)
    if begin < length:
        q += head * q_head_stride
        k += head // group * k_head_stride
        v += head // group * v_head_stride
        columns = tl.arange(0, COLUMNS)
        row = begin + tl.arange(0, QUERIES)
        inside = row < length
        queries = _rows(q, first + row, inside, columns, E, q_stride)
        # Finite: a row of which no key of a tile is allowed stays as it is.
        highest = tl.full([QUERIES], -1e30, tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        gathered = tl.zeros([QUERIES, COLUMNS], tl.float32)
        low = tl.maximum(prompt_length + begin - window + 1, 0) // KEYS * KEYS
        highest, total, gathered = _attend(
            queries, prompt_length + row, k, v, prompt, prompt_length, low, prompt_length, highest, total, gathered,
            columns, E, k_stride, v_stride, scale, window, softcap, CAPPED, KEYS,
        )  # fmt: skip
        low = tl.maximum(begin - window + 1, 0) // KEYS * KEYS
        highest, total, gathered = _attend(
            queries, row, k, v, first, length, low, tl.minimum(begin + QUERIES, length), highest, total, gathered,
            columns, E, k_stride, v_stride, scale, window, softcap, CAPPED, KEYS,
        )  # fmt: skip
        heads = tl.num_programs(1).to(tl.int64)
        offsets = ((first + row).to(tl.int64)[:, None] * heads + head) * E + columns[None, :]
        gathered = gathered / total[:, None]
        tl.store(out + offsets, gathered.to(out.dtype.element_ty), mask=inside[:, None] & (columns < E)[None, :])
        tl.store(lse + head * N + first + row, highest + tl.log(total), mask=inside)


@triton.jit
def _pull(
    q, grad, lse, along, positions, k, v, first, num_keys, low, high, summed, columns, E, k_stride, v_stride,
    scale, window, softcap, CAPPED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add ds . k over keys low to high, as in `_attend`."""
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        there = key < num_keys
        keys = _rows(k, first + key, there, columns, E, k_stride)
        values = _rows(v, first + key, there, columns, E, v_stride)
        t = _scores(q, keys, positions[:, None] - key[None, :], there[None, :], scale, window, softcap, CAPPED)
        d = _gradient_of_scores(t, tl.exp(t - lse[:, None]), grad, values, along, softcap, CAPPED)
        summed += tl.dot(d.to(keys.dtype), keys, input_precision="ieee")
    return summed


@triton.jit(do_not_specialize=["N", "blocks", "window"])
def _query_gradient_kernel(
    q, k, v, grad, lse, along, grad_q, spans, N, E, group, blocks,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, window, softcap,
    CAPPED: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    span = spans + (tl.program_id(0) // blocks) * 6
    begin = (tl.program_id(0) % blocks) * QUERIES
    first, length = tl.load(span), tl.load(span + 1)
    prompt, prompt_length = tl.load(span + 2), tl.load(span + 3)
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1).to(tl.int64)
    if begin < length:
        q += head * q_head_stride
        k += head // group * k_head_stride
        v += head // group * v_head_stride
        columns = tl.arange(0, COLUMNS)
        row = begin + tl.arange(0, QUERIES)
        inside = row < length
        queries = _rows(q, first + row, inside, columns, E, q_stride)
        grads = _rows(grad + head * E, first + row, inside, columns, E, heads * E)
        row_lse = tl.load(lse + head * N + first + row, mask=inside, other=0.0)
        row_along = tl.load(along + head * N + first + row, mask=inside, other=0.0)
        summed = tl.zeros([QUERIES, COLUMNS], tl.float32)
        low = tl.maximum(prompt_length + begin - window + 1, 0) // KEYS * KEYS
        summed = _pull(
            queries, grads, row_lse, row_along, prompt_length + row, k, v, prompt, prompt_length, low, prompt_length,
            summed, columns, E, k_stride, v_stride, scale, window, softcap, CAPPED, KEYS,
        )  # fmt: skip
        low = tl.maximum(begin - window + 1, 0) // KEYS * KEYS
        summed = _pull(
            queries, grads, row_lse, row_along, row, k, v, first, length, low, tl.minimum(begin + QUERIES, length),
            summed, columns, E, k_stride, v_stride, scale, window, softcap, CAPPED, KEYS,
        )  # fmt: skip
        offsets = ((first + row).to(tl.int64)[:, None] * heads + head) * E + columns[None, :]
        summed = (summed * scale).to(grad_q.dtype.element_ty)
        tl.store(grad_q + offsets, summed, mask=inside[:, None] & (columns < E)[None, :])


@triton.jit
def _push(
    q, grad, lse, along, token, inside, distance, keys, values, there, sum_k, sum_v, columns, E, q_stride, grad_stride,
    scale, window, softcap, CAPPED: tl.constexpr,
):  # fmt: skip
    """Add what these query tokens [Q] give to dk and dv [K, E] of a tile of keys."""
    queries = _rows(q, token, inside, columns, E, q_stride)
    grads = _rows(grad, token, inside, columns, E, grad_stride)
    allowed = inside[:, None] & there[None, :]
    t = _scores(queries, keys, distance, allowed, scale, window, softcap, CAPPED)
    p = tl.exp(t - tl.load(lse + token, mask=inside, other=0.0)[:, None])
    sum_v += tl.dot(tl.trans(p.to(grads.dtype)), grads, input_precision="ieee")
    d = _gradient_of_scores(
        t, p, grads, values, tl.load(along + token, mask=inside, other=0.0), softcap, CAPPED
    )  # fmt: skip
    sum_k += tl.dot(tl.trans(d.to(queries.dtype)), queries, input_precision="ieee")
    return sum_k, sum_v


@triton.jit(do_not_specialize=["N", "blocks", "window"])
def _key_gradient_kernel(
    q, k, v, grad, lse, along, grad_k, grad_v, spans, positions, N, E, group, blocks,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, window, softcap,
    CAPPED: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    span = spans + (tl.program_id(0) // blocks) * 6
    begin = (tl.program_id(0) % blocks) * KEYS  # of this tile's keys, in their segment
    first, length = tl.load(span), tl.load(span + 1)
    readers, num_readers = tl.load(span + 4), tl.load(span + 5)
    key_head = tl.program_id(1).to(tl.int64)
    key_heads = tl.num_programs(1).to(tl.int64)
    if begin < length:
        columns = tl.arange(0, COLUMNS)
        key = begin + tl.arange(0, KEYS)
        there = key < length
        last = tl.minimum(begin + KEYS, length) - 1
        keys = _rows(k + key_head * k_head_stride, first + key, there, columns, E, k_stride)
        values = _rows(v + key_head * v_head_stride, first + key, there, columns, E, v_stride)
        sum_k = tl.zeros([KEYS, COLUMNS], tl.float32)
        sum_v = tl.zeros([KEYS, COLUMNS], tl.float32)
        for head in range(key_head * group, key_head * group + group):
            from_q, from_grad = q + head * q_head_stride, grad + head * E
            from_lse, from_along = lse + head * N, along + head * N
            # Its own segment's queries, from these keys on.
            for start in range(begin // QUERIES * QUERIES, tl.minimum(last + window, length), QUERIES):
                row = start + tl.arange(0, QUERIES)
                distance = row[:, None] - key[None, :]
                sum_k, sum_v = _push(
                    from_q, from_grad, from_lse, from_along, first + row, row < length, distance, keys, values, there,
                    sum_k, sum_v, columns, E, q_stride, key_heads * group * E, scale, window, softcap, CAPPED,
                )  # fmt: skip
            # Those of the completions after it, if it is a prompt.
            for start in range(0, num_readers, QUERIES):
                row = start + tl.arange(0, QUERIES)
                inside = row < num_readers
                position = tl.load(positions + readers + row, mask=inside, other=LAST_POSITION)
                if tl.min(position) - last < window:
                    distance = position[:, None] - key[None, :]
                    sum_k, sum_v = _push(
                        from_q, from_grad, from_lse, from_along, readers + row, inside, distance, keys, values, there,
                        sum_k, sum_v, columns, E, q_stride, key_heads * group * E, scale, window, softcap, CAPPED,
                    )  # fmt: skip
        offsets = ((first + key).to(tl.int64)[:, None] * key_heads + key_head) * E + columns[None, :]
        stored = there[:, None] & (columns < E)[None, :]
        tl.store(grad_k + offsets, (sum_k * scale).to(grad_k.dtype.element_ty), mask=stored)
        tl.store(grad_v + offsets, sum_v.to(grad_v.dtype.element_ty), mask=stored)
