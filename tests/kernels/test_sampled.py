"""Log-probabilities of one token a row against float64 PyTorch."""

import pytest
import torch
from grpo_kernels import token_logprobs


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 8192), (5, 8193), (7, 20_001), (0, 9)])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_values(impl, dtype, device, shape, temperature):
    logits = (3 * torch.randn(shape, device=device) / temperature).to(dtype)
    tokens = torch.randint(0, shape[1], shape[:1], device=device)
    truth = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    found = token_logprobs(logits, tokens, impl=impl)
    assert found.dtype == torch.float32 and found.shape == tokens.shape
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def test_masked_tokens_huge_logits_and_rows_apart(impl, device):
    wide = torch.randn(4, 3, 9000, device=device) * 50
    logits = wide[:, 1]  # rows at a pitch of their own
    logits[:, ::2] = -torch.inf
    logits[0, 8999] = 1e30
    logits[1] -= 1e4
    tokens = torch.tensor([8999, 1, 3, 2], device=device, dtype=torch.int32)
    truth = logits.double().log_softmax(-1).gather(1, tokens.long()[:, None])[:, 0]
    found = token_logprobs(logits, tokens, impl=impl)
    assert found[0] == 0 and found[3] == -torch.inf
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def test_refuses_other_shapes(device):
    with pytest.raises(ValueError, match=r"logits are \[2, 3\] and tokens \[3\]"):
        token_logprobs(torch.zeros(2, 3, device=device), torch.zeros(3, dtype=torch.long, device=device))
