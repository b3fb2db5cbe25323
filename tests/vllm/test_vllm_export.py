"""What is exported opens in stock vLLM, without anything of ours: the adapter by its own LoRA, and the merged model.
The tokens that it samples have the log-probabilities there that the policy gives them."""

import json

import pytest
import torch
from tiny_engines import batch_of, prompts
from tiny_models import FUSED, build_policy, randomise, write_checkpoint

from grpo.checkpoint import Progress, save_checkpoint
from grpo.config import Config
from grpo.export.__main__ import main
from grpo.folder import Saved, write_config
from grpo.generators import reader
from grpo.types import Completion, Group

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma"]
RANK = 8  # of those that vLLM has kernels for
CLOSE = dict(atol=2e-3, rtol=2e-3)  # its attention on a CPU sums in another order


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """(policy, folder of its base, of the adapter, of the merged model) of a family."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = FUSED[request.param]()
    settings.hidden_size, settings.head_dim = 128, 32
    base = write_checkpoint(folder / "base", settings, vary_norms=True)
    config = Config(model=str(base), base="float32", device="cpu", lora_rank=RANK, lora_alpha=16.0,
                    max_completion_tokens=12, mask_truncated=False)  # fmt: skip
    policy = build_policy(config)
    randomise(policy, size=0.1)
    run = folder / "run"
    run.mkdir()
    write_config(Saved(run, "1", "/gone/toy.py", "", "toy", config, {}))
    save_checkpoint(run, policy, Progress(run="1", step=5), reader(policy.device)(), keep=3)
    assert main([str(run), "--to", str(folder / "adapter")]) == 0
    assert main([str(run), "--to", str(folder / "merged"), "--merged", "--dtype", "float32"]) == 0
    return policy, base, folder / "adapter", folder / "merged"


def written_by_vllm(model, adapter=None):
    """Groups that stock vLLM writes, with its log p of each token."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    lora = dict(enable_lora=True, max_lora_rank=RANK) if adapter else {}
    llm = LLM(str(model), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=128,
              max_num_seqs=16, kv_cache_memory_bytes=64 << 20, **lora)  # fmt: skip
    how = SamplingParams(n=2, max_tokens=12, temperature=1.0, seed=1, logprobs=0, detokenize=False, ignore_eos=True)
    request = LoRARequest("trained", 1, str(adapter)) if adapter else None
    asked = prompts()
    try:
        found = llm.generate(
            [{"prompt_token_ids": each.tokens} for each in asked], how, lora_request=request, use_tqdm=False
        )
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()  # a next engine would take its process groups
    return [Group(prompt, list(map(completion_of, one.outputs))) for prompt, one in zip(asked, found, strict=True)]


def completion_of(output):
    tokens = list(output.token_ids)
    logprobs = [row[token].logprob for row, token in zip(output.logprobs, tokens, strict=True)]
    return Completion(tokens, logprobs, "", "length", 0)


def assert_same(policy, groups):
    batch = batch_of(groups, policy.config)
    ours = policy.logprobs(batch)[0]
    torch.testing.assert_close(ours, batch.sampler_logprobs, **CLOSE)
    assert (ours - policy.reference_logprobs(batch)).abs().max() > 0.05  # the adapter says something


def test_the_merged_model_computes_the_same(exported):
    policy, _, _, merged = exported
    assert_same(policy, written_by_vllm(merged))


def test_the_adapter_computes_the_same(exported):
    policy, base, adapter, _ = exported
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == RANK
    assert_same(policy, written_by_vllm(base, adapter))
