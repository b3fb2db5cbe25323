"""How a reward function is called: by the names of its arguments, decided once, from its signature.

Knows nothing of weights, groups or advantages. Axis: S completions scored together, flat, in group order.

    f(completion, answer) -> float | None               one completion; any data set column by its name
    f(prompts, completions, answer, **kwargs) -> list    all S of them, as TRL and Unsloth call theirs
    async def f(...)                                     either kind

A batch function is called with lists of S: `prompts`, `completions`, `completion_ids` and each column it
names (all columns if it takes **kwargs), and with TRL's `trainer_state` (None), `log_metric`, `log_extra`.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

from grpo.errors import UserError, in_words, nearest, user_code
from grpo.rewards.samples import OF_CHATS, OF_ONE_COMPLETION, OF_TEXTS, Samples, Source, column_source, where
from grpo.rewards.values import listed, shown
from grpo.watchdog import Limit, Watchdog, watchdog

Caller = Callable[[Samples], list[Any]]  # S values
AsyncCaller = Callable[[Samples], Awaitable[list[Any]]]
Finish = Callable[[], list[Any]]
Call = Callable[[str, Callable, dict[str, Any]], Any]  # what it is in words, a function and its arguments -> its result
AsyncLimit = Callable[[], AbstractAsyncContextManager[Any]]  # the time that one call may take
Start = Callable[[Samples], Finish]  # returns with async rewards under way; Finish waits for the values

_NAMES_A_BATCH = {"prompts", "completions", "completion_ids"}


def starter(
    name: str,
    function: Callable,
    columns: Iterable[str],
    chat: bool,
    probe: Samples | None,
    timeout: float | None,
) -> Start:
    """Decide how `function` is called, so that scoring has nothing left to decide.

    In a chat task a batch function gets TRL's chat form, `[[{"role": "assistant", "content": ...}], ...]`,
    unless calling it on `probe` shows that it wants strings.
    """
    parameters = _parameters(name, function)
    sources_of_columns: dict[str, Source] = {column: column_source(column) for column in columns}
    limit, start, call_each, call_batch = (_async_way if is_async(function) else _sync_way)(name, timeout)

    def start_with(call: Callable, form: dict[str, Source]) -> Start:
        sources = _choose_sources(name, parameters, sources_of_columns | form)
        return partial(start, partial(call, name, function, sources, limit))

    if "completion" in parameters:
        return start_with(call_each, OF_ONE_COMPLETION)
    _check_names_a_batch(name, parameters)
    start_batch = partial(start_with, call_batch)
    if not chat:
        return start_batch(OF_TEXTS)
    if probe is None:
        return start_batch(OF_CHATS)
    return start_batch(_form_that_works(start_batch, probe))


def is_async(function: Callable) -> bool:
    """An `async def`, or an object whose __call__ is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _parameters(name: str, function: Callable) -> dict[str, inspect.Parameter]:
    """What the function itself takes by name; what it does not name, but passes on, is named by what it wraps.

    Raises:
        UserError: its arguments cannot be read, or not be given by name.
    """
    wrapped = _wrapped(function)
    try:
        parameters = dict(inspect.signature(function, follow_wrapped=False).parameters)
    except (TypeError, ValueError) as error:
        if wrapped is not None:  # functools.cache makes objects of C, which have no signature
            return _parameters(name, wrapped)
        raise UserError(
            f"Reward `{name}` is {shown(function)}, whose arguments cannot be read. Wrap it in a function: "
            "`def my_reward(completion): ...`."
        ) from error
    unnamed = [key for key, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_ONLY]
    if unnamed:
        raise UserError(
            f"Reward `{name}` takes `{unnamed[0]}` by position only. Rewards are called by argument name: "
            "remove the `/` from its signature, or wrap it in a function."
        )
    bound = function.keywords if isinstance(function, partial) else {}  # what is bound already stays as it is
    named = {key: each for key, each in parameters.items() if each.kind is not each.VAR_POSITIONAL and key not in bound}
    passes_on = [key for key, each in named.items() if each.kind is each.VAR_KEYWORD]
    if passes_on and wrapped is not None:
        del named[passes_on[0]]
        return _parameters(name, wrapped) | named
    return named


