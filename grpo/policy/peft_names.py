"""PEFT's names of what has an adapter: what its settings call it, and what its tensors are called in the files.
Knows nothing of their values.

A linear is a target module, and its tensors bear its name. A weight of experts is a target parameter; PEFT wraps the
module that holds it once for each that is targeted, in the order in which the module has them, and names the tensors
after the wrapped module: the last wrapper's are the module's, those of the one before it `base_layer`'s, and so on.

Beside experts PEFT takes gate_proj, up_proj and down_proj for the names that experts had when each was a linear, and
would put an adapter of a shared expert, or of a dense MLP of the first layers, on the experts instead. The weight of
such a linear is named as a target parameter too, which computes the same and leaves its tensors their names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

# Last names that PEFT takes for those of experts, of Mixtral's kind and of all others.
TAKEN = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")


def tensor_name(module: str, factor: str) -> str:
    """PEFT's name of factor "A" or "B" of the module with this Hugging Face name."""
    return f"base_model.model.{module}.lora_{factor}.weight"


def weight_name(linear: str) -> str:
    """A linear as a target parameter."""
    return f"{linear}.weight"


def targets(linears: Iterable[str], experts: Collection[str], beside_experts: bool) -> tuple[list[str], list[str]]:
    """What PEFT is to adapt: target_modules and target_parameters, by full names, for a suffix such as "dense" would
    also match what has no adapter. beside_experts: the model has some, with an adapter or without."""
    modules, parameters = [], list(experts)
    for name in linears:
        if beside_experts and name.rpartition(".")[2] in TAKEN:
            parameters.append(weight_name(name))
        else:
            modules.append(name)
    return modules, parameters


def modules_of(experts: Iterable[str]) -> dict[str, str]:
    """Name of each weight of experts that has an adapter, in the model's order -> the module its tensors are named
    after."""
    found: dict[str, str] = {}
    for name in experts:
        module = name.rpartition(".")[0]
        for before in found:
            if before.rpartition(".")[0] == module:
                found[before] += ".base_layer"
        found[name] = module
    return found
