"""Activations: what of a layer's forward pass waits for its backward pass, and where. Knows nothing of models.

    keep        all that the backward pass reads stays where it is
    recompute   the layer's input stays; the layer is computed once more when its gradient is asked for
    offload     as recompute, and the input waits in pinned memory of the host; it goes there and comes back on a stream
                beside the computation, one layer ahead

All three compute the same numbers. What they cost: keeping, some 110 KB a token and layer of an 8B; recomputing, a
quarter of the layer's time (its last product is not computed again, see grpo_kernels/saving.py) and 8 KB; offloading,
that time and no memory of the GPU (Chen et al. 2016, arXiv 1604.06174; Rhu et al. 2016, arXiv 1602.08124).
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


def ways(treatments: Sequence[Treatment], device: torch.device) -> list[RunLayer]:
    """How each layer of a model is run."""
    offload = Offload(device)
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
        self.last: Callable[[], Parked | None] = _nothing  # weakly: a pass without a backward pass leaves nothing
        self.leaving: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, layer: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """layer(*arguments); tensors among these, such as hidden states [N, D], are what waits."""
        with saved_tensors_hooks(self._pack, self._unpack):  # of the inputs alone: inside are those of `checkpoint`
            return _recomputed(layer, *arguments, **named)

    def _pack(self, x: Tensor) -> Any:
        if self.stream is None or not x.is_cuda or not x.is_floating_point():
            return x
        self._leave()
        parked = Parked(x, self.stream, self.last())
        self.last = weakref.ref(parked)
        self.leaving = x, parked.gone
        return parked

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, Parked):
            return packed
        self._leave()
        return packed.taken_back()

    def _leave(self) -> None:
        """Give up the tensor that went last, behind its copy. So its memory is free for what the computation takes
        next; had the other stream been recorded with it, not before the host has seen the copy made, which is behind by
        some layers: half a gigabyte of an 8B's SFT lay about so."""
        if self.leaving:
            x, gone = self.leaving
            torch.cuda.current_stream(x.device).wait_event(gone)
            self.leaving = None


def _nothing() -> None:
    return None


class Parked:
    """A tensor of the GPU that waits in pinned memory. `before`: the one whose turn in the backward pass is next. On
    the GPU it is in the memory of the computation's stream, there and back, so there is no pool of another one."""

    def __init__(self, x: Tensor, stream: torch.cuda.Stream, before: Parked | None):
        self.device, self.stream = x.device, stream
        self.before = weakref.ref(before) if before is not None else _nothing
        self.there: Tensor = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.here: tuple[Tensor, torch.cuda.Event] | None = None
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.there.copy_(x, non_blocking=True)
            self.gone = stream.record_event()

    def fetch(self) -> None:
        """Begin to bring it back, unless that has begun."""
        if self.here is None:
            here = torch.empty(self.there.shape, dtype=self.there.dtype, device=self.device)
            # What the computation had in this memory may not be done with yet.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                here.copy_(self.there, non_blocking=True)
                self.here = here, self.stream.record_event()

    def taken_back(self) -> Tensor:
        """The tensor, for the stream of the computation; the next one is on its way."""
        self.fetch()
        assert self.here is not None
        (here, come), self.here = self.here, None
        torch.cuda.current_stream(self.device).wait_event(come)
        if (before := self.before()) is not None:
            before.fetch()
        return here

    def __del__(self) -> None:
        if self.here is not None:  # fetched for a backward pass that was given up
            here, come = self.here
            torch.cuda.current_stream(here.device).wait_event(come)
