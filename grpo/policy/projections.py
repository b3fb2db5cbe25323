"""Projections: the linear maps of a model as one set of weights, base and adapter, that everything multiplies by.

A projection holds the rows of one or several linears that read the same input ([q;k;v], [gate;up]):

    base     [M, K]     frozen, float32, bf16 or NF4; M = sum of the parts' output sizes
    lora_a   [P r, K]   the parts' A stacked, float32 master
    lora_b   [M_p, r]   one a part, float32 masters
    mirrors             the factors in the dtype of the computation, at fixed addresses, A right below a dense base; in
                        float32 the masters

    y = x base^T + bias + scale * [ (x A_p^T) B_p^T for each part p ]

`scale` is one element, shared by all projections of a store: alpha / r, or 0 for the reference policy. The policy's own
forward and backward and every rollout engine read these same tensors, so nothing is ever copied between them;
`ProjectionStore.refresh` brings the mirrors up to date after an optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Protocol

import torch
from grpo_kernels.lora import LoraFactors, dense_weight, empty_with_room, lora_linear
from grpo_kernels.nf4 import BLOCK, NESTED_BLOCK, NF4, nf4_concat, nf4_double_quantize, nf4_quantize
from torch import Tensor, nn

from grpo.errors import UserError

Base = Tensor | NF4


class Based(Protocol):
    """What multiplies by a frozen base."""

    base: Base


class Masters:
    """The LoRA factors of something that is multiplied by: what is trained of it, and how that begins."""

    base: Base
    names: list[str]  # of what it holds in the Hugging Face model
    sizes: list[int]  # the rows of each
    rank: int
    lora_a: nn.Parameter
    lora_b: nn.ParameterList
    mirrors: list[Tensor]  # the factors in the dtype of the computation

    def share_scale(self, scale: Tensor) -> None:
        """Multiply the adapter by this one-element tensor from now on."""
        raise NotImplementedError

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, A, B) of each of its names: views of the masters."""
        raise NotImplementedError

    def masters(self) -> list[nn.Parameter]:
        """A and the parts' B, the tensors that are trained."""
        return [self.lora_a, *self.lora_b]

    def initialise(self, generator: torch.Generator) -> None:
        """A uniform as PEFT draws it (kaiming with a = sqrt 5), B zero: the adapter starts as nothing."""
        bound = 1 / math.sqrt(self.lora_a.shape[1])
        with torch.no_grad():
            drawn = torch.rand(self.lora_a.shape, generator=generator) * (2 * bound) - bound
            self.lora_a.copy_(drawn)
            for b in self.lora_b:
                b.zero_()


