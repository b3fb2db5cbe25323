"""The adapter in PEFT's files and names: saved here it opens in `PeftModel`, and the other way round.

adapter_files(policy)           the files of the adapter as it is
load_adapter(policy, folder)    the policy computes with the adapter in a folder what PEFT computes
describe(folder)                the rank and the scale of the adapter in a folder, before there is a model
factors_in(folder)              what it adds to each linear and to experts, for whoever has no policy
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from grpo.errors import UserError
from grpo.policy.adapter_settings import REMEDY, AdapterSettings, read_settings
from grpo.policy.peft_names import modules_of, targets, tensor_name
from grpo.policy.policy import Policy

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PICKLED = "adapter_model.bin"  # what PEFT wrote before 0.8 in place of the first

# Tensors of a head or an embedding, by the names that models give them.
BEYOND = re.compile(r"\.(lm_head|embed_out|embed_tokens|wte|word_embeddings|embed_in)\.|lora_embedding_")

FIRST = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")

Factors = dict[str, tuple[Tensor, Tensor]]  # Hugging Face name -> A [r, K], B [M, r]; of E experts [E r, K], [M, r E]


def adapter_files(policy: Policy, dtype: torch.dtype = torch.float32) -> dict[str, bytes]:
    """File name -> content of the adapter as it is now."""
    tensors: dict[str, Tensor] = {}
    modules = modules_of(policy.store.experts)
    for name, a, b in policy.store.factors():
        tensors[tensor_name(modules.get(name, name), "A")] = a.to("cpu", dtype).contiguous()
        tensors[tensor_name(modules.get(name, name), "B")] = b.to("cpu", dtype).contiguous()
    return {
        WEIGHTS: save(tensors, {"format": "pt"}),
        SETTINGS: json.dumps(_settings(policy), indent=2).encode(),
    }


def _settings(policy: Policy) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that differ from its defaults or that a reader looks for."""
    experts = policy.store.experts
    linears = [name for name, _, _ in policy.store.factors() if name not in experts]
    modules, parameters = targets(linears, experts, policy.store.beside_experts)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": policy.source,
        "r": policy.store.rank,
        "lora_alpha": policy.store.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": modules,
        **({"target_parameters": parameters} if parameters else {}),
        "fan_in_fan_out": policy.conv1d,
    }


@torch.no_grad()
def load_adapter(policy: Policy, folder: Path) -> list[str]:
    """Take over an adapter in PEFT's format, so that the policy computes what PEFT computes with it.

    A linear, or a weight of experts, without an adapter in the files gets B zero; returns the names of those. The store
    has one scale, that of the linears which no pattern names; another's goes into its B. Where one's rank is lower than
    the others', the rows of A beyond it stay as they are, against columns of B that are zero. Nothing is changed before
    all is checked.

    Raises:
        UserError: the files are missing or damaged, belong to another model or rank, or are not plain LoRA.
    """
    settings = read_settings(folder / SETTINGS)
    tensors = tensors_in(folder)
    ours = {name: (a, b) for name, a, b in policy.store.factors()}
    rank = policy.store.rank
    theirs = _by_linear(tensors, settings, ours, policy.store.experts, folder)
    _check_shapes(theirs, settings, ours, rank, folder)
    alpha = settings.alpha_over(rank)
    for name, (a, b) in ours.items():
        if name in theirs:
            their_a, their_b = theirs[name]
            named, experts = settings.named(name), len(a) // rank
            own = settings.rank_of(named)
            a.unflatten(0, (experts, rank))[:, :own] = their_a.unflatten(0, (experts, own))
            b_of_experts = (their_b * (settings.alpha_over(rank, named) / alpha)).unflatten(1, (own, experts))
            b.copy_(F.pad(b_of_experts, (0, 0, 0, rank - own)).flatten(1))
        else:
            b.zero_()
    policy.store.set_alpha(alpha)
    policy.store.refresh()
    return [name for name in ours if name not in theirs]


@dataclass(frozen=True)
class Described:
    """What is known of an adapter without its model."""

    rank: int  # the largest of its linears'
    alpha: float  # alpha / rank is the scale of the linears that no pattern names
    base: str  # the model that it was trained over, by its name or folder then; may be empty
    experts: bool  # it is on experts too


