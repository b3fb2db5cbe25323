"""Grouped products against a loop over experts in float64; the sorting of rows against a sum over choices."""

import pytest
import torch
from grpo_kernels.grouped import ExpertFactors, Routing, grouped_linear, quantize_experts
from grpo_kernels.grouped_nf4 import MOST_ROWS, stays_packed
from grpo_kernels.nf4 import nf4_dequantize, nf4_double_quantize, nf4_quantize

# tokens, choices, experts, rows, columns, rank: odd ones, which want padding, and experts that nobody chose
SHAPES = [(13, 2, 5, 24, 16, 3), (7, 3, 4, 7, 5, 2), (1, 1, 9, 8, 64, 8), (0, 2, 3, 8, 16, 4)]


def chosen(tokens, choices, experts):
    return (
        torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)])
        if tokens
        else torch.zeros(0, choices).long()
    )


def factors_for(experts, rows, columns, rank, dtype, device, scale=0.75):
    a = (torch.randn(experts * rank, columns, device=device) / columns**0.5).requires_grad_()
    b = torch.randn(rows, rank * experts, device=device).mul_(0.3).requires_grad_()
    return ExpertFactors(a, b, a.detach().to(dtype), b.detach().to(dtype), torch.tensor([scale], device=device))


def by_a_loop(x, weights, experts, a, b, scale):
    """Row after row, as PEFT lays out the factors: [S, M]."""
    count = len(weights)
    a = a.reshape(count, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, count)
    rows = [weights[e] @ row + scale * b[:, :, e] @ (a[e] @ row) for row, e in zip(x, experts.tolist(), strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, weights.shape[1])


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("kind", ["dense", "nf4", "nf4 double"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_a_loop(shape, kind, adapted, dtype, device, relative_error):
    tokens, choices, count, rows, columns, rank = shape
    routing = Routing.of(chosen(tokens, choices, count).to(device), count)
    weights = (torch.randn(count, rows, columns, device=device) / columns**0.5).to(dtype)
    base = weights.flatten(0, 1) if kind == "dense" else quantize_experts(weights, device)
    if kind == "nf4 double":
        base = nf4_double_quantize(base)
    if kind != "dense":
        weights = nf4_dequantize(base, dtype).unflatten(0, (count, rows))
    factors = factors_for(count, rows, columns, rank, dtype, device) if adapted else None
    x = torch.randn(tokens * choices, columns, device=device).to(dtype).requires_grad_()
    out = grouped_linear(x, base, routing.offsets, factors)
    grad = torch.randn_like(out)
    out.backward(grad)

    true_x = x.detach().double().requires_grad_()
    a, b = (
        (torch.zeros(count, columns), torch.zeros(rows, count))
        if factors is None
        else (factors.a_mirror, factors.b_mirror)
    )
    a, b = (side.to(device).double().requires_grad_() for side in (a, b))
    truth = by_a_loop(true_x, weights.double(), routing.experts, a, b, 0.75)
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    assert out.dtype == dtype and relative_error(out, truth) < bound
    if tokens:
        truth.backward(grad.double())
        assert relative_error(x.grad, true_x.grad) < bound
        if factors is not None:
            assert factors.a.grad.dtype == torch.float32
            assert relative_error(factors.a.grad, a.grad) < bound
            assert relative_error(factors.b.grad, b.grad) < bound


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_sorted_by_expert_and_come_back(shape, device):
    tokens, choices, count, *_ = shape
    picked = chosen(tokens, choices, count).to(device)
    routing = Routing.of(picked, count)
    assert (routing.experts.diff() >= 0).all()
    assert routing.offsets.tolist() == [int((picked <= expert).sum()) for expert in range(count)]
    x = torch.randn(tokens, 6, dtype=torch.float64, device=device, requires_grad=True)
    rows = routing.spread(x)
    back = routing.gathered(rows * (1 + routing.experts)[:, None])
    torch.testing.assert_close(back, x[:, None] * (1 + picked)[..., None])
    weights = torch.randn_like(back)
    (back * weights).sum().backward()
    torch.testing.assert_close(x.grad, (weights * (1 + picked)[..., None]).sum(1))


def test_each_expert_is_quantised_by_itself(device):
    weights = torch.randn(3, 8, 40, device=device)
    packed = quantize_experts(weights, device)
    for number, weight in enumerate(weights):
        alone = nf4_quantize(weight)
        assert torch.equal(packed.packed.view(3, -1)[number], alone.packed)
        assert torch.equal(packed.absmax.view(3, -1)[number], alone.absmax)


def test_experts_that_share_blocks_are_quantised_together(device):
    weights = torch.randn(3, 3, 5, device=device)
    assert torch.equal(quantize_experts(weights, device).packed, nf4_quantize(weights.view(9, 5)).packed)


def test_what_does_not_belong_together_is_told(device):
    with pytest.raises(ValueError, match=r"x is \[4, 8\] and the base \[6, 16\] of 3 experts"):
        grouped_linear(torch.zeros(4, 8), torch.zeros(6, 16), torch.tensor([1, 2, 4], dtype=torch.int32))


# ---- the weight stays in 4 bits

# rows of each expert, outputs, columns: none, more than a pass holds, an expert's last tile not full, a step not full
UNEVEN = [([3, 0, 1], 24, 64), ([0, 70, 2, 0], 130, 192), ([1], 7, 64), ([0, 0], 16, 128), ([5] * 9, 64, 320)]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("sizes, outputs, columns", UNEVEN, ids=str)
def test_few_rows_by_a_weight_that_stays_in_4_bits(sizes, outputs, columns, double, dtype, device, relative_error):
    count, total = len(sizes), sum(sizes)
    base = quantize_experts(torch.randn(count, outputs, columns, device=device) / columns**0.5, device)
    base = nf4_double_quantize(base) if double else base
    x = torch.randn(total, 2 * columns, device=device).to(dtype)[:, columns:]  # rows further apart than they are long
    offsets = torch.tensor(sizes, device=device).cumsum(0).int()
    got = grouped_linear(x, base, offsets, impl="triton")
    weights = nf4_dequantize(base, dtype, impl="torch").unflatten(0, (count, outputs)).double()
    truth = torch.cat([rows @ of.T for rows, of in zip(x.double().split(sizes), weights, strict=True)])
    assert got.shape == (total, outputs) and got.dtype == dtype
    assert relative_error(got, truth) < {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def test_its_gradients_are_those_of_the_dense_product(device, relative_error):
    count, rows, columns, rank = 4, 24, 64, 3
    base = quantize_experts(torch.randn(count, rows, columns, device=device), device)
    routing = Routing.of(chosen(9, 2, count).to(device), count)
    gradients = []
    for impl in ("torch", "triton"):
        torch.manual_seed(0)
        factors = factors_for(count, rows, columns, rank, torch.float32, device)
        x = torch.randn(18, columns, device=device).requires_grad_()
        out = grouped_linear(x, base, routing.offsets, factors, impl)
        (out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum().backward()
        gradients.append([out, x.grad, factors.a.grad, factors.b.grad])
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 2e-6


def test_where_it_does_not(device):
    """Blocks that span two rows, many rows, or a CPU without being asked."""

    def base(columns):
        return quantize_experts(torch.randn(2, 8, columns, device=device), device)

    few, many = (torch.zeros(rows, 64, device=device) for rows in (4, 2 * MOST_ROWS + 1))
    assert stays_packed(few, base(64), 2, "triton") and not stays_packed(few, base(64), 2, "torch")
    assert not stays_packed(few[:, :48], base(48), 2, "triton")
    assert stays_packed(few, base(64), 2, "auto") == (device.type == "cuda")
    assert not stays_packed(many, base(64), 2, "auto")
