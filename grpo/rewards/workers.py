"""Worker processes: rewards are called at the same time as each other, and one that hangs is ended with its process.

Knows nothing of signatures or of what a failure means. The other end is grpo/rewards/worker.py.

    Pool          so many workers, each fed by a thread of ours that sends a call, waits for the reply, and looks at the
                  clock: a call that is late, whatever it does, ends with the process and all that it started, and
                  another process takes the next
    way_workers   calls are handed to the pool when they are begun; the outcomes come in their order
    Printed       what workers, and what they have started, print: into one file, to a bound

Only a function that the worker finds by its module's name can be called there (`portable`).
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from grpo.errors import WHAT_USER_CODE_RAISES, UserError, in_words
from grpo.rewards.attempt import ADVICE
from grpo.rewards.calling import Callee, Finish, Outcome, Start
from grpo.rewards.kept import LARGEST_LOG
from grpo.rewards.samples import Logged, Samples
from grpo.rewards.values import Missing
from grpo.rewards.worker import Order, Reply, Setup
from grpo.watchdog import Limit

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from grpo.rewards.worker import main; main({}, {})"
_START = 300.0  # seconds for a process to import what the rewards need
_LOOK = 0.2  # seconds between two looks at whether a worker lives
_CLOSE = 2.0  # seconds for a thread to see that its process is gone
_SEND = 10  # seconds that it may take to hand a call over
_LEAST_MEMORY = 2 << 30  # bytes
_CHUNK = 1 << 16  # bytes that are read at once of what is printed


class Gone(Exception):
    """The worker has ended: how, in words."""


class Late(Exception):
    """It did not answer in time."""


def portable(function: Callable) -> bytes:
    """A function as a worker can take it, by its module's name.

    Raises:
        ValueError: it cannot, in words.
    """
    if "__main__" in (getattr(function, "__module__", None), getattr(type(function), "__module__", None)):
        raise ValueError("it is defined in the script that was started: put it into a module")
    try:
        return pickle.dumps(function)
    except WHAT_USER_CODE_RAISES as error:
        what = getattr(function, "__qualname__", "")
        if "<lambda>" in what or "<locals>" in what:
            raise ValueError("it is made inside of a function: define it at the top of a file") from error
        raise ValueError(f"it cannot be sent there: {in_words(error)}") from error


class Printed:
    """A file for what workers print, made when there is something. Nothing is written beyond `most` bytes, or where the
    disk is full: that is no reason for a reward to fail. No file: what is printed goes nowhere."""

    def __init__(self, log: Path | None, most: int = LARGEST_LOG):
        self.log, self.left = log, most
        self.lock = threading.Lock()

    def opened(self) -> tuple[int, threading.Thread]:
        """Somewhere to print to, and who reads there until everybody has closed it."""
        reader, writer = os.pipe()
        thread = threading.Thread(target=self._take, args=(reader,), name="grpo-reward-log", daemon=True)
        thread.start()
        return writer, thread

    def _take(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as pipe:
            while chunk := pipe.read(_CHUNK):
                with self.lock:
                    chunk = chunk[: self.left]
                    self.left -= len(chunk)
                    if chunk and self.log:
                        with suppress(OSError), self.log.open("ab") as file:
                            file.write(chunk)


class Worker:
    """One process.

    Raises:
        Gone: it could not be started.
    """

    def __init__(self, setup: Setup, printed: Printed):
        ours, theirs = socket.socketpair()
        writer, self.reads = printed.opened()
        # So that a process which does not read cannot hold us.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND, 0))
        command = [
            sys.executable,
            "-P",
            "-c",
            _BOOT.format(theirs.fileno(), writer),
            json.dumps([str(place) for place in sys.path]),
        ]
        # One computes on one core: there are several. Sets of texts have one order in all of them.
        environment = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"} | dict(os.environ)
        with theirs, open(writer, "wb", buffering=0):
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), writer],
                start_new_session=True,  # Ctrl-C is for the run; and what it starts is ended with it
                env=environment,
            )
        self.connection = Connection(ours.detach())
        try:
            self.faults: dict[str, str] = self.ask(setup, _START)
        except Late as late:
            self.end()
            raise Gone(f"it was not ready in {_START:g} s") from late
        except Gone:
            self.end()
            raise

    def ask(self, what: Any, seconds: float | None) -> Any:
        """Send something and wait for the reply.

        Raises:
            Gone: it has ended. Late: no reply in so many seconds.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            self.connection.send_bytes(pickle.dumps(what, pickle.HIGHEST_PROTOCOL))
            while not self.connection.poll(_LOOK if deadline is None else max(0.0, min(_LOOK, deadline - _now()))):
                if deadline is not None and _now() >= deadline:
                    raise Late
                if not self.is_alive():  # what it started may still hold its end of the connection
                    raise EOFError
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise Gone(self._how_it_ended()) from error

    def is_alive(self) -> bool:
        """The process is there."""
        return self.process.poll() is None

    def kill(self) -> None:
        """End it and all that it has started. Any thread may."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """The same, by whoever speaks to it: nobody else may close what is read from."""
        self.kill()
        self.connection.close()
        self.reads.join(_CLOSE)  # longer by what has left its process group

    def _how_it_ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1.0)
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return f"{name}, as when memory runs out" if name == "SIGKILL" else name
        return "it no longer answers"


@dataclass
class Job:
    """A call that is to be made."""

    order: Order
    limit: Limit | None
    lane: Lane
    future: Future[Reply] = field(default_factory=Future)


@dataclass
class Lane:
    """The jobs of one reward, of which at most so many run at the same time."""

    width: int
    waiting: deque[Job] = field(default_factory=deque)
    running: int = 0


class Pool:
    """`size` workers for the rewards that `setup` has. A process is started when a thread has its first call. log: for
    what is printed.

    Raises:
        UserError: no process can be started.
    """

    def __init__(self, size: int, setup: Setup, log: Path | None = None):
        self.size = size
        self.setup = setup
        self.printed = Printed(log)
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.workers: set[Worker] = set()  # that live
        self.threads: list[threading.Thread] = []
        self.closed = False
        try:
            first: Worker | None = Worker(setup, self.printed)
        except (Gone, OSError) as error:
            how = f"it ended at once ({error})" if isinstance(error, Gone) else in_words(error)
            raise UserError(
                f"No worker process for the rewards can be started: {how}. Mend what the task file does when it is "
                "imported, or call the rewards in the run's own process: --reward-workers 0."
            ) from error
        self.workers.add(first)
        self.faults = first.faults
        for number in range(size):
            serve = partial(self._serve, first if number == 0 else None)
            self.threads.append(threading.Thread(target=serve, name=f"grpo-reward-worker-{number}", daemon=True))
            self.threads[-1].start()

    def submit(self, lane: Lane, order: Order, limit: Limit | None) -> Future[Reply]:
        """Have a call made as soon as a worker is free."""
        job = Job(order, limit, lane)
        with self.lock:
            lane.waiting.append(job)
        self._hand_out(lane)
        return job.future

    def close(self) -> None:
        """End all workers, whatever they do."""
        with self.lock:
            self.closed = True
            workers = list(self.workers)
        for _ in self.threads:
            self.jobs.put(None)
        for worker in workers:
            worker.kill()
        for thread in self.threads:
            thread.join(_CLOSE)

    def _hand_out(self, lane: Lane) -> None:
        with self.lock:
            while lane.waiting and lane.running < lane.width:
                lane.running += 1
                self.jobs.put(lane.waiting.popleft())

    def _serve(self, worker: Worker | None) -> None:
        """A thread's life."""
        while (job := self.jobs.get()) is not None:
            if job.future.set_running_or_notify_cancel():
                worker = self._run(worker, job)
            with self.lock:
                job.lane.running -= 1
            self._hand_out(job.lane)
        self._let_go(worker)

    def _run(self, worker: Worker | None, job: Job) -> Worker | None:
        """Make the call; returns the worker that takes the next one, if it lives."""
        limit = job.limit
        try:
            if self.closed:
                raise Gone("the run has ended")
            if worker is None or not worker.is_alive():
                self._let_go(worker)
                worker = None
                worker = self._started()
            job.future.set_result(worker.ask(job.order, limit.seconds if limit else None))
            return worker
        except Late:
            words = f"raised TimeoutError ({limit.exceeded if limit else 'no result'}) on"
        except Gone as gone:
            words = f"ended its process ({gone}) on"
        except Exception as error:  # no process can be started, or the reply cannot be read
            words = f"could not be called in a worker process ({in_words(error)}) on"
        self._let_go(worker)
        job.future.set_result(Reply([Missing(words, ADVICE)] * job.order.count))
        return None

    def _let_go(self, worker: Worker | None) -> None:
        if worker:
            with self.lock:
                self.workers.discard(worker)
            worker.end()

    def _started(self) -> Worker:
        worker = Worker(self.setup, self.printed)
        with self.lock:
            self.workers.add(worker)
            closed = self.closed
        fault = next((told for name, told in worker.faults.items() if told and not self.faults[name]), "")
        if closed or fault:
            self._let_go(worker)
            raise Gone(f"importing it raised {fault}" if fault else "the run has ended")
        return worker