def describe(folder: Path) -> Described:
    """The adapter in a folder.

    Raises:
        UserError: its files are missing or damaged, or it is not plain LoRA.
    """
    settings = read_settings(folder / SETTINGS)
    tensors = tensors_in(folder)
    ranks = [_rank_in(name, tensor, settings) for name, tensor in tensors.items() if FIRST.fullmatch(name)]
    if not ranks:
        raise UserError(f"The adapter in {folder} holds no factors of any linear layer. Choose another.")
    on_experts = any(settings.is_of_experts(match[1]) for name in tensors if (match := FIRST.fullmatch(name)))
    return Described(max(ranks), settings.alpha_over(max(ranks)), settings.base, on_experts)


def _rank_in(name: str, a: Tensor, settings: AdapterSettings) -> int:
    """The rank of the adapter of which A has this name. A of experts has the rows of all."""
    module = FIRST.fullmatch(name)[1].replace(".base_layer", "")  # pyright: ignore[reportOptionalSubscript]
    if settings.is_target(module) or settings.is_parameter(f"{module}.weight"):
        return len(a)
    of_experts = [settings.rank_of(f"{module}.{end.rpartition('.')[2]}") for end in settings.parameters]
    return max(of_experts, default=len(a))


@dataclass(frozen=True)
class LinearFactors:
    """What an adapter adds to the weight [M, K] of a linear: scale * B A, in float32; or to each of E experts."""

    a: Tensor  # [r, K], or [E r, K]
    b: Tensor  # [M, r], or [M, r E]
    scale: float
    experts: int = 1  # E

    def delta(self) -> Tensor:
        """[M, K], of experts [E M, K]. Row e r + j of their A and column j E + e of their B are expert e's."""
        if self.experts == 1:
            return self.scale * (self.b @ self.a)
        a, b = self.a.unflatten(0, (self.experts, -1)), self.b.unflatten(1, (-1, self.experts))
        return self.scale * torch.einsum("mje,ejk->emk", b, a).flatten(0, 1)


def factors_in(folder: Path, experts: Iterable[str] = ()) -> dict[str, LinearFactors]:
    """Hugging Face name of a linear, or of a weight of experts -> its factors, of the adapter in a folder.

    experts: the names of all weights of experts in its model, in the model's order.
    Raises:
        UserError: the files are missing or damaged, or it is not plain LoRA of linears and these experts.
    """
    settings, tensors, linears, of_experts = _checked(folder)
    modules = modules_of(name for name in experts if settings.is_parameter(name))
    if foreign := sorted(of_experts - set(modules.values())):
        raise UserError(
            f"The adapter in {folder} is on the experts of its model too ({foreign[0]}), which is of no linear layer. "
            f"{REMEDY}"
        )
    found = {}
    for name, module in (dict.fromkeys(linears, "") | modules).items():
        found[name] = _factors(tensors, name, module or name, settings, folder)
    return found


def count_factors(folder: Path) -> tuple[int, int]:
    """Of how many linears and of how many weights of experts the adapter in a folder is.

    Raises:
        UserError: as of `factors_in`.
    """
    settings, tensors, linears, of_experts = _checked(folder)
    for name in linears:
        _factors(tensors, name, name, settings, folder)
    return len(linears), len(of_experts)


def _checked(folder: Path) -> tuple[AdapterSettings, dict[str, Tensor], list[str], set[str]]:
    """An adapter whose tensors are all factors A with their B; the modules among them that are linears, and those that
    stand for a weight of experts."""
    settings = read_settings(folder / SETTINGS)
    tensors = tensors_in(folder)
    names = [match[1] for name in tensors if (match := FIRST.fullmatch(name))]
    surplus = sorted(tensors.keys() - {tensor_name(name, x) for name in names for x in "AB"})
    if surplus or not names:
        raise UserError(
            f"The adapter in {folder} holds {f'{surplus[0]}, which is' if surplus else 'nothing that is'} no factor of "
            f"a linear layer. {REMEDY}"
        )
    of_experts = set(filter(settings.is_of_experts, names))
    return settings, tensors, [name for name in names if name not in of_experts], of_experts


