"""Promises: the weights of a checkpoint as tensors that are read when they are needed, one at a time.

Knows nothing of projections. transformers is given promises in place of weights, and does with them what it does with
weights: renames, casts, joins and ties them, and says which are missing. Nothing is read for that but what it looks at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from grpo.errors import UserError, is_out_of_memory

Progressed = Callable[[int, int], object]  # told the bytes that are read, and how many there are


def no_progress(done: int, total: int) -> None:
    """Nobody wants to know."""


# The dtypes of safetensors that weights come in. A tensor of another one is read at once.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class NotPromised(Exception):
    """Something was done with a promise that needs the weight itself."""


class Promise(Tensor):
    """A tensor on the CPU that is read when it is asked for, and not kept.

    What is computed of it is promised in turn, where it is a tensor; anything else (is it equal to that one?) is
    computed at once.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    form: Tensor  # its shape, strides and dtype, on the device "meta"
    read: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, form: Tensor, read: Callable[[], Tensor]) -> Promise:
        made = Tensor._make_wrapper_subclass(cls, form.shape, strides=form.stride(), dtype=form.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        made.form, made.read = form, read
        return made

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Promise({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        returned = [str(value.type) for value in func._schema.returns]
        if func._schema.is_mutable:
            raise NotPromised(f"{func} changes a weight that is not read yet")
        if returned not in (["Tensor"], ["List[Tensor]"]):
            return _compute(func, given)
        args, kwargs = tree_map_only(Tensor, _form, given)
        forms = func(*args, **(kwargs | {"device": "meta"} if "device" in kwargs else kwargs))
        if isinstance(forms, Tensor):
            return Promise(forms, partial(_compute, func, given))
        return [Promise(form, partial(_compute, func, given, index)) for index, form in enumerate(forms)]


def _form(tensor: Tensor) -> Tensor:
    return tensor.form if isinstance(tensor, Promise) else tensor.to("meta")


def _compute(func: Any, given: tuple[Any, Any], index: int | None = None) -> Any:
    args, kwargs = tree_map_only(Promise, value_of, given)
    computed = func(*args, **kwargs)
    return computed if index is None else computed[index]


def value_of(tensor: Tensor) -> Tensor:
    """The tensor itself, read if it is only promised."""
    return tensor.read() if isinstance(tensor, Promise) else tensor


class Checkpoint:
    """The tensors of safetensors files, promised by name. A tensor's bytes are read into memory of their own, so that
    nothing of a file is mapped or kept."""

    def __init__(self, files: list[str], progressed: Progressed):
        """progressed: told after each tensor.

        Raises:
            UserError: two files have a tensor of the same name.
        """
        self.promised: dict[str, Tensor] = {}
        self._progressed = progressed
        self._total = 0
        self._left: dict[str, int] = {}  # bytes of each tensor that was not read yet
        self._done = 0  # bytes read; a tensor that is read again is counted once
        homes: dict[str, str] = {}
        for file in files:
            opened = _open(file)
            for name in opened.keys():
                if name in homes:
                    raise UserError(
                        f"The checkpoint's {name} is in two of its files, {homes[name]} and {Path(file).name}, and "
                        f"nobody can say which is right. Get the checkpoint anew (it is in {Path(file).parent})."
                    )
                homes[name] = Path(file).name
                self.promised[name] = self._promise(opened, file, name)

    def _promise(self, opened: Any, file: str, name: str) -> Tensor:
        stored = opened.get_slice(name)
        dtype = DTYPES.get(stored.get_dtype())
        read = partial(self._read, opened, file, name)
        if dtype is None:
            return read()
        form = torch.empty(stored.get_shape(), dtype=dtype, device="meta")
        self._left[name] = form.nbytes
        self._total += form.nbytes
        return Promise(form, read)

    def _read(self, opened: Any, file: str, name: str) -> Tensor:
        try:
            tensor = opened.get_tensor(name)
        except Exception as error:  # the operating system's and the format's have classes of their own
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"The checkpoint's {name} cannot be read from {file} ({type(error).__name__}: {error}). The file was "
                "changed while it was read, or its disk fails: get it anew."
            ) from error
        self._done += self._left.pop(name, 0)
        self._progressed(self._done, self._total)
        return tensor


def _open(file: str) -> Any:
    """Read, not mapped: pages of a mapped file are memory of this process, and a file that is cut short ends it."""
    try:
        return safe_open(file, framework="pt", backend="pread")
    except Exception as error:  # the format's own class does not say of which file it speaks
        raise type(error)(f"{Path(file).name}: {error}") from error


def settle(model: nn.Module, device: torch.device, where: Callable[[str], bool] = lambda name: True) -> None:
    """Read what is promised in a model and put it in place on `device`; what is shared stays shared.

    where: of which modules, by name; all, if it is not said.
    """
    slots = [
        (name, module, key, tensor)
        for name, module in model.named_modules()
        for key, tensor in chain(
            module.named_parameters(recurse=False, remove_duplicate=False),
            module.named_buffers(recurse=False, remove_duplicate=False),
        )
        if isinstance(tensor, Promise)
    ]
    wanted = {id(tensor) for name, _, _, tensor in slots if where(name)}
    settled: dict[int, Tensor] = {}
    for _, module, key, tensor in slots:
        if id(tensor) in wanted:
            if id(tensor) not in settled:
                settled[id(tensor)] = _settled(tensor, device)
            setattr(module, key, settled[id(tensor)])


def _settled(promise: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    value = value_of(promise).contiguous().to(device, dtype)
    if value.untyped_storage().nbytes() > value.nbytes:  # a part of something larger, which is not to be kept with it
        value = value.clone()
    return nn.Parameter(value, requires_grad=False) if isinstance(promise, nn.Parameter) else value


def read_copy(module: nn.Module) -> Any:
    """A copy of a module on the CPU and in float32, in which what was promised is read."""
    read = {
        id(tensor): _settled(tensor, torch.device("cpu"), torch.float32 if tensor.is_floating_point() else None)
        for tensor in chain(module.parameters(), module.buffers())
        if isinstance(tensor, Promise)
    }
    return copy.deepcopy(module, read).float()
