"""The MLP of a fused layer: one operation where the kernels have it, its parts otherwise, and the same values."""

import pytest
import torch
from transformers.activations import ACT2FN

from grpo.policy.fused import build_mlp
from grpo.policy.projections import Projection


def projection(sizes, columns, has_bias):
    base, bias = torch.randn(sum(sizes), columns), torch.randn(sum(sizes)) if has_bias else None
    made = Projection(base, bias, [f"part_{i}" for i in range(len(sizes))], sizes, 4, torch.float32)
    with torch.no_grad():
        for master in made.masters():
            master.normal_()
    return made


def dense(made, x):
    """The projection in float64."""
    low_rank = [b.double() @ a.double() for _, a, b in made.factors()]
    out = x @ (made.base.double() + torch.cat(low_rank)).t()
    return out if made.bias is None else out + made.bias.double()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu2"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [None, 2])
def test_it_is_down_of_activated_gate_times_up(activation, has_bias, rows):
    torch.manual_seed(0)
    gate_up, down = projection([24, 24], 16, has_bias), projection([16], 24, has_bias)
    x = torch.randn(5, 16, dtype=torch.float64)
    gate, up = dense(gate_up, x).chunk(2, dim=-1)
    expected = dense(down, ACT2FN[activation](gate) * up)
    got = build_mlp(gate_up, down, ACT2FN[activation])(x.float(), rows)
    assert (got.double() - expected).norm() < 1e-6 * expected.norm()
