"""SwiGLU and GeGLU against float64 PyTorch.
Knows nothing of projections.
"""

import pytest
import torch
from grpo_kernels import swiglu
from grpo_kernels.gates import gated, gated_backward

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SHAPES = [(5, 252), (1, 123), (3, 7, 2048), (2, 1025)]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]


def float64_truth(gate, up, activation):
    gate, up = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up, gate, up
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(gate, approximate=approximate) * up, gate, up


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_gradients(impl, dtype, device, relative_error, shape, activation):
    gate = (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    up = torch.randn(shape, device=device).to(dtype).requires_grad_()
    grad = torch.randn(shape, device=device).to(dtype)
    true_product, true_gate, true_up = float64_truth(gate, up, activation)
    true_product.backward(grad.double())

    product = gated(gate, up, activation, impl=impl)
    product.backward(grad)
    assert product.dtype == dtype
    assert relative_error(product, true_product) < TOLERANCE[dtype]
    assert relative_error(gate.grad, true_gate.grad) < TOLERANCE[dtype]
    assert relative_error(up.grad, true_up.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_halves_of_one_tensor(impl, device, relative_error, activation):
    """The fused projection's output [N, 2 I]: halves are read where they lie, and gradients may overwrite them."""
    gate_up = torch.randn(9, 2 * 300, device=device)
    gate, up = gate_up.chunk(2, -1)
    grad = torch.randn(9, 300, device=device)
    true_product, true_gate, true_up = float64_truth(gate, up, activation)
    true_product.backward(grad.double())
    truth = torch.cat([true_gate.grad, true_up.grad], -1)

    assert relative_error(gated(gate, up, activation, impl=impl), true_product) < 2e-6
    grads, product = gated_backward(gate, up, grad, activation, impl=impl)
    assert relative_error(product, true_product) < 2e-6
    assert relative_error(grads, truth) < 2e-6
    grads, product = gated_backward(gate, up, grad, activation, out=gate_up, impl=impl)
    assert grads.data_ptr() == gate_up.data_ptr()
    assert relative_error(product, true_product) < 2e-6
    assert relative_error(gate_up, truth) < 2e-6


def test_far_from_zero(impl, device):
    """Where exp overflows the activation is x or 0 and its slope 1 or 0, never NaN."""
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4]], device=device, requires_grad=True)
    for activation in ACTIVATIONS:
        gate.grad = None
        product = gated(gate, torch.ones_like(gate), activation, impl=impl)
        product.sum().backward()
        torch.testing.assert_close(product, gate.clamp(min=0), rtol=1e-6, atol=1e-30)
        expected = torch.tensor([[0, 0, 0, 0.5, 1, 1, 1.0]], device=device)
        torch.testing.assert_close(gate.grad, expected, rtol=1e-6, atol=1e-30)


def test_no_rows(impl, device):
    gate = torch.zeros(0, 64, device=device, requires_grad=True)
    product = swiglu(gate, torch.zeros(0, 64, device=device), impl=impl)
    product.sum().backward()
    assert product.shape == gate.grad.shape == (0, 64)


def test_names(impl, device):
    gate, up = torch.randn(2, 3, 40, device=device).unbind(0)
    torch.testing.assert_close(swiglu(gate, up, impl=impl), gated(gate, up, "silu", impl=impl))


def test_bad_arguments_are_named(device):
    gate = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match="activation is 'relu'"):
        gated(gate, gate, "relu")
    with pytest.raises(ValueError, match=r"up \[2, 4\]"):
        swiglu(gate, gate[:, :4])


def test_compiles_into_one_graph(impl, device):
    gate_up = torch.randn(4, 80, device=device)

    def run(gate_up):
        return swiglu(*gate_up.chunk(2, -1), impl=impl).square().sum()

    eager, compiled = gate_up.clone().requires_grad_(), gate_up.clone().requires_grad_()
    run(eager).backward()
    torch.compile(run, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_than_2_to_the_31_elements():
    N, I = 2**17 + 8, 2**14
    gate, up, grad = (torch.randn(N, I, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    product = swiglu(gate, up, impl="triton")
    assert torch.equal(product[-8:], swiglu(gate[-8:].clone(), up[-8:].clone(), impl="triton"))
    grads, _ = gated_backward(gate, up, grad, "silu", impl="triton")
    expected, _ = gated_backward(*(tensor[-8:].clone() for tensor in (gate, up, grad)), "silu", impl="triton")
    assert torch.equal(grads[-8:], expected)
