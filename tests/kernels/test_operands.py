"""Operands as callers have them: strided views, shapes that do not go together, any rank, autocast, another GPU.
Most operations are compared with themselves on contiguous copies; what they compute is checked elsewhere.
"""

from dataclasses import replace

import pytest
import torch
from grpo_kernels import (
    GroupLayout,
    add_rms_norm,
    group_attention,
    linear_logprob,
    lora_linear,
    lora_linear_inference,
    lora_mlp,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
    rms_norm,
    rope,
    swiglu,
)
from grpo_kernels.gates import gated_backward
from lora_reference import leaves, plain, random_base, random_factors, random_projection, reference_linear


def strided(tensor):
    """The same values, every other element of its memory; the others are NaN."""
    memory = torch.full((*tensor.shape, 2), torch.nan).to(tensor)
    memory[..., 0] = tensor
    return memory[..., 0].detach().requires_grad_(tensor.requires_grad)


def gradients(outputs, inputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(
        (output * torch.linspace(-1, 1, output.numel()).half().view(output.shape).to(output)).sum()
        for output in outputs
    )
    return torch.autograd.grad(loss, inputs)


def agree(run, *operands):
    """`run` gives the same results and gradients for strided operands as for contiguous ones."""
    contiguous = [operand.detach().requires_grad_(operand.requires_grad) for operand in operands]
    views = [strided(operand) for operand in operands]
    trained = [[tensor for tensor in tensors if tensor.requires_grad] for tensors in (contiguous, views)]
    expected, got = run(*contiguous), run(*views)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, trained[1]), gradients(expected, trained[0]))


@pytest.mark.parametrize("width", [8, 128])
def test_targets(width, device, impl):
    hidden, weight = torch.randn(40, width, device=device), torch.randn(100, width, device=device)
    targets = torch.randint(0, 100, (40, 2), device=device)
    for view in (targets[:, 0], targets[:1, 0].expand(40)):
        expected = linear_logprob(hidden, weight, view.contiguous(), impl=impl)
        torch.testing.assert_close(linear_logprob(hidden, weight, view, impl=impl), expected)
    with pytest.raises(ValueError, match="give int64"):
        linear_logprob(hidden, weight, targets[:, 0].int(), impl=impl)


def test_weight_of_a_norm(device, impl):
    x, weight = (
        torch.randn(5, 24, device=device, requires_grad=True),
        torch.randn(24, device=device, requires_grad=True),
    )
    agree(lambda x, weight: rms_norm(x, weight, impl=impl), x, weight)


def normed_rope(q, k, cos, sin, q_norm, k_norm, impl):
    return rope(q, k, cos, sin, q_norm=q_norm, k_norm=k_norm, impl=impl)


def test_angles_and_norms_of_rope(device, impl):
    q, k = (torch.randn(6, heads, 16, device=device, requires_grad=True) for heads in (4, 2))
    cos, sin = (torch.randn(8, 6, device=device).t() for _ in range(2))
    norms = [torch.randn(16, device=device, requires_grad=True) for _ in range(2)]
    agree(lambda *operands: normed_rope(*operands, impl), q, k, cos, sin, *norms)
    expected = normed_rope(q, k, cos.contiguous(), sin.contiguous(), *norms, impl)
    torch.testing.assert_close(normed_rope(q, k, cos, sin, *norms, impl), expected)


def test_gradient_of_a_norm_in_its_own_precision(device, impl, relative_error):
    q, k = (torch.randn(50, heads, 16, device=device).half() for heads in (4, 2))
    cos, sin = (torch.randn(50, 8, device=device) for _ in range(2))
    norm = torch.randn(16, device=device, requires_grad=True)
    got = gradients(normed_rope(q, k, cos, sin, norm, norm, impl), [norm])[0]
    exact = norm.detach().double().requires_grad_()
    expected = gradients(normed_rope(q.double(), k.double(), cos, sin, exact, exact, "torch"), [exact])[0]
    assert got.dtype == torch.float32
    assert relative_error(got, expected) < 2e-5


