"""AdapterLink: for models that vLLM builds otherwise than of the trainer's weights. It holds its own copy of the base,
and its own LoRA machinery receives the adapter. Knows nothing of sampling.

vLLM reads an adapter from buffers at fixed addresses, and so do captured CUDA graphs. Where each linear's part of them
begins is looked up once; bringing the policy's weights is then one copy of every A and of every B times the scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.lora.request import LoRARequest

from grpo.errors import UnsuitedEngine, UserError
from grpo.policy import Policy
from grpo.rollout import vllm_compat, vllm_lora


class Copy(NamedTuple):
    """A block of a linear's rows: its factors, and where vLLM reads them."""

    name: str
    a: Tensor  # [r, K]
    to_a: Tensor  # [r, K]
    b: Tensor  # [M_s, r]
    to_b: Tensor  # [M_s, r]


class AdapterLink:
    """The policy's adapter, copied into vLLM's."""

    def __init__(self, policy: Policy, why: str = ""):
        """why: vLLM's layers cannot be the trainer's, a clause.

        Raises:
            UnsuitedEngine: vLLM's base could not match the policy's.
            UserError: its buffers for the adapter could not.
        """
        _check_base(policy, why)
        self.told = f"samples from its own copy of the weights, to which the adapter is copied ({why})"
        self.model, self.store = policy.model, policy.store
        self.copies: list[Copy] = []
        # The path is never read: an adapter of this id is there already. Nothing may ask vLLM to load it again.
        self.lora_request = LoRARequest("policy", 1, "in memory")
        self.arguments: dict[str, Any] = {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": _room_for(policy.config.lora_rank),
            # By their last names, which is all that vLLM compares. The head has no projection, so it is not among them.
            "lora_target_modules": sorted({name.rpartition(".")[2] for name, _, _ in self.store.factors()}),
        }

    @contextmanager
    def building(self) -> Iterator[None]:
        """See Link.building."""
        vllm_compat.exempt_from_compilation(self.model)
        yield

    def attach(self, llm: Any) -> None:
        """See Link.attach.

        Raises:
            UserError: vLLM has no buffer for a projection of the policy.
        """
        vllm_lora.open_adapter(llm, self.lora_request)
        find = vllm_lora.find_lora_slices(llm, self.lora_request.lora_int_id)
        for name, a, b in self.store.factors():
            self.copies += copies_of(name, a, b, find(name))

    @torch.no_grad()
    def push(self) -> None:
        """See Link.push. With scale 0 vLLM samples from the reference policy."""
        _, a, to_a, b, to_b = zip(*self.copies, strict=True)
        scaled = torch._foreach_mul(b, self.store.scale[0])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_([*to_a, *to_b], [*a, *scaled])  # pyright: ignore[reportPrivateImportUsage]


def _check_base(policy: Policy, why: str) -> None:
    """vLLM reads the checkpoint in the dtype that the policy computes in, and its LoRA kernels know no float32."""
    fitting = "float32" if policy.device.type == "cpu" else "bf16"
    if policy.config.base != fitting:
        raise UnsuitedEngine(
            f"vLLM cannot share the layers of {policy.source} ({why}), so it would sample from its own copy of the "
            f"weights, which is not rounded as --base {policy.config.base} is. Use --base {fitting} or --engine torch."
        )


def _room_for(rank: int) -> int:
    """The smallest rank that vLLM can lay out memory for and that holds this one."""
    ranks = vllm_lora.lora_ranks()
    if rank > ranks[-1]:
        raise UserError(f"--lora-rank is {rank}, and vLLM takes {ranks[-1]} at most. Lower it or use --engine torch.")
    return next(larger for larger in ranks if larger >= rank)


def copies_of(name: str, a: Tensor, b: Tensor, slices: list[vllm_lora.LoraSlice]) -> list[Copy]:
    """The factors A [r, K] and B [M, r] of a linear over the slices that hold its rows: all of A to each, B split."""
    rank, columns = a.shape
    sizes = [part.b.shape[0] for part in slices]
    if sum(sizes) != b.shape[0] or any(part.a.shape[1] != columns for part in slices):
        raise UnsuitedEngine(
            f"vLLM takes no adapter on {name} ({b.shape[0]} rows of {columns} inputs), which the policy trains. "
            "Use --engine torch, and please report this with the model's name."
        )
    return [
        Copy(name, a, part.a[:rank], rows, part.b[:, :rank]) for part, rows in zip(slices, b.split(sizes), strict=True)
    ]
