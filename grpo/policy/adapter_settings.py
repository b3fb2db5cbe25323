"""What the adapter_config.json of a LoRA adapter in PEFT's format says about what the adapter computes.

Knows nothing of tensors. Of PEFT's forty-odd fields each is honoured, or means nothing for what the saved adapter
computes, or is refused by its name; so is a field of a version of PEFT that is not known here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.errors import UserError

# More than any alpha means, and little enough that no scale made of it overflows.
LARGEST_ALPHA = 1e30

HONOURED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters"}

# What these say changes nothing that the saved tensors compute.
MEANINGLESS = {
    *("peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    # Dropout and how weights that are trained anew would begin or be tied.
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
    # Which linears have an adapter: the tensors that are there say so, and target_modules which must be there.
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
    # How the base stores its weights, which is read from the base; and settings that a refused field would switch on.
    *("fan_in_fan_out", "megatron_core", "qalora_group_size"),
}

# Of the ways to begin those that leave the base as it is. After the others (pissa, olora, corda, loftq, lora_ga) PEFT
# takes away from the base what the factors began with, each time that it opens the adapter.
HARMLESS_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal", "mica")

REPEATS, REPEATED_GROUP, MOST_REPEATS = re.compile(r"[*+{]"), re.compile(r"\)[*+{]"), 6

REMEDY = "Merge the adapter into its model with PEFT's merge_and_unload, save that and give it as --model."


@dataclass(frozen=True)
class AdapterSettings:
    """Rank and scale of each linear, by its Hugging Face module name."""

    rank: int
    alpha: float
    rslora: bool  # the scale is alpha / sqrt r: Kalajdzievski 2023, arXiv 2312.03732
    rank_pattern: Mapping[str, int]  # expression for the end of names -> rank
    alpha_pattern: Mapping[str, float]
    base: str  # the model that it was trained over, by its name or folder then; may be empty
    targets: Any  # the names of linears or their ends, or an expression for whole names; () where more fields decide
    parameters: tuple[str, ...] = ()  # names of parameters or their ends, which are targets too

    def rank_of(self, linear: str) -> int:
        """r of this linear."""
        return _first_match(self.rank_pattern, linear, self.rank)

    def alpha_over(self, rank: int, linear: str = "") -> float:
        """The alpha for which alpha / rank is this linear's scale: its own where that is its rank. Without a linear
        that of those which no pattern names."""
        own, alpha = self.rank_of(linear), _first_match(self.alpha_pattern, linear, self.alpha)
        return alpha * (rank / math.sqrt(own) if self.rslora else rank / own)

    def is_target(self, linear: str) -> bool:
        """Whether target_modules says that this linear must have an adapter."""
        if isinstance(self.targets, str):
            return self.targets == "all-linear" or bool(re.fullmatch(self.targets, linear))
        return linear in self.targets or any(linear.endswith(f".{end}") for end in self.targets)

    def is_parameter(self, parameter: str) -> bool:
        """Whether target_parameters says that this parameter must have an adapter."""
        return any(parameter == end or parameter.endswith(f".{end}") for end in self.parameters)

    def is_of_experts(self, module: str) -> bool:
        """Whether the tensors of a module of this name, which are there, are those of a target that is no linear."""
        return bool(self.parameters) and not self.is_target(module) and self.named(module) == module

    def named(self, linear: str) -> str:
        """What the patterns of ranks and alphas are compared with: its weight's name if that is the target."""
        return f"{linear}.weight" if self.is_parameter(f"{linear}.weight") else linear


def _first_match(pattern: Mapping[str, Any], linear: str, otherwise: Any) -> Any:
    matching = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", linear))
    return next(matching, otherwise)


def read_settings(path: Path) -> AdapterSettings:
    """The settings in this adapter_config.json.

    Raises:
        UserError: it cannot be read, is damaged, or asks for something that cannot be computed here.
    """
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}). Choose another checkpoint.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is damaged: it holds no fields. Choose another checkpoint.")
    _check_known(path, fields)
    wrong = [f"{name} {_shown(fields.get(name))}" for name, fits in FITTING.items() if not fits(fields.get(name))]
    if wrong:
        raise UserError(f"{path} is damaged: {', '.join(wrong)} cannot be so. Choose another checkpoint.")
    return AdapterSettings(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        rslora=fields.get("use_rslora") or False,
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        base=str(fields.get("base_model_name_or_path") or ""),
        targets=() if fields.get("exclude_modules") or fields.get("layers_to_transform") else fields["target_modules"],
        parameters=tuple(fields.get("target_parameters") or ()),
    )


def _check_known(path: Path, fields: dict[str, Any]) -> None:
    """Nothing is asked for but LoRA with the fields that are honoured."""
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{path} has peft_type {_shown(fields.get('peft_type'))}, and only LORA can be read. {REMEDY}")
    asked = {name: value for name, value in fields.items() if not _is_unset(value)}
    asked.pop("peft_type")
    if asked.get("bias") == "none":
        del asked["bias"]
    if asked.get("init_lora_weights", True) in HARMLESS_BEGINNINGS:
        asked.pop("init_lora_weights", None)
    refused = sorted(asked.keys() - HONOURED - MEANINGLESS)
    if refused:
        told = ", ".join(f"{name} {_shown(asked[name])}" for name in refused[:3])
        raise UserError(f"{path} asks for {told}, which changes what is computed and cannot be followed here. {REMEDY}")


def _is_unset(value: Any) -> bool:
    """How PEFT writes what is not asked for. A 0 is not: in a field that is not known here it may mean much."""
    return value is None or value is False or value in ("", [], {})


def _shown(value: Any) -> str:
    """A value as it stands in the file, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= LARGEST_ALPHA


def _is_bool(value: Any) -> bool:
    return value is None or type(value) is bool


def _is_expression(value: Any) -> bool:
    """Whether this is a regular expression that is tried on a name in no time: one with repetitions of repetitions, or
    with many of them, can take hours to find that it does not match."""
    try:
        simple = len(REPEATS.findall(value)) <= MOST_REPEATS and not REPEATED_GROUP.search(value)
        return simple and bool(re.compile(value))
    except (re.error, OverflowError, RecursionError, TypeError):
        return False


def _is_pattern(value: Any, fits: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(map(_is_expression, value)) and all(map(fits, value.values()))
    )


def _is_target(value: Any) -> bool:
    return _are_names(value) or _is_expression(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


# Field -> whether a value of it can be.
FITTING = {
    "r": _is_rank,
    "lora_alpha": _is_alpha,
    "use_rslora": _is_bool,
    "rank_pattern": lambda value: _is_pattern(value, _is_rank),
    "alpha_pattern": lambda value: _is_pattern(value, _is_alpha),
    "target_modules": _is_target,
    "target_parameters": lambda value: value is None or _are_names(value),
}
