"""The folder that is exported into: whole, or not there; what somebody has is never written over."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from grpo.checkpoint import sync_folder
from grpo.errors import UserError

DRAFT = ".export.partial"  # the folder in it that is written into first


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, for want of space say.
    """
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:  # the format's own class, of the system's errors too
        raise OSError(None, str(error), str(path)) from error


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """Inside, a folder to write into; what is in it is in `to` afterwards, or nowhere if something was raised.

    Raises:
        UserError: `to` has something in it, or cannot be made.
    """
    draft = to / DRAFT
    is_new = not to.exists()
    check_free(to)
    try:
        to.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except OSError as error:
        raise UserError(f"The folder {to} cannot be made: {error.strerror}. Choose another --to.") from error
    try:
        yield draft
        for path in sorted(draft.iterdir()):
            path.rename(to / path.name)
        draft.rmdir()
        sync_folder(to)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):
            if is_new:
                to.rmdir()
        raise


def check_free(to: Path) -> None:
    """Nothing would be written over.

    Raises:
        UserError: something would.
    """
    if to.is_symlink() and not to.exists():
        raise UserError(f"{to} is a link that leads nowhere. Choose another --to.")
    if to.exists() and not to.is_dir():
        raise UserError(f"{to} is a file. --to takes the name of a folder.")
    there = sorted(path.name for path in to.iterdir()) if to.is_dir() else []
    if there == [DRAFT]:
        raise UserError(
            f"In {to} another export is at work, or one was ended: it has {DRAFT}. Wait for it, take {DRAFT} away, or "
            "choose another --to."
        )
    if there:
        raise UserError(f"{to} has something in it ({there[0]}), and is not written over. Choose another --to.")
