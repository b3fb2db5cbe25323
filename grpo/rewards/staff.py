"""Staff: which rewards are called in worker processes, and how many of those there are. Decided before the first step;
but one that took too long in the run's own process is called in workers from the next scoring on, where that is not
ruled out: the next time it might hold the interpreter in C, which ends the run.

Knows nothing of how a process is spoken to. Async rewards stay: they wait, and share one event loop. So do those that a
worker could not find or be sent what they ask for, those that say so (`@reward(workers=0)`), and, where nobody asks for
workers, fast ones: to send a call elsewhere takes longer than they do.

Those that have workers, and async ones, are called on a group as soon as it is finished, while others are sampled
(grpo/rewards/scoring.py).
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from grpo.errors import WHAT_USER_CODE_RAISES, UserError, in_words
from grpo.rewards.scoring import Reward
from grpo.rewards.worker import Setup
from grpo.rewards.workers import Pool, memory_of_one, portable, sources_of, way_workers
from grpo.system import HAS_FORK

HERE, WORKERS = "here", "elsewhere"
NOT_KNOWN: Mapping[str, str] = {}
SLOW = 0.5  # seconds of a step that a reward takes, from which on it is called elsewhere
_FEWEST, _MOST = 2, 8  # workers, where nobody says how many: many rewards wait more than they compute
_LARGEST = 1 << 20  # bytes of a function that is moved unasked: a larger one holds a model


class Staff(list[Reward]):
    """The rewards, in whose place others may be that are the same, but called elsewhere.

    placed  {reward: where it is called}, for a checkpoint
    """

    def __init__(self, rewards: list[Reward], engaged: Callable[[Reward], Reward]):
        super().__init__(rewards)
        self.placed = placed(rewards)
        self._engaged = engaged

    def move(self, late: set[str]) -> None:
        """Give workers to rewards that took too long, between two scorings; each is looked at once."""
        for name in late:
            at = [reward.name for reward in self].index(name)
            self[at] = self._engaged(self[at])
            self.placed |= placed(self)
        late.clear()


@contextmanager
def staffed(
    rewards: list[Reward],
    asked: int,
    completions: int,
    log: Path | None,
    note: Callable[[str], object],
    before: Mapping[str, str] = NOT_KNOWN,
) -> Iterator[Staff]:
    """Inside, the rewards, with workers for those that get some.

    asked: --reward-workers. completions: of a step. log: what rewards print in workers. note: is told who is called
    where. before: where a resumed run called them, which it goes on to do unless something else is asked for: what is
    measured is never twice the same.
    """
    uses_gpu = _gpu_is_in_use()  # by the task: the policy comes later
    functions = _to_move(rewards, asked, completions, note, before)
    with ExitStack() as pools:
        at_work = _engaged(pools, rewards, functions, asked, log, note) if functions else rewards
        yield Staff(at_work, partial(_after_a_late_call, pools, asked, log, note, uses_gpu))


def _engaged(
    pools: ExitStack,
    rewards: list[Reward],
    functions: dict[str, bytes],
    asked: int,
    log: Path | None,
    note: Callable[[str], object],
) -> list[Reward]:
    """The rewards, those with a function in workers."""
    moved = [reward for reward in rewards if reward.name in functions]
    sources = sources_of([reward.callee.function for reward in moved])
    setup = Setup(functions, sources, os.getcwd(), memory_of_one(), os.getpid())
    pool = Pool(_size(moved, asked), setup, log and log.absolute())
    pools.callback(pool.close)
    return [_with_workers(reward, pool, note) if reward in moved else reward for reward in rewards]


def _after_a_late_call(
    pools: ExitStack,
    asked: int,
    log: Path | None,
    note: Callable[[str], object],
    uses_gpu: bool,
    reward: Reward,
) -> Reward:
    """The reward in workers, where that is not ruled out."""
    if reward.elsewhere or asked == 0 or reward.options.workers == 0 or not HAS_FORK:
        return reward
    try:
        functions = {reward.name: _sent(reward, unasked=True, uses_gpu=uses_gpu)}
        return _engaged(pools, [reward], functions, asked, log, note)[0]
    except (ValueError, UserError) as fault:
        told = str(fault).rstrip(".")
        note(f"note: reward `{reward.name}` took too long, and is still called in the run's own process: {told}.")
        return reward


def _to_move(
    rewards: list[Reward], asked: int, completions: int, note: Callable[[str], object], before: Mapping[str, str]
) -> dict[str, bytes]:
    """The functions to be called in workers, pickled; `note` is told why others are not where one might expect it."""
    functions = {}
    if not HAS_FORK:  # what is open cannot be given to another process, nor be taken from it by its end
        if asked > 0:
            note("note: rewards are called in the run's own process: this system has no way to hand them to others.")
        return functions
    for reward in rewards:
        if not _wants(reward, asked, completions, before.get(reward.name)):
            continue
        try:
            unasked = asked < 0 and not reward.options.workers
            functions[reward.name] = _sent(reward, unasked, _gpu_is_in_use())
        except ValueError as fault:
            note(f"note: reward `{reward.name}` is called in the run's own process: {fault}.")
    return functions


def _wants(reward: Reward, asked: int, completions: int, before: str | None) -> bool:
    if reward.elsewhere or asked == 0 or reward.options.workers == 0:  # an async one is in the event loop
        return False
    if asked > 0 or reward.options.workers:
        return True
    return before == WORKERS if before else reward.pace.of_a_completion() * completions > SLOW


def placed(rewards: list[Reward]) -> dict[str, str]:
    """Where they are called, for a checkpoint."""
    return {reward.name: WORKERS if reward.elsewhere else HERE for reward in rewards}


def _sent(reward: Reward, unasked: bool, uses_gpu: bool) -> bytes:
    """The reward's function as workers are given it.

    Raises:
        ValueError: it cannot be, or, where nobody has asked for it, had better not.
    """
    function = portable(reward.callee.function)
    _try_to_send(reward)
    if unasked:
        _check_light(function, uses_gpu)
    return function


def _gpu_is_in_use() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda.is_initialized())


def _try_to_send(reward: Reward) -> None:
    """Pickle what it is called with.

    Raises:
        ValueError: that cannot be.
    """
    for call in reward.callee.calls(reward.probe) if reward.probe else ():
        for name, value in call.arguments.items():
            try:
                pickle.dumps(value)
            except WHAT_USER_CODE_RAISES as error:
                raise ValueError(f"its argument `{name}` cannot be sent to another: {in_words(error)}") from error


def _check_light(function: bytes, uses_gpu: bool) -> None:
    """Whether a slow reward may be moved that nobody has asked to move.

    Raises:
        ValueError: something speaks against it.
    """
    if len(function) > _LARGEST:
        raise ValueError(
            f"it holds {len(function) / 2**20:.0f} MiB, which each worker would hold too (--reward-workers N moves it)"
        )
    if uses_gpu:
        raise ValueError(
            "the task uses the GPU, of which each worker would take some memory (--reward-workers N moves it)"
        )


def _size(moved: list[Reward], asked: int) -> int:
    wanted = max(reward.options.workers or 0 for reward in moved)
    return asked if asked > 0 else max(wanted, _FEWEST, min(_MOST, num_cores() - 1))


def num_cores() -> int:
    """Cores that this process may use."""
    with suppress(AttributeError):  # macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _with_workers(reward: Reward, pool: Pool, note: Callable[[str], object]) -> Reward:
    """The reward in workers, if they have found it."""
    if fault := pool.faults[reward.name]:
        note(f"note: reward `{reward.name}` is called in the run's own process: a worker that imports it gets {fault}.")
        return reward
    width = min(reward.options.workers or pool.size, pool.size)
    note(f"reward `{reward.name}` is called in {width} worker process{'es' * (width > 1)}")
    return reward.called(partial(way_workers, pool, reward.limit, width))
