"""The adapter as a GGUF file, which llama.cpp puts over a GGUF of the base. Knows nothing of runs.

llama.cpp's layout: for a weight blk.N.attn_q.weight the factors are blk.N.attn_q.weight.lora_a [r, K] and .lora_b
[M, r], and what they add is (adapter.lora.alpha / r) B A, r being that of the tensor. There is one alpha for all:
the scale of a linear that has another goes into its B.

For the architecture "llama" llama.cpp rotates neighbouring rows of a head's q and k, where Hugging Face rotates a row
with that half a head away, and a GGUF has the rows of both in that order; B has the same rows. Other architectures
rotate as Hugging Face does.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from grpo.errors import UserError
from grpo.export.source import Source
from grpo.policy.adapter import LinearFactors, factors_in
from grpo.policy.load import from_hub

ADAPTER_FILE = "adapter.gguf"
BASE_FILE = "base.gguf"  # in the Modelfile, for the user to put there


@dataclass(frozen=True)
class Layout:
    """How llama.cpp has an architecture of Hugging Face's."""

    name: str  # llama.cpp's of it
    interleaved: bool = False  # the rows of q and k, within each head


# Hugging Face's model_type -> what llama.cpp's converter makes of it. What it changes further in linears is not done
# here: only architectures of which it changes nothing else are listed.
LAYOUTS = {
    "llama": Layout("llama", interleaved=True),
    "mistral": Layout("llama", interleaved=True),
    "qwen2": Layout("qwen2"),
    "qwen3": Layout("qwen3"),
    "gemma": Layout("gemma"),
    "gemma2": Layout("gemma2"),
    "gemma3_text": Layout("gemma3"),
    "phi3": Layout("phi3"),
}


def check_installed() -> None:
    """The package that writes GGUF files is here.

    Raises:
        UserError: it is not.
    """
    if find_spec("gguf") is None:
        raise UserError("--gguf needs the package gguf, which is not installed here: run `pip install 'grpo[export]'`.")


def write_lora_gguf(source: Source, folder: Path) -> list[str]:
    """Write the adapter and a Modelfile; returns what is to be told.

    Raises:
        UserError: it is not known how llama.cpp has this architecture, or the factors are not of this model.
    """
    import gguf

    factors = factors_in(source.folder)
    settings = from_hub(AutoConfig.from_pretrained, source.base).get_text_config()
    layout = LAYOUTS.get(settings.model_type)
    if layout is None:
        raise UserError(
            f"How llama.cpp keeps the linears of a {settings.model_type} is not known here (of {', '.join(LAYOUTS)} it "
            "is). Export the whole model through llama.cpp's own converter: --merged --gguf --llama-cpp PATH."
        )
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.name)
    names = gguf.get_tensor_name_map(arch, settings.num_hidden_layers)
    first = next(iter(factors.values()))
    alpha = first.scale * len(first.a)
    writer = gguf.GGUFWriter(folder / ADAPTER_FILE, layout.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(source.title)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for linear, factor in factors.items():
        # Within a model that sees, the text's has a name of its own.
        name = names.get_name(linear) or names.get_name(linear.replace("language_model.", "", 1))
        if name is None:
            raise UserError(f"llama.cpp has no weight for the adapter's {linear}. Give the --model of the adapter.")
        writer.add_tensor(f"{name}.weight.lora_a", factor.a.contiguous().numpy())
        writer.add_tensor(f"{name}.weight.lora_b", _b_of(linear, factor, alpha, layout, settings).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_modelfile(folder, BASE_FILE, source, ADAPTER_FILE)
    return [
        f"the adapter of {source.title} as a GGUF for {layout.name}: rank {source.rank}, {len(factors)} linears",
        f"note: Ollama wants a GGUF of {source.base} beside it, as {BASE_FILE}: the Modelfile says so.",
    ]


def _b_of(linear: str, factor: LinearFactors, alpha: float, layout: Layout, settings: Any) -> Tensor:
    """B for the alpha of the file, its rows as llama.cpp has them."""
    rank = len(factor.a)
    own = factor.scale * rank
    b = factor.b if own == alpha else factor.b * (own / alpha)
    if layout.interleaved and linear.endswith((".q_proj", ".k_proj")):
        key_heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
        b = interleaved(b, settings.num_attention_heads if linear.endswith(".q_proj") else key_heads)
    return b.contiguous()


def interleaved(b: Tensor, heads: int) -> Tensor:
    """Rows [M, r] of `heads` heads, in each of them the first half and the second half by turns."""
    if len(b) % (2 * heads):
        raise UserError(f"The adapter's {len(b)} rows do not go with {heads} heads. Give the --model of the adapter.")
    return b.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_modelfile(folder: Path, model: str, source: Source, adapter: str = "") -> None:
    """Ollama's file that says what a model is made of. Its chat template comes with the GGUF of the model."""
    lines = [
        f"# {_one_line(source.title)}, over {_one_line(source.base)}. Use: ollama create my-model -f Modelfile",
        *([f"# {model} is a GGUF of the base, made by llama.cpp's convert_hf_to_gguf.py."] if adapter else []),
        f"FROM ./{model}",
        *([f"ADAPTER ./{adapter}"] if adapter else []),
    ]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
