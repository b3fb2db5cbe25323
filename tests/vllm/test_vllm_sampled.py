"""Log-probabilities of sampled tokens in the form that vLLM's sampler takes, beside vLLM's own function."""

import pytest
import torch
from grpo_kernels import token_logprobs

from grpo.rollout import vllm_sampled


def test_what_is_asked_for_of_sampled_tokens_alone():
    logits, tokens = torch.randn(5, 1003), torch.randint(0, 1003, (5,))
    found = vllm_sampled.of_sampled(pytest.fail)(logits, 0, tokens, None, max_per_req_token_ids=0, logits_mode=False)
    assert found.logprob_token_ids.tolist() == [[token] for token in tokens.tolist()]
    torch.testing.assert_close(found.logprobs[:, 0], logits.log_softmax(-1)[torch.arange(5), tokens])
    assert found.selected_token_ranks.shape == (5,)


@pytest.mark.parametrize(
    "asked",
    [
        dict(num_logprobs=3),
        dict(max_per_req_token_ids=1, logprob_token_ids_state="state"),
        dict(logits_mode=True),
        dict(cu_num_logits=[0, 2]),
    ],
)
def test_whatever_else_is_asked_for_is_vllms(asked):
    called = []

    def original(logits, num_logprobs, sampled_token_ids, cu_num_logits=None, **more):
        called.append(dict(num_logprobs=num_logprobs, cu_num_logits=cu_num_logits) | more)
        return "vLLM's"

    logits, tokens = torch.randn(2, 7), torch.tensor([1, 2])
    given = {"num_logprobs": 0} | asked
    found = vllm_sampled.of_sampled(original)(logits, sampled_token_ids=tokens, **given)
    assert found == "vLLM's"
    assert called[0].items() >= given.items()


def test_it_is_installed_where_vllm_has_the_function_and_undone():
    module = pytest.importorskip(vllm_sampled.MODULE)
    original = getattr(module, vllm_sampled.NAME)
    undo = vllm_sampled.install()
    try:
        ours = getattr(module, vllm_sampled.NAME)
        assert ours is not original
        logits, tokens = torch.randn(2, 7), torch.tensor([1, 2])
        torch.testing.assert_close(ours(logits, 0, tokens).logprobs[:, 0], token_logprobs(logits, tokens))
    finally:
        undo()
    assert getattr(module, vllm_sampled.NAME) is original
