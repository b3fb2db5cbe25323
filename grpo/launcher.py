"""Launcher: what torchrun, or another that sets the same variables, says of this process. Knows nothing of PyTorch.

    launched()            the place of this process among others; None where it is alone
    take_own_gpu(place)   from now on this process sees one GPU, its own, which every library then calls cuda:0

Both come before PyTorch is imported. `leave_variables` takes away what was read: libraries that find these variables
(vLLM, accelerate) would open process groups of their own, and torch's rendezvous would look for theirs at ours.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from grpo.errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LEFT = (*NEEDED, "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE")
OF_TORCHRUN = "TORCHELASTIC_"  # how further variables of it begin
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # who meets there is on this host
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, and where they meet."""

    rank: int
    size: int
    local_rank: int  # among those of this host
    host: str  # of the store that they meet at
    port: int
    by_agent: bool  # the launcher keeps the store, and it outlives the processes; else rank 0 does
    local_size: int  # processes of this host; 0: not known


def launched() -> Place | None:
    """The place of this process, as its environment says; None where nobody has launched several.

    Raises:
        UserError: the variables are there and are no numbers, or some are missing.
    """
    given = {name: os.environ[name] for name in NEEDED if os.environ.get(name)}
    if not {"RANK", "WORLD_SIZE"} <= given.keys():
        return None
    if missing := [name for name in NEEDED if name not in given]:
        raise UserError(
            f"The environment has RANK and WORLD_SIZE, but not {' and '.join(missing)}. torchrun sets them all: "
            "`torchrun --nproc-per-node N -m grpo.run ...`. For a run of one process unset RANK and WORLD_SIZE."
        )
    here = given["WORLD_SIZE"] if given["MASTER_ADDR"] in LOOPBACK else "0"
    of_host = os.environ.get("LOCAL_WORLD_SIZE") or here
    try:
        rank, size, local, port = (int(given[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        local_size = int(of_host)
    except ValueError as error:
        names = "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_PORT"
        raise UserError(f"{names} must be whole numbers: {error}.") from error
    if not 0 <= rank < size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {size}. Ranks are 0 to WORLD_SIZE - 1.")
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(rank, size, local, given["MASTER_ADDR"], port, by_agent, local_size)


def take_own_gpu(place: Place) -> None:
    """Let this process see one of the GPUs that it was given: that of its local rank.

    Raises:
        UserError: it was given fewer.
    """
    given = os.environ.get(VISIBLE)
    if given == "" or given == "-1":
        return
    cards = [str(place.local_rank)] if given is None else [card.strip() for card in given.split(",")]
    if given is None or len(cards) == 1:  # one alone is this process's own already, as Slurm gives them
        os.environ[VISIBLE] = cards[0]
    elif place.local_rank < len(cards):
        os.environ[VISIBLE] = cards[place.local_rank]
    else:
        raise UserError(
            f"{VISIBLE} is {given}: {len(cards)} GPUs, and this is process {place.local_rank + 1} of this host. There "
            f"is one process a GPU: give --nproc-per-node {len(cards)}, or more GPUs."
        )


def leave_variables() -> None:
    """Take away what the launcher has set."""
    for name in [name for name in os.environ if name in LEFT or name.startswith(OF_TORCHRUN)]:
        del os.environ[name]
