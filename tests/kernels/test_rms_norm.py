"""RMSNorm and its fused addition against the float64 formula.
Knows nothing of models.
"""

import pytest
import torch
from grpo_kernels import add_rms_norm, rms_norm

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
EPS = 1e-6


def float64_norm(x, weight, offset=0.0):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * (weight + offset)


def leaf(tensor):
    return tensor.detach().double().requires_grad_()


@pytest.mark.parametrize("shape", [(7, 252), (1, 123), (2, 5, 128), (33, 64), (3, 2048)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_and_gradients(impl, dtype, device, relative_error, shape, offset):
    x = (2 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], device=device).to(dtype).requires_grad_()
    grad = torch.randn(shape, device=device).to(dtype)
    true_x, true_weight = leaf(x), leaf(weight)
    truth = float64_norm(true_x, true_weight, offset)
    truth.backward(grad.double())

    normed = rms_norm(x, weight, EPS, offset=offset, impl=impl)
    normed.backward(grad)
    assert normed.dtype == dtype
    assert relative_error(normed, truth) < TOLERANCE[dtype]
    assert relative_error(x.grad, true_x.grad) < TOLERANCE[dtype]
    assert relative_error(weight.grad, true_weight.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(7, 252), (1, 123), (2, 5, 128), (3, 2048)])
def test_fused_addition(impl, dtype, device, relative_error, shape):
    """The gradient of the sum joins what comes through the norm, in both addends."""
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    residual = torch.randn(shape, device=device).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], device=device).to(dtype)
    grad_normed, grad_total = torch.randn(2, *shape, device=device).to(dtype).unbind(0)
    true_x, true_residual = leaf(x), leaf(residual)
    true_total = true_x + true_residual
    truth = float64_norm(true_total, weight.double())
    torch.autograd.backward([truth, true_total], [grad_normed.double(), grad_total.double()])

    normed, total = add_rms_norm(x, residual, weight, EPS, impl=impl)
    torch.autograd.backward([normed, total], [grad_normed, grad_total])
    assert torch.equal(total, x + residual)
    assert relative_error(normed, truth) < TOLERANCE[dtype]
    assert relative_error(x.grad, true_x.grad) < TOLERANCE[dtype]
    assert relative_error(residual.grad, true_x.grad) < TOLERANCE[dtype]


def test_only_one_result_is_used(impl, device, relative_error):
    x = torch.randn(4, 96, device=device, requires_grad=True)
    residual, weight, grad = (
        torch.randn(4, 96, device=device),
        torch.randn(96, device=device),
        torch.randn(4, 96, device=device),
    )
    _, total = add_rms_norm(x, residual, weight, EPS, impl=impl)
    total.backward(grad)
    assert torch.equal(x.grad, grad)

    x.grad = None
    normed, _ = add_rms_norm(x, residual, weight, EPS, impl=impl)
    normed.backward(grad)
    true_x = leaf(x)
    float64_norm(true_x + residual.double(), weight.double()).backward(grad.double())
    assert relative_error(x.grad, true_x.grad) < 2e-6


def test_strided_rows(impl, device, relative_error):
    """Columns of a wider tensor, as a fused projection leaves them."""
    wide = torch.randn(11, 3 * 64, device=device)
    weight = torch.randn(64, device=device)
    x = wide[:, 64:128]
    assert relative_error(rms_norm(x, weight, EPS, impl=impl), float64_norm(x.double(), weight.double())) < 2e-6


def test_zeros_and_no_rows(impl, device):
    weight = torch.ones(32, device=device)
    zeros = torch.zeros(3, 32, device=device, requires_grad=True)
    normed = rms_norm(zeros, weight, EPS, impl=impl)
    normed.sum().backward()
    assert torch.equal(normed, torch.zeros_like(normed))
    assert zeros.grad.isfinite().all()

    nothing = torch.zeros(0, 32, device=device, requires_grad=True)
    rms_norm(nothing, weight, EPS, impl=impl).sum().backward()
    assert nothing.grad.shape == (0, 32)


def test_bad_arguments_are_named(device):
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match=r"weight is \[4\]"):
        rms_norm(x, torch.ones(4, device=device))
    with pytest.raises(ValueError, match=r"residual \[1, 8\]"):
        add_rms_norm(x, x[:1], torch.ones(8, device=device))


def test_compiles_into_one_graph(impl, device):
    x, residual, weight = (
        torch.randn(6, 40, device=device),
        torch.randn(6, 40, device=device),
        torch.ones(40, device=device),
    )

    def run(x):
        normed, total = add_rms_norm(x, residual, weight, EPS, impl=impl)
        return (normed * total).sum() + rms_norm(total, weight, EPS, impl=impl).square().sum()

    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    run(eager).backward()
    torch.compile(run, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_than_2_to_the_31_elements():
    N, D = 2**19 + 8, 2**12
    x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(D, device="cuda", dtype=torch.bfloat16)
    few = x[-8:].clone().requires_grad_()
    expected = rms_norm(few, weight, EPS, impl="triton")
    expected.sum().backward()
    x.requires_grad_()
    normed = rms_norm(x, weight, EPS, impl="triton")
    normed.sum().backward()
    assert torch.equal(normed[-8:], expected)
    assert torch.equal(x.grad[-8:], few.grad)
