"""Rows: which of the trainer's weights a layer of vLLM's holds, seen while vLLM loads. Knows nothing of vLLM itself.

Its loading code is given a stand-in for each linear's weight, which it may transpose, view, take apart and put into
layers; of what arrives in a layer the memory says which rows of which projection that is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from grpo_kernels.nf4 import BLOCK
from torch import Tensor

from grpo.policy.projections import Base, Projection, ProjectionStore

# How vLLM's loading code names the blocks of rows of a layer, beside numbers.
BLOCKS = {"q": 0, "k": 1, "v": 2}


class NotShareableError(Exception):
    """vLLM builds this model otherwise than of the trainer's tensors; and how, in a clause."""


class Rows(NamedTuple):
    """Rows of a projection, or of a frozen weight without an adapter, [stop - start, K]."""

    owner: Projection | Tensor
    start: int
    stop: int

    def tensors(self, store: ProjectionStore) -> tuple[list[Tensor], list[Tensor]]:
        """What is multiplied by: the base's tensors; and A, B of each part and the scale, if there is an adapter."""
        if isinstance(self.owner, Tensor):
            return [self.owner[self.start : self.stop]], []
        a, *b = self.owner.mirrors
        if (self.start, self.stop) == (0, self.owner.base.shape[0]):
            return base_tensors(self.owner.base), [a, *b, store.scale]
        base, first = _rows_of(self.owner.base, self.start, self.stop), 0
        factors_a, factors_b = [], []
        for number, size in enumerate(self.owner.sizes):
            low, high = max(self.start - first, 0), min(self.stop - first, size)
            if low < high:
                factors_a.append(number)
                factors_b.append(b[number][low:high])
            first += size
        rank = self.owner.rank
        return base_tensors(base), [a[factors_a[0] * rank : (factors_a[-1] + 1) * rank], *factors_b, store.scale]


def _rows_of(base: Base, start: int, stop: int) -> Base:
    if isinstance(base, Tensor):
        return base[start:stop]
    if base.shape[1] % BLOCK:
        raise NotShareableError(f"it takes apart rows of {base.shape[1]} values, which blocks of {BLOCK} in NF4 span")
    return base.row_slice(start, stop)


def joined(pieces: list[Rows]) -> list[Rows]:
    """The same rows, those that follow each other in one projection as one piece."""
    found: list[Rows] = []
    for piece in pieces:
        if found and found[-1].owner is piece.owner and found[-1].stop == piece.start:
            piece = Rows(piece.owner, found.pop().start, piece.stop)
        found.append(piece)
    return found


class StandIns:
    """In the place of every linear's weight while vLLM loads: [M, K] of as many bytes as rows, known by its memory
    however it is viewed, transposed or split among rows."""

    def __init__(self, store: ProjectionStore, transposed: bool):
        self.named: list[tuple[str, Tensor]] = []
        self.owners: dict[int, tuple[Projection, int, Tensor]] = {}
        for projection in store.projections.values():
            start, device = 0, projection.base.device
            for name, size in zip(projection.names, projection.sizes, strict=True):
                rows = torch.empty(size, 1, dtype=store.compute_dtype, device=device)
                self.owners[rows.untyped_storage().data_ptr()] = (projection, start, rows)
                stand_in = rows.expand(size, projection.base.shape[1])
                self.named.append((f"{name}.weight", stand_in.t() if transposed else stand_in))
                start += size

    def rows(self, loaded: Tensor) -> Rows:
        """Of what came to a layer, which rows these are."""
        found = self.owners.get(loaded.untyped_storage().data_ptr())
        if found is None:
            if not loaded.is_floating_point() or loaded.dim() != 2:
                raise NotShareableError(f"it loads {list(loaded.shape)} {loaded.dtype} into a linear layer")
            return Rows(loaded, 0, len(loaded))
        projection, first, rows = found
        start = int(loaded.storage_offset())
        whole_rows = loaded.dim() == 2 and loaded.shape[1] == projection.base.shape[1]
        if not whole_rows or (len(loaded) > 1 and loaded.stride(0) != 1) or loaded.dtype != rows.dtype:
            raise NotShareableError(f"it loads linears as {list(loaded.shape)}, not by their rows")
        return Rows(projection, first + start, first + start + len(loaded))


def base_tensors(base: Base) -> list[Tensor]:
    tensors = (base,) if isinstance(base, Tensor) else (base.packed, base.absmax, base.nested_absmax, base.offset)
    return [tensor for tensor in tensors if tensor is not None]
