"""Causal attention over packed sequences in which the completions of a group attend to one copy of their prompt.
Knows nothing of projections, positions' embedding or losses.

Axes: N packed tokens, the first P those of prompts; Hq query heads, Hk key heads (Hk divides Hq), E head size;
S gathered keys.

A completion's token attends to its group's prompt and, causally, to its own completion. Two ways, of the same pairs of
tokens: with G completions of T tokens after a prompt of P tokens P^2 / 2 + G T (P + T / 2) of them, where packing whole
sequences takes G (P + T)^2 / 2.

Gathered: one variable-length flash attention call in which each completion's few queries meet keys and values gathered
for it, its prompt's and its own; masked causally from the lower right corner. The gradient of a key is the sum over its
copies. Where prompts are short this is the faster one.

Merged: nothing is copied. Softmax over the union of two key sets is the two softmaxes merged by their log-sum-exps (as
in Milakov and Gimelshein 2018, arXiv:1805.02867):

    l = log(exp(l_self) + exp(l_prompt))        out = exp(l_self - l) out_self + exp(l_prompt - l) out_prompt

so two calls suffice: every prompt and completion causally with itself, and all completions of a group, end to end, with
their prompt. The backward of each call needs only probabilities exp(s - l) and rowsum(dout * out), hence the merged out
and l: it is exact, and a prompt's keys sum over all completions by themselves.

Under `torch.utils.checkpoint` a layer's forward pass is run once more for its backward pass. Where something remembers
the result and its log-sum-exp (`Memory`), the second run is given them: attention's share of the work grows with the
length of sequences, what it leaves does not.

A sliding window (a token attends to the last so many up to itself) is one of flash attention's arguments where keys are
gathered; merged, and where scores are capped, the kernels of attention_tiles.py do it.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels.attention_tiles import tiled_attention
from grpo_kernels.dispatch import Impl, Operator, capability, cdiv, choose, isolated, next_power_of_2, tl, triton
from grpo_kernels.layout import GroupLayout


class Memory(Protocol):
    """Of one attention in one layer's pass: what its first run leaves to its second."""

    def keep(self, *tensors: Tensor) -> None:
        """Remember these."""

    def recall(self) -> tuple[Tensor, ...] | None:
        """What `keep` was given, once; None where that is nothing."""


@isolated
def group_attention(
    q: Tensor,  # [N, Hq, E]
    k: Tensor,  # [N, Hk, E]
    v: Tensor,  # [N, Hk, E]
    layout: GroupLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    impl: Impl = "auto",
    memory: Memory | None = None,
) -> Tensor:  # [N, Hq, E]
    """Attention of packed tokens, each to its prompt and what precedes it in its completion; differentiable in q, k, v.

    `scale` multiplies the scores, 1 / sqrt(E) unless given; `softcap` c makes c tanh(s / c) of a scaled score s. With a
    `window` a token attends to so many tokens of its sequence, the last of which it is itself. Flash attention runs it
    on a CUDA device of compute capability 8.0 and up in float16 and bfloat16, SDPA one sequence at a time elsewhere;
    Triton kernels where scores are capped, or there is a window and flash attention cannot. Flash attention alone asks
    `memory`.
    Raises ValueError for shapes that do not belong together, and for a window or cap that is not positive.
    """
    _check(q, k, v, layout, window, softcap)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[0] == 0:
        return _torch_attention(q, k, v, layout, scale, window, softcap)
    window = None if window is not None and window >= layout.longest_sequence else window
    if _flash_knows(q, layout, window, softcap) and choose("group_attention", impl, q, k, v) == "triton":
        return _flash_attention(q, k, v, layout, scale, window, memory)
    if window is None and softcap is None:
        if impl == "triton":
            raise ValueError(
                f"group_attention has no kernel for {q.dtype} on {q.device}: flash attention needs float16 or "
                "bfloat16, a CUDA device of compute capability 8.0, and a head size of at most 256. "
                "Use impl='auto' or 'torch'."
            )
        return _torch_attention(q, k, v, layout, scale, window, softcap)
    if choose("tiled_attention", impl, q, k, v) == "torch":
        return _torch_attention(q, k, v, layout, scale, window, softcap)
    return tiled_attention(q, k, v, layout, scale, window, softcap)


