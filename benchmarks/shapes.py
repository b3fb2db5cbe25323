"""The shapes of models that are measured: what transformers' configuration of that type takes; where they are written.

Imports nothing: a peer may want to be imported before anything else.
"""

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": dict(
        model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": dict(
        model_type="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, rope_theta=1e6,
    ),
    "qwen3-1.7b": dict(
        model_type="qwen3", hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    ),
    "llama-3.1-8b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False, rope_theta=500000.0,
        max_position_embeddings=131072,
    ),
    "qwen2.5-14b": dict(
        model_type="qwen2", hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False, rope_theta=1e6,
    ),
    "qwen2.5-32b": dict(
        model_type="qwen2", hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
        num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False, rope_theta=1e6,
    ),
    "llama-3.1-70b": dict(
        model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False, rope_theta=500000.0,
        max_position_embeddings=131072,
    ),
    "gemma-2b": dict(
        model_type="gemma", hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256, vocab_size=256000, tie_word_embeddings=True, max_position_embeddings=8192,
    ),
    "gemma-2-9b": dict(
        model_type="gemma2", hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, vocab_size=256000, tie_word_embeddings=True, max_position_embeddings=8192,
        query_pre_attn_scalar=256, sliding_window=4096,
    ),
    "gemma-3-4b": dict(
        model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=262208, tie_word_embeddings=True,
        max_position_embeddings=131072, query_pre_attn_scalar=256, sliding_window=1024,
    ),
    # A part of their layers, of the true shapes: a checkpoint of all of them in bf16 is on few disks.
    "qwen3-30b-a3b-8-layers": dict(
        model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, num_hidden_layers=8, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, vocab_size=151936, tie_word_embeddings=False, rope_theta=1e6,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "deepseek-v2-lite-9-layers": dict(
        model_type="deepseek_v2", hidden_size=2048, intermediate_size=10944, num_hidden_layers=9,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=102400, tie_word_embeddings=False,
        q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
        first_k_dense_replace=1, routed_scaling_factor=1.0, topk_method="greedy", n_group=1, topk_group=1,
    ),
    "gpt-oss-20b-6-layers": dict(
        model_type="gpt_oss", hidden_size=2880, intermediate_size=2880, num_hidden_layers=6, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, vocab_size=201088, tie_word_embeddings=False, sliding_window=128,
        num_local_experts=32, num_experts_per_tok=4, max_position_embeddings=131072,
    ),
    # For trying the scripts themselves.
    "tiny-experts": dict(
        model_type="qwen3_moe", hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=512, tie_word_embeddings=True, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True,
    ),
    "tiny": dict(
        model_type="qwen3", hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=512, tie_word_embeddings=True,
    ),
}  # fmt: skip


def model_folder(shape: str, quantized: bool, folder: Path) -> Path:
    """Where a shape's checkpoint lies. Peers know one in NF4 by the end of its name."""
    return folder / (f"{shape}-bnb-4bit" if quantized else shape)


def is_written(shape: str, quantized: bool, folder: Path) -> bool:
    """Whether it is there, with its tokenizer, as a whole: its config.json is what is written last."""
    files = ("tokenizer.json", "config.json")
    return all((model_folder(shape, quantized, folder) / file).exists() for file in files)
