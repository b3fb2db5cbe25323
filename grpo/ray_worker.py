"""A worker of Ray: starts one process of a run as torchrun would, and waits for it. Knows nothing of Ray but that it
sets the variables that torchrun sets.

The processes meet at the store that Ray's first worker keeps, which outlives them, as torchrun's agent's does. A worker
reports a failure only when all processes have ended: Ray ends the others at the first report, and rank 0 may be saving.

A module of its own: what is sent to workers is found by its name there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


class Failed(Exception):
    """The processes have ended, and not all of them well.

    codes       exit code of each rank
    sentence    what this worker's process has told the user; empty where that was another's to tell
    """

    def __init__(self, codes: list[int], sentence: str):
        super().__init__(codes, sentence)
        self.codes, self.sentence = codes, sentence

    def __str__(self) -> str:
        return self.sentence or f"The processes ended with exit codes {', '.join(map(str, self.codes))}."


def work(given: dict[str, Any]) -> None:
    """What a worker of Ray does, whose environment has the variables that torchrun sets too.

    Raises:
        Failed: a process did not end well.
    """
    import torch.distributed

    kept_by_ray = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    code, sentence = _run([sys.executable, "-m", *given["command"]], given["folder"], os.environ | kept_by_ray)
    codes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(codes, code)
    if any(codes):
        raise Failed(codes, sentence)


def _run(command: list[str], folder: str, environment: dict[str, str]) -> tuple[int, str]:
    """The exit code of a command, and the sentence that it ended with. What it prints goes where Ray shows it."""
    told = ""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            told = line if line.startswith("error: ") else told and told + line
    return process.returncode, told.removeprefix("error: ").strip()
