"""An embedding in the host's memory, on a CUDA GPU: the same to the last bit, and its bytes free."""

import pytest
import torch
import transformers
from test_activations_gpu import QWEN3, batch_of, gradients
from test_run_gpu import write_checkpoint

from grpo.config import Config
from grpo.policy import Policy
from grpo.policy.host_embedding import to_host
from grpo.policy.load import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def policy_of(folder, **options):
    config = Config(model=str(folder), base="nf4", device="cuda", lora_rank=8, **options)
    policy = Policy(load_model(config, torch.device("cuda"), 1024), config)
    for parameter in policy.store.parameters():
        parameter.data.normal_(std=0.02, generator=torch.Generator("cuda").manual_seed(parameter.numel()))
    policy.store.refresh()
    return policy


def test_it_is_the_same_and_its_bytes_are_free(tmp_path):
    policy = policy_of(write_checkpoint(QWEN3, tmp_path / "model"))
    layers = len(policy.model.layers)
    policy.model.treat(["offload"] * (layers - 1) + ["recompute"])
    batch, table = batch_of(policy, seed=1), policy.model.embed.weight
    size, values = table.nbytes, table.detach().clone()
    before = policy.logprobs(batch)[0].detach()
    held = torch.cuda.memory_allocated()
    del table
    assert to_host(policy.model, size - 1) == 0
    assert to_host(policy.model, 2**40) == size
    assert held - torch.cuda.memory_allocated() == size
    assert torch.equal(policy.logprobs(batch)[0].detach(), before)
    assert all(gradient.isfinite().all() for gradient in gradients(policy, batch))
    assert torch.equal(policy.model.embed.weight.cuda(), values)
    ids = batch.tokens.to(policy.model.embed.weight.device)  # as Llama 4 asks
    assert policy.model.embed(ids).is_cuda
    assert to_host(policy.model, 2**40) == 0  # it is there


def test_an_embedding_that_is_the_head_stays(tmp_path):
    tied = transformers.Qwen3Config(**{**QWEN3.to_dict(), "tie_word_embeddings": True})
    policy = policy_of(write_checkpoint(tied, tmp_path / "model"))
    assert to_host(policy.model, 2**40) == 0
    assert policy.model.embed.weight.is_cuda
