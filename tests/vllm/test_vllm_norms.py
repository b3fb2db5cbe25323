"""Gemma's norms by the policy's kernel are those that vLLM computes itself."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from grpo.rollout.vllm_norms import use_our_kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_alone_over_heads_and_with_a_residual(dtype):
    draw = torch.Generator().manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        model = torch.nn.Sequential(GemmaRMSNorm(48, eps=1e-3)).to(dtype)
    [norm] = model
    torch.nn.init.normal_(norm.weight, generator=draw)
    wide = torch.randn(5, 3 * 48, generator=draw).to(dtype)
    heads, x, residual = wide[:, :96].unflatten(-1, (2, 48)), wide[:, 96:], torch.randn(5, 48, generator=draw).to(dtype)
    expected = [norm.forward_native(x), norm.forward_native(heads), *norm.forward_native(x.clone(), residual.clone())]
    use_our_kernel(model)
    got = [norm(x), norm(heads), *norm(x, residual)]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs)