def test_bias(device, impl):
    x, bias = torch.randn(3, 128, device=device), torch.randn(96, device=device)
    nf4 = nf4_quantize(torch.randn(96, 128, device=device))
    factors = random_factors([64, 32], 128, 4, torch.float32, device)
    for run in (
        lambda bias: nf4_linear(x, nf4, bias, impl=impl),
        lambda bias: lora_linear(x, nf4, factors, bias, impl=impl),
        lambda bias: lora_linear_inference(x, nf4, factors, bias, impl=impl),
    ):
        torch.testing.assert_close(run(strided(bias)), run(bias))
        with pytest.raises(ValueError, match=r"bias is \[95\]; give \[96\]"):
            run(bias[:95])


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_factors_handed_to_the_operator(kind, device, impl):
    factors = random_factors([64, 32], 128, 4, torch.float32, device)
    base, x = random_base(96, 128, torch.float32, device, kind), torch.randn(3, 128, device=device)
    expected = lora_linear_inference(x, base, factors, impl=impl)
    wide = torch.randn(8, 200, device=device)
    wide[:, :128] = factors.a_mirror
    column_major = factors.a_mirror.t().contiguous().t()
    b = (factors.b_mirror[0], torch.cat([factors.b_mirror[1]] * 2, 1)[:, :4])  # of two pitches
    for a in (wide[:, :128], column_major):
        handed = replace(factors, a_mirror=a, b_mirror=b)
        torch.testing.assert_close(lora_linear_inference(x, base, handed, impl=impl), expected)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_shapes_that_do_not_belong_together(kind, device, impl):
    base, factors = random_projection([64, 32], 256, 4, torch.float32, device, kind)
    narrow, x = torch.randn(3, 128, device=device), torch.randn(3, 256, device=device)
    other = random_factors([64, 16], 256, 4, torch.float32, device)
    for run in (lora_linear, lora_linear_inference):
        with pytest.raises(ValueError, match="give both 256 columns"), torch.no_grad():
            run(narrow, base, factors, impl=impl)
        with pytest.raises(ValueError, match="add up to 96"):
            run(x, base, other, impl=impl)
    if kind == "nf4":
        with pytest.raises(ValueError, match="a byte holds two values"):
            half = replace(base, packed=base.packed[:100])
            lora_linear_inference(x, half, factors, impl=impl)
        with pytest.raises(ValueError, match=r"give \[..., 256\]"):
            nf4_linear(narrow, base, impl=impl)


def test_outputs_that_lie_apart(device):
    nf4 = nf4_quantize(torch.randn(64, 64, device=device))
    with pytest.raises(ValueError, match="rows are contiguous"):
        nf4_dequantize(nf4, torch.float32, out=torch.zeros(64, 64, device=device).t(), impl="triton")
    gate, up, grad = (torch.randn(4, 6, device=device) for _ in range(3))
    with pytest.raises(ValueError, match="last axis is contiguous"):
        gated_backward(gate, up, grad, "silu", out=torch.zeros(12, 4, device=device).t(), impl="triton")


def mlp(x, bases, factors, impl):
    return lora_mlp(x, bases[0], factors[0], bases[1], factors[1], impl=impl)


def mlp_in_float64(x, bases, gate_up, down):
    """Of the leaves [A, B, ...] of both projections."""
    scale = torch.tensor([0.75], dtype=torch.float64, device=x.device)
    weights = [plain(base, torch.float32, torch.float64) for base in bases]
    gate, up = reference_linear(x, weights[0], gate_up[0], gate_up[1:], scale).chunk(2, dim=-1)
    return reference_linear(torch.nn.functional.silu(gate) * up, weights[1], down[0], down[1:], scale)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize(("rank", "down_rank", "is_small"), [(4, 8, False), (8, 2, False), (4, 4, True), (4, 4, False)])
def test_an_mlp_of_any_ranks(rank, down_rank, is_small, kind, device, impl, relative_error, monkeypatch):
    """Two ranks, a GPU with too little shared memory for the fused backward, and x that is column-major."""
    if is_small:
        monkeypatch.setattr("grpo_kernels.mlp.shared_memory", lambda device: 1024)
    bases = [random_base(*shape, torch.float32, device, kind) for shape in ((128, 64), (64, 64))]
    factors = [
        random_factors(sizes, 64, own, torch.float32, device) for sizes, own in (([64, 64], rank), ([64], down_rank))
    ]
    x = torch.randn(64, 7, device=device).t().requires_grad_()
    exact = x.detach().double().requires_grad_()
    masters = [master for own in factors for master in (own.a, *own.b)]
    copies = [leaves(own, torch.float64) for own in factors]
    got, expected = mlp(x, bases, factors, impl), mlp_in_float64(exact, bases, *copies)
    assert relative_error(got, expected) < 1e-5
    pairs = zip(gradients(got, [x, *masters]), gradients(expected, [exact, *copies[0], *copies[1]]), strict=True)
    for gradient, true in pairs:
        assert relative_error(gradient, true) < 1e-5


