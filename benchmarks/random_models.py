"""Models of true shapes with random weights, as checkpoints with a tokenizer: speed and memory depend on no value.

Knows nothing of what is measured. The shapes are in shapes.py.

    write_model(shape, folder)       the checkpoint in bf16, or in bitsandbytes' NF4; its folder
    questions(tokenizer, ...)        texts that are so many tokens as a chat, the template's own included
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from shapes import SHAPES, is_written, model_folder
from torch import Tensor, nn

CONTEXT = 32768  # where a shape says nothing else
DEVIATION = 0.02  # of the weights
# A fresh model's norms multiply by 1. Of these families that is a weight of 0; with 1 they double what passes, layer
# after layer, until rounding decides what comes out.
FROM_ZERO = ("gemma", "gemma2", "gemma3_text")
SHARD_BYTES = 2 * 2**30

WORDS = "what is the sum of two numbers let us think step by step and give the final answer in a box with reasons"
MERGED = 420  # tokens with a text of their own; the rest of a vocabulary is names
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def write_model(shape: str, folder: Path, quantized: bool = False) -> Path:
    """A checkpoint with random weights in this shape, unless it is there already; a tensor at a time, so that no more
    than a shard of it is held. On the GPU, if there is one.

    quantized: the linears of the layers in bitsandbytes' NF4 with nested absmax.
    """
    target = model_folder(shape, quantized, folder)
    if is_written(shape, quantized, folder):
        return target
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(SHAPES[shape])
    tokenizer.save_pretrained(target)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    transformers.GenerationConfig(**ends).save_pretrained(target)
    settings = transformers.AutoConfig.for_model(
        **({"max_position_embeddings": CONTEXT} | SHAPES[shape] | ends), dtype=torch.bfloat16
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    write_shards(target, tensors(model, quantized))
    settings.architectures = [type(model).__name__]
    if quantized:
        settings.quantization_config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head"],
        ).to_dict()  # fmt: skip
    settings.save_pretrained(target)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return target


def tensors(model: nn.Module, quantized: bool) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a checkpoint of this model, which is on the meta device; tied weights once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    in_4_bits = linears - {"lm_head.weight"} if quantized else set()
    for name, parameter in model.named_parameters():
        value = torch.zeros(parameter.shape, dtype=torch.bfloat16, device=device)
        if parameter.ndim > 1:
            value.normal_(0, DEVIATION, generator=generator)
        elif "norm" in name:
            value.fill_(model.config.model_type not in FROM_ZERO)
        yield from quantized_tensors(name, value) if name in in_4_bits else [(name, value.cpu())]


def quantized_tensors(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A weight as bitsandbytes writes it: packed bytes, and what gives them back beside them."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(value, blocksize=64, compress_statistics=True, quant_type="nf4")
    yield name, packed.cpu()
    for part, tensor in state.as_dict(packed=True).items():
        yield f"{name}.{part}", tensor.cpu()


def write_shards(target: Path, named: Iterator[tuple[str, Tensor]]) -> None:
    """Safetensors files of a few GiB, and the index that finds a tensor in them."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    written = 0

    def write() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, value in named:
        shard[name] = value
        written += value.nbytes
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            write()
    if shard:
        write()
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def make_tokenizer(shape: dict[str, Any]) -> Any:
    """A byte-level tokenizer whose vocabulary has the shape's size, with the family's special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    is_llama = shape["model_type"] == "llama"
    if is_llama:
        names = dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|finetune_right_pad_id|>")
        special = [*names.values(), "<|start_header_id|>", "<|end_header_id|>"]
    else:
        names = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
        special = [*names.values(), "<|im_start|>"]
    taught = Tokenizer(models.BPE())
    taught.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    taught.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=MERGED, initial_alphabet=alphabet, show_progress=False)
    taught.train_from_iterator([WORDS], trainer)
    content = json.loads(taught.to_str())
    vocabulary = content["model"]["vocab"]
    for token in range(len(vocabulary), shape["vocab_size"] - len(special)):
        vocabulary[f"token{token}"] = token
    whole = Tokenizer.from_str(json.dumps(content))
    whole.add_special_tokens(special)
    assert whole.get_vocab_size() == shape["vocab_size"]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=whole, **names, model_max_length=CONTEXT)
    tokenizer.chat_template = LLAMA if is_llama else CHATML
    return tokenizer


def questions(tokenizer: Any, count: int, length: int, seed: int) -> list[str]:
    """Different texts, each of which a user's message makes exactly `length` tokens of."""
    draw, words = random.Random(seed), WORDS.split()

    def size(text: str) -> int:
        chat = [{"role": "user", "content": text}]
        return len(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False))

    most = len(max(words, key=len))  # tokens of a word: one a byte

    def one() -> str:
        text = str(draw.randrange(10**6))
        while (left := length - size(text)) > most:  # as many as are sure not to be too many: the size is dear to ask
            text += "".join(f" {draw.choice(words)}" for _ in range(left // (most + 1) or 1))
        text += " a" * left
        assert size(text) == length, f"{length} tokens are too few for a question"
        return text

    return [one() for _ in range(count)]


if __name__ == "__main__":  # SHAPE FOLDER bf16|nf4
    write_model(sys.argv[1], Path(sys.argv[2]), quantized=sys.argv[3] == "nf4")
