"""Guards: what a machine does to a run (Ctrl-C, memory and disks that run out), in words. Knows nothing of tasks."""

from __future__ import annotations

import errno
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo.config import Config
from grpo.errors import OUT_OF_CPU_MEMORY, UserError, is_out_of_memory
from grpo.folder import list_checkpoints

# No room, no quota, larger than allowed, read-only by now, a disk that fails.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def stops_gently(run: Any) -> Iterator[None]:
    """The first Ctrl-C lets the step finish, the second one does not."""

    def request(signal_number: int, frame: object) -> None:
        run.stop_requested = True
        run.recorder.message("Stopping after this step. Ctrl-C again to stop at once (the last checkpoint stays).")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def memory_in_words(config: Config, folder: Path | None = None) -> Iterator[None]:
    """Inside, memory that runs out is told with what to lower, and how the run in `folder` goes on.

    Raises:
        UserError: it ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, and not the only one
        if not is_out_of_memory(error):
            raise
        raise UserError(_out_of_memory(error, config, folder)) from error


def _out_of_memory(error: Exception, config: Config, folder: Path | None) -> str:
    whose = "this machine" if isinstance(error, MemoryError) or OUT_OF_CPU_MEMORY in str(error) else "the GPU"
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    told = f" (the last request was for {asked[1]})" if asked else ""
    in_4_bits = "" if config.base == "nf4" else ", or keep the base weights in 4 bits with --base nf4"
    return (
        f"The memory of {whose} ran out{told}. Lower --tokens-per-batch ({config.tokens_per_batch}) for the "
        f"update, or for the rollout --max-completion-tokens ({config.max_completion_tokens}), --prompts-per-step "
        f"({config.prompts_per_step}), --group-size ({config.group_size}) or --eval-prompts ({config.eval_prompts})"
        f"{in_4_bits}. {_how_to_go_on(folder, 'lower values')}"
    )


@contextmanager
def full_disk_in_words(folder: Path) -> Iterator[None]:
    """Inside, a file that cannot be written is told in a sentence, with how the run in `folder` goes on.

    Raises:
        UserError: there is no room, or the disk takes nothing more.
    """
    hook = threading.excepthook
    # TensorBoard writes in a thread of its own: what fails there is raised here too, and told once.
    threading.excepthook = lambda failed: None if _is_full_disk(failed.exc_value) else hook(failed)
    try:
        yield
    except OSError as error:
        if not _is_full_disk(error):
            raise
        raise UserError(
            f"What the run in {folder} records could not be written: {error.strerror}. "
            f"{_how_to_go_on(folder, 'more room')}"
        ) from error
    finally:
        threading.excepthook = hook


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def _how_to_go_on(folder: Path | None, needed: str) -> str:
    checkpoints = list_checkpoints(folder) if folder else []
    if not checkpoints:
        return f"There is no checkpoint to go on from: start again with {needed}."
    return f"The last checkpoint is {checkpoints[-1]}: go on with `python -m grpo.run --resume {folder}` and {needed}."
