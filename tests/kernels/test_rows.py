"""Rows of a table against torch's indexing."""

import pytest
import torch
from grpo_kernels import take_rows


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (0,), (2, 0)])
@pytest.mark.parametrize("width", [1, 64, 1000, 1025, 3000])
def test_are_those_of_the_table(width, shape, dtype, device, impl):
    table = torch.randn(11, width, device=device).to(dtype)
    index = torch.randint(0, 11, shape, device=device)
    assert torch.equal(take_rows(index, table, impl), table[index])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_by_integers_that_do_not_lie_side_by_side(kind, device, impl):
    table = torch.randn(11, 70, device=device)
    index = torch.tensor([[10, 0, 3], [4, 4, 9]], dtype=kind, device=device).t()
    assert torch.equal(take_rows(index, table, impl), table[index.long()])


def test_a_table_with_gaps_is_refused(device, impl):
    with pytest.raises(ValueError, match="one behind the other"):
        take_rows(torch.tensor([0], device=device), torch.randn(8, 11, device=device).t(), impl)


def test_has_no_gradient(device, impl):
    table = torch.randn(4, 8, device=device, requires_grad=True)
    assert not take_rows(torch.tensor([1], device=device), table, impl).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_of_a_table_in_pinned_memory(impl):
    table = torch.randn(5000, 4096).bfloat16().pin_memory()
    index = torch.randint(0, 5000, (3, 700))
    rows = take_rows(index.cuda(), table, impl)
    assert rows.is_cuda and torch.equal(rows.cpu(), table[index])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_of_a_table_of_more_than_two_to_the_31_values():
    table = torch.empty(2**31 // 1024 + 5, 1024, dtype=torch.float16, device="cuda")
    table[-1] = 3
    assert (take_rows(torch.tensor([len(table) - 1], device="cuda"), table) == 3).all()
