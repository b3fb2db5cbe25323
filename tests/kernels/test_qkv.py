"""The QKV projection: its three outputs, and gradients that arrive joined or apart."""

import pytest
import torch
from grpo_kernels.qkv import lora_qkv
from lora_reference import leaves, plain, random_base, random_factors, reference_linear

SIZES = [64, 32, 32]


@pytest.mark.parametrize("kind", ["dense", "nf4 double"])
@pytest.mark.parametrize("joined", [False, True])
def test_agrees_with_float64(kind, joined, dtype, device, impl, relative_error):
    base = random_base(128, 192, dtype, device, kind)
    factors = random_factors(SIZES, 192, 5, dtype, device)
    x = torch.randn(2, 9, 192, device=device).to(dtype).requires_grad_()
    bias = torch.randn(128, device=device).to(dtype)
    grad = torch.randn(2, 9, 128, device=device).to(dtype)
    grads = grad.split(SIZES, dim=-1)
    if not joined:
        grads = [part.contiguous() for part in grads]
    outputs = lora_qkv(x, base, factors, bias, impl=impl)
    assert [out.shape for out in outputs] == [(2, 9, size) for size in SIZES]
    got = [torch.cat(outputs, dim=-1), *torch.autograd.grad(outputs, [x, factors.a, *factors.b], grads)]

    def by_autograd(compute):
        weight, inputs = plain(base, dtype, compute), x.detach().to(compute).requires_grad_()
        a, *b = leaves(factors, compute)
        out = reference_linear(inputs, weight, a, b, factors.scale, bias)
        return [out, *torch.autograd.grad(out, [inputs, a, *b], grad.to(compute))]

    for ours, true, torchs in zip(got, by_autograd(torch.float64), by_autograd(dtype), strict=True):
        # Half a unit in the last place on top: with few rows there is no sum that would average roundings.
        assert relative_error(ours, true) <= 1.3 * relative_error(torchs, true) + max(1e-6, torch.finfo(dtype).eps / 2)


def test_an_output_that_is_not_used(device, impl):
    factors = random_factors(SIZES, 64, 4, torch.float32, device)
    base = random_base(128, 64, torch.float32, device, "nf4")
    x = torch.randn(7, 64, device=device, requires_grad=True)
    q, _, v = lora_qkv(x, base, factors, impl=impl)
    (q.sum() + v.sum()).backward()
    assert (factors.b[1].grad == 0).all()
    assert factors.b[0].grad.abs().max() > 0
    expected = plain(base, torch.float32, torch.float64)
    low_rank = [b.double() @ a.double() * 0.75 for a, b in zip(factors.a.split(4), factors.b, strict=True)]
    weight = expected + torch.cat(low_rank)
    torch.testing.assert_close(
        x.grad.double(), (weight[:64].sum(0) + weight[96:].sum(0)).expand(7, -1), atol=1e-4, rtol=1e-4
    )


def test_no_rows(device, impl):
    factors = random_factors(SIZES, 64, 4, torch.float32, device)
    q, k, v = lora_qkv(
        torch.randn(0, 64, device=device), random_base(128, 64, torch.float32, device, "nf4"), factors, impl=impl
    )
    assert q.shape == (0, 64) and k.shape == v.shape == (0, 32)
