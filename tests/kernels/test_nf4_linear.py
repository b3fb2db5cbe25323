"""Few rows times an NF4 weight, against the float64 product with the dequantised weight."""

import pytest
import torch
from grpo_kernels.nf4 import nf4_dequantize, nf4_quantize
from grpo_kernels.nf4_product import nf4_linear


def product_float64(x, nf4, bias):
    weight = nf4_dequantize(nf4, x.dtype, impl="torch")
    out = x.double() @ weight.double().t()
    return (out if bias is None else out + bias.double()), torch.nn.functional.linear(x, weight, bias)


def check(x, nf4, bias, impl, relative_error, eager=False):
    truth, plain = product_float64(x, nf4, bias)
    got = nf4_linear(x, nf4, bias, impl=impl, eager=eager)
    assert got.dtype == x.dtype
    # The sum runs in another order, so a float32 product may round differently; nothing else may.
    assert relative_error(got, truth) <= 1.1 * relative_error(plain, truth) + 3e-7


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_inputs"),
    [
        (1, 64, 64), (3, 123, 320), (17, 252, 192), (70, 64, 128),
        (1, 123, 512), (20, 100, 768), (40, 64, 256), (70, 123, 256),  # what tensor descriptors fetch
    ],
)  # fmt: skip
def test_agrees_with_float64(num_rows, num_outputs, num_inputs, double_quant, dtype, device, impl, relative_error):
    x = torch.randn(num_rows, num_inputs, device=device).to(dtype)
    nf4 = nf4_quantize(torch.randn(num_outputs, num_inputs, device=device), double_quant)
    check(x, nf4, torch.randn(num_outputs, device=device).to(dtype), impl, relative_error)


def test_k_split_among_programs(dtype, device, impl, relative_error):
    x = torch.randn(5, 2048, device=device).to(dtype)
    nf4 = nf4_quantize(torch.randn(64, 2048, device=device))
    # Twice: the programs that count arrivals must leave the counters as they found them.
    check(x, nf4, None, impl, relative_error)
    check(x, nf4, None, impl, relative_error)


def test_columns_that_blocks_do_not_divide(dtype, device, impl, relative_error):
    x = torch.randn(4, 507, device=device).to(dtype)
    check(x, nf4_quantize(torch.randn(31, 507, device=device)), None, impl, relative_error)


def test_leading_dimensions_and_strides(device, impl, relative_error):
    wide = torch.randn(2, 3, 256, device=device)
    nf4 = nf4_quantize(torch.randn(96, 128, device=device))
    got = nf4_linear(wide[..., ::2], nf4, impl=impl)
    truth, _ = product_float64(wide[..., ::2], nf4, None)
    assert got.shape == (2, 3, 96)
    assert relative_error(got, truth) < 1e-6


@pytest.mark.parametrize("start", [1, 8])
def test_rows_of_x_apart(start, dtype, device, impl, relative_error):
    wide = torch.randn(5, 256 + 16, device=device).to(dtype)
    # From the second column on, addresses are not those that a descriptor can have.
    x = wide[:, start : start + 256]
    check(x, nf4_quantize(torch.randn(96, 256, device=device)), None, impl, relative_error)
    check(x[:1].expand(5, 256), nf4_quantize(torch.randn(96, 256, device=device)), None, impl, relative_error)


@pytest.mark.parametrize("double_quant", [False, True])
def test_some_rows_of_a_weight(double_quant, dtype, device, impl, relative_error):
    nf4 = nf4_quantize(torch.randn(300, 512, device=device), double_quant)
    check(torch.randn(5, 512, device=device).to(dtype), nf4.row_slice(33, 200), None, impl, relative_error)


def test_launched_eagerly(dtype, device, impl, relative_error):
    x, nf4 = torch.randn(20, 512, device=device).to(dtype), nf4_quantize(torch.randn(100, 512, device=device))
    check(x, nf4, None, impl, relative_error, eager=True)


def test_no_rows(device, impl):
    nf4 = nf4_quantize(torch.randn(96, 128, device=device))
    assert nf4_linear(torch.randn(0, 128, device=device), nf4, impl=impl).shape == (0, 96)


def test_traced_as_one_operation(device):
    x, nf4 = torch.randn(3, 128, device=device), nf4_quantize(torch.randn(96, 128, device=device))
    compiled = torch.compile(lambda rows: nf4_linear(rows, nf4, impl="triton") + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), nf4_linear(x, nf4, impl="triton") + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("num_rows", [1, 8, 33, 64, 100, 200, 300])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1024, 4096), (6200, 4096), (6200, 4160)])
def test_every_tiling_in_bfloat16(num_outputs, num_inputs, num_rows, double_quant, relative_error):
    x = torch.randn(num_rows, num_inputs, device="cuda").bfloat16()
    nf4 = nf4_quantize(torch.randn(num_outputs, num_inputs, device="cuda").bfloat16(), double_quant)
    for impl in ("triton", "auto"):
        check(x, nf4, None, impl, relative_error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_in_a_cuda_graph():
    nf4 = nf4_quantize(torch.randn(1024, 4096, device="cuda").bfloat16(), True)
    x = torch.randn(8, 4096, device="cuda").bfloat16()
    nf4_linear(x, nf4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nf4_linear(x, nf4)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, nf4_linear(x, nf4))
