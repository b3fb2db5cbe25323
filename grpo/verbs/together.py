"""Together: what all ranks of a run must have in common before it begins. Knows nothing of how they meet."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from grpo.checkpoint import read_state
from grpo.data import as_bytes
from grpo.errors import UserError
from grpo.folder import alone_in
from grpo.policy.load import choose_device
from grpo.questions import Questions
from grpo.resolve import Resolved
from grpo.types import Prompt
from grpo.world import World

TRAINED_ON, HELD_OUT = "training rows", "held-out rows"  # whose fingerprints a checkpoint has: Progress.rows


def same_command(world: World, resolved: Resolved, checkpoint: Path | None) -> None:
    """Every rank would do the same.

    Raises:
        UserError: one would not.
    """
    config = dataclasses.asdict(resolved.config)
    mine = {
        "the task file's SHA-256": resolved.task_sha256,
        "the device": choose_device(resolved.config).type,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        **({"vLLM": _version("vllm")} if resolved.config.engine == "vllm" else {}),
        "the SHA-256 of this package's code": _code(),
        "the checkpoint to go on from": str(checkpoint and (checkpoint.name, read_state(checkpoint)[1])),
        **{f"--{name.replace('_', '-')}": repr(value) for name, value in config.items()},
    }
    for rank, other in enumerate(world.gather(mine)[1:], start=1):
        for name, value in _differences(mine, other):
            raise UserError(
                f"Rank {rank} is not like the others: {name} is {value} there. All processes need the same command, "
                "the same task file, data and versions, and a GPU each; several hosts that resume need the run's "
                "folder on a file system that they share."
            )


def _differences(mine: dict[str, str], other: dict[str, str]) -> Iterator[tuple[str, str]]:
    return ((name, value) for name, value in other.items() if mine.get(name) != value)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not known"


def _code() -> str:
    """The SHA-256 of what is run here: a version does not tell one checkout from another."""
    digest = hashlib.sha256()
    for package in ("grpo", "grpo_kernels"):
        spec = find_spec(package)
        assert spec and spec.submodule_search_locations
        folder = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def same_questions(world: World, questions: Questions) -> None:
    """Every rank asks the same: only then is one's group everybody's.

    Raises:
        UserError: one does not.
    """
    world.require_same(
        lambda: [_digest(questions.train), _digest(questions.test)],
        lambda others: (
            f"The prompts of ranks {', '.join(map(str, others))} are not those of rank 0. The task's `rows` must give "
            "the same rows in the same order in every process: sort what comes from a set or a folder, seed what is "
            "drawn, and give all hosts the same data."
        ),
    )
    world.require_same(
        lambda: [digest_of_columns(questions.train), digest_of_columns(questions.test)],
        lambda others: (
            f"The prompts are the same on all ranks, but ranks {', '.join(map(str, others))} have other columns in "
            "their rows than rank 0, such as other answers, and would score what they sample by them. The task's "
            "`rows` must give the same rows in every process: give all hosts the same data, and seed what is drawn."
        ),
    )


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.index, prompt.tokens]).encode())
    return digest.hexdigest()


def digest_of_columns(prompts: Sequence[Prompt]) -> str:
    """Of what rewards are given, and lessons made of."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(as_bytes(prompt.fields))
    return digest.hexdigest()


def alone_with(world: World, folder: Path) -> AbstractContextManager[None]:
    """As `alone_in` for the rank that writes there."""
    return alone_in(folder) if world.rank == 0 else nullcontext()
