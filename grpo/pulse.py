"""Pulse: tells the other ranks that this one lives, and ends this one when another has gone.
Knows nothing of what ranks do.

Who waits for a rank that is gone waits for ever: in C, on a GPU, where no exception comes. So each rank has a child, a
fork of it from before there was a GPU or a thread, that looks every BEAT seconds:

    is my rank there, and not stopped?   then it says so in the store that all ranks meet at; if it is gone, that
    is its launcher there?               one that was killed leaves its ranks behind, which would go on for nobody: its
                                         torchrun cannot start them again, and that of another host waits for it
    has any rank ended?                  then its own is rung: SIGNAL raises RankLost there, with the sentence of the
                                         rank that ended first, so that rank 0 saves and all end; after GRACE it is
                                         killed
    what is my rank at?                  where that is another thing than before it says so too, for those who wait
    is any rank silent?                  one that said nothing for SILENCE seconds (it is stopped, or its network is
                                         cut) has ended, and so has one that did not even begin to: all ranks had met
                                         just before (grpo/meeting.py)

A rank that had to be killed has its sentence written by the child. A store that does not answer means that this host
is cut off. While this process itself is late or stopped (Ctrl-Z of all) nobody is called silent.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

from grpo.errors import Stopped, UserError, in_words

BEAT = 0.5  # seconds
SILENCE = 20.0  # seconds
GRACE = 25.0  # seconds that a rank gets to save and end: torchrun gives its processes 30
HURRY = 15.0  # seconds that a step gets to finish once the launcher has asked to stop
CUT_OFF = 20.0  # seconds without an answer of the store

# Keys of the store, for ranks. Each sets its host before its first beat (grpo/meeting.py).
ENDED, BEATS, HOST, HEARD, DOES = "ended", "beat/{}", "host/{}", "heard/{}", "does/{}"

# Of the real-time signals that of the watchdog is the last but one; where there are none (macOS), the first for users.
SIGNAL = signal.SIGRTMAX - 2 if hasattr(signal, "SIGRTMAX") else getattr(signal, "SIGUSR1", 0)

_SIZE, _HEAD = 1 << 16, struct.Struct("dII")  # when to stop at the latest (monotonic; 0: no), by which signal, bytes
_TEXT = 60_000  # bytes of a sentence at most
_DOING, _AT = struct.Struct("?I"), _HEAD.size + _TEXT  # whether it waits, and the bytes of what it does; where that is
_MOST_DOING = 1000  # bytes of it

Store = Any  # torch.distributed's; typed by torch as a class of C
Connect = Callable[[], Store]


class RankLost(UserError):
    """Another rank has ended."""


class Pulse:
    """The child of this process, and what the two tell each other."""

    def __init__(self, rank: int, size: int, connect: Connect, keeps_store: bool = False, launcher: int = 0):
        """connect: makes a connection to the store; called in the child. keeps_store: it is this process's. launcher:
        the process that has started this one and stays as long; 0: not known."""
        self.rank, self.size = rank, size
        self.shared = mmap.mmap(-1, _SIZE)
        self.does("at its start")
        self.lost = ""
        self.before = signal.signal(SIGNAL, self._ring)
        parent = os.getpid()
        self.child = os.fork()
        if self.child == 0:
            _live(_Watch(parent, rank, size, self.shared, launcher), connect, keeps_store)

    def check(self) -> None:
        """Raises RankLost where another rank has ended, or Stopped where it is time to."""
        if self.lost:
            raise RankLost(self.lost)

    def hurry(self, number: int) -> None:
        """Raise Stopped, by that signal, in a while, if this has not ended by then."""
        struct.pack_into("dI", self.shared, 0, time.monotonic() + HURRY, number)

    def does(self, what: str) -> None:
        """What this rank does from now on, as in "reading rows": others are told who wait for it long."""
        encoded = what.encode(errors="replace")[:_MOST_DOING]
        self.shared[_AT + _DOING.size : _AT + _DOING.size + len(encoded)] = encoded
        _DOING.pack_into(self.shared, _AT, False, len(encoded))

    def waits(self, it_does: bool) -> None:
        """Whether this rank waits for others, in the middle of what it does."""
        self.shared[_AT] = it_does

    def others_do(self, store: Store) -> dict[int, str]:
        """What each other rank does, as it last said; empty where it waits, as this one does."""
        others = [rank for rank in range(self.size) if rank != self.rank and store.check([DOES.format(rank)])]
        return {rank: store.get(DOES.format(rank)).decode() for rank in others}

    def ignore(self) -> None:
        """From now on nothing that others do interrupts this rank."""
        signal.signal(SIGNAL, signal.SIG_IGN)

    def close(self) -> None:
        """End the child."""
        if self.child:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
            self.child = 0
        signal.signal(SIGNAL, self.before)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        _, asked, length = _HEAD.unpack_from(self.shared)
        if not length:
            raise Stopped(asked)
        if not self.lost:
            self.lost = self.shared[_HEAD.size : _HEAD.size + length].decode(errors="replace")
            raise RankLost(self.lost)


def tell_the_end(store: Store, rank: int, sentence: str) -> str:
    """Let all ranks know that this one ends, and why; what they know already, where an end was told before that."""
    host = store.get(HOST.format(rank)).decode() if store.check([HOST.format(rank)]) else "of unknown host"
    mine = json.dumps({"rank": rank, "host": host, "sentence": sentence[: _TEXT // 4]})
    first = store.compare_set(ENDED, "", mine).decode()
    return "" if first == mine else heard_by(rank, json.loads(first))


def heard_by(rank: int, told: Mapping[str, Any]) -> str:
    """The sentence about an end, for this rank; empty where it is its own to tell."""
    if told["rank"] != rank:
        return f"Rank {told['rank']} ({told['host']}) has ended the run: {told['sentence']}"
    if told["sentence"] == SILENT:
        return f"The other ranks have ended the run: nothing was heard of rank {rank} for a while."
    return f"Rank {rank} ({told['host']}) ends: {_ORPHANED}" if told["sentence"] == _ORPHANED else ""


def sentence_of(error: BaseException) -> str:
    """What others are told of how a process ends."""
    if isinstance(error, Stopped):
        return STOPPED_BY.format(error.number)
    if isinstance(error, KeyboardInterrupt):
        return "It was stopped at once."
    return str(error) if isinstance(error, UserError) else f"It failed with {in_words(error)}."


def stopped_by(sentence: str) -> int:
    """The signal that has stopped the rank that a RankLost tells of; 0: it ended otherwise."""
    found = re.search(STOPPED_BY.format(r"(\d+)") + "$", sentence)
    return int(found[1]) if found else 0


def only_others_can_say(sentence: str) -> bool:
    """Whether rank 0 cannot have told the user of the end that a RankLost tells of."""
    is_gone = sentence.startswith("Rank 0 (") and sentence.endswith((_WITHOUT_A_WORD, SILENT))
    return is_gone or sentence.endswith(_NO_ANSWER)


# ---- the child


def _live(watch: _Watch, connect: Connect, keeps_store: bool) -> None:
    """Never returns. A thread talks to the store, which may never answer; this one sees whether it does."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, SIGNAL):
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):  # 2>&-
            watch.terminal = os.dup(2)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(null, 2)  # torch writes a trace where a store goes away
        talk = threading.Thread(target=watch.talk, args=(connect,), daemon=True)
        talk.start()
        while os.getppid() == watch.parent:
            late = time.monotonic() - watch.answered > CUT_OFF
            if (late or not talk.is_alive()) and not watch.rung_at:
                watch.ring(f"Rank {watch.rank} ({socket.gethostname()}) is cut off from the others: {_NO_ANSWER}")
            watch.end_what_does_not_end()
            time.sleep(BEAT)
        os.close(watch.terminal)  # somebody may read it to its end
        if not keeps_store:  # else it is gone too, and those who see that wait for our copies of its connections
            talk.join(CUT_OFF)
    finally:
        os._exit(1)


