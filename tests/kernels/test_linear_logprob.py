"""linear_logprob against a float64 softmax over the whole logits matrix.
Knows nothing of how rows are chunked or which product computes what.
"""

import pytest
import torch
from grpo_kernels import head_product, linear_logprob

# Relative to the norm of the truth: float32 sums in another order; half precision operands with float32 accumulation.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def make_inputs(M, D, V, dtype, device, scale=1.0):
    hidden = torch.randn(M, D, device=device).to(dtype)
    weight = (scale * torch.randn(V, D, device=device) / D**0.5).to(dtype)
    targets = torch.randint(0, V, (M,), device=device)
    return hidden, weight, targets


def float64_truth(hidden, weight, targets, temperature=1.0, softcap=None):
    """Differentiable float64 log-probability and entropy, and the leaves they depend on."""
    hidden = hidden.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probabilities = torch.log_softmax(logits / temperature, dim=1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(1)
    return log_probabilities.gather(1, targets[:, None]).squeeze(1), entropy, hidden, weight


def a_loss(logprobs, entropy, entropy_weight):
    """Neither linear nor the same for each row, as policy losses are."""
    weights = torch.linspace(-1, 2, len(logprobs), device=logprobs.device, dtype=logprobs.dtype)
    return (weights * torch.exp(logprobs.clamp(max=0) / 4)).sum() + entropy_weight * (weights * entropy.square()).sum()


@pytest.mark.parametrize(("M", "D", "V"), [(33, 64, 507), (1, 252, 123), (130, 48, 1024)])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 5.0)])
def test_values_and_hidden_gradient(impl, dtype, device, relative_error, M, D, V, temperature, softcap):
    hidden, weight, targets = make_inputs(M, D, V, dtype, device, scale=3.0)
    true_logprobs, true_entropy, true_hidden, _ = float64_truth(hidden, weight, targets, temperature, softcap)
    a_loss(true_logprobs, true_entropy, 0.0).backward()

    hidden.requires_grad_()
    logprobs, entropy = linear_logprob(hidden, weight, targets, temperature, softcap, impl=impl)
    a_loss(logprobs, entropy, 0.0).backward()

    assert logprobs.dtype == entropy.dtype == torch.float32
    assert not entropy.requires_grad
    # Values come from the same 16-bit numbers as the truth, accumulated in float32, whatever the dtype.
    assert relative_error(logprobs, true_logprobs) < 2e-5
    assert relative_error(entropy, true_entropy) < 2e-5
    assert hidden.grad.dtype == dtype
    assert relative_error(hidden.grad, true_hidden.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_entropy_gradient(impl, dtype, device, relative_error, softcap):
    hidden, weight, targets = make_inputs(37, 64, 507, dtype, device, scale=3.0)
    true_logprobs, true_entropy, true_hidden, _ = float64_truth(hidden, weight, targets, 0.8, softcap)
    a_loss(true_logprobs, true_entropy, 0.1).backward()

    hidden.requires_grad_()
    logprobs, entropy = linear_logprob(hidden, weight, targets, 0.8, softcap, impl=impl, differentiable_entropy=True)
    a_loss(logprobs, entropy, 0.1).backward()
    assert relative_error(hidden.grad, true_hidden.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("hidden_is_trained", [True, False])
def test_trained_head(impl, dtype, device, relative_error, hidden_is_trained):
    hidden, weight, targets = make_inputs(70, 48, 251, dtype, device, scale=3.0)
    true_logprobs, true_entropy, true_hidden, true_weight = float64_truth(hidden, weight, targets, 0.9, 8.0)
    a_loss(true_logprobs, true_entropy, 0.1).backward()

    hidden.requires_grad_(hidden_is_trained)
    weight.requires_grad_()
    logprobs, entropy = linear_logprob(
        hidden, weight, targets, 0.9, 8.0, impl=impl, differentiable_entropy=True, chunk_rows=32
    )
    a_loss(logprobs, entropy, 0.1).backward()
    assert relative_error(weight.grad, true_weight.grad) < TOLERANCE[dtype]
    if hidden_is_trained:
        assert relative_error(hidden.grad, true_hidden.grad) < TOLERANCE[dtype]
    else:
        assert hidden.grad is None


def test_the_gradient_survives_certainty(impl, device, relative_error):
    """With p(target) = 1 - 1e-6 the gradient is tiny, and right to float32 precision: nothing cancels."""
    hidden, weight, _ = make_inputs(16, 64, 300, torch.float32, device)
    targets = torch.arange(16, device=device)
    weight[:16] = hidden * (16 / hidden.square().sum(1, keepdim=True))
    true_logprobs, _, true_hidden, _ = float64_truth(hidden, weight, targets)
    true_logprobs.sum().backward()
    hidden.requires_grad_()
    logprobs, _ = linear_logprob(hidden, weight, targets, impl=impl)
    logprobs.sum().backward()
    assert true_logprobs.min() > -1e-2
    assert relative_error(hidden.grad, true_hidden.grad) < 1e-4


@pytest.mark.parametrize("scale", [60.0, 400.0])
def test_huge_logits(impl, dtype, device, relative_error, scale):
    """Targets hundreds of nats below the largest logit: no overflow, in the values or in the gradient."""
    hidden, weight, targets = make_inputs(40, 64, 333, dtype, device, scale=scale)
    true_logprobs, true_entropy, true_hidden, _ = float64_truth(hidden, weight, targets)
    true_logprobs.sum().backward()
    assert true_logprobs.min() < -100
    hidden.requires_grad_()
    logprobs, entropy = linear_logprob(hidden, weight, targets, impl=impl)
    logprobs.sum().backward()
    assert relative_error(logprobs, true_logprobs) < 2e-5
    assert (entropy.double() - true_entropy).abs().max() < 2e-3
    assert relative_error(hidden.grad, true_hidden.grad) < max(TOLERANCE[dtype], 2e-4)


def test_no_rows(impl, device):
    hidden, weight, _ = make_inputs(0, 64, 100, torch.float32, device)
    hidden.requires_grad_()
    targets = torch.empty(0, dtype=torch.int64, device=device)
    logprobs, entropy = linear_logprob(hidden, weight, targets, impl=impl)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad.shape == (0, 64)


def test_chunks_change_nothing(impl, device):
    hidden, weight, targets = make_inputs(150, 64, 200, torch.float32, device)

    def run(chunk_rows):
        leaf = hidden.clone().requires_grad_()
        logprobs, entropy = linear_logprob(leaf, weight, targets, impl=impl, chunk_rows=chunk_rows)
        logprobs.square().sum().backward()
        return logprobs.detach(), entropy, leaf.grad

    for whole, split in zip(run(150), run(17), strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-6)


def test_without_gradients_the_values_are_the_same(impl, device):
    hidden, weight, targets = make_inputs(50, 64, 400, torch.float32, device)
    with torch.no_grad():
        plain = linear_logprob(hidden, weight, targets, 0.9, impl=impl)
    trained = linear_logprob(hidden.requires_grad_(), weight, targets, 0.9, impl=impl)
    for value, expected in zip(plain, trained, strict=True):
        torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-5)


def test_gradcheck_in_float64(device):
    hidden, weight, targets = make_inputs(5, 6, 9, torch.float64, device, scale=2.0)

    def run(hidden, weight):
        return linear_logprob(hidden, weight, targets, 0.7, 4.0, impl="torch", differentiable_entropy=True)

    torch.autograd.gradcheck(run, (hidden.clone().requires_grad_(), weight))
    torch.autograd.gradcheck(run, (hidden.clone().requires_grad_(), weight.clone().requires_grad_()))


def test_rows_may_be_strided(impl, device, relative_error):
    wide, weight, targets = make_inputs(40, 128, 222, torch.float32, device)
    hidden = wide[::2, :64]
    true_logprobs, _, _, _ = float64_truth(hidden, weight[:, 64:], targets[:20])
    logprobs, _ = linear_logprob(hidden, weight[:, 64:], targets[:20], impl=impl)
    assert relative_error(logprobs, true_logprobs) < 2e-5


def test_the_operator_is_well_formed(device):
    """Schema, fake kernel and autograd registration agree with what the operator does."""
    hidden, weight, targets = make_inputs(7, 16, 50, torch.float32, device)
    operator = torch.ops.grpo_kernels.linear_logprob.default
    for form in ("values", "unit", "unit_entropy"):
        arguments = (hidden.clone().requires_grad_(), weight, targets, 0.9, 0.0, form, True, "torch", 3)
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_bad_arguments_are_named(device):
    hidden, weight, targets = make_inputs(4, 8, 10, torch.float32, device)
    with pytest.raises(ValueError, match=r"weight \[10, 6\]"):
        linear_logprob(hidden, weight[:, :6], targets)
    with pytest.raises(ValueError, match="one target for each of 4 rows"):
        linear_logprob(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match=r"temperature is 0.0"):
        linear_logprob(hidden, weight, targets, 0.0)
    with pytest.raises(ValueError, match="impl is 'cuda'"):
        linear_logprob(hidden, weight, targets, impl="cuda")


def test_compiles_into_one_graph(impl, device):
    hidden, weight, targets = make_inputs(20, 32, 70, torch.float32, device)

    def loss(hidden):
        logprobs, entropy = linear_logprob(hidden, weight, targets, 0.9, impl=impl, differentiable_entropy=True)
        return a_loss(logprobs, entropy, 0.1)

    eager, compiled = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_chunk_of_more_than_2_to_the_31_elements(relative_error, dtype):
    M, D, V = 16500, 64, 131072
    hidden, weight, targets = make_inputs(M, D, V, dtype, torch.device("cuda"))
    last = slice(M - 100, M)
    true_logprobs, _, true_hidden, _ = float64_truth(hidden[last], weight, targets[last])
    true_logprobs.sum().backward()
    hidden.requires_grad_()
    logprobs, _ = linear_logprob(hidden, weight, targets, impl="triton", chunk_rows=M)
    logprobs.sum().backward()
    assert relative_error(logprobs[last], true_logprobs) < 2e-5
    assert relative_error(hidden.grad[last], true_hidden.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_head_alone_is_as_exact_as_float32(dtype, device, relative_error):
    """Rounded to 16 bits the logits would be off by 1e-3, or 2e-4 in float16."""
    hidden, weight, _ = make_inputs(33, 64, 507, dtype, device, scale=3.0)
    logits = head_product(hidden, weight)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(logits, hidden.double() @ weight.double().T) < 2e-6