def _factors(
    tensors: dict[str, Tensor], name: str, module: str, settings: AdapterSettings, folder: Path
) -> LinearFactors:
    """Those of a linear, or of a weight of experts, whose tensors bear the name of `module`."""
    a, b = tensors.get(tensor_name(module, "A")), tensors.get(tensor_name(module, "B"))
    rank = settings.rank_of(settings.named(name))
    experts = 1 if module == name or a is None else len(a) // rank
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or not len(a) == b.shape[1] == experts * rank > 0:
        raise UserError(f"The adapter in {folder} is damaged: the factors of {name} do not go with rank {rank}.")
    return LinearFactors(a, b, settings.alpha_over(rank, settings.named(name)) / rank, experts)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file by PEFT's names, in float32."""
    try:
        found = _unpickled(folder / PICKLED) if _is_pickled(folder) else load((folder / WEIGHTS).read_bytes())
        tensors = {name: tensor.float() for name, tensor in found.items()}
    except (OSError, SafetensorError, ValueError, KeyError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"The adapter in {folder} cannot be read: {error}. Choose another checkpoint.") from error
    broken = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if broken:
        raise UserError(
            f"The adapter in {folder} has values that are no finite numbers, in {len(broken)} of its tensors, such as "
            f"{broken[0]}. Choose another checkpoint."
        )
    return tensors


def _is_pickled(folder: Path) -> bool:
    return (folder / PICKLED).is_file() and not (folder / WEIGHTS).exists()


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch.save, of which nothing but tensors is read: no code that came with it is run."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{path.name} does not hold tensors by name")
    return found


def _by_linear(
    tensors: dict[str, Tensor], settings: AdapterSettings, ours: Factors, experts: Collection[str], folder: Path
) -> Factors:
    """The factors of each linear, and of each of our experts' weights, that has an adapter in the files, which are
    whole and hold nothing else."""
    modules = modules_of(name for name in experts if settings.is_parameter(name))
    modules = {name: name for name in ours if name not in experts} | modules
    linears = {tensor_name(module, x): name for name, module in modules.items() for x in "AB"}
    tensors = _of_the_text(tensors, linears)
    surplus = sorted(tensors.keys() - linears.keys())
    if beyond := sorted({name for name in surplus if BEYOND.search(name)}):
        raise UserError(
            f"The adapter in {folder} has the head or the embedding too ({beyond[0]}), by its target_modules or as it "
            f"was saved, and neither is trained here. {REMEDY}"
        )
    if not experts and (of_experts := [name for name in surplus if ".experts." in name]):
        raise UserError(
            f"The adapter in {folder} is on experts too ({of_experts[0]}). Give --expert-adapters, if the model has "
            "such."
        )
    if surplus:
        raise UserError(
            f"The adapter in {folder} has {len(surplus)} tensors that go with no linear layer of this model, such as "
            f"{surplus[0]}. Give the --model that it was trained with."
        )
    adapted = {name for name in modules if settings.is_target(name) or settings.is_parameter(settings.named(name))}
    adapted |= {linears[tensor] for tensor in tensors}
    missing = sorted(tensor for tensor, name in linears.items() if name in adapted and tensor not in tensors)
    if missing or not adapted:
        raise UserError(
            f"The adapter in {folder} lacks {len(missing) or 'all'} of the tensors that this model needs by its "
            f"{SETTINGS}{f', such as {missing[0]}' if missing else ''}. Choose another checkpoint, or give the --model "
            "that it was trained with."
        )
    return {
        name: (tensors[tensor_name(modules[name], "A")], tensors[tensor_name(modules[name], "B")])
        for name in ours
        if name in adapted
    }


def _of_the_text(tensors: dict[str, Tensor], linears: Collection[str]) -> dict[str, Tensor]:
    """The tensors by the names that the model has for itself. One that was trained within a larger model that sees,
    too, has "language_model" in its names."""
    renamed = {name.replace(".language_model.", ".", 1): tensor for name, tensor in tensors.items()}
    fits = len(renamed) == len(tensors) and renamed.keys() <= set(linears)
    return renamed if fits else tensors


def _check_shapes(theirs: Factors, settings: AdapterSettings, ours: Factors, rank: int, folder: Path) -> None:
    """Each linear's factors are of its size and of the rank that the settings say; the largest rank is the run's."""
    ranks = {name: settings.rank_of(settings.named(name)) for name in theirs}
    for name, factors in theirs.items():
        for x, there, here in zip("AB", factors, ours[name], strict=True):
            needed = list(here.shape)
            needed[x == "B"] = needed[x == "B"] // rank * ranks[name]
            if list(there.shape) != needed:
                raise UserError(
                    f"The adapter in {folder} has {tensor_name(name, x)} of shape {list(there.shape)} where this model "
                    f"and the adapter's rank need {needed}. Give the --model that it was trained with."
                )
    largest = max(ranks.values())
    if largest != rank:
        raise UserError(
            f"The adapter in {folder} is of rank {largest}, and --lora-rank is {rank}. Give --lora-rank {largest}."
        )