def way_workers(pool: Pool, limit: Limit | None, width: int, callee: Callee) -> Start:
    """limit: of one call, None for none. width: calls of this reward at the same time."""
    return partial(_start, pool, limit, Lane(width), callee)


def _start(pool: Pool, limit: Limit | None, lane: Lane, callee: Callee, samples: Samples) -> Finish:
    # What is logged elsewhere comes back with the replies.
    apart = replace(samples, logged=Logged())
    under_way = []
    for call in callee.calls(apart):
        places = [samples.places[member] for member in call.members]
        drawn_by = f"{callee.name} {samples.state.global_step} {places} {call.where}"
        seed = zlib.crc32(drawn_by.encode(errors="replace"))
        try:
            arguments = pickle.dumps((apart.logged, call.arguments), pickle.HIGHEST_PROTOCOL)
        except WHAT_USER_CODE_RAISES as error:
            future: Future[Reply] = Future()
            future.set_result(Reply([_not_sent(error)] * len(call.members)))
        else:
            future = pool.submit(lane, Order(callee.name, callee.fits, len(call.members), arguments, seed), limit)
        under_way.append((call.members, future))
    return Finish(partial(_finish, samples, under_way), partial(_cancel, under_way))


def _finish(samples: Samples, under_way: list[tuple[Any, Future[Reply]]]) -> Iterator[Outcome]:
    for members, future in under_way:
        reply = future.result()
        samples.logged.add(reply.logged)
        yield members, reply.scores


