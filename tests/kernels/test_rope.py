"""Rotary embedding with optional QK-norm against a rotation of complex numbers in float64.
Knows nothing of attention.
"""

import pytest
import torch
from grpo_kernels import rope

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
EPS = 1e-6


def angles(N, rotated, device):
    frequencies = 10000.0 ** -(torch.arange(0, rotated, 2, device=device) / rotated)
    angle = torch.arange(3, N + 3, device=device)[:, None] * frequencies
    return angle.cos(), angle.sin()


def float64_truth(x, cos, sin, weight=None, offset=0.0, interleaved=False):
    if weight is not None:
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * (weight + offset)
    half = cos.shape[1]
    if interleaved:  # bring the pairs to where the others have them, and back
        order = torch.cat(
            [torch.arange(0, 2 * half, 2), torch.arange(1, 2 * half, 2), torch.arange(2 * half, x.shape[-1])]
        )
        return float64_truth(x[..., order], cos, sin)[..., order.argsort()]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1)


@pytest.mark.parametrize(("N", "E", "rotated"), [(5, 64, 64), (1, 80, 80), (19, 96, 40), (3, 128, 128)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_and_gradients(impl, dtype, device, relative_error, N, E, rotated, normed, interleaved):
    cos, sin = angles(N, rotated, device)
    q = torch.randn(N, 6, E, device=device).to(dtype).requires_grad_()
    k = torch.randn(N, 2, E, device=device).to(dtype).requires_grad_()
    q_norm, k_norm = (torch.randn(2, E, device=device).to(dtype).unbind(0)) if normed else (None, None)
    offset = 1.0 if normed else 0.0
    leaves = [q, k] if not normed else [q, k, q_norm.requires_grad_(), k_norm.requires_grad_()]
    true_leaves = [tensor.detach().double().requires_grad_() for tensor in leaves]
    true_q = float64_truth(true_leaves[0], cos, sin, true_leaves[2] if normed else None, offset, interleaved)
    true_k = float64_truth(true_leaves[1], cos, sin, true_leaves[3] if normed else None, offset, interleaved)
    grad_q, grad_k = torch.randn_like(q), torch.randn_like(k)
    torch.autograd.backward([true_q, true_k], [grad_q.double(), grad_k.double()])

    settings = dict(eps=EPS, offset=offset, interleaved=interleaved)
    rotated_q, rotated_k = rope(q, k, cos, sin, q_norm=q_norm, k_norm=k_norm, **settings, impl=impl)
    torch.autograd.backward([rotated_q, rotated_k], [grad_q, grad_k])
    assert rotated_q.dtype == rotated_k.dtype == dtype
    assert relative_error(rotated_q, true_q) < TOLERANCE[dtype]
    assert relative_error(rotated_k, true_k) < TOLERANCE[dtype]
    for tensor, truth in zip(leaves, true_leaves, strict=True):
        assert relative_error(tensor.grad, truth.grad) < TOLERANCE[dtype]


def test_heads_of_a_fused_projection(impl, device, relative_error):
    """q and k are columns of one [N, (Hq + 2 Hk) E] tensor, cos and sin the first half of wider tables."""
    N, E = 13, 32
    projected = torch.randn(N, (4 + 2 * 2) * E, device=device)
    q = projected[:, : 4 * E].unflatten(1, (4, E))
    k = projected[:, 4 * E : 6 * E].unflatten(1, (2, E))
    cos, sin = angles(N, E, device)
    rotated_q, rotated_k = rope(q, k, torch.cat([cos, cos], 1)[:, : E // 2], sin, impl=impl)
    assert relative_error(rotated_q, float64_truth(q.double(), cos, sin)) < 2e-6
    assert relative_error(rotated_k, float64_truth(k.double(), cos, sin)) < 2e-6


def test_frozen_norms_get_no_gradient(impl, device, relative_error):
    cos, sin = angles(4, 16, device)
    q = torch.randn(4, 2, 16, device=device, requires_grad=True)
    k, weight = torch.randn(4, 1, 16, device=device), torch.randn(16, device=device)
    rotated_q, _ = rope(q, k, cos, sin, q_norm=weight, k_norm=weight, eps=EPS, impl=impl)
    rotated_q.square().sum().backward()
    true_q = q.detach().double().requires_grad_()
    float64_truth(true_q, cos, sin, weight.double()).square().sum().backward()
    assert k.grad is None
    assert weight.grad is None
    assert (q.grad.double() - true_q.grad).abs().max() < 1e-5


def test_no_tokens(impl, device):
    q = torch.zeros(0, 4, 16, device=device, requires_grad=True)
    rotated_q, rotated_k = rope(q, q[:, :2], *torch.zeros(2, 0, 8, device=device).unbind(0), impl=impl)
    (rotated_q.sum() + rotated_k.sum()).backward()
    assert q.grad.shape == (0, 4, 16)


def test_bad_arguments_are_named(device):
    q, k, table = (
        torch.zeros(3, 4, 16, device=device),
        torch.zeros(3, 2, 16, device=device),
        torch.zeros(3, 8, device=device),
    )
    with pytest.raises(ValueError, match=r"k \[3, 2, 8\]"):
        rope(q, k[..., :8], table, table)
    with pytest.raises(ValueError, match=r"cos is \[3, 16\]"):
        rope(q, k, table.repeat(1, 2), table)
    with pytest.raises(ValueError, match=r"q_norm is \[8\]"):
        rope(q, k, table, table, q_norm=table[0])


def test_compiles_into_one_graph(impl, device):
    cos, sin = angles(5, 16, device)
    q, k, weight = (
        torch.randn(5, 4, 16, device=device),
        torch.randn(5, 2, 16, device=device),
        torch.ones(16, device=device),
    )

    def run(q):
        rotated_q, rotated_k = rope(q, k, cos, sin, q_norm=weight, impl=impl)
        return rotated_q.square().sum() + (rotated_q[:, :2] * rotated_k).sum()

    eager, compiled = q.clone().requires_grad_(), q.clone().requires_grad_()
    run(eager).backward()
    torch.compile(run, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_than_2_to_the_31_elements():
    N, H, E = 2**19 + 8, 32, 128
    cos, sin = angles(N, E, "cuda")
    q = torch.randn(N, H, E, device="cuda", dtype=torch.bfloat16)
    rotated, _ = rope(q, q[:, :1], cos, sin, impl="triton")
    few = q[-8:].clone()
    expected, _ = rope(few, few[:, :1], cos[-8:].clone(), sin[-8:].clone(), impl="triton")
    assert torch.equal(rotated[-8:], expected)
