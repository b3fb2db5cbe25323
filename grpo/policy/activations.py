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

    def __call__(self, layer: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """layer(*arguments); tensors among these, such as hidden states [N, D], are what waits."""
        with saved_tensors_hooks(self._pack, self._unpack):  # of the inputs alone: inside are those of `checkpoint`
            return _recomputed(layer, *arguments, **named)

    def _pack(self, x: Tensor) -> Any:
        if self.stream is None or not x.is_cuda or not x.is_floating_point():
            return x
        parked = Parked(x, self.stream, self.last())
        self.last = weakref.ref(parked)
        return parked

    def _unpack(self, packed: Any) -> Tensor:
        return packed.taken_back() if isinstance(packed, Parked) else packed


def _nothing() -> None:
    return None


class Parked:
    """A tensor of the GPU that waits in pinned memory. `before`: the one whose turn in the backward pass is next."""

    def __init__(self, x: Tensor, stream: torch.cuda.Stream, before: Parked | None):
        self.device, self.stream = x.device, stream
        self.before = weakref.ref(before) if before is not None else _nothing
        self.there: Tensor = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.here: Tensor | None = None
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.there.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not given to others before the copy is made

    def fetch(self) -> None:
        """Begin to bring it back, unless that has begun."""
        if self.here is None:
            with torch.cuda.stream(self.stream):
                self.here = self.there.to(self.device, non_blocking=True)

    def taken_back(self) -> Tensor:
        """The tensor, for the stream of the computation; the next one is on its way."""
        self.fetch()
        here, self.here = self.here, None
        assert here is not None
        computation = torch.cuda.current_stream(self.device)
        # The one after it is fetched behind this one: what waits here does not wait for that.
        computation.wait_stream(self.stream)
        here.record_stream(computation)
        if (before := self.before()) is not None:
            before.fetch()
        return here
