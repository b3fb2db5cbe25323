"""What is exported opens in stock vLLM, without anything of ours: the adapter by its own LoRA, and the merged model.
The tokens of the same text have the log-probabilities there that the policy gives them."""

import json

import pytest
import torch
from tiny_engines import Letters, batch_of, contexts, prompts
from tiny_models import FUSED, build_policy, randomise, write_checkpoint

from grpo.checkpoint import Progress, save_checkpoint
from grpo.config import Config
from grpo.export.__main__ import main
from grpo.folder import Saved, write_config
from grpo.generators import reader
from grpo.rollout.sampling import sample_groups
from grpo.rollout.torch_engine import TorchEngine

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma"]
RANK = 8  # of those that vLLM has kernels for
CLOSE = dict(atol=2e-3, rtol=2e-3)  # its attention on a CPU sums in another order


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """(policy, groups that it wrote, folder of the base, of the adapter, of the merged model) of a family."""
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
    engine = TorchEngine(policy, Letters(), contexts(prompts()), config.temperature)
    return policy, sample_groups(engine, prompts(), 2, 12, seed=1), base, folder / "adapter", folder / "merged"


def logprobs_in_vllm(model, groups, adapter=None):
    """Stock vLLM's log p of the completions' tokens, as it scores a prompt."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora = dict(enable_lora=True, max_lora_rank=RANK) if adapter else {}
    llm = LLM(str(model), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=128,
              max_num_seqs=16, kv_cache_memory_bytes=64 << 20, **lora)  # fmt: skip
    pairs = [(group.prompt.tokens, each.tokens) for group in groups for each in group.completions]
    asked = [{"prompt_token_ids": context + tokens} for context, tokens in pairs]
    how = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    request = LoRARequest("trained", 1, str(adapter)) if adapter else None
    try:
        found = llm.generate(asked, how, lora_request=request, use_tqdm=False)
        return [
            row[token].logprob
            for one, (context, tokens) in zip(found, pairs, strict=True)
            for row, token in zip(one.prompt_logprobs[len(context) :], tokens, strict=True)
        ]
    finally:
        llm.llm_engine.engine_core.shutdown()


def assert_same(policy, groups, theirs):
    batch = batch_of(groups, policy.config)
    ours = policy.logprobs(batch)[0][batch.mask]
    torch.testing.assert_close(ours, torch.tensor(theirs), **CLOSE)
    assert (ours - policy.reference_logprobs(batch)[batch.mask]).abs().max() > 0.05  # the adapter says something


def test_the_merged_model_computes_the_same(exported):
    policy, groups, _, _, merged = exported
    assert_same(policy, groups, logprobs_in_vllm(merged, groups))


def test_the_adapter_computes_the_same(exported):
    policy, groups, base, adapter, _ = exported
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == RANK
    assert_same(policy, groups, logprobs_in_vllm(base, groups, adapter))
