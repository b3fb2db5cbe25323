"""Learning rate and optimizer of the adapter. Knows nothing of losses.

adamw        moments in float32: 8 bytes a parameter
adamw8bit    bitsandbytes' AdamW with moments in 8 bits, in blocks of 256 that have a scale each (Dettmers et al. 2021,
             arXiv 2110.02861): 2 bytes a parameter. Tensors of fewer than 4096 values keep theirs in float32.

The moments in 8 bits may be in pages of CUDA's managed memory (Dettmers et al. 2023, arXiv 2305.14314, section 3): they
come to the GPU for the optimizer's step, as far as there is room, and whatever else wants that room sends them back to
the host. Scales, and moments of fewer than 100,000 values, stay on the GPU. What is computed is the same bit for bit,
and no checkpoint knows of it: whether a resumed run has pages is its own plan's choice. bitsandbytes never frees a
page, and makes it with the state: so the optimizer is told before there is any (`page_state`), and what a checkpoint
brought is taken off the GPU until then (`lift_state`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config import Config, UpdateConfig
from grpo.errors import UserError, in_words, is_out_of_memory

# Bytes of the optimizer's state a parameter, near enough for a plan.
STATE_BYTES = {"adamw": 8, "adamw8bit": 2}

# bitsandbytes' own: a smaller tensor keeps its moments in float32.
FEWEST_IN_8_BITS, BLOCK = 4096, 256
FEWEST_IN_PAGES = 100_000  # likewise: a smaller one stays on the GPU

CONCURRENT_MANAGED_ACCESS = 89  # in CUDA's list of what may be asked of a device


def learning_rate(step: int, config: Config) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then the schedule. Pure, so a resumed run needs no state."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    left = (config.steps - step) / max(1, config.steps - config.warmup_steps)
    shape: dict[str, Callable[[float], float]] = {
        "constant": lambda left: 1.0,
        "linear": lambda left: min(1.0, left),
        "cosine": lambda left: (1 - math.cos(math.pi * min(1.0, left))) / 2,
    }
    return config.learning_rate * warm * shape[config.schedule](left)


def build_optimizer(parameters: list[nn.Parameter], config: UpdateConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) over the float32 masters of the adapter.

    Raises:
        UserError: 8 bits are asked for and bitsandbytes is not installed.
    """
    return _kind(config.optimizer)(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )


def check_optimizer(config: UpdateConfig, device: torch.device) -> None:
    """Whether the optimizer that is asked for works on this device, by trial: bitsandbytes' needs a library that was
    compiled for it, and pages a driver that moves them.

    Raises:
        UserError: it does not.
    """
    if config.optimizer == "adamw":
        return
    paged = config.page_optimizer == "on"
    if paged and not has_pages(device):
        raise UserError(
            f"--page-optimizer on has the optimizer's state in memory that the host and a GPU share, and {device} has "
            "none here: it takes a CUDA GPU, and Linux that is not in WSL. Use --page-optimizer auto or off."
        )
    trial = nn.Parameter(torch.zeros(FEWEST_IN_PAGES if paged else FEWEST_IN_8_BITS, device=device))
    trial.grad = torch.ones_like(trial)
    optimizer = build_optimizer([trial], config)
    try:
        if paged:
            page_state(optimizer)
        optimizer.step()
        if paged and not getattr(optimizer.state[trial]["state1"], "is_paged", False):
            raise NotImplementedError("this version makes no pages")
    except Exception as error:  # a kernel or a library that is missing: each has a class of its own
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"--optimizer {config.optimizer} does not work on {device} here: {in_words(error)}. Use --optimizer adamw, "
            "or another version of bitsandbytes."
        ) from error


def has_pages(device: torch.device) -> bool:
    """Whether host and GPU may both use CUDA's managed memory, whose pages then move by themselves. In WSL and on
    Windows they may not, and bitsandbytes would end the process there."""
    if device.type != "cuda":
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    torch.cuda.init()  # or the driver answers nothing
    index = torch.cuda.current_device() if device.index is None else device.index
    handle, told = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(handle), index):
        return False
    return not driver.cuDeviceGetAttribute(ctypes.byref(told), CONCURRENT_MANAGED_ACCESS, handle) and told.value == 1


def _kind(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw":
        return partial(torch.optim.AdamW, foreach=True)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit  # not before it is asked for: it takes seconds to import
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"--optimizer {name} is bitsandbytes', which cannot be imported here ({error}). Install it with `pip "
            "install bitsandbytes`, or use --optimizer adamw."
        ) from error
    return AdamW8bit


