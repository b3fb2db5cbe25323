"""A worker: a process of its own in which rewards are called, one call after the other. Knows nothing of runs.

Comes without torch, in a tenth of a second, so that one which was ended is soon replaced. It is a fresh interpreter, no
copy of the run: neither threads nor CUDA come along. What passes between (grpo/rewards/workers.py is the other end):

    Setup                 where modules are found, the rewards (pickled by name), what the process may take
    {reward: ""}          back: why one cannot be called here, empty where it can
    Order                 one call: the reward, its arguments pickled with what `log_metric` writes to
    Reply                 back: its scores, and what was logged

Modules that lie beside a task file, and the task file, are those of the moment at which the run was started, whatever
is written over them since: a worker that starts later scores as the first one did.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import pickle
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from types import CodeType, ModuleType
from typing import Any

from grpo.errors import WHAT_USER_CODE_RAISES, in_words
from grpo.rewards.attempt import attempt, missing_for
from grpo.rewards.samples import Logged
from grpo.rewards.values import Missing, Score
from grpo.system import limit_memory

_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG, of Linux
_FIRST_TO_GO = b"1000"  # when memory runs out the system ends this process before the run


@dataclass(frozen=True)
class Setup:
    """What a worker is told first."""

    functions: dict[str, bytes]  # {reward: its function, pickled}
    sources: dict[str, tuple[str, str]]  # {module: (its file, its text)}
    folder: str  # the working directory
    memory: int  # bytes that it may have
    parent: int  # process


@dataclass(frozen=True)
class Order:
    """One call. `arguments` is the pickle of (Logged, {argument: value}): functions among the arguments write to the
    first."""

    name: str
    fits: Callable[[Any, int], list[Score | Missing]]
    count: int
    arguments: bytes
    seed: int


@dataclass(frozen=True)
class Reply:
    """What comes of it."""

    scores: list[Score | Missing]
    logged: Logged = field(default_factory=Logged)


def main(descriptor: int, printed: int) -> None:
    """Serve the run at the other end of a connection until it is gone. printed: another, for what is printed."""
    os.set_inheritable(descriptor, False)  # not for the processes that a reward starts
    os.set_inheritable(printed, False)
    connection = Connection(descriptor)
    setup: Setup = pickle.loads(connection.recv_bytes())
    _be_a_worker(setup)
    functions, faults = _load(setup)
    connection.send_bytes(pickle.dumps(faults))
    begun = False
    while True:
        try:
            order: Order = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        if not begun:
            begun = True
            _print_into(printed)
        connection.send_bytes(pickle.dumps(serve(functions[order.name], order)))


def serve(function: Callable, order: Order) -> Reply:
    """Make one call."""
    _seed(order.seed)
    logged = Logged()
    try:
        logged, arguments = pickle.loads(order.arguments)
        scores = attempt(partial(_fitted, function, order, arguments), range(order.count))
    except BaseException as error:  # also a KeyboardInterrupt, which is no Ctrl-C here
        scores = [missing_for(error)] * order.count
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(*WHAT_USER_CODE_RAISES):
            stream.flush()
    # An exception of the reward's own class may not be known at the other end, nor fit through.
    return Reply([_without_error(score) for score in scores], logged)


def _fitted(function: Callable, order: Order, arguments: dict[str, Any]) -> list[Score | Missing]:
    return order.fits(function(**arguments), order.count)


def _without_error(score: Score | Missing) -> Score | Missing:
    return Missing(score.words, score.advice, score.trace) if isinstance(score, Missing) else score


def _be_a_worker(setup: Setup) -> None:
    os.chdir(setup.folder)
    with contextlib.suppress(OSError, AttributeError):  # Linux alone
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != setup.parent:  # it was gone before
        os._exit(0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
        file.write(_FIRST_TO_GO)
    limit_memory(setup.memory)
    sys.meta_path.insert(0, _AsItWas(setup.sources))


def _load(setup: Setup) -> tuple[dict[str, Callable], dict[str, str]]:
    """The rewards, and why one cannot be had."""
    functions: dict[str, Callable] = {}
    faults = dict.fromkeys(setup.functions, "")
    for name, data in setup.functions.items():
        try:
            functions[name] = pickle.loads(data)
        except BaseException as error:  # importing its module runs the user's code
            faults[name] = in_words(error)
    return functions, faults


def _print_into(descriptor: int) -> None:
    """From now on what is printed goes there, also what C code and started processes print."""
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


def _seed(seed: int) -> None:
    """A reward that draws at random draws the same whichever worker calls it, and when."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


class _AsItWas(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by texts that were read before."""

    def __init__(self, sources: dict[str, tuple[str, str]]):
        self.sources = sources

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.sources:
            return None
        return importlib.util.spec_from_file_location(fullname, self.sources[fullname][0], loader=self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self.get_code(module.__name__), module.__dict__)

    def get_code(self, name: str) -> CodeType:
        file, text = self.sources[name]
        return compile(text, file, "exec", dont_inherit=True)

    def get_source(self, name: str) -> str:
        """For tracebacks."""
        return self.sources[name][1]
