"""group_attention against float64 attention over whole, unshared sequences.
Knows nothing of how the sequences are computed.
"""

import math
from itertools import pairwise

import pytest
import torch
import torch.utils.checkpoint
from grpo_kernels import GroupLayout, attention, group_attention
from grpo_kernels.attention import sum_of_copies

ON_GPU = torch.cuda.is_available()
# Implementation, dtype, and how often keys may be copied: never and always are the two ways of the kernels.
# Flash attention is PyTorch's and has no interpreter: without a GPU only the twin runs.
WAYS = [("torch", torch.float32, 0), ("torch", torch.bfloat16, 0)] + (
    [("triton", dtype, most) for dtype in (torch.float16, torch.bfloat16) for most in (0, math.inf)] if ON_GPU else []
)
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
LAYOUTS = {
    "one group": ([13], [[5, 9, 1]]),
    "groups of several sizes": ([13, 1, 130], [[5, 9, 1], [7], [64, 3]]),
    "an empty completion and an empty group": ([4, 6, 3], [[5, 0, 2], [], [8]]),
    "no completions": ([13, 1, 70], [[], [], []]),
}


def sequences_of(layout):
    """Of every whole sequence, in packed order: (indices of its tokens, how many of the last are its own)."""
    starts = layout.segments.tolist()
    segments = [torch.arange(start, end) for start, end in pairwise(starts)]
    prompts = segments[: len(layout.prompt_lengths)]
    completions = iter(segments[len(layout.prompt_lengths) :])
    sequences = [(prompt, len(prompt)) for prompt in prompts]
    for prompt, group in zip(prompts, layout.completion_lengths, strict=True):
        for length in group:
            sequences.append((torch.cat([prompt, next(completions)]), length))
    return sequences


