"""Shards: the frozen base of a model's layers spread over ranks, a part of every layer on each. Knows nothing of runs.

    shards = Shards(world)
    shards.take(projections)     a layer's bases, held whole: from now on this rank holds 1/N of their bytes
    shards.settle()              all layers are taken: buffers, and the bases as views into them
    shards.around(ways)          how the layers of a model are run, each with its base there

Bytes are moved, not numbers: a layer's bases (packed codes, scales, scales of scales, or 16 or 32 bits) lie one behind
the other in a row of bytes that is cut in N equal parts. So whatever a base is in, every rank multiplies by the very
bits that one process would multiply by. (FSDP2 shards parameters by rows of a dtype and is not safe on packed 4-bit
weights: bitsandbytes issue 1945.)

    layer      0   1   2   3   4 ...        a part of each on every rank, for good
    buffer     A   B   A   B   A ...        two, each as large as the largest layer, at fixed addresses

While a layer is computed the next one is gathered into the other buffer, in the forward pass upwards, in the backward
pass downwards. A layer is always gathered into the same buffer, so the views that its projections have for a base are
made once and never move: what autograd and the kernels keep of a base is right again when its backward pass begins.
Nothing is gathered that its buffer still holds: the backward pass begins with the two layers that the forward pass
ended with. On GPUs NCCL gathers on a stream of its own, which waits for what is computed so far and which the
computation waits for when it needs the layer; no buffer is written while it is read.

What was thought of:

* Autograd counts how often a tensor is written, and refuses a saved one that was. `grpo_kernels.lora` keeps the base
  beside what it saves, as it never asks for its gradient, so a buffer that is written again is no concern of it.
  Whoever saved a base the usual way would be refused by autograd in the backward pass, not given other weights.
* A layer whose activations are computed again, or come back from the host, is computed within its own backward pass,
  when its base is there. Its base is asked for outside of that.
* A backward pass finds its layers by a hook on what each layer gave, which runs when the gradient of that is complete:
  before anything of the layer's own, and after all of the layer above that reads a base, for each of these products is
  on the way to that gradient.
* Every pass is a collective, of all ranks. But ranks have batches of their own, one more than another or none; a batch
  is halved where memory runs out, the audit reads a rank's own completions, a trial is repeated. So nobody counts
  passes. Before each pass a rank says what it is to be, and before it meets the others for anything else (a sum of
  gradients, an exchange of groups: `World.before_meeting`) that it has no more. Then, as long as another one has a
  pass, it lends its parts: it gathers what that pass gathers, and computes nothing. Between two meetings ranks may so
  have any number of passes, each its own.
* A pass without gradient is a forward pass; if any rank's is one with gradient, all gather for a backward pass too.
* A pass that fails half-way, for want of memory, leaves the others waiting for the rest of its layers. They are
  gathered, without computing, when this rank next says anything. What fails for good ends the run, of all ranks.
* Whoever waits looks at the pulse (grpo/ranks.py), so a rank that died ends the waiting. On GPUs the CPU does not wait
  for each layer; a GPU that waits for one that is gone is ended by the pulse's own process.

Embedding, head, norms, biases and the adapter stay whole on every rank. So do engines' weights: who samples in this
process would need passes of as many tokens as the longest completion of any rank has, and is refused. Models whose
layers are not recognised may run them in another order, or several times, and are refused too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from grpo_kernels.nf4 import NF4
from torch import Tensor

from grpo.config import Config
from grpo.errors import UserError
from grpo.policy.activations import RunLayer
from grpo.policy.projections import Base, Projection
from grpo.world import World

ALIGNED = 256  # bytes that each tensor in a buffer begins at a multiple of
BUFFERS = 2

NO_PASS, FORWARD, WITH_BACKWARD = 0, 1, 2  # what a rank says: how many times its pass goes through the layers


@dataclass(frozen=True)
class Placed:
    """A tensor of a base, and where in its layer's bytes it lies."""

    start: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.start + self.dtype.itemsize * self.shape.numel()

    def seen_in(self, layer: Tensor) -> Tensor:
        """The tensor, over the bytes of its layer."""
        return layer[self.start : self.end].view(self.dtype).view(self.shape)


@dataclass
class Layer:
    """What a rank holds of a layer."""

    part: Tensor  # uint8 [S]: of rank r the bytes from r S on
    bases: list[tuple[Projection, tuple[int, int], list[Placed]]]  # with the shape of each, and its tensors
    whole: Tensor  # uint8 [N S], in a buffer