class _Watch:
    """What the child knows."""

    def __init__(self, parent: int, rank: int, size: int, shared: mmap.mmap, launcher: int = 0):
        self.parent, self.rank, self.shared, self.launcher = parent, rank, shared, launcher
        self.others = [other for other in range(size) if other != rank]
        self.answered = time.monotonic()
        self.beats: dict[int, tuple[bytes, float]] = dict.fromkeys(self.others, (b"", self.answered))
        self.rung_at = 0.0  # when the rank began to end
        self.text = ""  # the sentence that it was rung with
        self.told: str | None = None  # what the store has of what it does
        self.terminal = 2

    def talk(self, connect: Connect) -> None:
        """With the store, until the rank is gone or the store is."""
        with suppress(Exception):
            store = connect()
            while os.getppid() == self.parent:
                now = time.monotonic()
                was_away, self.answered = now - self.answered > 5 * BEAT, now
                if not _is_stopped(self.parent):
                    store.add(BEATS.format(self.rank), 1)
                if (does := self._does()) != self.told:
                    self.told = does
                    store.set(DOES.format(self.rank), does)
                if self.launcher and _state(self.parent)[1] not in (self.launcher, 0):
                    tell_the_end(store, self.rank, _ORPHANED)
                self._hear(store, now, was_away)
                self._look_at_the_end(store, now)
                time.sleep(BEAT)
            tell_the_end(store, self.rank, _WITHOUT_A_WORD)

    def ring(self, text: str) -> None:
        """Let the rank end with this sentence."""
        self.rung_at, self.text = time.monotonic(), text
        encoded = text.encode(errors="replace")[:_TEXT]
        self.shared[_HEAD.size : _HEAD.size + len(encoded)] = encoded
        _HEAD.pack_into(self.shared, 0, 0.0, 0, len(encoded))
        with suppress(ProcessLookupError):
            os.kill(self.parent, SIGNAL)

    def end_what_does_not_end(self) -> None:
        """It waits for another in C, or on a GPU."""
        if self.rung_at and time.monotonic() > self.rung_at + GRACE:
            with suppress(ProcessLookupError):
                os.kill(self.parent, signal.SIGKILL)
                if self.text:  # else it has told the reason itself, and a word after that would be taken for another
                    self._say(f"{self.text} Rank {self.rank} did not come to its end in {GRACE:g} s, and was killed.")
            self.rung_at = math.inf

    def _does(self) -> str:
        """Empty: it waits."""
        waits, length = _DOING.unpack_from(self.shared, _AT)
        begin = _AT + _DOING.size
        return "" if waits else self.shared[begin : begin + length].decode(errors="replace")

    def _say(self, sentence: str) -> None:
        shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in sentence.strip())
        with suppress(OSError):  # nobody may be there to read it
            os.write(self.terminal, f"\nerror: {shown}\n".encode(errors="replace"))

    def _hear(self, store: Store, now: float, was_away: bool) -> None:
        """The beats of the others. was_away: we were late or stopped ourselves, and count from now."""
        there = [other for other in self.others if store.check([BEATS.format(other)])]
        told = store.multi_get([BEATS.format(other) for other in there]) if there else []
        beats = dict.fromkeys(self.others, b"") | dict(zip(there, told, strict=True))
        for other, beat in beats.items():
            before, since = self.beats[other]
            self.beats[other] = (beat, now if was_away or beat != before else since)
            if now - self.beats[other][1] > SILENCE:
                tell_the_end(store, other, SILENT)

    def _look_at_the_end(self, store: Store, now: float) -> None:
        deadline, _, _ = _HEAD.unpack_from(self.shared)
        if self.rung_at:
            return
        if store.check([ENDED]):
            if sentence := heard_by(self.rank, json.loads(store.get(ENDED))):
                self.ring(sentence)
            self.rung_at = now
            store.set(HEARD.format(self.rank), "")
        elif deadline and now > deadline:
            struct.pack_into("d", self.shared, 0, 0.0)
            with suppress(ProcessLookupError):
                os.kill(self.parent, SIGNAL)


STOPPED_BY = "It was stopped by signal {}."
_ORPHANED = "The launcher that has started it (torchrun) was killed or crashed: start it again on all hosts."
_WITHOUT_A_WORD = (
    "It ended without a word: it crashed, or was killed from outside, as the system does when memory runs out."
)
SILENT = (
    f"Nothing was heard of it for {SILENCE:g} s: its process is stopped, or was killed as it started, or its host or "
    "network is down."
)
_NO_ANSWER = "the store that all ranks meet at does not answer. Its host, its launcher or the network is down."


def _is_stopped(process: int) -> bool:
    """By a signal, or by a debugger. Where the system does not say it (macOS), it is not."""
    return _state(process)[0] in (b"T", b"t")


def _state(process: int) -> tuple[bytes, int]:
    """What it does, as a letter, and its parent; neither where the system does not say it (macOS)."""
    with suppress(OSError), open(f"/proc/{process}/stat", "rb") as file:
        letter, parent = file.read().rpartition(b")")[2].split()[:2]
        return letter, int(parent)
    return b"", 0
