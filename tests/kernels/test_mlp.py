"""The gated MLP against plain autograd in float64, for SwiGLU and both forms of GeGLU."""

import weakref

import pytest
import torch
import torch.utils.checkpoint
from grpo_kernels.lora import times_a
from grpo_kernels.mlp import _launch_gated, _launch_gated_backward, lora_mlp
from lora_reference import leaves, plain, random_projection, reference_linear

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
}


def projections(width, inner, rank, dtype, device, kind):
    """Base and factors of gate_up, base and factors of down."""
    return (
        *random_projection([inner, inner], width, rank, dtype, device, kind),
        *random_projection([width], inner, rank, dtype, device, kind, scale=1.5),
    )  # fmt: skip


def expected(x, gate_up, gate_up_factors, down, down_factors, activation, grad, compute):
    """Output and the gradients of x, A and B of gate and up, A and B of down, by plain autograd in `compute`."""
    weights = plain(gate_up, x.dtype, compute), plain(down, x.dtype, compute)
    x = x.detach().to(compute).requires_grad_()
    a, *b = leaves(gate_up_factors, compute)
    a_down, b_down = leaves(down_factors, compute)
    gate, up = reference_linear(x, weights[0], a, b, gate_up_factors.scale).chunk(2, dim=-1)
    out = reference_linear(ACTIVATIONS[activation](gate) * up, weights[1], a_down, [b_down], down_factors.scale)
    return [out, *torch.autograd.grad(out, [x, a, *b, a_down, b_down], grad.to(compute))]


