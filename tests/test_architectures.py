"""Whatever causal language model transformers has: its policy is right, or it is refused in a sentence before anything
is trained.

Right is: log-probabilities as transformers' own forward gives them, a sequence at a time and unpadded; the same with
layers recomputed and a gradient taken; the same through PEFT with the adapter's files; and completions of the PyTorch
engine that carry the policy's log-probabilities, with finished rows dropped on the way. Dropout, noise of routers and
the like are switched on in every configuration that has them.
"""

import peft
import pytest
import torch
import transformers
from tiny_engines import Letters, contexts, prompts, rollout
from tiny_models import build_policy, randomise, reference_logprobs, write_checkpoint

from grpo.config import Config
from grpo.errors import UserError
from grpo.packing import lay_out_to_read
from grpo.policy.adapter import adapter_files
from grpo.rollout.torch_engine import TorchEngine

SIZES = dict(
    vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, bos_token_id=1, pad_token_id=0,
)  # fmt: skip
HEADS = SIZES | dict(head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
LINEAR_ATTENTION = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip

# name: (class of its configuration, what it is given)
MODELS = {
    "llama": ("LlamaConfig", dict(**SIZES)),
    "gemma": ("GemmaConfig", dict(**HEADS)),
    "gemma2": ("Gemma2Config", dict(**HEADS, sliding_window=8)),
    "vaultgemma": ("VaultGemmaConfig", dict(**HEADS, sliding_window=8, attn_logit_softcapping=0.5)),
    "gemma3": ("Gemma3TextConfig", dict(**HEADS, sliding_window=8)),
    "phi": ("PhiConfig", dict(**SIZES)),
    "phi3": ("Phi3Config", dict(**SIZES)),
    "phi3-longrope": (
        "Phi3Config",
        dict(
            **SIZES,
            original_max_position_embeddings=16,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.0, 1.0, 1.0],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 16,
            },
        ),
    ),
    "dynamic": (
        "LlamaConfig",
        dict(
            **(SIZES | dict(max_position_embeddings=16)),
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        ),
    ),
    "opt": (
        "OPTConfig",
        dict(
            vocab_size=101,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=32,
            eos_token_id=2,
            bos_token_id=1,
            pad_token_id=0,
            dropout=0.3,
            attention_dropout=0.3,
        ),
    ),
    "biogpt": (
        "BioGptConfig",
        dict(
            **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
            hidden_dropout_prob=0.3,
            activation_dropout=0.3,
            layerdrop=0.3,
        ),
    ),
    "starcoder2": (
        "Starcoder2Config",
        dict(**SIZES, residual_dropout=0.3, embedding_dropout=0.3, attention_dropout=0.3),
    ),
    "bigcode": (
        "GPTBigCodeConfig",
        dict(
            vocab_size=101,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            eos_token_id=2,
            bos_token_id=1,
            attn_pdrop=0.3,
            resid_pdrop=0.3,
            embd_pdrop=0.3,
        ),
    ),
    "gpt2": (
        "GPT2Config",
        dict(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=2, bos_token_id=1),
    ),
    "neox": ("GPTNeoXConfig", dict(**SIZES)),
    "gptj": (
        "GPTJConfig",
        dict(
            vocab_size=101,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            rotary_dim=4,
            eos_token_id=2,
            bos_token_id=1,
        ),
    ),
    "gptneo": (
        "GPTNeoConfig",
        dict(
            vocab_size=101,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=256,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            eos_token_id=2,
            bos_token_id=1,
        ),
    ),
    "bloom": (
        "BloomConfig",
        dict(vocab_size=101, hidden_size=32, n_layer=2, n_head=4, eos_token_id=2, bos_token_id=1, pad_token_id=0),
    ),
    "falcon": (
        "FalconConfig",
        dict(
            vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2, bos_token_id=1
        ),
    ),
    "stablelm": ("StableLmConfig", dict(**SIZES)),
    "olmo": ("OlmoConfig", dict(**SIZES)),
    "olmo2": ("Olmo2Config", dict(**SIZES)),
    "olmo3": ("Olmo3Config", dict(**SIZES)),
    "glm": ("GlmConfig", dict(**HEADS)),
    "glm4": ("Glm4Config", dict(**HEADS)),
    "cohere": ("CohereConfig", dict(**SIZES)),
    "cohere-norms": ("CohereConfig", dict(**SIZES, use_qk_norm=True)),
    "cohere2": ("Cohere2Config", dict(**HEADS, sliding_window=8)),
    "granite": (
        "GraniteConfig",
        dict(**SIZES, residual_multiplier=0.5, embedding_multiplier=3.0, logits_scaling=2.0, attention_multiplier=0.3),
    ),
    "nemotron": ("NemotronConfig", dict(**SIZES)),
    "smollm3": ("SmolLM3Config", dict(**SIZES, no_rope_layers=[1, 0])),
    "exaone4": (
        "Exaone4Config",
        dict(**SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    ),
    "mpt": ("MptConfig", dict(vocab_size=101, d_model=32, n_layers=2, n_heads=4, max_seq_len=256, eos_token_id=2)),
    "helium": ("HeliumConfig", dict(**HEADS)),
    "ernie": ("Ernie4_5Config", dict(**HEADS)),
    "seedoss": ("SeedOssConfig", dict(**HEADS)),
    "arcee": ("ArceeConfig", dict(**SIZES)),
    "apertus": ("ApertusConfig", dict(**SIZES)),
    "persimmon": ("PersimmonConfig", dict(**SIZES)),
    "xglm": (
        "XGLMConfig",
        dict(
            vocab_size=101,
            d_model=32,
            ffn_dim=48,
            num_layers=2,
            attention_heads=4,
            max_position_embeddings=256,
            dropout=0.3,
            layerdrop=0.3,
            eos_token_id=2,
            bos_token_id=1,
            pad_token_id=0,
        ),
    ),
    "codegen": (
        "CodeGenConfig",
        dict(
            vocab_size=101,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            rotary_dim=4,
            eos_token_id=2,
            bos_token_id=1,
        ),
    ),
    "ctrl": (
        "CTRLConfig",
        dict(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=256, dff=48, eos_token_id=2),
    ),
    "mixtral": ("MixtralConfig", dict(**SIZES, num_local_experts=4, router_jitter_noise=0.3)),
    "qwen2moe": ("Qwen2MoeConfig", dict(**SIZES, **EXPERTS, shared_expert_intermediate_size=24)),
    "qwen3moe": ("Qwen3MoeConfig", dict(**HEADS, **EXPERTS)),
    "olmoe": ("OlmoeConfig", dict(**SIZES, num_experts=4, num_experts_per_tok=2)),
    "granitemoe": ("GraniteMoeConfig", dict(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "dsv2": (
        "DeepseekV2Config",
        dict(
            **(SIZES | dict(num_key_value_heads=4)),
            kv_lora_rank=8,
            q_lora_rank=None,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
    ),
    "dsv3": (
        "DeepseekV3Config",
        dict(
            **(SIZES | dict(num_key_value_heads=4)),
            kv_lora_rank=8,
            q_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
    ),
    "phimoe": (
        "PhimoeConfig",
        dict(**SIZES, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3, input_jitter_noise=0.3),
    ),
    "gptoss": ("GptOssConfig", dict(**HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)),
    "llama4": (
        "Llama4TextConfig",
        dict(
            **HEADS,
            intermediate_size_mlp=48,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attention_chunk_size=128,
        ),
    ),
    "glm4moe": (
        "Glm4MoeConfig",
        dict(
            **HEADS,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
    ),
    "mamba": ("MambaConfig", dict(vocab_size=101, hidden_size=32, num_hidden_layers=2, eos_token_id=2)),
    "falconh1": (
        "FalconH1Config",
        dict(**SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1),
    ),
    "lfm2": ("Lfm2Config", dict(**SIZES, layer_types=["conv", "full_attention"], block_ff_dim=48)),
    "qwen3next": (
        "Qwen3NextConfig",
        dict(**HEADS, **EXPERTS, **LINEAR_ATTENTION, shared_expert_intermediate_size=24, decoder_sparse_step=1),
    ),
    "qwen3_5": ("Qwen3_5TextConfig", dict(**HEADS, **LINEAR_ATTENTION)),
    "bamba": (
        "BambaConfig",
        dict(
            **SIZES,
            attn_layer_indices=[1],
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_expand=2,
        ),
    ),
    "jamba": (
        "JambaConfig",
        dict(
            **SIZES,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            num_experts_per_tok=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
    ),
    "recurrentgemma": (
        "RecurrentGemmaConfig",
        dict(
            **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
            attention_window_size=8,
            block_types=["recurrent", "attention"],
        ),
    ),
    "granitehybrid": (
        "GraniteMoeHybridConfig",
        dict(
            **SIZES,
            layer_types=["mamba", "attention"],
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_expand=2,
            num_local_experts=0,
            shared_intermediate_size=48,
        ),
    ),
}

# What is not supported, and a word of the sentence that says so.
REFUSED = {
    "phi": "logits", "gptj": "logits", "codegen": "logits", "ctrl": "logits",  # a bias on the head
    "mamba": "past their forward", "jamba": "past their forward",
    "phi3-longrope": "longrope beyond 16 tokens", "dynamic": "dynamic beyond 16 tokens",
}  # fmt: skip

# What is trained right, but not sampled by the PyTorch engine: a state that runs over the padding before a prompt.
NOT_SAMPLED = {"recurrentgemma": "The rollout engine is not the policy"}

# One of each kind of trouble; the others are a second stage.
FIRST = ("gemma2", "gemma3", "opt", "biogpt", "mixtral", "phimoe", "qwen3_5", "lfm2", "phi3-longrope", "cohere-norms")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow]) for name in MODELS]
)
def test_right_or_refused(name, groups, tmp_path):
    kind, settings = MODELS[name]
    folder = write_checkpoint(tmp_path, getattr(transformers, kind)(**settings))
    config = Config(model=str(folder), base="float32", device="cpu", lora_rank=3, lora_alpha=6.0,
                    max_completion_tokens=23)  # fmt: skip
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            build_policy(config)
        return
    how = {"dtype": torch.float32, "attn_implementation": "eager"}  # the one that computes soft caps
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    with torch.no_grad():
        expected, _ = reference_logprobs(model, groups, 1.0)
    for recompute in ("none", "layer"):
        policy = build_policy(Config(**vars(config) | {"recompute": recompute}))
        batch = lay_out_to_read(groups, policy.device)
        logprobs = policy.logprobs(batch)[0]
        torch.testing.assert_close(logprobs[batch.mask].double(), expected, atol=1e-5, rtol=1e-5)
        gradients = torch.autograd.grad(logprobs.sum(), policy.store.parameters(), allow_unused=True)
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    randomise(policy, size=0.05)
    batch = lay_out_to_read(groups, policy.device)
    for file, content in adapter_files(policy).items():
        (tmp_path / file).write_bytes(content)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    with torch.no_grad():
        expected, _ = reference_logprobs(adapted, groups, 1.0)
        torch.testing.assert_close(policy.logprobs(batch)[0][batch.mask].double(), expected, atol=1e-5, rtol=1e-5)
    if name in NOT_SAMPLED:
        with pytest.raises(UserError, match=NOT_SAMPLED[name]):
            TorchEngine(policy, Letters(), contexts(prompts(2)), 1.0)
        return
    engine = TorchEngine(policy, Letters(), contexts(prompts(2)), 1.0)
    sampled = rollout(engine, prompts(), 6, seed=3)
    assert len({len(completion.tokens) for group in sampled for completion in group.completions}) > 1
    batch = lay_out_to_read(sampled, policy.device)
    with torch.no_grad():
        torch.testing.assert_close(policy.logprobs(batch)[0], batch.sampler_logprobs, atol=3e-5, rtol=0)


def test_lengths_at_which_the_frequencies_are_still_those_are_taken(tmp_path):
    kind, settings = MODELS["phi3-longrope"]
    parameters = settings["rope_parameters"] | dict(original_max_position_embeddings=64)
    settings = settings | dict(original_max_position_embeddings=64, rope_parameters=parameters)
    folder = write_checkpoint(tmp_path, getattr(transformers, kind)(**settings))
    build_policy(Config(model=str(folder), base="float32", device="cpu"))  # for 64 tokens
