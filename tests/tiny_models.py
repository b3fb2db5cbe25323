"""Tiny random models of several architectures, and policies over them: what the tests share. No test is here."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from grpo.packing import build_packer
from grpo.policy import Policy, load_model

VOCABULARY = 101  # odd on purpose

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    eos_token_id=2,
    bos_token_id=1,
    pad_token_id=0,
)

NO_HEAD_SIZE = {name: value for name, value in SIZES.items() if name != "head_dim"}

# Architectures by name: those that FusedModel must recognise, and some that it must not.
FUSED = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True),
    "llama3-rope": lambda: transformers.LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**NO_HEAD_SIZE),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mistral-window": lambda: transformers.MistralConfig(**SIZES, sliding_window=8),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **NO_HEAD_SIZE, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gemma": lambda: transformers.GemmaConfig(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, final_logit_softcapping=5.0, attn_logit_softcapping=3.0, query_pre_attn_scalar=23, sliding_window=8
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **(SIZES | dict(num_hidden_layers=3)),
        sliding_window=8,
        query_pre_attn_scalar=23,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
        },
    ),
    "gemma3-sees": lambda: transformers.Gemma3Config(  # a larger model, of which the part for text is trained
        text_config=SIZES | dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        mm_tokens_per_image=4,
        tie_word_embeddings=True,
    ),
    "phi3": lambda: transformers.Phi3Config(**NO_HEAD_SIZE, sliding_window=8),
    "glm": lambda: transformers.GlmConfig(**SIZES),
    "glm4": lambda: transformers.Glm4Config(**SIZES, attention_bias=True),
    "stablelm": lambda: transformers.StableLmConfig(**NO_HEAD_SIZE, use_qkv_bias=True),
    "olmo2": lambda: transformers.Olmo2Config(**NO_HEAD_SIZE),
    "granite": lambda: transformers.GraniteConfig(
        **NO_HEAD_SIZE, residual_multiplier=0.5, embedding_multiplier=3.0, attention_multiplier=0.3, logits_scaling=2.0
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**NO_HEAD_SIZE, no_rope_layers=[1, 0]),
    "cohere": lambda: transformers.CohereConfig(**NO_HEAD_SIZE, logit_scale=0.25),
    "cohere2": lambda: transformers.Cohere2Config(
        **SIZES, logit_scale=0.25, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "exaone4": lambda: transformers.Exaone4Config(
        **NO_HEAD_SIZE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "stablelm-parallel": lambda: transformers.StableLmConfig(**NO_HEAD_SIZE, use_parallel_residual=True),
}
GENERIC = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256, eos_token_id=2, bos_token_id=1
    ),
    "starcoder2": lambda: transformers.Starcoder2Config(**NO_HEAD_SIZE, sliding_window=8),
}
LATENT = NO_HEAD_SIZE | dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
    n_group=1, topk_group=1,
)  # fmt: skip
MIXTURES = {
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **NO_HEAD_SIZE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**NO_HEAD_SIZE, num_experts=6, num_experts_per_tok=3),
    "mixtral": lambda: transformers.MixtralConfig(**NO_HEAD_SIZE, num_local_experts=4, num_experts_per_tok=2),
    "deepseek-v2": lambda: transformers.DeepseekV2Config(**LATENT),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SIZES, num_local_experts=6, num_experts_per_tok=2, sliding_window=8,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        },
    ),
}  # fmt: skip


def write_checkpoint(folder, config, vary_norms=False):
    """A random model of this configuration, with weights large enough for its probabilities to differ; with norms that
    differ too, it shows which of them is where."""
    torch.manual_seed(0)
    of_norms = torch.Generator().manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.rpartition(".")[0].endswith("experts"):
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
            elif "norm" in name and vary_norms:
                parameter.add_(torch.randn(parameter.shape, generator=of_norms), alpha=0.1)
    model.generation_config = transformers.GenerationConfig(eos_token_id=2, bos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


def random_blocks(shape, generator, scales=(121, 128)):
    """MXFP4 of random bits: blocks [..., 16] and scales, for dense values [..., 32]."""
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(*scales, shape, generator=generator, dtype=torch.uint8)


def write_mxfp4(folder, dense):
    """A checkpoint like `dense`, gpt-oss in a folder, but in bf16 and with experts in MXFP4, as it is downloaded."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, tensor in load_file(Path(dense) / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            count, columns, rows = tensor.shape
            blocks, scales = random_blocks((count, rows, columns // 32), generator)
            weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            weights[name] = tensor.bfloat16()
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((Path(dense) / "config.json").read_text())
    settings |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(settings))
    shutil.copy(Path(dense) / "generation_config.json", folder)
    return str(folder)


CPU = torch.device("cpu")


KEPT = ["0.qkv", "1.gate_up", "1.o"]  # projections in 16 bits where some are


def build_policy(config):
    return Policy(load_model(config, CPU, 64, dense=KEPT if config.quantization == "dynamic" else None), config)


def randomise(policy, seed=1, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.store.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    policy.store.refresh()


def one_batch(groups, config):
    [[batch]] = build_packer(config, CPU)(groups)
    return batch


def reference_logprobs(model, groups, temperature):
    """log p and entropy of each completion's tokens, one unpacked sequence at a time, in float64."""
    logprobs, entropies = [], []
    for group in groups:
        for completion in group.completions:
            tokens = torch.tensor([group.prompt.tokens + completion.tokens])
            logits = model(input_ids=tokens, use_cache=False).logits[0, len(group.prompt.tokens) - 1 : -1].double()
            log_p = torch.log_softmax(logits / temperature, dim=-1)
            logprobs.append(log_p.gather(1, torch.tensor(completion.tokens)[:, None]).squeeze(1))
            entropies.append(-(log_p.exp() * log_p).sum(1))
    return torch.cat(logprobs), torch.cat(entropies)