def test_a_rank_of_many_blocks(device, impl, relative_error):
    """Three parts of rank 131: in the backward they are one rank of 393."""
    base, factors = random_projection([48, 20, 16], 64, 131, torch.float32, device, "nf4")
    x = torch.randn(9, 64, device=device, requires_grad=True)
    exact, copies = x.detach().double().requires_grad_(), leaves(factors, torch.float64)
    weight = plain(base, torch.float32, torch.float64)
    expected = reference_linear(exact, weight, copies[0], copies[1:], factors.scale)
    got = lora_linear(x, base, factors, impl=impl)
    assert relative_error(got, expected) < 1e-5
    masters = [factors.a, *factors.b]
    pairs = zip(gradients(got, [x, *masters]), gradients(expected, [exact, *copies]), strict=True)
    for gradient, true in pairs:
        assert relative_error(gradient, true) < 1e-5
    with torch.no_grad():
        assert relative_error(lora_linear_inference(x, base, factors, impl=impl), expected) < 1e-5


def test_a_second_gradient_is_refused(device):
    """Their backwards have none: better an error than terms that are missing."""
    x, weight = torch.randn(5, 24, device=device, requires_grad=True), torch.randn(24, device=device)
    base, factors = random_projection([24], 24, 4, torch.float32, device, "dense")
    for y in (
        rms_norm(x, weight, impl="triton"),
        swiglu(x, x, impl="triton"),
        lora_linear(x, base, factors, impl="triton"),
        linear_logprob(x, torch.randn(30, 24, device=device), torch.arange(5, device=device), impl="triton")[0],
    ):
        (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (y.sum() + first.pow(2).sum()).backward()


def test_autocast_changes_nothing(device, impl):
    hidden, weight = torch.randn(9, 64, device=device, requires_grad=True), torch.randn(50, 64, device=device)
    targets = torch.arange(9, device=device)
    base, factors = random_projection([64, 32, 16], 64, 4, torch.float32, device, "nf4")
    for run in (
        lambda: linear_logprob(hidden, weight, targets, impl=impl),
        lambda: lora_linear(hidden, base, factors, impl=impl),
    ):
        expected = run()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            torch.testing.assert_close(run(), expected, rtol=0, atol=0)


def everything(device, dtype):
    """What each operation gives, with gradients, for the same operands on whatever device."""
    torch.manual_seed(0)
    x = torch.randn(40, 256, device=device, dtype=dtype, requires_grad=True)
    weight, targets = torch.randn(300, 256, device=device, dtype=dtype) / 16, torch.arange(40, device=device)
    cos, sin = (torch.randn(40, 32, device=device) for _ in range(2))
    bases = [random_base(*shape, dtype, device, "nf4") for shape in ((512, 256), (256, 256))]
    factors = [random_factors(sizes, 256, 8, dtype, device) for sizes in ([256, 256], [256], [128, 64, 64])]
    layout = GroupLayout.of([8], [[16, 16]], device)

    heads = x.view(40, 4, 64)
    outputs = [
        *linear_logprob(x, weight, targets, impl="triton"),
        rms_norm(x, weight[0], impl="triton"),
        *add_rms_norm(x, x, weight[0], impl="triton"),
        *rope(heads, heads, cos, sin, impl="triton"),
        swiglu(x, x, impl="triton"),
        lora_linear(x, bases[0], factors[0], impl="triton"),
        lora_linear(x, bases[1], factors[2], impl="triton"),
        mlp(x, bases, factors, "triton"),
        group_attention(heads, heads, heads, layout),
    ]
    (gradient,) = gradients(tuple(outputs), [x])
    with torch.no_grad():
        inferred = [
            nf4_linear(x, bases[0], impl="triton"),
            lora_linear_inference(x, bases[0], factors[0], impl="triton"),
            lora_linear_inference(x, weight[:256], factors[1], impl="triton"),
            nf4_dequantize(bases[0], dtype, impl="triton"),
        ]
    return [tensor.detach().cpu() for tensor in (*outputs, gradient, *inferred)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_that_is_not_current(dtype):
    expected = everything(torch.device("cuda", 0), dtype)
    got = everything(torch.device("cuda", 1), dtype)
    assert torch.cuda.current_device() == 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