def check(num_rows, width, inner, rank, kind, activation, dtype, device, impl, relative_error, rows_at_once=None):
    gate_up, gate_up_factors, down, down_factors = projections(width, inner, rank, dtype, device, kind)
    x = torch.randn(num_rows, width, device=device).to(dtype).requires_grad_()
    grad = torch.randn(num_rows, width, device=device).to(dtype)
    out = lora_mlp(x, gate_up, gate_up_factors, down, down_factors, activation, impl, rows_at_once)
    masters = [gate_up_factors.a, *gate_up_factors.b, down_factors.a, *down_factors.b]
    got = [out, *torch.autograd.grad(out, [x, *masters], grad)]
    assert all(gradient.dtype == torch.float32 for gradient in got[2:])
    truth, own = (
        expected(x, gate_up, gate_up_factors, down, down_factors, activation, grad, compute)
        for compute in (torch.float64, dtype)
    )
    for ours, true, torchs in zip(got, truth, own, strict=True):
        # Half a unit in the last place on top: with one row or rank 1 there is no sum that would average roundings.
        assert relative_error(ours, true) <= 1.3 * relative_error(torchs, true) + max(1e-6, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("kind", ["dense", "dense, A below", "nf4 double"])
def test_agrees_with_float64(kind, activation, dtype, device, impl, relative_error):
    check(37, 64, 192, 4, kind, activation, dtype, device, impl, relative_error)


@pytest.mark.parametrize(
    ("num_rows", "width", "inner", "rank"),
    [(1, 64, 64, 2), (9, 252, 123, 20), (150, 64, 128, 32), (37, 64, 80, 100), (37, 64, 80, 200)],
)
def test_odd_sizes(num_rows, width, inner, rank, dtype, device, impl, relative_error):
    check(num_rows, width, inner, rank, "nf4", "silu", dtype, device, impl, relative_error)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("kind", ["dense", "dense, A below", "nf4", "nf4 double"])
def test_in_parts_it_agrees_with_float64(kind, activation, dtype, device, impl, relative_error):
    check(300, 64, 192, 4, kind, activation, dtype, device, impl, relative_error, rows_at_once=128)


@pytest.mark.parametrize("num_rows", [1, 128, 129, 257])
def test_in_parts_of_odd_sizes(num_rows, dtype, device, impl, relative_error):
    check(num_rows, 252, 123, 20, "nf4", "silu", dtype, device, impl, relative_error, rows_at_once=128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows_at_once", [None, 512])
@pytest.mark.parametrize("kind", ["dense", "nf4 double"])
def test_a_training_size_in_bfloat16(kind, rows_at_once, relative_error):
    device = torch.device("cuda")
    check(1100, 1024, 3072, 32, kind, "silu", torch.bfloat16, device, "auto", relative_error, rows_at_once)


@pytest.mark.parametrize("rows_at_once", [None, 128])
def test_no_rows(rows_at_once, device, impl):
    gate_up, gate_up_factors, down, down_factors = projections(64, 128, 4, torch.float32, device, "nf4")
    x = torch.randn(0, 64, device=device, requires_grad=True)
    out = lora_mlp(x, gate_up, gate_up_factors, down, down_factors, impl=impl, rows_at_once=rows_at_once)
    out.sum().backward()
    assert out.shape == (0, 64) and x.grad.shape == (0, 64)
    for factors in (gate_up_factors, down_factors):
        assert all((master.grad == 0).all() for master in (factors.a, *factors.b))


@pytest.mark.parametrize("rows_at_once", [None, 128])
def test_fused_backward_runs_once(rows_at_once, device):
    arguments = projections(64, 64, 4, torch.float32, device, "nf4")
    out = lora_mlp(torch.randn(3, 64, device=device), *arguments, impl="triton", rows_at_once=rows_at_once).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        out.backward()


def test_fused_keeps_one_tensor_of_the_inner_width(device):
    gate_up, gate_up_factors, down, down_factors = projections(64, 512, 4, torch.float32, device, "nf4")
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        lora_mlp(torch.randn(11, 64, device=device), gate_up, gate_up_factors, down, down_factors, impl="triton")
    rows = {tensor.data_ptr(): tensor.numel() for tensor in held if tensor.shape[0] == 11}
    assert sorted(rows.values()) == [11 * 64, 11 * (2 * 512 + 16)]


def test_in_parts_it_keeps_x_alone_and_has_no_more_than_a_part_at_once(device, monkeypatch):
    arguments = projections(64, 512, 4, torch.float32, device, "nf4")
    x, held, parts = torch.randn(300, 64, device=device), [], []

    def counted(gate_up, *others):
        parts.append(gate_up.shape[0])
        return _launch_gated_backward(gate_up, *others)

    monkeypatch.setattr("grpo_kernels.mlp._launch_gated_backward", counted)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        out = lora_mlp(x, *arguments, impl="triton", rows_at_once=128)
    assert [tensor.data_ptr() for tensor in held if 300 in tensor.shape] == [x.data_ptr()]
    out.sum().backward()
    assert parts == [128, 128, 44]


def test_fused_keeps_nothing_after_its_backward_or_without_gradient(device):
    """The graph may live on: a loss that is held holds no activations."""
    arguments = projections(64, 512, 4, torch.float32, device, "nf4")
    held = {}

    def pack(tensor):
        held[tuple(tensor.shape)] = weakref.ref(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.no_grad():
            lora_mlp(torch.randn(300, 64, device=device), *arguments, impl="triton")
        assert not held
        out = lora_mlp(torch.randn(11, 64, device=device), *arguments, impl="triton").sum()
    gate_up = held[11, 2 * 512 + 16]
    assert gate_up() is not None
    out.backward()
    assert gate_up() is None


def test_fused_computed_again_for_its_backward_multiplies_by_down_once(device, monkeypatch):
    """`torch.utils.checkpoint` ends where the last tensor is kept; what comes out is the same to the last bit."""
    arguments = projections(64, 192, 4, torch.float32, device, "nf4")
    masters = [arguments[1].a, *arguments[1].b, arguments[3].a, *arguments[3].b]
    x, outputs = torch.randn(11, 64, device=device, requires_grad=True), []

    def counted(base, a, dtype):
        outputs.append(base.shape[0])
        return times_a(base, a, dtype)

    def mlp(x):
        return lora_mlp(2 * x, *arguments, impl="triton")

    kept = torch.autograd.grad(mlp(x).square().sum(), [x, *masters])
    monkeypatch.setattr("grpo_kernels.mlp.times_a", counted)
    out = torch.utils.checkpoint.checkpoint(mlp, x, use_reentrant=False)
    again = torch.autograd.grad(out.square().sum(), [x, *masters])
    assert outputs == [2 * 192, 64, 2 * 192]
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_unknown_activation_is_named(device):
    with pytest.raises(ValueError, match="'relu'"):
        lora_mlp(torch.randn(3, 64, device=device), *projections(64, 64, 4, torch.float32, device, "dense"), "relu")


def test_in_parts_computed_again_for_its_backward_multiplies_by_gate_and_up_once_more(device, monkeypatch):
    """`torch.utils.checkpoint` ends before the first product, so the layer's second pass has none of the MLP."""
    arguments = projections(64, 192, 4, torch.float32, device, "nf4")
    masters = [arguments[1].a, *arguments[1].b, arguments[3].a, *arguments[3].b]
    x, passed = torch.randn(300, 64, device=device, requires_grad=True), []

    def counted(*arguments):
        passed.append("h")
        return _launch_gated(*arguments)

    def mlp(x):
        return lora_mlp(2 * x, *arguments, impl="triton", rows_at_once=128)

    kept = torch.autograd.grad(mlp(x).square().sum(), [x, *masters])
    monkeypatch.setattr("grpo_kernels.mlp._launch_gated", counted)
    out = torch.utils.checkpoint.checkpoint(mlp, x, use_reentrant=False)
    again = torch.autograd.grad(out.square().sum(), [x, *masters])
    assert passed == 3 * ["h"]
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


@pytest.mark.parametrize("kind", ["dense", "nf4 double"])
def test_without_gradient(kind, dtype, device, impl, relative_error):
    """A few rows, as in decoding, take another way to the same values."""
    arguments = projections(64, 192, 4, dtype, device, kind)
    x = torch.randn(2, 3, 64, device=device).to(dtype)
    with_gradient = lora_mlp(x, *arguments, "gelu_tanh", impl=impl)
    with torch.no_grad():
        without = lora_mlp(x, *arguments, "gelu_tanh", impl=impl)
    assert without.shape == (2, 3, 64)
    assert relative_error(without, with_gradient) < max(1e-6, 2 * torch.finfo(dtype).eps)