def _cancel(under_way: list[tuple[Any, Future[Reply]]]) -> None:
    for _, future in under_way:
        future.cancel()


def _not_sent(error: BaseException) -> Missing:
    return Missing(
        f"could not be sent to a worker process ({in_words(error)}) with",
        "Say @reward(workers=0) above it: then it is called in the run's own process.",
    )


def sources_of(functions: list[Callable]) -> dict[str, tuple[str, str]]:
    """The modules of these functions that are no package's, and what lies beside them: {name: (file, text)}."""
    names = {getattr(each, "__module__", None) for function in functions for each in _inside(function)}
    files = {name: _file_of(name) for name in list(sys.modules) if "." not in name}
    folders = {file.parent for name, file in files.items() if file and name in names}
    found = {}
    for name, file in files.items():
        if file and (name in names or file.parent in folders):
            with suppress(OSError, ValueError):
                found[name] = (str(file), file.read_text(encoding="utf-8"))
    return found


def _inside(function: Any) -> list[Any]:
    return [function, getattr(function, "func", None), type(function), getattr(function, "__wrapped__", None)]


def _file_of(module: str) -> Path | None:
    """The Python file of a module that is no package; None for all else."""
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if not isinstance(file, str) or not file.endswith(".py") or hasattr(loaded, "__path__") or module == "__main__":
        return None
    is_installed = "site-packages" in Path(file).parts or Path(file).parent == Path(os.__file__).parent
    return None if is_installed else Path(file)


def memory_of_one() -> int:
    """Bytes that a worker may have: a quarter of the machine's memory, or of what a container gives."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no such file, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(_LEAST_MEMORY, total // 4)


def _now() -> float:
    return time.monotonic()