def float64_truth(q, k, v, layout, scale, window=None, softcap=None):
    q, k, v = (tensor.detach().double().cpu().requires_grad_() for tensor in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    outs = []
    for indices, own in sequences_of(layout):
        queries = q[indices].transpose(0, 1)
        keys, values = (tensor[indices].repeat_interleave(repeats, 1).transpose(0, 1) for tensor in (k, v))
        scores = queries @ keys.transpose(1, 2) * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        length = len(indices)
        back = torch.arange(length)[:, None] - torch.arange(length)
        scores = scores.masked_fill((back < 0) | (back >= (window or length)), -torch.inf)
        outs.append((scores.softmax(-1) @ values).transpose(0, 1)[length - own :])
    return torch.cat(outs), q, k, v


@pytest.mark.parametrize(("impl", "dtype", "most_copies"), WAYS)
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("Hq", "Hk", "E"), [(4, 4, 32), (4, 2, 64), (6, 1, 128)])
def test_attention_and_gradients(device, relative_error, impl, dtype, most_copies, lengths, Hq, Hk, E):
    layout = GroupLayout.of(*lengths, device=device, most_copies=most_copies)
    q = torch.randn(layout.num_tokens, Hq, E, device=device).to(dtype).requires_grad_()
    k, v = (torch.randn(layout.num_tokens, Hk, E, device=device).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(layout.num_tokens, Hq, E, device=device).to(dtype)
    truth, true_q, true_k, true_v = float64_truth(q, k, v, layout, E**-0.5)
    truth.backward(grad.double().cpu())

    out = group_attention(q, k, v, layout, impl=impl)
    out.backward(grad)
    assert out.dtype == dtype
    assert relative_error(out, truth) < TOLERANCE[dtype]
    for tensor, expected in ((q, true_q), (k, true_k), (v, true_v)):
        assert relative_error(tensor.grad, expected.grad) < 2 * TOLERANCE[dtype]


# How keys are copied, on a GPU, decides who computes a window without a cap: flash attention or our kernels.
@pytest.mark.parametrize("most_copies", [0, math.inf] if ON_GPU else [0])
@pytest.mark.parametrize(
    ("lengths", "Hq", "Hk", "E", "window", "softcap"),
    [
        (([13], [[5, 9, 1]]), 4, 2, 24, 5, None),
        (([9, 1, 70], [[5, 9, 1], [7], [33, 3]]), 2, 1, 80, None, 3.0),
        (([9, 1, 70], [[5, 9, 1], [7], [33, 3]]), 1, 1, 16, 34, None),
        (([4, 6, 3], [[5, 0, 2], [], [8]]), 3, 3, 40, 2, 2.0),
        (([13, 1, 70], [[], [], []]), 2, 1, 16, 40, 5.0),
        (([4, 6], [[3], [2]]), 2, 2, 32, 1000, 4.0),
    ],
)
def test_windows_and_soft_caps(impl, dtype, device, relative_error, most_copies, lengths, Hq, Hk, E, window, softcap):
    layout = GroupLayout.of(*lengths, device=device, most_copies=most_copies)
    projected = torch.randn(layout.num_tokens, Hq + 2 * Hk, E, device=device).to(dtype).mul_(2).requires_grad_()
    q, k, v = projected.split([Hq, Hk, Hk], 1)
    grad = torch.randn(layout.num_tokens, Hq, E, device=device).to(dtype)
    truth, *true_leaves = float64_truth(q, k, v, layout, 0.3, window, softcap)
    truth.backward(grad.double().cpu())

    out = group_attention(q, k, v, layout, scale=0.3, window=window, softcap=softcap, impl=impl)
    out.backward(grad)
    assert out.dtype == dtype
    assert relative_error(out, truth) < TOLERANCE[dtype]
    for gradient, expected in zip(projected.grad.split([Hq, Hk, Hk], 1), true_leaves, strict=True):
        assert relative_error(gradient, expected.grad) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_gathered_keys_are_those_of_the_whole_sequences(lengths, device):
    layout = GroupLayout.of(*lengths, device=device, most_copies=math.inf)
    expected = [indices if own else indices[:0] for indices, own in sequences_of(layout)]
    if layout.gathered is None:
        assert all(own == len(indices) for indices, own in sequences_of(layout))
        return
    lists = [layout.gathered.keys[start:end].tolist() for start, end in pairwise(layout.gathered.starts)]
    assert lists == [indices.tolist() for indices in expected]
    assert layout.gathered.longest == max(map(len, lists))


@pytest.mark.parametrize("shape", [(), (1,), (3, 8), (2, 700)])
@pytest.mark.parametrize("lengths", list(LAYOUTS.values())[:3])
def test_the_gradient_of_a_key_is_the_sum_over_its_copies(lengths, shape, dtype, device, relative_error):
    layout = GroupLayout.of(*lengths, device=device, most_copies=math.inf)
    keys = layout.gathered.keys
    copies = torch.randn(len(keys), *shape, device=device).to(dtype)
    expected = torch.zeros(layout.num_tokens, *shape, device=device, dtype=torch.float64)
    expected.index_add_(0, keys, copies.double())
    got = sum_of_copies(copies, layout.gathered.copies, layout.gathered.copy_starts)
    assert got.dtype == dtype
    assert relative_error(got, expected) < 2 * torch.finfo(dtype).eps


def test_keys_are_gathered_unless_that_copies_each_too_often():
    assert GroupLayout.of([9], [[9] * 4]).gathered is not None  # 81 keys of 45 tokens
    assert GroupLayout.of([90], [[1] * 8]).gathered is None  # 818 keys of 98 tokens
    assert GroupLayout.of([9, 4]).gathered is None
    assert GroupLayout.of([9], [[0, 0]]).gathered is None


@pytest.mark.parametrize("most_copies", [0, math.inf])
def test_scale_and_strided_heads(most_copies, device, relative_error):
    """q, k and v as columns of one fused projection's output."""
    layout = GroupLayout.of([9, 4], [[3, 5], [2]], device=device, most_copies=most_copies)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    projected = torch.randn(layout.num_tokens, (4 + 2 + 2) * 32, device=device).to(dtype)
    q, k, v = (part.unflatten(1, (-1, 32)) for part in projected.split([128, 64, 64], 1))
    truth, *_ = float64_truth(q, k, v, layout, 0.3)
    assert relative_error(group_attention(q, k, v, layout, scale=0.3), truth) < TOLERANCE[dtype]


def test_positions_go_on_after_the_prompt():
    layout = GroupLayout.of([3, 2], [[2, 1], [4]])
    assert layout.positions().tolist() == [0, 1, 2, 0, 1, 3, 4, 3, 2, 3, 4, 5]
    assert layout.num_tokens == 12
    assert layout.num_prompt_tokens == 5


def test_a_layout_may_be_empty(device):
    layout = GroupLayout.of([], [], device=device)
    nothing = torch.zeros(0, 2, 8, device=device, requires_grad=True)
    assert group_attention(nothing, nothing, nothing, layout).shape == (0, 2, 8)
    assert layout.positions().shape == (0,)


def test_bad_arguments_are_named(device):
    layout = GroupLayout.of([3], [[2]], device=device)
    q = torch.zeros(5, 4, 8, device=device)
    with pytest.raises(ValueError, match="q has 5 tokens and the layout 3"):
        group_attention(q, q, q, GroupLayout.of([3], device=device))
    with pytest.raises(ValueError, match=r"k \[5, 3, 8\]"):
        group_attention(q, q[:, :3], q[:, :3], layout)
    with pytest.raises(ValueError, match="1 prompts and 2 groups"):
        GroupLayout.of([3], [[2], [1]])
    with pytest.raises(ValueError, match="1 token or more"):
        GroupLayout.of([3, 0], [[2], [1]])
    for wrong in ({"window": 0}, {"softcap": 0.0}):
        with pytest.raises(ValueError, match="give None or a positive number"):
            group_attention(q, q, q, layout, **wrong)
    if not ON_GPU:
        with pytest.raises(ValueError, match="flash attention needs"):
            group_attention(q, q, q, layout, impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("most_copies", [0, math.inf])
def test_compiles_into_one_graph(most_copies, device, relative_error):
    layout = GroupLayout.of([9, 4], [[3, 5], [2]], device=device, most_copies=most_copies)
    q = torch.randn(layout.num_tokens, 4, 32, device=device, dtype=torch.bfloat16)
    eager, compiled = q.clone().requires_grad_(), q.clone().requires_grad_()

    def run(q):
        return group_attention(q, q[:, :2], q[:, 2:], layout).float().square().sum()

    run(eager).backward()
    torch.compile(run, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert relative_error(compiled.grad, eager.grad) < 1e-2


class Told:
    """A memory of the GPU's own."""

    def __init__(self):
        self.kept = None

    def keep(self, *tensors):
        self.kept = tensors if torch.is_grad_enabled() else None

    def recall(self):
        kept, self.kept = self.kept, None
        return kept


def flash_by_torch(q, k, v, q_starts, k_starts, _longest_q, _longest_k, is_causal, scale, window=None):
    """PyTorch's flash attention as its documentation has it, masked from the lower right corner."""
    assert window is None
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), -torch.inf)
    for queries, scores, values in pieces(q, k, v, q_starts, k_starts, is_causal, scale):
        out[queries] = (scores.softmax(-1) @ values).transpose(0, 1)
        lse[:, queries] = scores.logsumexp(-1)
    return out, lse


def flash_backward_by_torch(
    grad, q, k, v, out, lse, q_starts, k_starts, longest_q, longest_k, is_causal, scale, window=None
):
    """By the probabilities exp(s - lse) and rowsum(dout * out), as FlashAttention's paper has it (arXiv 2205.14135)."""
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    with torch.enable_grad():
        total = torch.zeros(())
        for queries, scores, values in pieces(*leaves, q_starts, k_starts, is_causal, scale):
            p = torch.exp(scores.detach() - lse[:, queries, None])
            dout = grad[queries].transpose(0, 1)
            rows = (dout * out[queries].transpose(0, 1)).sum(-1, keepdim=True)
            total = total + ((p @ values) * dout).sum() + (p * (dout @ values.detach().mT - rows) * scores).sum()
        return torch.autograd.grad(total, leaves)


def pieces(q, k, v, q_starts, k_starts, is_causal, scale):
    repeats = q.shape[1] // k.shape[1]
    for (first, last), (start, stop) in zip(pairwise(q_starts.tolist()), pairwise(k_starts.tolist()), strict=True):
        if last > first and stop > start:
            keys, values = (each[start:stop].repeat_interleave(repeats, 1).transpose(0, 1) for each in (k, v))
            scores = q[first:last].transpose(0, 1) @ keys.mT * scale
            above = torch.ones(last - first, stop - start, dtype=torch.bool).triu(stop - start - last + first + 1)
            yield slice(first, last), scores.masked_fill(above & is_causal, -torch.inf), values


@pytest.mark.parametrize("most_copies", [0, math.inf])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layer_computed_again_is_told_what_its_attention_gave(lengths, most_copies, monkeypatch, relative_error):
    """Flash attention is called once, its gradient is the same to the last bit, and the float64 truth's."""
    device, dtype = (torch.device("cuda"), torch.bfloat16) if ON_GPU else (torch.device("cpu"), torch.float32)
    layout = GroupLayout.of(*lengths, device=device, most_copies=most_copies)
    if not ON_GPU:
        monkeypatch.setattr(attention, "_flash_backward", flash_backward_by_torch)
    flash, called = attention._flash if ON_GPU else flash_by_torch, []
    monkeypatch.setattr(attention, "_flash", lambda *inputs: called.append(1) or flash(*inputs))
    q = torch.randn(layout.num_tokens, 4, 32, device=device).to(dtype).requires_grad_()
    k, v = (torch.randn(layout.num_tokens, 2, 32, device=device).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(layout.num_tokens, 4, 32, device=device).to(dtype)

    def gradients(memory, calls):
        def layer(q, k, v):
            return 2 * attention._flash_attention(2 * q, 2 * k, 2 * v, layout, 0.3, None, memory)

        called.clear()
        out = torch.utils.checkpoint.checkpoint(layer, q, k, v, use_reentrant=False)
        got = torch.autograd.grad(out, [q, k, v], grad)
        assert len(called) == calls
        return out, *got

    once = 1 if layout.gathered is not None or layout.num_tokens == layout.num_prompt_tokens else 2
    plain, told = gradients(None, 2 * once), gradients(Told(), once)
    truth, *leaves = float64_truth(2 * q, 2 * k, 2 * v, layout, 0.3)
    truth.backward(2 * grad.double().cpu())
    for ours, again, true in zip(plain, told, [2 * truth, *(2 * leaf.grad for leaf in leaves)], strict=True):
        assert ON_GPU or torch.equal(ours, again)
        assert relative_error(again, true) < 4 * TOLERANCE[dtype]
