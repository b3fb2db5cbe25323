"""The adapter by itself, in PEFT's format, with its model's tokenizer beside it. Knows nothing of weights of models."""

from __future__ import annotations

import shutil
from pathlib import Path

from grpo.export.folder import write_tensors
from grpo.export.source import Source
from grpo.policy.adapter import SETTINGS, WEIGHTS, count_factors, tensors_in
from grpo.policy.companions import companions


def write_adapter(source: Source, folder: Path) -> list[str]:
    """Copy the adapter; returns what is to be told. One that PEFT pickled is written as safetensors."""
    linears, experts = count_factors(source.folder)
    shutil.copyfile(source.folder / SETTINGS, folder / SETTINGS)
    if (source.folder / WEIGHTS).is_file():
        shutil.copyfile(source.folder / WEIGHTS, folder / WEIGHTS)
    else:
        write_tensors({name: each.contiguous() for name, each in tensors_in(source.folder).items()}, folder / WEIGHTS)
    on = f"{linears} linears" + f" and {experts} weights of experts" * bool(experts)
    return [
        f"the adapter of {source.title}: rank {source.rank}, {on}, over {source.base}",
        *copy_companions(source, folder),
    ]


def copy_companions(source: Source, folder: Path) -> list[str]:
    """Copy what makes the tokenizer and the generation; returns a sentence where there is no tokenizer."""
    found = companions(source.base, ask=True)
    for name, path in found.items():
        shutil.copyfile(path, folder / name)
    if any(name.startswith(("tokenizer", "tekken", "vocab")) for name in found):
        return []
    return [f"note: no tokenizer is beside it: {source.base} has none, or is not to be had now."]
