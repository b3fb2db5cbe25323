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
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import cache, partial
from types import MethodType
from typing import Any

from grpo.errors import UserError, nearest, user_code
from grpo.rewards.samples import OF_CHATS, OF_ONE_COMPLETION, OF_TEXTS, Samples, Source, column_source, where
from grpo.rewards.values import listed, shown

Caller = Callable[[Samples], Any]  # a list of S values, or whatever else the function returned
AsyncCaller = Callable[[Samples], Awaitable[Any]]
Finish = Callable[[], Any]
Limit = Callable[[], AbstractContextManager[Any]]  # the time that one call may take
AsyncLimit = Callable[[], AbstractAsyncContextManager[Any]]
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


def _call_each(name: str, function: Callable, sources: dict[str, Source], limit: Limit, samples: Samples) -> list[Any]:
    values = []
    for index, arguments in enumerate(_rows(sources, samples)):
        with user_code(_told(name, samples, slice(index, index + 1))), limit():
            values.append(function(**arguments))
    return values


def _call_batch(name: str, function: Callable, sources: dict[str, Source], limit: Limit, samples: Samples) -> Any:
    with user_code(_told(name, samples, slice(None))), limit():
        returned = function(**{key: source(samples) for key, source in sources.items()})
        return listed(name, returned, samples)


async def _call_each_async(
    name: str, function: Callable, sources: dict[str, Source], limit: AsyncLimit, samples: Samples
) -> list[Any]:
    async def call_one(index: int, arguments: dict[str, Any]) -> Any:
        with user_code(_told(name, samples, slice(index, index + 1))):
            async with limit():
                return await function(**arguments)

    rows = enumerate(_rows(sources, samples))
    return await asyncio.gather(*(call_one(index, arguments) for index, arguments in rows))


async def _call_batch_async(
    name: str, function: Callable, sources: dict[str, Source], limit: AsyncLimit, samples: Samples
) -> Any:
    with user_code(_told(name, samples, slice(None))):
        async with limit():
            returned = await function(**{key: source(samples) for key, source in sources.items()})
            return listed(name, returned, samples)


def _rows(sources: dict[str, Source], samples: Samples) -> Iterator[dict[str, Any]]:
    columns = [source(samples) for source in sources.values()]
    return (dict(zip(sources, row, strict=True)) for row in zip(*columns, strict=True))


def _told(name: str, samples: Samples, scored: slice) -> Callable[[str], str]:
    """What was raised, in words -> the sentence about it."""
    return lambda raised: (
        f"Reward `{name}` raised {raised} on {where(samples, scored)}. A crash or a time-out is never scored 0: "
        "mend the reward, or let it return None where it does not apply."
    )


def _start_sync(call: Caller, samples: Samples) -> Finish:
    return partial(call, samples)


def _start_async(finish: Callable[[Future[Any]], Any], call: AsyncCaller, samples: Samples) -> Finish:
    async def run() -> Any:
        return await call(samples)

    return partial(finish, asyncio.run_coroutine_threadsafe(run(), _event_loop()))


def _sync_way(name: str, timeout: float | None) -> tuple[Limit, Any, Any, Any]:
    return _time_limit(name, timeout), _start_sync, _call_each, _call_batch


def _async_way(name: str, timeout: float | None) -> tuple[AsyncLimit, Any, Any, Any]:
    if timeout is None:
        return nullcontext, partial(_start_async, Future.result), _call_each_async, _call_batch_async
    deadlines: dict[object, float] = {}
    finish = partial(_result_unless_blocked, name, timeout, deadlines)
    return partial(_deadline, timeout, deadlines), partial(_start_async, finish), _call_each_async, _call_batch_async


@asynccontextmanager
async def _deadline(timeout: float, deadlines: dict[object, float]) -> AsyncIterator[None]:
    """A time limit that also a call keeps which blocks the loop; `deadlines` has those of the calls under way."""
    call = object()
    deadlines[call] = time.monotonic() + timeout
    try:
        async with asyncio.timeout(timeout) as limit:
            yield
    except TimeoutError as error:
        raise TimeoutError(_late(timeout) if limit.expired() else str(error)) from error
    finally:
        deadline = deadlines.pop(call)
    if time.monotonic() > deadline:  # it never gave the loop a chance to stop it
        raise TimeoutError(_late(timeout))


def _result_unless_blocked(name: str, timeout: float, deadlines: dict[object, float], future: Future[Any]) -> Any:
    """The result; an error if a call has blocked the loop, which nobody can interrupt, for more than its time.

    The loop gets `timeout` seconds to stop a late call by itself, which tells its row.
    """
    while not wait([future], timeout).done:
        if any(time.monotonic() > deadline + timeout for deadline in list(deadlines.values())):
            raise UserError(
                f"Reward `{name}` gave {_late(timeout)}, and the event loop that all async rewards share is blocked. A "
                "time-out is never scored 0: let them `await` what they wait for, or write them with `def`."
            )
    return future.result()


def _late(timeout: float) -> str:
    return f"no result in {timeout:g} s"


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    # One loop for all async rewards and steps, so that a client which a reward keeps stays usable. On its own
    # thread, so that they run while other rewards compute, and inside a notebook's running loop too.
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="grpo-async-rewards", daemon=True).start()
    return loop


def _time_limit(name: str, timeout: float | None) -> Limit:
    if timeout is None:
        return nullcontext
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            f"Reward `{name}` cannot have a time limit outside the main thread. Start the run from the main "
            "thread, write the reward as `async def`, or set no timeout."
        )
    return partial(_alarm, timeout)


@contextmanager
def _alarm(timeout: float) -> Iterator[None]:
    # A signal, because a thread that waits cannot interrupt a regular expression that holds the interpreter.
    rung = threading.Event()

    def ring(signal_number: int, frame: object) -> None:
        rung.set()
        raise _TimeIsUp

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        with suppress(_TimeIsUp):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    if rung.is_set():  # also where a bare `except:` caught it
        raise TimeoutError(_late(timeout))


class _TimeIsUp(BaseException):
    """No Exception, because a reward may turn any of those into a score."""


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
