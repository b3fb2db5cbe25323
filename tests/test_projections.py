"""How a projection's base and factors lie in memory."""

import pytest
import torch
from grpo_kernels.nf4 import NF4, nf4_dequantize

from grpo.policy.building import kept_dtype
from grpo.policy.projections import Projection, ProjectionStore, join_dense, join_nf4


def linears(*sizes, columns=64):
    return [torch.randn(size, columns) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mirror_of_a_lies_below_a_dense_base_and_is_refreshed_there(dtype):
    weights = linears(96, 7)
    base, room = join_dense(weights, dtype, rank=3)
    store = ProjectionStore()
    store.add("both", Projection(base, None, ["one", "two"], [96, 7], 3, dtype, room))
    store.initialise(alpha=6.0, seed=0)
    [projection] = store.projections.values()
    assert torch.equal(projection.base, torch.cat(weights).to(dtype))
    below = projection.base.as_strided((103 + 6, 64), (64, 1))[103:]
    assert below.data_ptr() == projection.lora.a_mirror.data_ptr()
    assert torch.equal(below, projection.lora_a.detach().to(dtype)) and below.any()
    with torch.no_grad():
        projection.lora_a.mul_(3)
    store.refresh()
    assert torch.equal(below, projection.lora_a.detach().to(dtype))
    assert torch.equal(projection.base, torch.cat(weights).to(dtype))


def test_without_a_rank_a_base_has_nothing_below_it():
    base, room = join_dense(linears(5, 3), torch.float32)
    assert room is None
    assert base.untyped_storage().nbytes() == 8 * 64 * 4


def test_parts_of_a_dense_base_may_come_in_4_bits():
    [quantised] = linears(64)
    quantised = join_nf4([quantised])
    assert isinstance(quantised, NF4)
    base, _ = join_dense([quantised, torch.ones(2, 64)], torch.float32, rank=1)
    assert torch.equal(base[:64], nf4_dequantize(quantised, torch.float32)) and (base[64:] == 1).all()


def test_a_dense_base_is_kept_in_what_is_computed_in_where_that_is_16_bits():
    assert kept_dtype("float32", torch.float32) == torch.float32
    assert kept_dtype("bf16", torch.bfloat16) == torch.bfloat16
    assert kept_dtype("bf16", torch.float16) == torch.float16  # a GPU without bfloat16
    assert kept_dtype("bf16", torch.float32) == torch.bfloat16  # a CPU: the rounding of the weights is the GPU's
