"""The merged model: one checkpoint in which the adapter is added to its base. Knows nothing of runs.

    W' = W + scale * B A, computed in float32 and rounded once

What W is: what was trained over. A base in 16 bits is the checkpoint's own weights. Over a base in 4 bits the adapter
has learned beside what the rounding did, so W is the NF4 base as it computed, dequantised, in 16 bits again; --onto
original takes the checkpoint's own weights there too.

The checkpoint's tensors are read one after the other, under the names that its files have, and written in shards: of a
base in 16 bits no more than a shard is in memory, of one in 4 bits the quantised base as well. Of a mixture of experts
all is, where experts have an adapter or are in 4 bits (merged_experts.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from grpo_kernels.lora import dense_weight
from grpo_kernels.nf4 import BLOCK, NF4, nf4_dequantize
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from grpo.config import Config
from grpo.errors import UserError
from grpo.export.folder import write_tensors
from grpo.export.merged_experts import names_of_experts, write_whole
from grpo.export.source import Source
from grpo.policy.adapter import LinearFactors, factors_in
from grpo.policy.companions import file_of
from grpo.policy.experts import ExpertWeights
from grpo.policy.linears import is_quantized
from grpo.policy.load import Loaded, from_hub, load_model, promised_tensors, safetensors_files
from grpo.policy.promises import Progressed, no_progress, value_of

SHARD_BYTES = 4 * 10**9
DTYPES = {"bf16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SIXTEEN_BITS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PREFIXES = ("", "model.", "language_model.model.", "model.language_model.", "language_model.", "transformer.")
OF_MORE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # a vision tower's


@dataclass(frozen=True)
class Base:
    """The tensors of a checkpoint that the adapter is added to, by the names in its files."""

    tensors: Mapping[str, Tensor]  # promised
    linears: Mapping[str, str]  # name of a tensor -> that of the linear whose weight it is, where that has a name here
    read: Mapping[str, Callable[[], Tensor]]  # name of a tensor -> its value, of those that were in 4 bits
    transposed: bool  # linears are kept as [K, M] (GPT-2)


def write_merged(
    source: Source,
    folder: Path,
    onto: str,
    dtype: str,
    progressed: Progressed = no_progress,
) -> tuple[str, list[str]]:
    """Write the merged model's weights and config.json; returns the name of their dtype, and what is to be told.

    onto: "trained" or "original"; dtype: a name of DTYPES, or "auto": that of the checkpoint, if it is of 16 bits.

    Raises:
        UserError: the checkpoint is not to be had, is of another model, or not in a format that can be read.
    """
    settings = from_hub(AutoConfig.from_pretrained, source.base)
    experts = names_of_experts(settings)
    factors = factors_in(source.folder, experts)
    is_4_bits = is_quantized(settings, source.base)
    files = from_hub(lambda name, trust_remote_code: safetensors_files(settings, name), source.base)
    if not files:
        raise UserError(f"The weights of {source.base} are not in safetensors files. Give its safetensors as --model.")
    dequantised = is_4_bits or (onto == "trained" and source.config is not None and source.config.base == "nf4")
    tensors = promised_tensors(settings, files, progressed)
    loaded = _load(source) if dequantised else None
    kept = DTYPES.get(dtype) or _own_dtype(settings)
    if experts and (loaded or set(experts) & factors.keys()):
        if is_4_bits:
            raise UserError(
                f"The checkpoint {source.base} is of a mixture of experts in 4 bits, which is not merged here. Give "
                "the checkpoint that it was made from as --model, with --onto original, or merge with PEFT's "
                "merge_and_unload."
            )
        values = _quantised(loaded) | _quantised_experts(loaded) if loaded else {}
        write_whole(source.base, factors, values, kept, SHARD_BYTES, folder)
    else:
        base = _base(tensors, factors, loaded, _is_transposed(settings), source)
        _write_shards(base, factors, kept, folder)
    _write_settings(source, kept, folder)
    which = "its NF4 weights as they were trained over, dequantised" if dequantised else "its own weights"
    written = str(kept).partition(".")[2]
    told = [f"{source.title} merged in float32 with {source.base}: {which}, written in {written}"]
    if source.config is None and not dequantised:
        told.append("note: nothing here says whether the adapter was trained over these or over NF4 made of them.")
    return written, told


# ---- what the adapter is added to


def _load(source: Source) -> Loaded:
    """The base in 4 bits, as a run has it."""
    config = source.config or Config(model=source.base, base="nf4")
    config = replace(config, model=source.base, base="nf4", device="cpu", lora_rank=1)
    return load_model(config, torch.device("cpu"), 1, note=lambda told: None, dense=source.dense)


def _base(
    tensors: Mapping[str, Tensor],
    factors: Mapping[str, LinearFactors],
    loaded: Loaded | None,
    transposed: bool,
    source: Source,
) -> Base:
    quantised = _quantised(loaded) if loaded else {}
    linears = _names_in_files(factors, tensors, source)
    of_the_base = _names_in_files(quantised, tensors, source)
    extra = {key for key in tensors if _is_of_4_bits(key, tensors)}
    read = {key: quantised[name] for key, name in of_the_base.items()}
    for key in tensors:
        if loaded and f"{key}.absmax" in tensors and key not in read:  # the head, dense since it was loaded
            read[key] = partial(value_of, loaded.model.head)
    return Base({key: tensor for key, tensor in tensors.items() if key not in extra}, linears, read, transposed)


def _quantised(loaded: Loaded) -> dict[str, Callable[[], Tensor]]:
    """Name of each linear -> its weight as it computes, in float32, laid out as in the files."""
    found = {}
    for projection in loaded.store.projections.values():
        start = 0
        for name, size in zip(projection.names, projection.sizes, strict=True):
            found[name] = partial(_rows, projection.base, start, start + size, loaded.conv1d)
            start += size
    return found


def _quantised_experts(loaded: Loaded) -> dict[str, Callable[[], Tensor]]:
    """Name of each weight of experts -> the weight as it computes, [E M, K]."""
    held = [each for each in loaded.model.modules() if isinstance(each, ExpertWeights)]
    return {each.name: partial(dense_weight, each.base, torch.float32) for each in held}


def _rows(base: Tensor | NF4, start: int, stop: int, transposed: bool) -> Tensor:
    if isinstance(base, Tensor):
        rows = base[start:stop].float()
    elif base.shape[1] % BLOCK == 0:
        rows = nf4_dequantize(base.row_slice(start, stop), torch.float32)
    else:
        rows = nf4_dequantize(base, torch.float32)[start:stop]
    return rows.T if transposed else rows


def _is_of_4_bits(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether this is not a weight but a part of one in NF4: its scales and levels."""
    weight = key[: key.rfind(".weight.") + len(".weight")] if ".weight." in key else ""
    return bool(weight) and weight in tensors