def clip_gradient(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale the gradient down to `max_norm` and return the norm that it had.

    Raises:
        UserError: it is NaN or infinite; the parameters have not been touched.
    """
    norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
    if not math.isfinite(norm):
        raise UserError(
            f"The gradient's norm is {norm}, so this step would ruin the adapter. Resume from the last checkpoint with "
            "a lower --learning-rate, or look into completions.jsonl for what the policy had come to."
        )
    return norm


def state_to_come(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """As much of its device's memory as the optimizer takes at its first step, beside pages: two moments of each
    parameter that has none yet."""
    without = [parameter for parameter in _parameters(optimizer) if parameter not in optimizer.state]
    return [tensor for parameter in without for tensor in 2 * _moment(optimizer, parameter)]


def _moment(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    if isinstance(optimizer, torch.optim.AdamW):
        return [torch.empty_like(parameter)]
    return _in_8_bits(parameter, paged=_is_paged(optimizer))


def _in_8_bits(parameter: Tensor, paged: bool) -> list[Tensor]:
    """What one moment has on the parameter's device."""
    if parameter.numel() < FEWEST_IN_8_BITS:
        return [torch.empty_like(parameter)]
    scales = torch.empty(math.ceil(parameter.numel() / BLOCK), device=parameter.device)
    if paged and parameter.numel() >= FEWEST_IN_PAGES:
        return [scales]
    return [torch.empty_like(parameter, dtype=torch.uint8), scales]


def beside_pages(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a state in 8 bits that stay on the GPU where the rest is in pages; of this optimizer's parameters,
    whatever its own state is in."""
    counted = [parameter.detach().to("meta") for parameter in _parameters(optimizer)]
    return sum(tensor.nbytes for parameter in counted for tensor in 2 * _in_8_bits(parameter, paged=True))


def page_state(optimizer: Any) -> None:
    """From now on the state of an optimizer in 8 bits is made in pages. To be asked for while there is none."""
    assert not optimizer.state, "a state that is there stays where it is"
    optimizer.is_paged = True  # bitsandbytes' own, which it reads whenever it makes or uses a state


def _is_paged(optimizer: torch.optim.Optimizer) -> bool:
    return getattr(optimizer, "is_paged", False)  # bitsandbytes' alone has it


def lift_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Take the optimizer's state off it and off its device: a copy in the host's memory, as `restore_optimizer` puts it
    back."""
    lifted = {name: tensor.to("cpu", copy=True) for name, tensor in optimizer_tensors(optimizer).items()}
    optimizer.state.clear()
    return lifted


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, "<parameter number>.<name>"; empty before the first step. Those in pages
    are of the CPU, and change with the next step as the others do."""
    if _is_paged(optimizer):  # the GPU may still be writing what the host is to read
        for device in {each.device for each in _parameters(optimizer) if each.is_cuda}:
            torch.cuda.synchronize(device)
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if not name.startswith("qmap")  # what 8 bits stand for: the same in all, and made with the optimizer
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`.

    Raises:
        UserError: they are another optimizer's.
        ValueError: they are not of these parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    in_float32 = isinstance(optimizer, torch.optim.AdamW)
    if any(("exp_avg" in entry) != in_float32 for entry in state.values()):
        here, there = ("adamw", "adamw8bit") if in_float32 else ("adamw8bit", "adamw")
        raise UserError(
            f"The checkpoint has the state of --optimizer {there}, which --optimizer {here} cannot go on from. Go on "
            f"with --optimizer {there}, or start a new run."
        )
    if in_float32:
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    else:
        _restore_in_8_bits(optimizer, state)


def _restore_in_8_bits(optimizer: Any, state: dict[int, dict[str, Tensor]]) -> None:
    """bitsandbytes' own load_state_dict wants tables again that are the same in every run."""
    groups = optimizer.param_groups
    places = [(number, place) for number, group in enumerate(groups) for place in range(len(group["params"]))]
    if not state.keys() <= set(range(len(places))):
        raise ValueError(f"the optimizer has {len(places)} parameters, and not those of {list(state)}")
    optimizer.state.clear()
    for index, saved in state.items():
        number, place = places[index]
        parameter = groups[number]["params"][place]
        optimizer.init_state(groups[number], parameter, number, place)
        made = optimizer.state[parameter]
        made["step"] = int(saved.pop("step"))
        wanted = {name: tensor for name, tensor in made.items() if name in saved}
        if {n: (t.shape, t.dtype) for n, t in saved.items()} != {n: (t.shape, t.dtype) for n, t in wanted.items()}:
            raise ValueError(f"the optimizer's state of parameter {index} has other sizes")
        for name, tensor in wanted.items():
            tensor.copy_(saved[name])
