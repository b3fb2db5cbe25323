"""The LoRA linear against plain autograd in float64: outputs, gradients, and what autograd holds."""

from dataclasses import replace

import pytest
import torch
from grpo_kernels.lora import lora_linear
from grpo_kernels.nf4 import NF4, nf4_quantize
from lora_reference import leaves, plain, random_base, random_factors, random_projection, reference_linear


def expected(x, base, factors, bias, grad, compute):
    """Output and gradients of x, A and the B_j by plain autograd in `compute`."""
    weight = plain(base, x.dtype, compute)
    x = x.detach().to(compute).requires_grad_()
    a, *b = leaves(factors, compute)
    out = reference_linear(x, weight, a, b, factors.scale, bias)
    return [out, *torch.autograd.grad(out, [x, a, *b], grad.to(compute))]


@pytest.mark.parametrize("kind", ["dense", "dense, A below", "nf4", "nf4 double"])
@pytest.mark.parametrize(
    ("num_rows", "sizes", "num_inputs", "rank"),
    [(1, [64], 64, 4), (37, [123], 192, 8), (70, [128, 32, 32], 64, 3), (5, [252, 7], 128, 20)],
)
def test_agrees_with_float64(num_rows, sizes, num_inputs, rank, kind, dtype, device, impl, relative_error):
    base, factors = random_projection(sizes, num_inputs, rank, dtype, device, kind)
    x = torch.randn(num_rows, num_inputs, device=device).to(dtype).requires_grad_()
    bias, grad = (
        torch.randn(sum(sizes), device=device).to(dtype),
        torch.randn(num_rows, sum(sizes), device=device).to(dtype),
    )
    out = lora_linear(x, base, factors, bias, impl=impl)
    got = [out, *torch.autograd.grad(out, [x, factors.a, *factors.b], grad)]
    assert all(gradient.dtype == torch.float32 for gradient in got[2:])
    truth, own = (expected(x, base, factors, bias, grad, compute) for compute in (torch.float64, dtype))
    for ours, true, torchs in zip(got, truth, own, strict=True):
        # Half a unit in the last place on top: with few rows there is no sum that would average roundings.
        assert relative_error(ours, true) <= 1.3 * relative_error(torchs, true) + max(1e-6, torch.finfo(dtype).eps / 2)


def test_gradients_accumulate_in_the_masters(device, impl):
    factors = random_factors([32, 16], 64, 4, torch.float16, device)
    base = random_base(48, 64, torch.float16, device, "nf4")
    x = torch.randn(9, 64, device=device).half()
    for _ in range(2):
        lora_linear(x, base, factors, impl=impl).float().sum().backward()
    twice = factors.a.grad.clone()
    factors.a.grad = None
    lora_linear(x, base, factors, impl=impl).float().sum().backward()
    assert factors.a.grad.dtype == torch.float32
    torch.testing.assert_close(twice, 2 * factors.a.grad)


def test_scale_zero_is_the_base(device, impl, relative_error):
    factors = random_factors([64], 64, 4, torch.float32, device, scale=0.0)
    base = random_base(64, 64, torch.float32, device, "nf4")
    x = torch.randn(5, 64, device=device)
    assert (
        relative_error(lora_linear(x, base, factors, impl=impl), x.double() @ plain(base, x.dtype, torch.float64).t())
        < 1e-6
    )


def test_inputs_without_gradient(device, impl):
    factors = random_factors([64, 32], 64, 4, torch.float32, device)
    base = random_base(96, 64, torch.float32, device, "nf4")
    x = torch.randn(2, 5, 64, device=device)
    without = torch.autograd.grad(lora_linear(x, base, factors, impl=impl).sum(), factors.a)[0]
    with_gradient = torch.autograd.grad(lora_linear(x.requires_grad_(), base, factors, impl=impl).sum(), factors.a)[0]
    torch.testing.assert_close(without, with_gradient)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_no_rows(kind, device, impl):
    factors = random_factors([64], 64, 4, torch.float32, device)
    x = torch.randn(0, 64, device=device, requires_grad=True)
    out = lora_linear(x, random_base(64, 64, torch.float32, device, kind), factors, impl=impl)
    out.sum().backward()
    assert out.shape == (0, 64) and x.grad.shape == (0, 64)
    assert (factors.a.grad == 0).all() and (factors.b[0].grad == 0).all()


def test_autograd_never_holds_the_dequantised_weight(device, impl):
    base = nf4_quantize(torch.randn(256, 192, device=device))
    factors = random_factors([256], 192, 4, torch.float32, device)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(torch.randn(5, 192, device=device, requires_grad=True), base, factors, impl=impl)
    assert held
    assert max(tensor.untyped_storage().nbytes() for tensor in held) < 256 * 192


def test_another_scale_over_the_same_factors(device, impl, relative_error):
    factors = random_factors([64], 64, 4, torch.float32, device)
    base = random_base(64, 64, torch.float32, device, "dense")
    assert not isinstance(base, NF4)
    x = torch.randn(5, 64, device=device)
    reference = replace(factors, scale=torch.zeros(1, device=device))
    low_rank = lora_linear(x, base, factors, impl=impl) - lora_linear(x, base, reference, impl=impl)
    assert relative_error(low_rank, x.double() @ factors.a.double().t() @ factors.b[0].double().t() * 0.75) < 1e-5


@pytest.mark.parametrize("kind", ["dense", "dense, A below", "nf4 double"])
def test_without_gradient(kind, dtype, device, impl, relative_error):
    """A few rows, as in decoding, take another way to the same values."""
    base, factors = random_projection([64, 32], 128, 4, dtype, device, kind)
    bias = torch.randn(96, device=device).to(dtype)
    x = torch.randn(2, 3, 128, device=device).to(dtype)
    with_gradient = lora_linear(x, base, factors, bias, impl=impl)
    with torch.no_grad():
        without = lora_linear(x, base, factors, bias, impl=impl)
    assert without.shape == (2, 3, 96)
    assert relative_error(without, with_gradient) < max(1e-6, torch.finfo(dtype).eps)