def _names_in_files(names: Collection[str], tensors: Mapping[str, Tensor], source: Source) -> dict[str, str]:
    """Name of a tensor in the files -> name of the linear, for all of these. A checkpoint of more than a language
    model, or an old one, has its names after another prefix than the model that is trained."""
    for taken in PREFIXES:
        for put in PREFIXES:
            found = {f"{put}{name[len(taken) :]}.weight": name for name in names if name.startswith(taken)}
            if len(found) == len(names) and found.keys() <= tensors.keys():
                return found
    missing = next((name for name in names if f"{name}.weight" not in tensors), "")
    raise UserError(
        f"The checkpoint of {source.base} has no {missing}.weight, which the adapter belongs to. Give the --model that "
        "it was trained with; if this is the one, merge with PEFT's merge_and_unload."
    )


def _is_transposed(settings: Any) -> bool:
    return settings.model_type in ("gpt2", "openai-gpt", "imagegpt")  # Conv1D


def _own_dtype(settings: Any) -> torch.dtype:
    said = getattr(settings, "dtype", None) or getattr(settings.get_text_config(), "dtype", None)
    return SIXTEEN_BITS.get(str(said).rpartition(".")[2], torch.bfloat16)


# ---- the sum, written


def _write_shards(base: Base, factors: Mapping[str, LinearFactors], dtype: torch.dtype, folder: Path) -> None:
    shards = list(_shards(base, dtype))
    index: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = SAFE_WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written = {key: _value(key, base, factors, dtype) for key in keys}
        write_tensors(written, folder / name)
        index |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        total = sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(content, indent=2))


def _shards(base: Base, dtype: torch.dtype) -> Iterator[list[str]]:
    """The names of the tensors of each shard, in the order of the files."""
    keys: list[str] = []
    size = 0
    for key, tensor in base.tensors.items():
        values = 2 * tensor.numel() if key in base.read and tensor.dtype == torch.uint8 else tensor.numel()
        own = values * (dtype.itemsize if key in base.read or tensor.is_floating_point() else tensor.itemsize)
        if keys and size + own > SHARD_BYTES:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += own
    yield keys


def _value(key: str, base: Base, factors: Mapping[str, LinearFactors], dtype: torch.dtype) -> Tensor:
    """A tensor of the merged model."""
    stored = base.read[key]() if key in base.read else value_of(base.tensors[key])
    if not stored.is_floating_point():
        return stored
    factor = factors.get(base.linears.get(key, ""))
    if factor is None:
        return stored.to(dtype).contiguous()
    return merged(stored, factor, base.transposed, key).to(dtype).contiguous()


def merged(weight: Tensor, factor: LinearFactors, transposed: bool, name: str) -> Tensor:
    """weight + scale * B A in float32. transposed: the weight is [K, M]."""
    delta = factor.delta()
    delta = delta.T if transposed else delta
    if delta.shape != weight.shape:
        raise UserError(
            f"The adapter's {name} is for a weight of shape {list(delta.shape)}, and the model's is "
            f"{list(weight.shape)}. Give the --model that it was trained with."
        )
    return weight.float() + delta


def _write_settings(source: Source, dtype: torch.dtype, folder: Path) -> None:
    """config.json as the base has it, but for how its weights are kept."""
    path = file_of(source.base, "config.json", ask=True)
    if path is None:
        raise UserError(f"{source.base} has no config.json. Get the model anew.")
    settings = json.loads(path.read_text(encoding="utf-8"))
    said = str(dtype).partition(".")[2]
    for owner in (settings, *(part for part in settings.values() if isinstance(part, dict))):
        owner.pop("quantization_config", None)
        for name in {"dtype", "torch_dtype"} & owner.keys():
            owner[name] = said
    if "torch_dtype" not in settings:
        settings["dtype"] = said
    (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    for name in OF_MORE:
        if path := file_of(source.base, name, ask=True):
            (folder / name).write_bytes(path.read_bytes())