def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float, window: int | None, memory: Memory | None
) -> Tensor:  # fmt: skip
    # Flash attention lays its result out as q lies, and what merges results takes heads beside each other.
    q = q if q.stride(1) == q.shape[2] else q.contiguous()
    if (gathered := layout.gathered) is not None:
        lists = gathered.keys, gathered.starts, gathered.copies, gathered.copy_starts
        longest = [layout.longest[0], gathered.longest]
        inputs = q, k, v, layout.segments, *lists, longest, scale, window
        return _remembered(memory, _gathered_op, _setup_gathered, _backward_gathered, inputs)
    starts = layout.segments, layout.groups, layout.prompts
    inputs = q, k, v, *starts, list(layout.longest), layout.num_prompt_tokens, scale, window
    return _remembered(memory, _merged_op, _setup_merged, _backward_merged, inputs)


def _remembered(
    memory: Memory | None, launch: Operator, setup: Callable[..., None], backward: Callable[..., Any], inputs: tuple
) -> Tensor:
    """The attention by an operator, of whose two results the memory is told; or by what it remembers of them."""
    known = memory.recall() if memory else None
    if known is not None:
        return _Known.apply(setup, backward, *known, *inputs)
    out, lse = launch(*inputs)
    if memory:
        memory.keep(out.detach(), lse)
    return out


class _Known(torch.autograd.Function):
    """An operator's node in the graph, its result being there."""

    @staticmethod
    def forward(ctx, setup, backward, out, lse, *inputs):
        setup(ctx, inputs, (out, lse))
        ctx.of_operator = backward
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, None, None, None, *ctx.of_operator(ctx, grad, None)


def _check(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, window: int | None, softcap: float | None
) -> None:  # fmt: skip
    if q.ndim != 3 or k.shape != v.shape or k.shape[::2] != q.shape[::2] or q.shape[1] % max(k.shape[1], 1) != 0:
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; give [N, Hq, E], and [N, Hk, E] with Hk "
            "dividing Hq."
        )
    if q.shape[0] != layout.num_tokens:
        raise ValueError(f"q has {q.shape[0]} tokens and the layout {layout.num_tokens}; they must be the same tokens.")
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"window is {window} and softcap {softcap}; give None or a positive number.")


def _flash_knows(q: Tensor, layout: GroupLayout, window: int | None, softcap: float | None) -> bool:
    """Whether flash attention computes this. It counts a window from the last of a query's keys, which therefore have
    to lie together."""
    together = layout.gathered is not None or layout.num_tokens == layout.num_prompt_tokens
    return is_flash(q.device, q.dtype, q.shape[2]) and softcap is None and (window is None or together)


