"""NF4 against bitsandbytes, bit for bit: quantising, dequantising, slicing and joining."""

import bitsandbytes.functional
import pytest
import torch
from grpo_kernels.nf4 import NF4, arrived_on, dynamic_levels_on, levels_on, nf4_concat, nf4_dequantize, nf4_quantize

SHAPES = [(64, 64), (3, 40), (7, 13), (1, 1), (130, 64), (99, 507), (252, 320)]


def theirs(weight, double_quant):
    return bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)


def dequantized_theirs(packed, state, dtype):
    state.dtype = dtype
    return bitsandbytes.functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 512)])
def test_quantize_writes_what_bitsandbytes_writes(shape, double_quant, dtype, device):
    weight = torch.randn(shape, device=device).to(dtype)
    packed, state = theirs(weight, double_quant)
    ours = nf4_quantize(weight, double_quant)
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    if double_quant:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert (ours.offset == state.offset).all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_reads_what_bitsandbytes_wrote(shape, double_quant, dtype, device, impl):
    packed, state = theirs(torch.randn(shape, device=device), double_quant)
    nested = (state.state2.absmax, state.offset.expand_as(state.state2.absmax).contiguous()) if double_quant else ()
    ours = nf4_dequantize(NF4(packed.view(-1), state.absmax, shape, *nested), dtype, impl=impl)
    assert torch.equal(ours, dequantized_theirs(packed, state, dtype))


def test_bfloat16_twin_rounds_as_bitsandbytes(device):
    weight = torch.randn(99, 507, device=device).bfloat16()
    packed, state = theirs(weight, True)
    ours = nf4_dequantize(nf4_quantize(weight, True), torch.bfloat16, impl="torch")
    assert torch.equal(ours, dequantized_theirs(packed, state, torch.bfloat16))


@pytest.mark.parametrize("shape", [(5, 128), (7, 13)])
def test_dequantize_into_a_view_leaves_its_surroundings(shape, device, impl):
    nf4 = nf4_quantize(torch.randn(shape, device=device))
    buffer = torch.full((shape[0], shape[1] + 16), 7.0, device=device)
    result = nf4_dequantize(nf4, torch.float32, out=buffer[:, : shape[1]], impl=impl)
    assert torch.equal(result, nf4_dequantize(nf4, torch.float32, impl="torch"))
    assert (buffer[:, shape[1] :] == 7.0).all()


@pytest.mark.parametrize("double_quant", [False, True])
def test_zeros_stay_zeros(double_quant, device, impl):
    nf4 = nf4_quantize(torch.zeros(4, 64, device=device), double_quant)
    assert (nf4_dequantize(nf4, torch.float32, impl=impl) == 0).all()


def test_no_rows(device, impl):
    nf4 = NF4(torch.empty(0, dtype=torch.uint8, device=device), torch.empty(0, device=device), (0, 64))
    assert nf4_dequantize(nf4, torch.float16, impl=impl).shape == (0, 64)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 3), (2, 2), (5, 37), (64, 128), (0, 128)])
def test_row_slice_is_the_rows_over_the_same_memory(start, stop, double_quant, device, impl):
    nf4 = nf4_quantize(torch.randn(128, 256, device=device), double_quant)
    rows = nf4.row_slice(start, stop)
    assert torch.equal(nf4_dequantize(rows, torch.float32, impl=impl), nf4_dequantize(nf4, torch.float32)[start:stop])
    if stop > start:
        assert rows.packed.data_ptr() == nf4.packed.data_ptr() + start * 128


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("sizes", [(64, 128, 5), (3, 5, 7)])
def test_concat_is_the_rows_below_each_other(sizes, double_quant, device, impl):
    parts = [nf4_quantize(torch.randn(size, 256, device=device), double_quant) for size in sizes]
    joined = nf4_concat(parts)
    expected = torch.cat([nf4_dequantize(part, torch.float32) for part in parts])
    assert torch.equal(nf4_dequantize(joined, torch.float32, impl=impl), expected)
    keeps_double_quant = double_quant and sizes[0] == 64
    assert (joined.absmax.dtype == torch.uint8) == keeps_double_quant


def test_rows_that_share_blocks_cannot_be_sliced_or_joined(device):
    nf4 = nf4_quantize(torch.randn(4, 40, device=device))
    with pytest.raises(ValueError, match="columns"):
        nf4.row_slice(0, 2)
    with pytest.raises(ValueError, match="columns"):
        nf4_concat([nf4, nf4])


def test_memory_is_that_of_the_format(device):
    rows, columns = 512, 512
    plain, double = (nf4_quantize(torch.randn(rows, columns, device=device), d) for d in (False, True))
    assert plain.nbytes == rows * columns * (1 / 2 + 4 / 64)
    assert double.nbytes == rows * columns * (1 / 2 + 1 / 64 + 8 / 64 / 256)


def test_traced_as_one_operation(device):
    nf4 = nf4_quantize(torch.randn(8, 128, device=device), True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def doubled(packed, absmax, nested_absmax, offset):
        return nf4_dequantize(NF4(packed, absmax, (8, 128), nested_absmax, offset), torch.float32, impl="triton") * 2

    expected = nf4_dequantize(nf4, torch.float32, impl="torch") * 2
    for constant in (arrived_on, levels_on, dynamic_levels_on):
        constant.cache_clear()  # as in a process whose first weight is made in a compiled function
    assert torch.equal(doubled(nf4.packed, nf4.absmax, nf4.nested_absmax, nf4.offset), expected)
    assert all(constant.cache_info().currsize == 1 for constant in (arrived_on, levels_on, dynamic_levels_on))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_than_2_to_31_values():
    shape = (2**31 // 4096 + 40, 4096)
    num_values = shape[0] * shape[1]
    packed = torch.randint(0, 256, (num_values // 2,), dtype=torch.uint8, device="cuda")
    nf4 = NF4(packed, torch.rand(num_values // 64, device="cuda"), shape)
    got = nf4_dequantize(nf4, torch.bfloat16, impl="triton")
    for start in (0, shape[0] - 64):
        expected = nf4_dequantize(nf4.row_slice(start, start + 64), torch.bfloat16, impl="torch")
        assert torch.equal(got[start : start + 64], expected)
