"""The merged model where its experts are not what the checkpoint's files hold: each with its adapter, or dequantised.
Knows nothing of linears' own files, or of runs.

A checkpoint keeps experts one by one, joined or transposed, as its family does; transformers joins them when it opens
one, and takes them apart again when it saves. So the whole model is opened, what was trained is added to its parameters
by their names there, and it is saved: all of it is in this machine's memory, in the dtype of its files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo.policy.adapter import LinearFactors
from grpo.policy.experts import BIAS, are_experts, parameters_of
from grpo.policy.load import whole_model

Values = Mapping[str, Callable[[], Tensor]]  # name of a parameter -> rows [M, K], of experts [E M, K], in float32


def names_of_experts(settings: Any) -> list[str]:
    """The weights of experts of a model with this configuration, in its order. None of them is made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    return [
        f"{name}.{part}"
        for name, module in model.named_modules()
        if are_experts(module)
        for part in parameters_of(module)
        if not part.endswith(BIAS)
    ]


def write_whole(
    base: str, factors: Mapping[str, LinearFactors], dequantised: Values, dtype: torch.dtype, shard: int, folder: Path
) -> None:
    """Write the weights of the model `base` with these factors added, in shards of so many bytes.

    factors, dequantised: by the names of linears and of weights of experts; the second are what these compute with in
    place of the checkpoint's own.
    """
    model = whole_model(base)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    with torch.no_grad():
        for name in factors.keys() | dequantised.keys():
            owner = modules[name.rpartition(".")[0]] if name in parameters else modules[name]
            transposed = name in parameters and owner.is_transposed
            parameter = parameters[name] if name in parameters else owner.weight
            rows = dequantised[name]() if name in dequantised else _rows(parameter, transposed)
            rows = rows + factors[name].delta() if name in factors else rows
            parameter.data = _laid_out(rows, parameter.shape, transposed).to(dtype)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)


def _rows(parameter: Tensor, transposed: bool) -> Tensor:
    """[M, K], or [E, M, K] as [E M, K], in float32."""
    rows = parameter.mT if transposed else parameter
    return rows.flatten(0, -2).float()


def _laid_out(rows: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """The inverse: in the shape of a parameter."""
    if transposed:
        return rows.unflatten(0, (shape[0], shape[2])).mT.contiguous()
    return rows.view(shape)