def _wrapped(function: Any) -> Any:
    """What a decorator says that it wraps (functools.wraps), bound as the function is; None if it says nothing."""
    if inspect.ismethod(function):
        inner = getattr(function.__func__, "__wrapped__", None)
        return inner and MethodType(inner, function.__self__)
    if isinstance(function, partial):
        inner = getattr(function.func, "__wrapped__", None)
        return inner and partial(inner, *function.args, **function.keywords)
    of_object = getattr(function, "__call__", None)  # noqa: B004
    return getattr(function, "__wrapped__", None) or (_wrapped(of_object) if inspect.ismethod(of_object) else None)


def _check_names_a_batch(name: str, parameters: dict[str, inspect.Parameter]) -> None:
    takes_anything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if not takes_anything and not _NAMES_A_BATCH & parameters.keys():
        asked = ", ".join(parameters) or "nothing"
        raise UserError(
            f"Reward `{name}` asks for {asked}, and so never sees what it should score. Name an argument "
            "`completion` (one string; return a float) or `completions` (the batch; return a list of floats)."
        )


def _choose_sources(
    name: str, parameters: dict[str, inspect.Parameter], available: dict[str, Source]
) -> dict[str, Source]:
    named = {key: each for key, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    for key, parameter in named.items():
        if key not in available and parameter.default is parameter.empty:
            raise UserError(
                f"Reward `{name}` asks for `{key}`, and the data set has no such column.{nearest(key, available)} "
                f"It can ask for: {', '.join(available)}."
            )
    if len(named) < len(parameters):
        return available
    return {key: available[key] for key in named if key in available}


def _call_each(
    name: str, function: Callable, sources: dict[str, Source], begin: Callable[[], Call], samples: Samples
) -> list[Any]:
    call, values = begin(), []
    for index, arguments in enumerate(_rows(sources, samples)):
        scored = slice(index, index + 1)
        with _code_of_reward(name, samples, scored):
            values.append(call(_what(name, samples, scored), function, arguments))
    return values


def _call_batch(
    name: str, function: Callable, sources: dict[str, Source], begin: Callable[[], Call], samples: Samples
) -> list[Any]:
    def listing(**arguments: Any) -> list[Any]:  # a generator computes while it is listed
        return listed(name, function(**arguments), samples)

    call, arguments = begin(), {key: source(samples) for key, source in sources.items()}
    with _code_of_reward(name, samples, slice(None)):
        return call(_what(name, samples, slice(None)), listing, arguments)


async def _call_each_async(
    name: str, function: Callable, sources: dict[str, Source], limit: AsyncLimit, samples: Samples
) -> list[Any]:
    async def call_one(index: int, arguments: dict[str, Any]) -> Any:
        with _code_of_reward(name, samples, slice(index, index + 1)), _no_ctrl_c():
            async with limit():
                return await function(**arguments)

    rows = enumerate(_rows(sources, samples))
    return await asyncio.gather(*(call_one(index, arguments) for index, arguments in rows))


async def _call_batch_async(
    name: str, function: Callable, sources: dict[str, Source], limit: AsyncLimit, samples: Samples
) -> list[Any]:
    with _code_of_reward(name, samples, slice(None)), _no_ctrl_c():
        async with limit():
            returned = await function(**{key: source(samples) for key, source in sources.items()})
            return listed(name, returned, samples)


def _rows(sources: dict[str, Source], samples: Samples) -> Iterator[dict[str, Any]]:
    columns = [source(samples) for source in sources.values()]
    return (dict(zip(sources, row, strict=True)) for row in zip(*columns, strict=True))


@contextmanager
def _code_of_reward(name: str, samples: Samples, scored: slice) -> Iterator[None]:
    """Inside runs a reward: what it raises is told, and a copy of the process that it has forked ends here."""
    process = os.getpid()
    with user_code(partial(_told, name, samples, scored)):
        try:
            yield
        finally:
            if os.getpid() != process:
                _end_copy()


def _told(name: str, samples: Samples, scored: slice, raised: str) -> str:
    return (
        f"Reward `{name}` raised {raised} on {where(samples, scored)}. A crash or a time-out is never scored 0: "
        "mend the reward, or let it return None where it does not apply."
    )


def _end_copy() -> None:
    """A second process must not go on with the run, nor clean up what is the first one's."""
    error = sys.exception()
    if error is not None and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    os._exit(1 if error else 0)


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """In the event loop's thread a KeyboardInterrupt is no Ctrl-C, and would end the loop."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise RuntimeError(in_words(error)) from error


def _limit(timeout: float) -> Limit:
    remedy = "A time-out is never scored 0: mend the reward, or give it more time."
    return Limit(timeout, "the --reward-timeout", remedy)


def _what(name: str, samples: Samples, scored: slice) -> str:
    return f"reward `{name}` on {where(samples, scored)}"


# ---- plain rewards


def _start_sync(call: Caller, samples: Samples) -> Finish:
    return partial(call, samples)


def _sync_way(name: str, timeout: float | None) -> tuple[Callable[[], Call], Any, Any, Any]:
    if timeout is None:
        return lambda: _call_unwatched, _start_sync, _call_each, _call_batch
    _living_watchdog()  # that it cannot be had is told before the run
    limit = _limit(timeout)
    return lambda: partial(_living_watchdog().call, limit), _start_sync, _call_each, _call_batch


def _call_unwatched(what: str, function: Callable, arguments: dict[str, Any]) -> Any:
    return function(**arguments)


def _living_watchdog() -> Watchdog:
    try:
        return watchdog()
    except OSError as error:
        raise UserError(
            f"The process that watches how long rewards take cannot be started: {error}. Leave it room, or set no "
            "limit with --reward-timeout 0."
        ) from error


# ---- async rewards, all in one event loop

_LOOK = 0.5  # seconds between two looks at whether the loop still runs
_PATIENCE = 2.0  # seconds that the loop gets to stop a late call by itself, which tells its row


def _async_way(name: str, timeout: float | None) -> tuple[AsyncLimit, Any, Any, Any]:
    if timeout is None:
        return nullcontext, partial(_start_async, partial(_result, name)), _call_each_async, _call_batch_async
    _living_watchdog()
    limit, deadlines = _limit(timeout), {}
    finish = partial(_result_in_time, name, limit, deadlines)
    return partial(_deadline, limit, deadlines), partial(_start_async, finish), _call_each_async, _call_batch_async


def _start_async(finish: Callable[[Samples, Future[Any]], Any], call: AsyncCaller, samples: Samples) -> Finish:
    async def run() -> list[Any]:
        return await call(samples)

    return partial(finish, samples, asyncio.run_coroutine_threadsafe(run(), _living_loop()))


@asynccontextmanager
async def _deadline(limit: Limit, deadlines: dict[object, float]) -> AsyncIterator[None]:
    """A time limit that also a call keeps which blocks the loop; `deadlines` has those of the calls under way."""
    call = object()
    deadlines[call] = time.monotonic() + limit.seconds
    try:
        async with asyncio.timeout(limit.seconds) as timer:
            yield
    except TimeoutError as error:
        raise TimeoutError(limit.exceeded if timer.expired() else str(error)) from error
    finally:
        deadline = deadlines.pop(call)
    if time.monotonic() > deadline:  # it never gave the loop a chance to stop it
        raise TimeoutError(limit.exceeded)


def _result(name: str, samples: Samples, future: Future[list[Any]]) -> list[Any]:
    """The result; an error if a reward has stopped the loop."""
    while not wait([future], _LOOK).done:
        _check_loop_runs(name)
    with user_code(partial(_told, name, samples, slice(None))):  # a reward may cancel the tasks of all
        return future.result()


def _result_in_time(
    name: str, limit: Limit, deadlines: dict[object, float], samples: Samples, future: Future[list[Any]]
) -> list[Any]:
    """The result; an error if a call has blocked the loop, which nobody can interrupt, for more than its time.

    What holds the interpreter too does not let us look, and is ended by the watchdog.
    """
    dog, patience = _living_watchdog(), min(_PATIENCE, limit.seconds)
    watch = dog.show(None, limit, _what(name, samples, slice(None)))
    began = time.monotonic()
    try:
        while not wait([future], min(_LOOK, limit.seconds)).done:
            _check_loop_runs(name)
            dog.beat(watch)
            if any(time.monotonic() > max(began, deadline) + patience for deadline in list(deadlines.values())):
                raise UserError(
                    f"Reward `{name}` gave {limit.exceeded}, and the event loop of all async rewards is blocked. "
                    "A time-out is never scored 0: let them `await` what they wait for, or write them with `def`."
                )
    finally:
        dog.hide(watch)
    return _result(name, samples, future)


_loops: list[asyncio.AbstractEventLoop] = []  # the last one runs
_unfinished: list[asyncio.Task[Any]] = []  # in loops that were stopped; kept, because thrown away they would complain


def _living_loop() -> asyncio.AbstractEventLoop:
    # One loop for all async rewards and steps, so that a client which a reward keeps stays usable. On its own
    # thread, so that they run while other rewards compute, and inside a notebook's running loop too.
    if not _loop_runs():
        loop, runs = asyncio.new_event_loop(), threading.Event()
        loop.call_soon(runs.set)
        threading.Thread(target=loop.run_forever, name="grpo-async-rewards", daemon=True).start()
        runs.wait()
        _loops.append(loop)
    return _loops[-1]


def _loop_runs() -> bool:
    return bool(_loops) and _loops[-1].is_running()


def _check_loop_runs(name: str) -> None:
    if not _loop_runs():
        _unfinished.extend(asyncio.all_tasks(_loops[-1]))
        raise UserError(
            f"Reward `{name}` never came back: the event loop that all async rewards share was stopped or closed. It "
            "belongs to all of them: a reward must not stop it."
        )


# ---- which form of a batch a reward wants


class _WatchedMessage(dict[str, str]):
    """A chat message that notices when it is read."""

    was_read = False

    def __getitem__(self, key: str) -> str:
        self.was_read = True
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.was_read = True
        return super().get(key, default)

    def values(self) -> Any:
        self.was_read = True
        return super().values()

    def items(self) -> Any:
        self.was_read = True
        return super().items()


def _form_that_works(start_with: Callable[[dict[str, Source]], Start], probe: Samples) -> dict[str, Source]:
    """Chat messages if the function reads them, else strings if it runs on those.

    Running is not enough: `"</answer>" in completion` runs on a list of messages too, and is false there.
    """
    messages = [_WatchedMessage(role="assistant", content=completion.text) for completion in probe.completions]
    watched = OF_CHATS | {"completions": lambda samples: [[message] for message in messages]}
    chat_error = _error_of(start_with(watched), probe)
    reads_chats = any(message.was_read for message in messages)
    if reads_chats and chat_error is None:
        return OF_CHATS
    text_error = _error_of(start_with(OF_TEXTS), probe)
    if text_error is None:
        return OF_TEXTS
    if chat_error is None:
        return OF_CHATS
    raise chat_error if reads_chats else text_error


def _error_of(start: Start, samples: Samples) -> UserError | None:
    try:
        start(samples)()
    except UserError as error:
        return error
    return None
