"""Generators: the states of the global random generators, read and set back. Knows nothing of runs or checkpoints.

Only reward functions draw from them: the run's own draws follow from seeds alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Generators:
    """Python's, numpy's and torch's, as they were."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor  # [bytes] uint8
    cuda: dict[str, Tensor]  # "cuda": [bytes] uint8, of the current GPU; empty where the run has none

    def restore(self) -> None:
        """Set the generators to this."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for state in self.cuda.values():
            torch.cuda.set_rng_state(state)

    def tensors(self) -> dict[str, Tensor]:
        """The same as tensors with names, for a file of them."""
        version, internal, gauss = self.python
        assert version == 3
        inner = self.numpy["state"]
        return {
            "python": torch.tensor(internal, dtype=torch.int64),
            "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
            "numpy": torch.from_numpy(inner["key"].astype(np.int64)),
            "numpy.rest": torch.tensor(
                [inner["pos"], self.numpy["has_gauss"], self.numpy["gauss"]], dtype=torch.float64
            ),
            "torch": self.torch,
            **self.cuda,
        }


def from_tensors(tensors: dict[str, Tensor]) -> Generators:
    """What `Generators.tensors` was called on; a GPU's state is left out where there is no GPU.

    Raises:
        KeyError: a name is missing.
    """
    gauss = tensors["python.gauss"].tolist()
    pos, has_gauss, numpy_gauss = tensors["numpy.rest"].tolist()
    numpy_state = {
        "bit_generator": "MT19937",
        "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": int(pos)},
        "has_gauss": int(has_gauss),
        "gauss": numpy_gauss,
    }
    python_state = (3, tuple(tensors["python"].tolist()), gauss[0] if gauss else None)
    has_cuda = torch.cuda.is_available() and "cuda" in tensors
    cuda = {"cuda": tensors["cuda"]} if has_cuda else {}
    return Generators(python_state, numpy_state, tensors["torch"], cuda)


def reader(device: torch.device) -> Callable[[], Generators]:
    """What reads the generators that a run on this device has."""
    return _with_gpu if device.type == "cuda" else _without_gpu


def _without_gpu() -> Generators:
    return Generators(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), {})


def _with_gpu() -> Generators:
    return replace(_without_gpu(), cuda={"cuda": torch.cuda.get_rng_state()})
