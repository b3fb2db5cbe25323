"""The inference form of the LoRA linear against float64 and against the forward that is trained."""

from dataclasses import replace

import pytest
import torch
from grpo_kernels import lora_linear, lora_linear_inference
from lora_reference import plain, random_base, random_factors, random_projection, reference_linear
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize("kind", ["dense", "dense, A below", "nf4", "nf4 double"])
@pytest.mark.parametrize(
    ("num_rows", "sizes", "num_inputs", "rank"),
    [
        (1, [64], 64, 4),
        (1, [252, 7], 128, 20),
        (17, [123], 192, 8),
        (70, [128, 32, 32], 64, 3),
        (33, [123, 64, 1], 128, 16),
        (5, [31, 33], 507, 5),
        (1, [252, 7], 512, 20),
        (40, [100], 256, 3),
        (70, [123, 64, 1], 768, 24),  # what tensor descriptors fetch
    ],
)
def test_agrees_with_float64(num_rows, sizes, num_inputs, rank, kind, dtype, device, impl, relative_error):
    base, factors = random_projection(sizes, num_inputs, rank, dtype, device, kind)
    x = torch.randn(num_rows, num_inputs, device=device).to(dtype)
    for bias in (None, torch.randn(sum(sizes), device=device).to(dtype)):
        truth, plain_torch = (
            reference_linear(
                x.to(compute),
                plain(base, dtype, compute),
                factors.a_mirror.to(compute),
                [b.to(compute) for b in factors.b_mirror],
                factors.scale,
                bias,
            )
            for compute in (torch.float64, dtype)
        )
        got = lora_linear_inference(x, base, factors, bias, impl=impl)
        assert got.dtype == dtype
        # Half a unit in the last place on top: with few rows there is no sum that would average roundings.
        bound = 1.3 * relative_error(plain_torch, truth) + max(1e-6, torch.finfo(dtype).eps / 2)
        assert relative_error(got, truth) <= bound
        trained = lora_linear(x, base, factors, bias, impl=impl)
        assert relative_error(got, trained) <= max(1e-6, torch.finfo(dtype).eps)


def test_k_split_among_programs(device, impl, relative_error):
    factors = random_factors([64, 32], 2048, 8, torch.float16, device)
    base = random_base(96, 2048, torch.float16, device, "nf4 double")
    x = torch.randn(3, 2048, device=device).half()
    trained = lora_linear(x, base, factors, impl=impl)
    # Twice: the programs that count arrivals must leave the counters as they found them.
    for _ in range(2):
        assert relative_error(lora_linear_inference(x, base, factors, impl=impl), trained) < 1e-3


@pytest.mark.parametrize("kind", ["dense", "dense, A below", "nf4", "nf4 double"])
@pytest.mark.parametrize(("sizes", "num_inputs"), [([123, 64], 192), ([100], 512)])
def test_launched_eagerly(sizes, num_inputs, kind, dtype, device, impl, relative_error):
    """A decoder without a graph, through the function that trains."""
    base, factors = random_projection(sizes, num_inputs, 5, dtype, device, kind)
    x, bias = torch.randn(7, num_inputs, device=device).to(dtype), torch.randn(sum(sizes), device=device).to(dtype)
    with torch.no_grad():
        got = lora_linear(x, base, factors, bias, impl=impl)
    captured = lora_linear_inference(x, base, factors, bias, impl=impl)
    assert relative_error(got, captured) <= max(1e-6, torch.finfo(dtype).eps)


def test_a_that_descriptors_cannot_fetch(device, impl, relative_error):
    """Its address is no multiple of 16 bytes."""
    base, factors = random_projection([100], 512, 4, torch.float16, device, "nf4")
    x = torch.randn(7, 512, device=device).half()
    memory = torch.empty(factors.a_mirror.numel() + 1, dtype=torch.float16, device=device)
    elsewhere = replace(factors, a_mirror=memory[1:].view(4, 512).copy_(factors.a_mirror))
    expected = lora_linear_inference(x, base, factors, impl=impl)
    assert relative_error(lora_linear_inference(x, base, elsewhere, impl=impl), expected) < 1e-3


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_scale_zero_is_the_base(kind, device, impl, relative_error):
    factors = random_factors([64, 16], 64, 4, torch.float32, device, scale=0.0)
    base = random_base(80, 64, torch.float32, device, kind)
    x = torch.randn(5, 64, device=device)
    alone = x.double() @ plain(base, x.dtype, torch.float64).t()
    assert relative_error(lora_linear_inference(x, base, factors, impl=impl), alone) < 1e-6


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_no_rows(kind, device, impl):
    factors = random_factors([64, 32], 64, 4, torch.float32, device)
    x = torch.randn(0, 64, device=device)
    assert lora_linear_inference(x, random_base(96, 64, torch.float32, device, kind), factors, impl=impl).shape == (
        0,
        96,
    )


def test_reads_mirrors_not_masters(device, impl):
    factors = random_factors([64], 64, 4, torch.float16, device)
    base = random_base(64, 64, torch.float16, device, "nf4")
    x = torch.randn(3, 64, device=device).half()
    lost = replace(factors, a=torch.full_like(factors.a, torch.nan), b=(torch.full_like(factors.b[0], torch.nan),))
    expected = lora_linear_inference(x, base, factors, impl=impl)
    got = lora_linear_inference(x.requires_grad_(), base, lost, impl=impl)
    assert torch.equal(got, expected) and not got.requires_grad


