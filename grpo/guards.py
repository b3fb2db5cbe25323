"""Guards: what a machine does to a run (signals, memory and disks that run out, files that vanish), in words.

Knows nothing of tasks.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

from grpo import system
from grpo.config import Config
from grpo.errors import OUT_OF_CPU_MEMORY, Stopped, UserError, is_out_of_memory
from grpo.folder import CONFIG_FILE, list_checkpoints

# No room, no quota, larger than allowed, read-only by now, a disk that fails.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
STOPPING = system.signals("SIGINT", "SIGTERM", "SIGHUP")


class Stoppable(Protocol):
    """What a signal is told to: a run."""

    stop_requested: int  # the number of the signal; 0: nobody has asked


# ---- signals


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP stop the program as Ctrl-C does: by an exception (Stopped), so that what is open is
    closed."""
    with _on_signals(_stop):
        yield


@contextmanager
def stops_gently(run: Stoppable, tell: Callable[[str], object]) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP lets the step finish, the second one does not."""

    def request(number: int, frame: FrameType | None) -> None:
        run.stop_requested = number
        for each in STOPPING:
            if signal.getsignal(each) is request:
                signal.signal(each, _stop)
        _leave_a_lost_terminal()
        with suppress(OSError):  # nobody may be there to read it
            tell("Stopping after this step. Ctrl-C again to stop at once (the last checkpoint stays).")

    with _on_signals(request):
        yield


def _stop(number: int, frame: FrameType | None) -> None:
    _leave_a_lost_terminal()
    raise Stopped(number)


_ours: list[Callable[[int, FrameType | None], None]] = []  # the handlers that are set, the outermost first


@contextmanager
def _on_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to that one alone
        yield
        return
    # nohup has SIGHUP ignored, and means it.
    heeded = [each for each in STOPPING if each.name != "SIGHUP" or signal.getsignal(each) != signal.SIG_IGN]
    before = {each: signal.signal(each, handle) for each in heeded}
    _ours.append(handle)
    try:
        yield
    finally:
        _ours.remove(handle)
        for each, handler in before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)  # None: not set by Python


def _in_a_copy() -> None:
    """In a forked child, of a reward's process pool say. Pools end their processes by SIGTERM, and one that takes it
    for a wish to finish the step, or raises in the middle of the pool's own locks, is waited for without end. The first
    Ctrl-C, and a terminal that is lost, are meant for the run: its step needs the child."""
    for each in STOPPING:
        if signal.getsignal(each) in (_stop, *_ours):
            signal.signal(each, signal.SIG_DFL if each == signal.SIGTERM else _heed_the_next)


def _heed_the_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


system.in_forked_children(_in_a_copy)


def _leave_a_lost_terminal() -> None:
    """Where the terminal is gone every line would fail, and the step with it: from now on they go nowhere."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


@contextmanager
def no_happy_exit() -> Iterator[None]:
    """Inside, os._exit(0) in this process is an error: what it cuts short would be a success for a scheduler, or `&&`.
    In a forked copy it means that copy. (C's own exit goes unnoticed.)"""
    process, leave = os.getpid(), os._exit

    def _exit(status: int) -> NoReturn:
        if status or os.getpid() != process:
            leave(status)
        with suppress(OSError):
            os.write(2, b"error: Something that the run calls has ended it by os._exit(0). Nothing more was saved.\n")
        leave(2)

    os._exit = _exit
    try:
        yield
    finally:
        os._exit = leave


# ---- memory and files


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
        f"The memory of {whose} ran out{told}. The update splits its batches by itself, down to one completion: lower "
        f"--max-completion-tokens ({config.max_completion_tokens}), or for the rollout --prompts-per-step "
        f"({config.prompts_per_step}), --group-size ({config.group_size}) or --eval-prompts ({config.eval_prompts})"
        f"{in_4_bits}. {how_to_go_on(folder, 'lower values')}"
    )


@contextmanager
def files_in_words(folder: Path) -> Iterator[None]:
    """Inside, a file that cannot be written or read is told in a sentence, with how the run in `folder` goes on.

    Raises:
        UserError: there is no room, no permission, no such folder any more, or the system refuses it otherwise.
    """
    hook = threading.excepthook
    # TensorBoard writes in a thread of its own: what fails there is raised here too, and told once.
    threading.excepthook = lambda failed: None if isinstance(failed.exc_value, OSError) else hook(failed)
    try:
        yield
    except OSError as error:
        raise UserError(_refused(error, folder)) from error
    finally:
        threading.excepthook = hook


def _refused(error: OSError, folder: Path) -> str:
    """What the system refused, and what to do."""
    what = f"What the run in {folder} records could not be written"
    which = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    if error.errno in DISK_ERRORS:
        return f"{what}: {which}. {how_to_go_on(folder, 'more room')}"
    if error.errno in TOO_MANY_FILES:
        limit = system.most_open_files()
        return (
            f"The process has too many files open: the system allows it {limit} (`ulimit -n`). Raise that, or close "
            f"what the rewards open. {how_to_go_on(folder, 'a higher limit')}"
        )
    if not folder.is_dir():
        return f"The run folder {folder} is gone: something has taken it away. Put it back, or start a new run."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{what}: {which}. {how_to_go_on(folder, 'the right to write there')}"
    return f"The run in {folder} was refused a file: {which}. {how_to_go_on(folder, 'that put right')}"


@contextmanager
def told_how_to_go_on(folder: Path) -> Iterator[None]:
    """Inside, whatever goes wrong ends with the command that goes on with the run in `folder`.

    Raises:
        UserError: with that command, where it did not say it yet.
    """
    try:
        yield
    except UserError as error:
        if "--resume" in str(error) or not folder.is_dir():
            raise
        raise UserError(f"{error} {how_to_go_on(folder)}") from error
    except (Exception, KeyboardInterrupt) as error:  # a fault of ours: its traceback ends with the same words
        error.add_note(how_to_go_on(folder))
        raise


def command_to_go_on(folder: Path | None) -> str:
    """For a shell."""
    return f"python -m grpo.run --resume {shlex.quote(str(folder))}"


def how_to_go_on(folder: Path | None, needed: str = "") -> str:
    """The sentence with the command. needed: what is to be changed first, if it is known."""
    with_what = f" and {needed}" if needed else ""
    command = f"`{command_to_go_on(folder)}`"
    checkpoints = list_checkpoints(folder) if folder else []
    if checkpoints:
        return f"The last checkpoint is {checkpoints[-1]}: go on with {command}{with_what}."
    if folder and (folder / CONFIG_FILE).is_file():
        return f"There is no checkpoint yet: start over in the same folder with {command}{with_what}."
    return f"There is no checkpoint to go on from: start again{f' with {needed}' if needed else ''}."