class Projection(nn.Module, Masters):
    """One or several linears over the same input, with their LoRA factors."""

    def __init__(
        self,
        base: Base,
        bias: Tensor | None,
        names: list[str],
        sizes: list[int],
        rank: int,
        dtype: torch.dtype,
        below: Tensor | None = None,
    ):
        """names: the Hugging Face module names of the parts; sizes: their output sizes; dtype: of the computation;
        below: [P r, K] in that dtype, where the mirror of A is to be."""
        super().__init__()
        rows, columns = base.shape
        assert rows == sum(sizes)
        device = base.device
        self.base = base
        self.bias = bias
        self.names = names
        self.sizes = sizes
        self.rank = rank
        self.lora_a = nn.Parameter(torch.zeros(len(sizes) * rank, columns, device=device))
        self.lora_b = nn.ParameterList(nn.Parameter(torch.zeros(size, rank, device=device)) for size in sizes)
        self.mirrors = [m.detach() if dtype == torch.float32 else m.detach().to(dtype) for m in self.masters()]
        if below is not None:
            self.mirrors[0] = below.copy_(self.mirrors[0])
        self.share_scale(torch.ones(1, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., M]."""
        return lora_linear(x, self.base, self.lora, self.bias)

    def share_scale(self, scale: Tensor) -> None:
        """Multiply the adapter by this one-element tensor from now on."""
        a, *b = self.mirrors
        self.lora = LoraFactors(self.lora_a, tuple(self.lora_b), a, tuple(b), scale)

    def biases(self) -> Iterator[tuple[str, Tensor]]:
        """(name, bias [M_p]) of each part, if there are any."""
        if self.bias is not None:
            for name, bias in zip(self.names, self.bias.split(self.sizes), strict=True):
                yield f"{name}.bias", bias

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, A [r, K], B [M_p, r]) of each part: views of the masters."""
        for name, a, b in zip(self.names, self.lora_a.detach().split(self.rank), self.lora_b, strict=True):
            yield name, a, b.detach()


def join_dense(weights: list[Base], dtype: torch.dtype, rank: int = 0) -> tuple[Tensor, Tensor | None]:
    """The weights [M_p, K] of several linears as one dense base, and the memory right below it, [P r, K], if any, for
    A."""
    parts = [dense_weight(weight, dtype) for weight in weights]
    if rank == 0:
        return torch.cat(parts), None
    rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    base, below = empty_with_room(rows, len(parts) * rank, columns, dtype, parts[0].device)
    return torch.cat(parts, out=base), below


def join_nf4(weights: list[Base]) -> NF4:
    """The weights [M_p, K] of several linears as one base in NF4.

    Each part is quantised on its own, so that a part's rows are those bitsandbytes would have written, and a part
    that is in NF4 already keeps its bytes; only where blocks of 64 would span rows of two parts is the whole quantised
    at once.

    Raises:
        UserError: such blocks are there already, so that the parts cannot be joined.
    """
    if len(weights) > 1 and any(weight.shape[1] % BLOCK for weight in weights):
        dense = [weight for weight in weights if isinstance(weight, Tensor)]
        if len(dense) < len(weights):
            raise UserError(
                f"Linears that read the same {weights[0].shape[1]} values are quantised in blocks of {BLOCK}, which "
                "span their rows, so they cannot be kept together in NF4. Use --base bf16."
            )
        return nf4_quantize(torch.cat(dense))
    parts = [weight if isinstance(weight, NF4) else nf4_quantize(weight) for weight in weights]
    return parts[0] if len(parts) == 1 else nf4_concat(parts)


def double_quantize(based: Based) -> None:
    """The scales of the blocks in 8 bits, of a base in 4 bits; its packed bytes stay where they are."""
    if isinstance(based.base, NF4):
        based.base = nf4_double_quantize(based.base)


class ProjectionStore:
    """All projections of a model by name, its experts, with an adapter or frozen, and the one scale that they share."""

    def __init__(self) -> None:
        self.projections: dict[str, Projection] = {}
        self.experts: dict[str, Masters] = {}
        self._frozen: list[Based] = []  # experts without an adapter
        self.shared_by = 1  # ranks that keep a part of each base (shards.py)
        self.beside_experts = False  # the model has experts, with an adapter or without
        self.scale = torch.ones(1)
        self.alpha = 1.0
        self._start: list[Tensor] = []

    def __getitem__(self, name: str) -> Projection:
        return self.projections[name]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that projections compute in."""
        return next(self.adapted()).mirrors[0].dtype

    @property
    def rank(self) -> int:
        """The rank of every projection's adapter."""
        return next(self.adapted()).rank

    @property
    def dense(self) -> list[str]:
        """The names of the projections whose base is not in 4 bits."""
        return [name for name, projection in self.projections.items() if isinstance(projection.base, Tensor)]

    @property
    def spared_by_double_quant(self) -> int:
        """Bytes that `double_quantize` would free; none of bases in parts, which stay as they were cut."""
        if self.shared_by > 1:
            return 0
        bases = [each.base for each in self._based() if isinstance(each.base, NF4)]
        blocks = [base.absmax.numel() for base in bases if base.nested_absmax is None]
        return sum(3 * count - 8 * math.ceil(count / NESTED_BLOCK) for count in blocks)

    def double_quantize(self) -> None:
        """The scales of the blocks in 8 bits, of every base in 4 bits; their packed bytes stay where they are."""
        for each in self._based():
            double_quantize(each)

    def _based(self) -> Iterator[Based]:
        return chain(self.adapted(), self._frozen)

    def add(self, name: str, projection: Projection) -> None:
        """Take a projection in; its scale becomes the store's."""
        self._join(projection)
        self.projections[name] = projection

    def add_experts(self, experts: Masters) -> None:
        """The same for one weight of the experts of a layer."""
        self._join(experts)
        self.experts[experts.names[0]] = experts

    def add_frozen(self, experts: Based) -> None:
        """The same for one without an adapter."""
        self._frozen.append(experts)

    def adapted(self) -> Iterator[Masters]:
        """All that has an adapter, in a fixed order."""
        yield from self.projections.values()
        yield from self.experts.values()

    def _join(self, adapted: Masters) -> None:
        if not self.projections and not self.experts:
            self.scale = torch.ones(1, device=adapted.base.device)
        adapted.share_scale(self.scale)

    def initialise(self, alpha: float, seed: int) -> None:
        """Draw the adapter anew: A random, B zero, each projection from the one seeded generator in turn."""
        generator = torch.Generator().manual_seed(seed)
        for adapted in self.adapted():
            adapted.initialise(generator)
        self.set_alpha(alpha)
        self.refresh()

    def set_alpha(self, alpha: float) -> None:
        """Scale the adapter by alpha / rank."""
        self.alpha = alpha
        self.scale.fill_(alpha / self.rank)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, every projection is the frozen base alone: the reference policy."""
        self.scale.zero_()
        try:
            yield
        finally:
            self.scale.fill_(self.alpha / self.rank)

    def keep_start(self) -> None:
        """Remember the adapter as it is now, in the dtype of the computation: `started` is the policy with it."""
        self._start = [mirror.clone() for mirror in self._mirrors()]

    def started(self) -> AbstractContextManager[None]:
        """Inside, every projection has the adapter of the start."""
        return self.with_adapter(self._start)

    def kept(self) -> list[Tensor]:
        """The adapter as it is now, in the dtype of the computation, in this machine's memory."""
        return [mirror.to("cpu", copy=True) for mirror in self._mirrors()]

    @contextmanager
    def with_adapter(self, kept: list[Tensor]) -> Iterator[None]:
        """Inside, every projection has an adapter that was kept. It stands where the trained one stands, so that it is
        multiplied by in the same way, and the masters are what it is replaced by again."""
        masters = [master.detach() for master in self.parameters()]
        trained = [m.clone() for m in masters] if self.compute_dtype == torch.float32 else masters
        torch._foreach_copy_(self._mirrors(), kept)  # pyright: ignore[reportPrivateImportUsage]
        try:
            yield
        finally:
            torch._foreach_copy_(self._mirrors(), trained)  # pyright: ignore[reportPrivateImportUsage]

    def _mirrors(self) -> list[Tensor]:
        return [mirror for adapted in self.adapted() for mirror in adapted.mirrors]

    def parameters(self) -> list[nn.Parameter]:
        """The float32 masters, in a fixed order."""
        return [master for adapted in self.adapted() for master in adapted.masters()]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters to their mirrors; a no-op in float32, where they are the same memory."""
        torch._foreach_copy_(self._mirrors(), [p.detach() for p in self.parameters()])  # pyright: ignore[reportPrivateImportUsage]

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(Hugging Face name, A [r, K], B [M, r]) of every linear, and (name, A [E r, K], B [M, r E]) of every weight
        of experts: views of the masters."""
        for adapted in self.adapted():
            yield from adapted.factors()
