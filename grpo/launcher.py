"""Launcher: what torchrun, or another that sets the same variables, says of this process. Knows nothing of PyTorch.

    launched()            the place of this process among others; None where it is alone
    take_own_gpu(place)   from now on this process sees one GPU, its own, which every library then calls cuda:0
    launcher_told(place)  inside, what goes wrong is written where torchrun looks for it at its own end

The first two come before PyTorch is imported. `leave_variables` takes away what was read: libraries that find these
variables (vLLM, accelerate) would open process groups of their own, and torch's rendezvous would look for theirs at
ours.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from grpo.errors import ToldElsewhere, UserError
from grpo.pulse import RankLost, sentence_of

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LEFT = (*NEEDED, "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE")
OF_TORCHRUN = "TORCHELASTIC_"  # how further variables of it begin
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # who meets there is on this host
MOST = 10_000  # processes
VISIBLE = "CUDA_VISIBLE_DEVICES"
ERROR_FILE = OF_TORCHRUN + "ERROR_FILE"


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
    launcher: int = 0  # the process that has started this one; 0: not known
    error_file: str = ""  # where the launcher looks for why this process has ended


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
    if size > MOST or not 0 <= local_size <= size or not 0 <= local < (local_size or size):
        raise UserError(
            f"WORLD_SIZE is {size}, LOCAL_WORLD_SIZE {local_size} and LOCAL_RANK {local}. There are at most {MOST:,} "
            "processes, of them LOCAL_WORLD_SIZE on this host, whose LOCAL_RANK is 0 to LOCAL_WORLD_SIZE - 1."
        )
    if not 0 < port < 1 << 16:
        raise UserError(f"MASTER_PORT is {port}. Ports are 1 to 65535.")
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(
        rank,
        size,
        local,
        given["MASTER_ADDR"],
        port,
        by_agent,
        local_size,
        os.getppid(),
        os.environ.get(ERROR_FILE, ""),
    )


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


@contextmanager
def launcher_told(place: Place, plain: Callable[[str], str]) -> Iterator[None]:
    """Inside, what goes wrong is written where torchrun looks for it: its last words are that sentence, instead of "To
    enable traceback see". plain: makes a text one for a terminal."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if place.error_file:
            _write_reason(Path(place.error_file), error, plain)
        raise


def _write_reason(path: Path, error: BaseException, plain: Callable[[str], str]) -> None:
    """Of the processes that torchrun finds ended it calls that of the earliest second the root cause, and sees nothing
    finer: one that ends because of another is of the next."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    is_told = any(isinstance(each, RankLost | ToldElsewhere) for each in chain)
    own = next((each for each in chain if not isinstance(each, ToldElsewhere)), error)
    sentence = plain(sentence_of(own))
    told = {"py_callstack": sentence, "timestamp": str(int(time.time()) + is_told)}
    whole = path.with_suffix(".whole")  # half a file would be the end of torchrun
    with suppress(OSError):
        whole.write_text(json.dumps({"message": {"message": sentence, "extraInfo": told}}))
        whole.replace(path)


def leave_variables() -> None:
    """Take away what the launcher has set."""
    for name in [name for name in os.environ if name in LEFT or name.startswith(OF_TORCHRUN)]:
        del os.environ[name]