def test_rows_that_lie_apart(device, impl):
    factors = random_factors([64, 32], 64, 4, torch.float32, device)
    base = random_base(96, 64, torch.float32, device, "nf4")
    wide = torch.randn(5, 130, device=device)
    x = wide[:, 3:67]
    expected = lora_linear_inference(x.contiguous(), base, factors, impl=impl)
    torch.testing.assert_close(lora_linear_inference(x, base, factors, impl=impl), expected, rtol=1e-6, atol=1e-6)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.mm
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("kind", "in_decoding", "in_training"), [("dense", 2, 2), ("dense, A below", 1, 1), ("nf4", 0, 1)]
)
def test_one_product_where_a_lies_below_the_base(kind, in_decoding, in_training, device, impl):
    if impl == "torch":
        pytest.skip("the twin is written for clarity")
    base, factors = random_projection([64, 32], 128, 4, torch.float16, device, kind)
    x = torch.randn(3, 128, device=device).half()
    with Products() as products:
        lora_linear_inference(x, base, factors, impl=impl)
    assert products.count == in_decoding
    with Products() as products:
        lora_linear(x, base, factors, impl=impl)
    assert products.count == in_training


def test_neighbours_in_other_memory_are_not_taken_for_one(device, impl, relative_error):
    """A weight that ends where A begins, but whose memory ends there too, or goes on with something else."""
    base, factors = random_projection([64], 128, 4, torch.float16, device, "dense, A below")
    x = torch.randn(3, 128, device=device).half()
    together = base.as_strided((68, 128), (128, 1)).clone()  # no room for the padding
    tight = replace(factors, a_mirror=together[64:])
    expected = lora_linear_inference(x, base, factors, impl=impl)
    assert relative_error(lora_linear_inference(x, together[:64], tight, impl=impl), expected) < 1e-3
    elsewhere = replace(factors, a_mirror=factors.a_mirror.clone())
    factors.a_mirror.fill_(torch.nan)
    assert relative_error(lora_linear_inference(x, base, elsewhere, impl=impl), expected) < 1e-3


def test_more_than_three_parts(device):
    factors = random_factors([16] * 4, 64, 4, torch.float32, device)
    base = random_base(64, 64, torch.float32, device, "dense")
    with pytest.raises(ValueError, match="4 parts has no fused form"):
        lora_linear_inference(torch.randn(2, 64, device=device), base, factors, impl="triton")


@pytest.mark.parametrize("kind", ["dense", "dense, A below", "nf4", "nf4 double"])
def test_traced_as_one_operation(kind, device, impl):
    base, factors = random_projection([64, 32], 128, 4, torch.float32, device, kind)
    x, bias = torch.randn(3, 128, device=device), torch.randn(96, device=device)

    def run(rows):
        return lora_linear_inference(rows, base, factors, bias, impl=impl) + 1

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_rows in (3, 7):
        x = torch.randn(num_rows, 128, device=device)
        assert torch.equal(compiled(x), run(x))


def test_operators_follow_their_schema(device):
    factors = random_factors([64, 32], 128, 4, torch.float32, device)
    x = torch.randn(3, 128, device=device)
    low_rank = factors.a_mirror, list(factors.b_mirror), factors.scale
    dense = random_base(96, 128, torch.float32, device, "dense")
    torch.library.opcheck(torch.ops.grpo_kernels.lora_linear_dense.default, (x, dense, *low_rank))
    nf4 = random_base(96, 128, torch.float32, device, "nf4 double")
    packed = nf4.packed, nf4.absmax, nf4.nested_absmax, nf4.offset, 96
    torch.library.opcheck(torch.ops.grpo_kernels.lora_linear_nf4.default, (x, *packed, *low_rank))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["nf4", "nf4 double"])
@pytest.mark.parametrize("num_rows", [1, 8, 33, 64, 100, 200, 300])
@pytest.mark.parametrize(("sizes", "num_inputs"), [([1000, 24], 4096), ([6200], 4096), ([6200], 4160)])
def test_every_tiling_in_bfloat16(sizes, num_inputs, num_rows, kind, relative_error):
    base, factors = random_projection(sizes, num_inputs, 40, torch.bfloat16, torch.device("cuda"), kind)
    x = torch.randn(num_rows, num_inputs, device="cuda").bfloat16()
    truth = reference_linear(
        x.double(),
        plain(base, torch.bfloat16, torch.float64),
        factors.a_mirror.double(),
        [b.double() for b in factors.b_mirror],
        factors.scale,
        None,
    )
    for impl in ("triton", "auto"):
        # x A^T and its product with B are rounded, as is x W^T.
        assert relative_error(lora_linear_inference(x, base, factors, impl=impl), truth) < torch.finfo(x.dtype).eps / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["dense", "dense, A below", "nf4", "nf4 double"])
@pytest.mark.parametrize("num_rows", [1, 8, 64, 200, 512])
def test_replayed_in_a_cuda_graph(kind, num_rows):
    base, factors = random_projection([1024, 256, 256], 2048, 32, torch.bfloat16, torch.device("cuda"), kind)
    x, bias = torch.randn(num_rows, 2048, device="cuda").bfloat16(), torch.randn(1536, device="cuda").bfloat16()
    lora_linear_inference(x, base, factors, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lora_linear_inference(x, base, factors, bias)
    for scale in (0.0, 0.5, 1.0):
        x.normal_()
        factors.scale.fill_(scale)
        factors.a_mirror.normal_()
        factors.b_mirror[1].normal_()
        graph.replay()
        assert torch.equal(out, lora_linear_inference(x, base, factors, bias))