def is_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether flash attention computes heads of this size where there is neither window nor cap: it asks a memory."""
    fits = head_size <= 256 and head_size % 8 == 0
    return fits and dtype in (torch.float16, torch.bfloat16) and capability(device) >= (8, 0)


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One call a prompt and a completion."""
    prompts = list(layout.prompt_lengths)
    completions = [length for group in layout.completion_lengths for length in group]
    queries, keys, values = (tensor.split(prompts + completions) for tensor in (q, k, v))
    scores = scale, window, softcap
    outs = [_causal(queries[prompt], keys[prompt], values[prompt], *scores) for prompt in range(len(prompts))]
    segment = len(prompts)
    for prompt, group in enumerate(layout.completion_lengths):
        for _ in group:
            own_and_prompt = [torch.cat([tensors[prompt], tensors[segment]]) for tensors in (keys, values)]
            outs.append(_causal(queries[segment], *own_and_prompt, *scores))
            segment += 1
    return torch.cat(outs) if outs else q


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """The last len(q) tokens of a sequence of len(k), each attending to all before it and itself."""
    T, S = len(q), len(k)
    if T == 0:
        return q
    if window is not None and window < S:
        # The first query sees no key before this one.
        k, v = k[max(0, S - T - window + 1) :], v[max(0, S - T - window + 1) :]
        S = len(k)
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T).triu(S - T - window + 1)
    else:
        # With as many queries as keys the mask need not exist.
        mask = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril() if mask is None else mask
        hidden = torch.zeros(mask.shape, device=q.device).masked_fill(~mask, -torch.inf)
        out = masked_attention(q, k, v, hidden, scale, softcap)
    return out[0].transpose(0, 1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention by torch alone: q [B, Hq, T, E], k and v [B, Hk, S, E] with Hk dividing Hq, mask [T, S] or [B, 1, T, S]
    added to the scores, after these are capped -> [B, Hq, T, E]."""
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, Hk, Hq / Hk, T, E]
    k, v = k[:, :, None], v[:, :, None]
    scores = (grouped @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    capped = softcap * torch.tanh(scores / softcap) + mask.unsqueeze(-3)
    return (capped.softmax(-1).to(v.dtype) @ v).flatten(1, 2)


# Gathered keys, as autograd and torch.compile see them. `longest` is that of prompts and completions, and of the lists.


def _launch_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    keys: Tensor,
    key_starts: Tensor,
    copies: Tensor,
    copy_starts: Tensor,
    longest: list[int],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The attention [N, Hq, E] and the log-sum-exp of its scores [Hq, N] in float32. Keys and values [S, Hk, E] are
    gathered here and again in the backward, so that autograd never holds the copies."""
    there = k.index_select(0, keys), v.index_select(0, keys)
    return _flash(q, *there, segments, key_starts, *longest, True, scale, window)


def _fake_gathered(q, k, v, segments, keys, key_starts, copies, copy_starts, longest, scale, window):
    return q.new_empty(q.shape), torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


def _launch_gathered_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    keys: Tensor,
    key_starts: Tensor,
    copies: Tensor,
    copy_starts: Tensor,
    longest: list[int],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    there = k.index_select(0, keys), v.index_select(0, keys)
    grad_q, grad_k, grad_v = _flash_backward(
        grad.contiguous(), q, *there, out, lse, segments, key_starts, *longest, True, scale, window
    )
    return grad_q, sum_of_copies(grad_k, copies, copy_starts), sum_of_copies(grad_v, copies, copy_starts)


def _fake_gathered_backward(
    grad, q, k, v, out, lse, segments, keys, key_starts, copies, copy_starts, longest, scale, window
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_gathered(ctx, inputs, output) -> None:
    q, k, v, segments, keys, key_starts, copies, copy_starts, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, segments, keys, key_starts, copies, copy_starts)


def _backward_gathered(ctx, grad: Tensor | None, _lse):
    if grad is None:
        return (None,) * 11
    return (*_gathered_backward_op(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 8)


_gathered_op = Operator("gathered_attention", _launch_gathered, _fake_gathered)
_gathered_backward_op = Operator("gathered_attention_backward", _launch_gathered_backward, _fake_gathered_backward)
_gathered_op.differentiate(_setup_gathered, _backward_gathered)


def sum_of_copies(gathered: Tensor, copies: Tensor, copy_starts: Tensor) -> Tensor:
    """[S, ...] -> [N, ...]: of each token the sum over its copies, in float32, rounded once and always in one order."""
    num_tokens, size = len(copy_starts) - 1, gathered[0].numel()
    sums = gathered.new_empty(num_tokens, *gathered.shape[1:])
    block = min(1024, next_power_of_2(size))
    _sum_of_copies_kernel[(num_tokens, cdiv(size, block))](
        gathered, copies, copy_starts, sums, size, BLOCK=block, num_warps=4
    )
    return sums


@triton.jit
def _sum_of_copies_kernel(gathered, copies, copy_starts, sums, size, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros([BLOCK], tl.float32)
    for index in range(tl.load(copy_starts + token), tl.load(copy_starts + token + 1)):
        index_of_copy = tl.load(copies + index).to(tl.int64)
        total += tl.load(gathered + index_of_copy * size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + token * size + column, total.to(sums.dtype.element_ty), mask=inside)


# Two merged calls, as autograd and torch.compile see them. `longest` is GroupLayout.longest. A window there is where no
# completion is, so that the first call does all.


def _launch_merged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    groups: Tensor,
    prompts: Tensor,
    longest: list[int],
    num_prompt_tokens: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The attention [N, Hq, E] and the log-sum-exp of its scores [Hq, N] in float32."""
    longest_segment, longest_group, longest_prompt = longest
    P = num_prompt_tokens
    out, lse = _flash(q, k, v, segments, segments, longest_segment, longest_segment, True, scale, window)
    if P < len(q):
        to_prompt, prompt_lse = _flash(
            q[P:], k[:P], v[:P], groups, prompts, longest_group, longest_prompt, False, scale
        )
        _merge(out, lse, to_prompt, prompt_lse, P)
    return out, lse


def _fake_merged(q, k, v, segments, groups, prompts, longest, num_prompt_tokens, scale, window):
    return q.new_empty(q.shape), torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


def _launch_merged_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    groups: Tensor,
    prompts: Tensor,
    longest: list[int],
    num_prompt_tokens: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    longest_segment, longest_group, longest_prompt = longest
    P = num_prompt_tokens
    grad = grad.contiguous()
    grad_q, grad_k, grad_v = _flash_backward(
        grad, q, k, v, out, lse, segments, segments, longest_segment, longest_segment, True, scale, window
    )
    if P < len(q):
        more_q, more_k, more_v = _flash_backward(
            grad[P:], q[P:], k[:P], v[:P], out[P:], lse[:, P:].contiguous(),
            groups, prompts, longest_group, longest_prompt, False, scale,
        )  # fmt: skip
        grad_q[P:] += more_q
        grad_k[:P] += more_k
        grad_v[:P] += more_v
    return grad_q, grad_k, grad_v


def _fake_merged_backward(
    grad, q, k, v, out, lse, segments, groups, prompts, longest, num_prompt_tokens, scale, window
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_merged(ctx, inputs, output) -> None:
    q, k, v, segments, groups, prompts, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, segments, groups, prompts)


def _backward_merged(ctx, grad: Tensor | None, _lse):
    if grad is None:
        return (None,) * 10
    return (*_merged_backward_op(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 7)


_merged_op = Operator("merged_attention", _launch_merged, _fake_merged)
_merged_backward_op = Operator("merged_attention_backward", _launch_merged_backward, _fake_merged_backward)
_merged_op.differentiate(_setup_merged, _backward_merged)


# PyTorch's own flash attention: the operators behind torch.nn.attention.varlen.varlen_attn, which before torch 2.13
# takes no grouped heads, and whose backward takes no log-sum-exp but its own.


def _flash(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int,
    is_causal: bool, scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        q_starts,
        k_starts,
        longest_q,
        longest_k,
        0.0,
        is_causal,
        False,
        scale=scale,
        **_window_of_flash(window),
    )
    return out, lse


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int, is_causal: bool, scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        q_starts,
        k_starts,
        longest_q,
        longest_k,
        0.0,
        is_causal,
        no_dropout,
        unused,
        scale=scale,
        **_window_of_flash(window),
    )


def _window_of_flash(window: int | None) -> dict[str, int]:
    """Flash attention counts the tokens before the query's own."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _merge(out: Tensor, lse: Tensor, to_prompt: Tensor, prompt_lse: Tensor, P: int) -> None:
    """Merge to_prompt [N - P, Hq, E] and prompt_lse [Hq, N - P] into tokens P and on of out [N, Hq, E], lse [Hq, N]."""
    num_tokens, num_heads, E = to_prompt.shape
    block = next_power_of_2(E)
    rows = max(1, 4096 // block)
    _merge_kernel[(cdiv(num_tokens * num_heads, rows),)](
        out, lse, to_prompt, prompt_lse, num_tokens * num_heads, num_heads, E, P, lse.stride(0), prompt_lse.stride(0),
        ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "P", "lse_stride", "prompt_lse_stride"])
def _merge_kernel(
    out, lse, to_prompt, prompt_lse, num_rows, num_heads, E, P, lse_stride, prompt_lse_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A row is one head of one token.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    token, head = rows // num_heads, rows % num_heads
    own = tl.load(lse + head * lse_stride + P + token, mask=inside, other=0.0)
    prompt = tl.load(prompt_lse + head * prompt_lse_stride + token, mask=inside, other=0.0)
    largest = tl.maximum(own, prompt)
    merged = largest + tl.log(tl.exp(own - largest) + tl.exp(prompt - largest))
    columns = tl.arange(0, BLOCK)[None, :]
    mask = inside[:, None] & (columns < E)
    offsets = rows[:, None] * E + columns
    first = out + P.to(tl.int64) * num_heads * E
    own_out = tl.load(first + offsets, mask=mask, other=0.0).to(tl.float32)
    prompt_out = tl.load(to_prompt + offsets, mask=mask, other=0.0).to(tl.float32)
    merged_out = tl.exp(own - merged)[:, None] * own_out + tl.exp(prompt - merged)[:, None] * prompt_out
    tl.store(first + offsets, merged_out.to(out.dtype.element_ty), mask=mask)
    # Every value that this program reads has to be read before one is overwritten.
    tl.debug_barrier()
    tl.store(lse + head * lse_stride + P + token, merged, mask=inside)
