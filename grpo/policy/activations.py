"""Activations: what of a layer's forward pass waits for its backward pass, and where. Knows nothing of models.

    keep        all that the backward pass reads stays where it is
    recompute   the layer's input stays; the layer is computed once more when its gradient is asked for
    offload     as recompute, and the input waits in pinned memory of the host, beside it what attention gave, which is
                not computed again; they go there and come back on a stream beside the computation, one layer ahead

All three compute the same numbers. What they cost: keeping, some 110 KB a token and layer of an 8B; recomputing, a
quarter of the layer's time (its last product is not computed again, see grpo_kernels/saving.py) and 8 KB; offloading,
that time without attention's share, which grows with the length of sequences, no memory of the GPU and 16 KB of the
host's (Chen et al. 2016, arXiv 1604.06174; Rhu et al. 2016, arXiv 1602.08124; Korthikanti et al. 2022, arXiv
2205.05198).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Treatment = Literal["keep", "recompute", "offload"]
RunLayer = Callable[..., Any]  # (layer, its arguments) -> its result
Around = Callable[[list[RunLayer]], list[RunLayer]]  # how each layer is run -> the same with something about it


def as_they_are(ways: list[RunLayer]) -> list[RunLayer]:
    """Nothing is done about them."""
    return ways


def ways(treatments: Sequence[Treatment], offload: Offload) -> list[RunLayer]:
    """How each layer of a model is run."""
    run: dict[Treatment, RunLayer] = {"keep": _kept, "recompute": _recomputed, "offload": offload}
    return [run[treatment] for treatment in treatments]


def _kept(layer: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return layer(*arguments, **named)


def _recomputed(layer: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    # No layer draws a random number: a policy is never in train mode. Reading the generators' states takes time.
    return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False, **named)


class Offload:
    """Runs layers whose inputs wait in the host's memory. One for all layers of a model, which run in their order."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.layer: list[weakref.ref[Parked]] = []  # what the layer that runs has parked
        self.before: list[weakref.ref[Parked]] = []  # what the one before it has: weakly, a pass may have no backward
        self.leaving: list[Parked] = []

    def __call__(self, layer: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """layer(*arguments); tensors among these, such as hidden states [N, D], are what waits."""
        self._leave()
        self.before, self.layer = self.layer, []
        with saved_tensors_hooks(self.park, self.take_back):  # of the inputs alone: inside are those of `checkpoint`
            return _recomputed(layer, *arguments, **named)

    def park(self, x: Tensor) -> Any:
        """What stands for a tensor that is wanted in the backward pass of the layer that runs."""
        if self.stream is None or not x.is_cuda or not x.is_floating_point() or not x.numel():
            return x
        parked = Parked(x, self.stream, self.before)
        self.layer.append(weakref.ref(parked))
        self.leaving.append(parked)
        return parked

    def take_back(self, parked: Any) -> Tensor:
        """The tensor that it stands for."""
        if not isinstance(parked, Parked):
            return parked
        self._leave()
        return parked.taken_back()

    def _leave(self) -> None:
        """Give up the tensors that went last, behind their copies. So their memory is free for what the computation
        takes next; had the other stream been recorded with them, not before the host has seen the copies made, which is
        behind by some layers: half a gigabyte of an 8B's SFT lay about so."""
        for parked in self.leaving:
            parked.leave()
        self.leaving.clear()


class Remembered:
    """What attention gave in a layer that is offloaded, for when the layer is computed again: a
    `grpo_kernels.attention.Memory`."""

    def __init__(self, offload: Offload):
        self.offload = offload
        self.parked: list[Any] | None = None

    def keep(self, *tensors: Tensor) -> None:
        """See Memory."""
        self.parked = [self.offload.park(tensor) for tensor in tensors] if torch.is_grad_enabled() else None

    def recall(self) -> tuple[Tensor, ...] | None:
        """See Memory."""
        if self.parked is None:
            return None
        parked, self.parked = self.parked, None
        return tuple(map(self.offload.take_back, parked))


# Bytes that lie together in pinned memory. PyTorch rounds what it pins up to a power of two and keeps what was freed
# for the next of that size: a large tensor in one piece would have up to twice its size, each length its own memory.
PIECE = 2**23


class Parked:
    """A tensor of the GPU that waits in pinned memory. `before`: those whose turn in the backward pass is next. On the
    GPU it is in the memory of the computation's stream, there and back, so there is no pool of another one."""

    # A tensor and when it has been copied: that which went, until it is given up; that which came, until it is taken.
    gone: tuple[Any, Any] | None = None
    here: tuple[Tensor, Any] | None = None

    def __init__(self, x: Tensor, stream: torch.cuda.Stream, before: list[weakref.ref[Parked]]):
        self.stream, self.before = stream, before
        self.computation = torch.cuda.current_stream(x.device)
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        pieces = x.contiguous().view(-1).split(PIECE // x.itemsize)
        # Whole pieces, the last one too, of which some is used.
        self.there = [torch.empty(PIECE // x.itemsize, dtype=x.dtype, pin_memory=True) for _ in pieces]
        stream.wait_stream(self.computation)
        with torch.cuda.stream(stream):
            for there, piece in zip(self.there, pieces, strict=True):
                there[: len(piece)].copy_(piece, non_blocking=True)
            self.gone = pieces, stream.record_event()

    def leave(self) -> None:
        """Give up the tensor itself: what the computation does from now on is behind its copy."""
        if self.gone is not None:
            self.computation.wait_event(self.gone[1])
            self.gone = None

    def fetch(self) -> None:
        """Begin to bring it back, unless that has begun."""
        if self.here is None:
            here = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            # What the computation had in this memory may not be done with yet.
            self.stream.wait_stream(self.computation)
            with torch.cuda.stream(self.stream):
                for piece, there in zip(here.view(-1).split(len(self.there[0])), self.there, strict=True):
                    piece.copy_(there[: len(piece)], non_blocking=True)
                self.here = here, self.stream.record_event()

    def taken_back(self) -> Tensor:
        """The tensor, for the stream of the computation; the layer before it is on its way."""
        self.fetch()
        assert self.here is not None
        (here, come), self.here = self.here, None
        self.computation.wait_event(come)
        for each in self.before:
            if (parked := each()) is not None:
                parked.fetch()
        self.before = []  # once
        return here

    def __del__(self) -> None:
        for held in (self.gone, self.here):  # of a pass that was given up half-way
            if held is not None:
                self.computation.wait_event(held[1])
