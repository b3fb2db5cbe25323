"""Ranks: the World of several processes, over torch.distributed. Knows nothing of runs.

    joined(place, tell) inside, this process is one of a world; how it ends is told to all others
    Ranks.gather        pickles, by gloo
    Ranks.collect       bytes of all ranks, likewise
    Ranks.sum_gradients one flat all-reduce, by NCCL where the masters are on GPUs, by gloo else

The process groups are objects of our own beside torch's default group, which is left to others: vLLM makes it, of one
process, in each rank. Whoever waits looks at the pulse (grpo/pulse.py) meanwhile, so that a rank that is gone ends the
waiting. For one that lives it waits on, and says so (grpo/waiting.py). Before GPUs wait for each other the processes
have met: a rank that is gone by then is not waited for there.

What arrives is unpickled: like all of torch.distributed this is for hosts and networks that trust each other.
"""

from __future__ import annotations

import ctypes
import io
import pickle
import signal
import socket
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grpo import system
from grpo.errors import Stopped, ToldElsewhere, UserError, in_words
from grpo.launcher import Place
from grpo.meeting import connect, meet
from grpo.pulse import HEARD, Pulse, RankLost, Store, only_others_can_say, sentence_of, stopped_by, tell_the_end
from grpo.types import Completion
from grpo.waiting import Note, Waiting
from grpo.world import World

distributed: Any = torch.distributed  # its stores and process groups are classes of C, without types

NO_LIMIT = timedelta(days=30)  # of an exchange: who is gone the pulse knows
LONGEST_PAUSE = 0.005  # seconds between two looks at whether an exchange is over
BROKEN = 5.0  # seconds after which a broken connection has no better reason than itself


class Left:
    """What a rank gives that comes to no meeting any more."""


