"""Errors that are told in a sentence. `grpo.run` prints them without a traceback and exits with code 2."""

import torch

# Whose memory ran out is told by words where there is no class: torch says so of this machine's, CUDA, cuBLAS and vLLM
# (while it warms up) of a GPU's.
OUT_OF_CPU_MEMORY = "DefaultCPUAllocator"
OUT_OF_GPU_MEMORY = ("CUDA error: out of memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class UserError(Exception):
    """What was given, what is allowed, what to do; full sentences, because the user reads nothing else."""


class UnsuitedEngine(UserError):
    """The rollout engine has no way to sample from this model; another one may have."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is memory that ran out, a GPU's or this machine's."""
    signs = (OUT_OF_CPU_MEMORY, *OUT_OF_GPU_MEMORY)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in signs)