class Shards:
    """The parts of a rank, the buffers, and how far the pass under way is."""

    def __init__(self, world: World):
        self.world = world
        self.layers: list[Layer] = []
        self.held: list[int | None] = [None] * BUFFERS  # the layer that each buffer has, or is getting
        self.arrived: list[Callable[[], None]] = [_nothing] * BUFFERS  # waits for it
        self.number = 0  # of the pass
        self.reached = self.end = 0  # layers of it that were there, one after the other, and how many there are in all

    # ---- building

    def take(self, projections: Sequence[Projection]) -> None:
        """Hold this rank's part of the bases of a layer, the next one, instead of all."""
        end, bases = 0, []
        for projection in projections:
            places: list[Placed] = []
            for tensor in tensors_of(projection.base):
                places.append(Placed(_up(end, ALIGNED), tensor.dtype, tensor.shape))
                end = places[-1].end
            bases.append((projection, (projection.base.shape[0], projection.base.shape[1]), places))
        size = _up(-(-end // self.world.size), ALIGNED)
        whole = torch.zeros(self.world.size * size, dtype=torch.uint8, device=projections[0].base.device)
        for projection, _, places in bases:
            for place, tensor in zip(places, tensors_of(projection.base), strict=True):
                place.seen_in(whole).copy_(tensor)
            projection.base = torch.empty(0)  # until `settle`
        mine = whole[self.world.rank * size :][:size].clone()
        self.layers.append(Layer(mine, bases, torch.empty(0)))

    def settle(self) -> None:
        """All layers are taken: their bases are views into buffers from now on."""
        largest = max(len(layer.part) for layer in self.layers)
        device = self.layers[0].part.device
        of_a_buffer = self.world.size * largest
        buffers = [torch.zeros(of_a_buffer, dtype=torch.uint8, device=device) for _ in self.layers[:BUFFERS]]
        for index, layer in enumerate(self.layers):
            layer.whole = buffers[index % BUFFERS][: self.world.size * len(layer.part)]
            for projection, shape, places in layer.bases:
                projection.base = base_over([place.seen_in(layer.whole) for place in places], shape)
        self.world.before_meeting(self.have_no_pass)

    def around(self, ways: Sequence[RunLayer]) -> list[RunLayer]:
        """How each layer is run, with its base there. A pass begins with the first."""
        first, *others = [partial(self._run, index, way) for index, way in enumerate(ways)]
        return [partial(self._run_first, first), *others]

    @property
    def told(self) -> str:
        """What is kept here, for the user."""
        mine = sum(len(layer.part) for layer in self.layers)
        return f"the base in {self.world.size} parts, {mine / 2**20:,.1f} MiB on each rank"

    # ---- passes

    def have_no_pass(self) -> None:
        """This rank is about to meet the others: until all are, it lends."""
        self._leave_nothing_out()
        while times := self.world.largest(NO_PASS):
            self._begin(times)
            self._leave_nothing_out()

    def _run_first(self, run: RunLayer, layer: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self._leave_nothing_out()
        self._begin(self.world.largest(WITH_BACKWARD if torch.is_grad_enabled() else FORWARD))
        return run(layer, *arguments, **named)

    def _run(self, index: int, way: RunLayer, layer: Callable[..., Any], *arguments: Any, **named: Any) -> Tensor:
        assert self.reached == index, f"layer {index} is run in the place of layer {self.reached}"
        self._reach_next()
        given: Tensor = way(layer, *arguments, **named)
        if given.requires_grad:
            given.register_hook(partial(self._come_back, self.number, index))
        return given

    def _come_back(self, number: int, index: int, _gradient: Tensor) -> None:
        """The backward pass has come to what a layer gave."""
        turn = 2 * len(self.layers) - 1 - index
        if number != self.number or self.reached > turn:
            raise RuntimeError("Over a base in parts each forward pass is followed by its own backward pass, once.")
        while self.reached <= turn:
            self._reach_next()

    def _begin(self, times: int) -> None:
        self.number += 1
        self.reached, self.end = 0, times * len(self.layers)

    def _leave_nothing_out(self) -> None:
        """What the pass under way has not come to, another rank may wait for."""
        while self.reached < self.end:
            self._reach_next()

    def _reach_next(self) -> None:
        """The next layer of the pass is there, and the one after it on its way."""
        index = self._turn(self.reached)
        self._gather(index)
        self.arrived[index % BUFFERS]()
        self.arrived[index % BUFFERS] = _nothing
        self.reached += 1
        if self.reached < self.end:
            self._gather(self._turn(self.reached))

    def _turn(self, reached: int) -> int:
        """Whose turn it is: up through the layers, and down again."""
        return min(reached, 2 * len(self.layers) - 1 - reached)

    def _gather(self, index: int) -> None:
        """Begin to, unless its buffer has the layer."""
        if self.held[index % BUFFERS] != index:
            layer = self.layers[index]
            self.held[index % BUFFERS] = index
            self.arrived[index % BUFFERS] = self.world.collect(layer.part, layer.whole)


def is_sharded(config: Config, world: World, note: Callable[[str], object]) -> bool:
    """Whether the base is to be in parts: that is asked for, and there is somebody to share it with; else it is noted.

    Raises:
        UserError: it cannot be.
    """
    if not config.shard_base:
        return False
    if world.size == 1:
        note("note: --shard-base is of several processes (torchrun), and this is one: it has all of the base.")
        return False
    if config.engine not in ("server", "none"):
        raise UserError(
            f"--shard-base keeps a part of the base on each GPU, and --engine {config.engine} would sample from all of "
            "it in this process. Use --engine server: one or more `vllm serve`, also on these GPUs, with "
            "--tensor-parallel-size and a lower --gpu-memory-utilization (docs/scaling.md); sft and dpo do without, by "
            "--engine none."
        )
    if config.quantization == "dynamic":
        raise UserError(
            "--quantization dynamic is measured on the whole base on each GPU, and --shard-base keeps a part of it. "
            "Use --quantization uniform."
        )
    return True


def not_recognised(config: Config, model: Any, why: str) -> UserError:
    """Why a model's base cannot be in parts; why: its layers were not recognised."""
    return UserError(
        f"--shard-base is for models whose layers are recognised (Llama, Mistral, Qwen2, Qwen3 and their kin); "
        f"{config.model} is a {type(model).__name__}, whose layers are not ({why}). Leave it out, or take "
        "another model."
    )


# ---- bases and their memory


def tensors_of(base: Base) -> list[Tensor]:
    """All that a base holds."""
    if isinstance(base, Tensor):
        return [base]
    return [each for each in (base.packed, base.absmax, base.nested_absmax, base.offset) if each is not None]


def base_over(tensors: list[Tensor], shape: tuple[int, int]) -> Base:
    """The inverse of `tensors_of`, over this memory."""
    return tensors[0] if len(tensors) == 1 else NF4(tensors[0], tensors[1], shape, *tensors[2:])


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _nothing() -> None:
    return None
