"""Head: what a model makes of the products of its last hidden states with its head. Knows nothing of layers.

    x = hidden . head      s = softcap tanh(factor x / softcap), or factor x      log p = log_softmax(s / temperature)

A factor folds into the two other numbers, so that it costs nothing: s / temperature is what a head without one gives at
softcap / factor and temperature / factor. It is found by giving the model other products than its own, whatever its
config calls the numbers and however coarse its dtype is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALL, LARGE = 2.0**-30, 2.0**30  # products at which a soft cap is not yet to be seen, and at which it is all there is
REACH = 40.0  # between are the products of a trial


@dataclass(frozen=True)
class Logits:
    """A model's logits, of the products with its head."""

    factor: float = 1.0
    softcap: float | None = None

    def at(self, temperature: float) -> tuple[float, float | None]:
        """Temperature and soft cap that give the same probabilities without a factor, as `linear_logprob` does."""
        return temperature / self.factor, None if self.softcap is None else self.softcap / self.factor

    def __call__(self, products: Tensor) -> Tensor:
        """Products [..., V] -> logits [..., V]."""
        scaled = self.factor * products
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


@contextmanager
def instead(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, the module is called and this is run."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@torch.no_grad()
def read_logits(head: Any, run: Callable[[], Tensor]) -> Logits | None:
    """What is made of the products with `head`, a module; None where it is something else than `Logits`.

    run: gives the model's logits [1, T, V] of three tokens or more, which it may raise in doing.
    """
    given: list[Tensor] = []

    def products(hidden: Tensor) -> Tensor:
        """Rows of the smallest, of the largest, and of all between, whatever the hidden states."""
        between = torch.linspace(-REACH, REACH, len(head.weight), dtype=torch.float64, device=hidden.device)
        rows = between.expand(*hidden.shape[:-1], -1).clone()
        rows[..., 0, :], rows[..., 1, :] = SMALL, LARGE
        given.append(rows)
        return rows

    with instead(head, products):
        found = run()
    if len(given) != 1 or found.shape != given[0].shape or found.shape[-2] < 3:
        return None
    factor, end = (float(found[..., row, 0].flatten()[0]) for row in (0, 1))
    factor /= SMALL
    softcap = None if math.isclose(end, factor * LARGE, rel_tol=1e-5) else end
    if not all(0 < number < math.inf for number in (factor, 1.0 if softcap is None else softcap)):
        return None
    logits = Logits(factor, softcap)
    return logits if torch.allclose(logits(given[0]), found.double(), rtol=1e-5, atol=0) else None
