"""Errors that are told in a sentence. `grpo.run` prints them without a traceback and exits with code 2."""

from __future__ import annotations

import asyncio
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

# Whose memory ran out is told by words where there is no class: torch says so of this machine's, CUDA, Triton (whose
# kernels are loaded late), cuBLAS and vLLM (while it warms up, and when it takes
# its cache back) of a GPU's.
OUT_OF_CPU_MEMORY = "DefaultCPUAllocator"
OUT_OF_GPU_MEMORY = (
    "CUDA error: out of memory",
    "CUDA Error: out of memory",
    "CUDA out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class UserError(Exception):
    """What was given, what is allowed, what to do; full sentences, because the user reads nothing else."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: the sentences, where a terminal would obey no letter of them."""
        return [
            "error: " + "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in str(self))
        ]


class Stopped(KeyboardInterrupt):
    """A signal asks the program to stop at once."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class ToldElsewhere(UserError):
    """Another process of the same run has told the user."""


class UnsuitedEngine(UserError):
    """The rollout engine has no way to sample from this model; another one may have."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is memory that ran out, a GPU's or this machine's."""
    signs = (OUT_OF_CPU_MEMORY, *OUT_OF_GPU_MEMORY)
    torch = sys.modules.get("torch")  # not imported for this: where nobody did, none of its errors can be
    kinds = (MemoryError, torch.OutOfMemoryError) if torch else MemoryError
    return isinstance(error, kinds) or any(sign in str(error) for sign in signs)


# sys.exit() and a cancelled task are no Exceptions, and would end the run without a word.
WHAT_USER_CODE_RAISES = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)


@contextmanager
def user_code(told: Callable[[str], str]) -> Iterator[None]:
    """Inside runs the user's own code (a task file, a reward, a template), which may raise anything.

    told: what was raised, in words -> the sentence about it. A UserError is passed on as it is, and Ctrl-C.

    Raises:
        UserError: it raised.
    """
    try:
        yield
    except BaseException as error:  # a class of the user's own may be no Exception
        if isinstance(error, UserError) or type(error) in (KeyboardInterrupt, Stopped):
            raise
        raise UserError(told(in_words(error))) from error


@contextmanager
def exits_in_words() -> Iterator[None]:
    """Inside, sys.exit() is an error: of a library, or of user code where none was expected. 0 would be a success.

    Raises:
        UserError: it was called.
    """
    try:
        yield
    except SystemExit as error:
        raise UserError(
            f"The program was ended from within: something that it calls raised SystemExit ({error.code}). Look for "
            "sys.exit() in the task file and in what it imports."
        ) from error


def in_words(error: BaseException) -> str:
    """ "ZeroDivisionError (division by zero)"; an error whose own text cannot be had is named alone."""
    try:
        text = str(error).strip()
    except BaseException:  # an exception's __str__ is the user's code too
        text = "whose text cannot be shown"
    return f"{type(error).__name__} ({text or 'without a message'})"


def nearest(name: str, names: Iterable[str]) -> str:
    """ " Did you mean `answer`?" for a name that is nearly one of these; empty where none is near."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean `{close[0]}`?" if close else ""
