"""What a model makes of its head's products: found by giving it others, and folded into temperature and soft cap."""

import math

import pytest
import torch
from grpo_kernels import linear_logprob
from torch import nn

from grpo.policy.head import Logits, instead, read_logits

VOCABULARY = 7


def read(made, dtype=torch.float32, tokens=4):
    """What is read of a model that makes `made(products)` of its head's products."""
    head = nn.Linear(3, VOCABULARY, bias=False, dtype=dtype)
    return read_logits(head, lambda: made(head(torch.zeros(1, tokens, 3, dtype=dtype))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factor_and_cap_are_exact_in_any_dtype(dtype):
    assert read(lambda x: x, dtype) == Logits()
    assert read(lambda x: x / 8.0, dtype) == Logits(0.125)
    assert read(lambda x: 30 * torch.tanh(x / 30), dtype) == Logits(1.0, 30.0)
    found = read(lambda x: 30 * torch.tanh(x * 0.3 / 30).float(), dtype)
    assert found.factor == pytest.approx(0.3, rel=1e-6)
    assert found.softcap == pytest.approx(30.0, rel=1e-6)


@pytest.mark.parametrize("made", [
    lambda x: -x,
    lambda x: 0 * x,
    lambda x: x * math.nan,
    lambda x: x + 1,
    lambda x: x.clamp(-20, 20),
    lambda x: x.log_softmax(-1),
    lambda x: x[..., :-1],
    lambda x: torch.zeros_like(x) if x.dtype == torch.float64 else x,
    lambda x: 30 * torch.tanh(x / 30) + torch.arange(VOCABULARY),
])  # fmt: skip
def test_what_is_something_else_is_not_read(made):
    assert read(made) is None


def test_a_head_that_is_not_called_or_seldom_is_not_read():
    head = nn.Linear(3, VOCABULARY, bias=False)
    assert read_logits(head, lambda: torch.zeros(1, 4, VOCABULARY)) is None
    assert read(lambda x: x, tokens=2) is None


def test_what_was_there_instead_is_there_again():
    head = nn.Linear(3, VOCABULARY, bias=False)
    with pytest.raises(ZeroDivisionError), instead(head, lambda x: 1 / 0):
        head(torch.zeros(1, 3))
    assert "forward" not in vars(head)
    head.forward = own = lambda x: x
    with instead(head, lambda x: x + 1):
        assert head(1) == 2
    assert head.forward is own


@pytest.mark.parametrize("logits", [Logits(), Logits(0.0625), Logits(16.0, 30.0), Logits(0.25, 2.0)])
def test_a_factor_folds_into_temperature_and_cap(logits):
    torch.manual_seed(0)
    hidden = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight, targets = torch.randn(VOCABULARY, 6, dtype=torch.float64), torch.randint(VOCABULARY, (5,))
    expected = torch.log_softmax(logits(hidden @ weight.T) / 0.7, -1)
    wanted = expected.gather(1, targets[:, None]).squeeze(1), -(expected.exp() * expected).sum(-1)
    ours = linear_logprob(hidden, weight, targets, *logits.at(0.7), differentiable_entropy=True)
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    [gradient], [reference] = (
        torch.autograd.grad((logprob + 0.3 * entropy).sum(), hidden) for logprob, entropy in (ours, wanted)
    )
    torch.testing.assert_close(gradient, reference)
