"""Exchange: the folder through which adapters get to the servers, and the names that they have there. Knows nothing of
HTTP.

    HERE/grpo-servers-<id>/              of one process, locked for as long as it lives
    HERE/grpo-servers-<id>/<name>/       an adapter in PEFT's format, renamed into its place when it is whole
    grpo-<id>-v<version>-<digest>        its name: a version has one of its own, and equal names are equal adapters

A server reads an adapter when it is loaded, and again when it has dropped it to make room, so the present one stays.
A process that was killed leaves its adapters at the servers and its folder here. The next one finds them by their names
and takes those away whose lock is free.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from grpo import system
from grpo.addresses import read_shared_folder
from grpo.rollout.server_protocol import Card

PREFIX = "grpo-servers-"
NAME = re.compile(r"grpo-([0-9a-f]{8})-v\d+-[0-9a-f]{8}")
LOCK = "lock"
DIGITS = 4  # bytes of an id, and of a digest


class Offered(NamedTuple):
    """An adapter that servers can load."""

    name: str
    path: str  # as the servers see it


class Exchange:
    """The adapters of one process."""

    def __init__(self, setting: str = ""):
        """setting: see Config.servers_folder.

        Raises:
            OSError: nothing can be written there.
        """
        here, there = read_shared_folder(setting)
        self.here = Path(here or tempfile.gettempdir()).expanduser().resolve()
        self.there = (there if there != here else "") or str(self.here)
        self.here.mkdir(parents=True, exist_ok=True)
        self.id = secrets.token_hex(DIGITS)
        self.folder = self.here / f"{PREFIX}{self.id}"
        draft = self.here / f".{PREFIX}{self.id}"  # it has its name when it is locked
        # Weights are nobody's business: in a folder for temporary files other users may not read them.
        draft.mkdir(mode=0o755 if setting else 0o700)
        self._lock = _locked(draft / LOCK)
        draft.rename(self.folder)

    def write(self, version: int, files: dict[str, bytes]) -> Offered:
        """An adapter of a version of the policy, where it is not there already."""
        digest = hashlib.sha256(b"".join(files.values())).hexdigest()[: 2 * DIGITS]
        name = f"grpo-{self.id}-v{version}-{digest}"
        if not (self.folder / name).is_dir():
            draft = self.folder / f".{name}"
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            for file, content in files.items():
                (draft / file).write_bytes(content)
            draft.rename(self.folder / name)
        return Offered(name, f"{self.there}/{self.folder.name}/{name}")

    def keep_only(self, name: str) -> None:
        """Remove what was written before."""
        for path in self.folder.iterdir():
            if path.name not in (LOCK, name):
                shutil.rmtree(path, ignore_errors=True)

    def left_behind(self, cards: Iterable[Card]) -> list[str]:
        """The names of those among a server's adapters that belong to nobody any more: to a process that has died.

        Whose folder is neither in this exchange nor anywhere on this machine may be another machine's, and alive.
        """
        return [card.name for card in cards if NAME.fullmatch(card.name) and self._is_left(Path(card.root).parent)]

    def remove_dead(self) -> None:
        """Remove the folders of this user's processes that have died."""
        for folder in self.here.glob(f"{PREFIX}*"):
            owner = folder.name.removeprefix(PREFIX)
            with suppress(OSError):
                if owner != self.id and folder.stat().st_uid == self.folder.stat().st_uid and _is_dead(folder):
                    shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove everything of this process."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock in _held:
            _held.discard(self._lock)
            os.close(self._lock)

    def _is_left(self, there: Path) -> bool:
        """Whether a folder, by its path at a server, is a dead process's."""
        if str(there.parent) == self.there:
            return there.name != self.folder.name and _is_dead(self.here / there.name)
        return there.is_dir() and _is_dead(there)


def _is_dead(folder: Path) -> bool:
    """Whether nobody is behind a folder any more."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        return system.is_unlocked(descriptor)
    finally:
        os.close(descriptor)


# Locks of this process: a forked child, a worker of rewards say, would hold them for as long as it lives.
_held: set[int] = set()


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    system.lock(descriptor)  # where there are no locks nobody is taken for dead
    _held.add(descriptor)
    return descriptor


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


system.in_forked_children(_let_go)
