"""Fixtures: tiny random models of several architectures, written as checkpoints, and groups of random completions."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite needs no network and must not wait for one

import pytest
import torch
import transformers

from grpo.config import Config
from grpo.types import Completion, Group, Prompt

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

# Architectures by name: those that KnownModel must recognise, and some that it must not.
KNOWN = {
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
    "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, tie_word_embeddings=True),
}
UNKNOWN = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256, eos_token_id=2, bos_token_id=1
    ),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, final_logit_softcapping=5.0, sliding_window=8),
    "mistral-window": lambda: transformers.MistralConfig(**SIZES, sliding_window=8),
    "granite": lambda: transformers.GraniteConfig(
        **{k: v for k, v in SIZES.items() if k != "head_dim"},
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
    ),
}


def write_checkpoint(folder, config):
    """A random model of this configuration, with weights large enough for its probabilities to differ."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    model.generation_config = transformers.GenerationConfig(eos_token_id=2, bos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """name of an architecture -> folder of its checkpoint, written once."""
    written = {}

    def folder(name):
        if name not in written:
            path = tmp_path_factory.mktemp(name)
            written[name] = str(write_checkpoint(path, (KNOWN | UNKNOWN)[name]()))
        return written[name]

    return folder


@pytest.fixture
def tiny_config(checkpoint):
    """A Config over a tiny checkpoint; keyword arguments override."""

    def build(name="qwen3", **overrides):
        defaults = dict(model=checkpoint(name), base="float32", device="cpu", lora_rank=3, lora_alpha=6.0)
        return Config(**(defaults | overrides))

    return build


@pytest.fixture
def groups():
    """Three groups of random completions, of odd and unequal lengths, one token among them."""
    generator = torch.Generator().manual_seed(5)

    def random_tokens(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    def completion(length):
        sampler = (torch.randn(length, generator=generator) * 0.3 - 4.0).tolist()
        return Completion(random_tokens(length), sampler, "", "stop", 0)

    lengths = [(7, (5, 1, 13)), (1, (3, 3, 2)), (12, (9, 4, 6))]
    made = []
    for index, (prompt, completions) in enumerate(lengths):
        group = Group(Prompt(index, "", random_tokens(prompt), {}), [completion(n) for n in completions])
        group.rewards = torch.randn(3, generator=generator)
        group.advantages = torch.randn(3, generator=generator)
        made.append(group)
    return made
