"""starts.jsonl: each time that a run was started or gone on with: when, by which command, with what, on what.

Knows nothing of a run but what it is handed. It is a history: going on from an earlier checkpoint cuts nothing of it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from grpo.record.jsonl import JsonLines, check_position

STARTS = "starts.jsonl"
PACKAGES = (
    "grpo",
    "torch",
    "transformers",
    "vllm",
    "bitsandbytes",
    "triton",
    "peft",
    "datasets",
    "tokenizers",
    "numpy",
)


def write_start(folder: Path, about: Mapping[str, Any]) -> None:
    """Add a line: `about` beside the time and the versions."""
    path = folder / STARTS
    if path.is_symlink():
        check_position(path, 0)
    whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else None  # a line that was cut by a kill is dropped
    file = JsonLines(path, whole)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    file.write([{"time": now, **about, "versions": versions()}])
    file.close()


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run computes with, as far as they are here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
