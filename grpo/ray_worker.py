"""A worker of Ray: starts one process of a run as torchrun would, and waits for it. Knows nothing of Ray but that it
sets the variables that torchrun sets.

The processes meet at the store that Ray's first worker keeps, which outlives them, as torchrun's agent's does. A worker
returns only when all processes have ended, for rank 0 may be saving. A process that has failed is no failure of Ray's
worker, of which Ray would print what is for programmers: what became of it is what the worker returns.

A module of its own: what is sent to workers is found by its name there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a process has ended."""

    code: int
    sentence: str  # that it has told the user; empty where that was another's to tell


def work(given: dict[str, Any]) -> list[tuple[int, str]]:
    """What a worker of Ray does, whose environment has the variables that torchrun sets too: how the process of each
    rank has ended (Ended)."""
    import torch.distributed

    kept_by_ray = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    ended = _run([sys.executable, "-m", *given["command"]], given["folder"], os.environ | kept_by_ray)
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, tuple(ended))
    return of_ranks


def _run(command: list[str], folder: str, environment: dict[str, str]) -> Ended:
    """How a command ended. What it prints goes where Ray shows it."""
    told = ""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            told = line if line.startswith("error: ") else told and told + line
    return Ended(process.returncode, told.removeprefix("error: ").strip())