class Ranks(World):
    """One of several processes."""

    def __init__(self, place: Place, root: Store, store: Store, pulse: Pulse, note: Note):
        """root: the launcher's store, which outlives the processes; store: of these processes alone. note: is told of
        others that are waited for long."""
        self.rank, self.size = place.rank, place.size
        self.root, self.store, self.pulse = root, store, pulse
        self.waiting = Waiting(self.rank, self.size, store, pulse, note)
        prefixed = distributed.PrefixStore("gloo", store)
        self.group = self._made(lambda: distributed.ProcessGroupGloo(prefixed, self.rank, self.size, NO_LIMIT))
        self.gpu_group: Any = None  # made when there is something to sum on a GPU
        self.ready: Callable[[], None] = _nothing

    def gather(self, value: Any) -> list[Any]:
        """See World.gather.

        Raises:
            UserError: a rank has left, after help that it was asked for alone, say.
        """
        values = self._exchange(value)
        if left := [rank for rank, each in enumerate(values) if isinstance(each, Left)]:
            raise UserError(
                f"Ranks {', '.join(map(str, left))} have shown help, or what is wrong with a value of their command "
                "line, and ended. All processes need the same command."
            )
        return values

    def _exchange(self, value: Any) -> list[Any]:
        self.ready()
        content = torch.frombuffer(bytearray(_pickled(value)), dtype=torch.uint8)
        sizes = [int(size) for size in self._all(torch.tensor([len(content)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(content)] = content
        received = self._all(padded)
        return [pickle.loads(each[:size].numpy().tobytes()) for each, size in zip(received, sizes, strict=True)]

    def prepare(self, masters: Sequence[nn.Parameter]) -> None:
        """See World.prepare."""
        self.gather(None)
        self._reduce(torch.zeros(sum(master.numel() for master in masters), device=masters[0].device))

    def sum_gradients(self, masters: Sequence[nn.Parameter]) -> None:
        """See World.sum_gradients."""
        has_one = [
            any(of_master) for of_master in zip(*self.gather([m.grad is not None for m in masters]), strict=True)
        ]
        summed = [master for master, has in zip(masters, has_one, strict=True) if has]
        for master in summed:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad
        gradients = [master.grad for master in summed if master.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def share(self, costs: Sequence[float]) -> list[int]:
        """See World.share."""
        return super().share(costs) or [0]

    def require_same(self, value: Callable[[], object], told: Callable[[list[int]], str]) -> None:
        """See World.require_same."""
        values = self.gather(value())
        if others := [rank for rank, other in enumerate(values) if other != values[0]]:
            raise UserError(told(others))

    def collect(self, part: Tensor, whole: Tensor) -> Callable[[], None]:
        """See World.collect. `largest` is called before it, so that on GPUs nobody waits for who is gone."""
        work = self._group_for(part)._allgather_base(whole, part)  # by NCCL on a stream of its own
        return work.wait if part.is_cuda else partial(self._finish, work)

    def largest(self, number: int) -> int:
        """See World.largest."""
        return max(int(each) for each in self._all(torch.tensor([number])))

    def before_meeting(self, ready: Callable[[], None]) -> None:
        """See World.before_meeting."""
        self.ready = ready

    def remember(self, name: str, value: str) -> None:
        """See World.remember."""
        with self._explained():
            self.root.set(f"grpo/{name}", value)

    def recall(self, name: str) -> str:
        """See World.recall."""
        with self._explained():
            return self.root.get(f"grpo/{name}").decode() if self.root.check([f"grpo/{name}"]) else ""

    def does(self, what: str) -> None:
        """See World.does."""
        self.pulse.does(what)

    def hurry(self, number: int) -> None:
        """See World.hurry."""
        self.pulse.hurry(number)

    def leave(self) -> None:
        """All went well: wait for all, so that nobody takes an end for a loss. Twice, so that nobody listens any more
        when the first one goes. One that is killed in between takes nothing along: all is done."""
        self._exchange(Left())
        self.pulse.ignore()
        with suppress(RankLost):
            self._exchange(Left())
        self.pulse.close()
        if self.gpu_group is not None:
            self.gpu_group.shutdown()

    def abandon(self) -> None:
        """Never take the process group down: that would wait for exchanges with ranks that do not answer any more."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))

    def tell(self, error: BaseException, by_agent: bool) -> str:
        """Tell the others how this one ends; what another has told before that, empty where this is the first end."""
        before = ""
        with suppress(RuntimeError):  # the store is gone, and the others know that as well
            self.root.set_timeout(timedelta(seconds=BROKEN))
            before = tell_the_end(self.store, self.rank, sentence_of(error))
            if not by_agent and self.rank == 0:  # the store goes with us
                self.store.wait([HEARD.format(rank) for rank in range(1, self.size)], timedelta(seconds=BROKEN))
        return before

    def _reduce(self, flat: Tensor) -> None:
        """Add it up over all ranks, which have met."""
        self._finish(self._group_for(flat).allreduce([flat]))

    def _all(self, mine: Tensor) -> list[Tensor]:
        received = [torch.empty_like(mine) for _ in range(self.size)]
        self._finish(self.group.allgather([received], [mine]))
        return received

    def _group_for(self, tensor: Tensor) -> Any:
        if tensor.device.type != "cuda":
            return self.group
        if self.gpu_group is None:
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = timedelta(hours=1)
            prefixed = distributed.PrefixStore("nccl", self.store)
            self.gpu_group = distributed.ProcessGroupNCCL(prefixed, self.rank, self.size, options)
        return self.gpu_group

    def _made(self, build: Callable[[], Any]) -> Any:
        """What is built together with all others, as long as they are there: torch waits for them in C."""
        built: Future[Any] = Future()

        def work() -> None:
            try:
                built.set_result(build())
            except Exception as error:
                built.set_exception(error)

        threading.Thread(target=work, daemon=True).start()  # where one is gone it is never done
        with self._explained():
            while not built.done():
                self.pulse.check()
                time.sleep(LONGEST_PAUSE)
            return built.result()

    def _finish(self, work: Any) -> None:
        """Wait for an exchange, as long as all others are there."""
        pause = 1e-5
        self.waiting.begin()
        try:
            with self._explained():
                while not work.is_completed():
                    self.pulse.check()
                    self.waiting.look()
                    time.sleep(pause)
                    pause = min(LONGEST_PAUSE, 1.2 * pause)
                work.wait()
        except BaseException:
            if self.gpu_group is not None:  # what waits on the GPU would keep it from everything that follows
                self.gpu_group.abort()
            raise
        finally:
            self.waiting.end()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Inside, a connection that breaks is told as what it is: a rank is gone, and the pulse will soon know why."""
        try:
            yield
        except RuntimeError as error:
            end = time.monotonic() + BROKEN
            while time.monotonic() < end:
                self.pulse.check()
                time.sleep(LONGEST_PAUSE)
            raise RankLost(f"The connection between the ranks broke: {in_words(error)}.") from error


def _nothing() -> None:
    return None


@contextmanager
def joined(place: Place, tell: Note) -> Iterator[Ranks]:
    """Inside, this process is one of a world. tell: is told of others that are waited for long.

    Raises:
        UserError: the others did not come, or one of them has ended.
        ToldElsewhere: instead of that, where this is not the rank to say so.
        Stopped: likewise, where a signal has stopped one of them at once.
    """
    world = join(place, tell)
    try:
        yield world
        world.leave()
    except SystemExit:  # after --help, on all of them
        world.leave()
        raise
    except BaseException as error:  # the pulse stays: should this process not come to its end, it is ended
        world.pulse.ignore()
        for number in system.signals("SIGINT", "SIGTERM", "SIGHUP"):  # torchrun's, when one has ended; it would be told
            signal.signal(number, signal.SIG_IGN)
        before = "" if world.pulse.lost else world.tell(error, place.by_agent)  # of one that failed at the same time
        lost = world.pulse.lost or before  # what the error may not say any more: others have put it into their words
        is_same = bool(before) and before.endswith(sentence_of(error))  # as of prompts that differ, which all find
        world.abandon()
        if number := stopped_by(lost):  # no failure: all were asked to stop, whoever it was that said so first
            stopped = Stopped(number)
            for note in getattr(error, "__notes__", []) if isinstance(error, KeyboardInterrupt) else [str(error)]:
                stopped.add_note(note)
            raise stopped from error
        is_speaker = world.rank == 0 or (only_others_can_say(lost) and (world.rank == 1 or place.local_rank == 0))
        if lost and is_speaker and not is_same:
            raise as_told(lost, error) from error
        if lost and world.rank > 0:
            raise ToldElsewhere from error
        if isinstance(error, UserError) and world.rank > 0:
            raise UserError(f"Rank {world.rank} ({socket.gethostname()}): {error}") from error
        raise


def as_told(lost: str, error: BaseException) -> UserError:
    """Why another rank has ended the run, and what this one says of how to go on. Whatever that has interrupted here (a
    look at a server, a reward) may have put words of its own in front, or have come to another end."""
    _, found, rest = str(error).partition(lost)
    if found:
        return UserError(lost + rest)
    if isinstance(error, KeyboardInterrupt):  # torchrun stops all that are left when one has ended
        return UserError(" ".join([lost, *getattr(error, "__notes__", [])]))
    return UserError(f"{lost} Then this rank ended: {sentence_of(error)}")


def join(place: Place, note: Note) -> Ranks:
    """Meet the others, and miss them from now on.

    Raises:
        UserError: not all came, or one of them has ended.
    """
    root, members = meet(place)
    store = distributed.PrefixStore(members, root)
    keeps_store = place.rank == 0 and not place.by_agent

    def to_members() -> Store:
        return distributed.PrefixStore(members, connect(place, is_host=False))

    launcher = place.launcher if place.by_agent else 0
    pulse = Pulse(place.rank, place.size, to_members, keeps_store, launcher)
    return Ranks(place, root, store, pulse, note)


# ---- pickles


class _Pickler(pickle.Pickler):
    """Columns of numbers as bytes, which takes a tenth of the time; the numbers are the same to the bit."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Completion:
            tokens, logprobs = array("q", obj.tokens), array("d", obj.sampler_logprobs)
            rest = (obj.text, obj.finish, obj.policy_version, obj.seed, tuple(map(tuple, obj.others)))
            return _completion, (tokens.tobytes(), logprobs.tobytes(), *rest)
        if type(obj) is Tensor:
            return _tensor, (obj.tolist(), obj.dtype)
        return NotImplemented


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _completion(
    tokens: bytes, logprobs: bytes, text: str, finish: Any, version: int, seed: int, others: Any
) -> Completion:
    from grpo.types import Span

    columns = (array("q", tokens).tolist(), array("d", logprobs).tolist())
    return Completion(*columns, text, finish, version, seed, tuple(Span(*span) for span in others))


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()
