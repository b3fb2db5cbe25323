"""How a reward function is called: by the names of its arguments, decided once, from its signature.

Knows nothing of weights, groups or advantages, nor in which process or thread a call runs.
Axis: S completions scored together, flat, in group order.

    f(completion, answer) -> float | None               one completion; any data set column by its name (where there is
                                                        no column of that name, verl's `solution_str` is the completion)
    f(prompts, completions, answer, **kwargs) -> list    all S of them, as TRL and Unsloth call theirs
    async def f(...)                                     either kind

A batch function is called with lists of S: `prompts`, `completions`, `completion_ids` and each column it
names (all columns if it takes **kwargs), and with TRL's `trainer_state`, `log_metric`, `log_extra`; with `group_size`
if it names it. A function of one completion gets these four if it names them.

    Calls     Samples -> the calls of a scoring: which completions each scores, and with what arguments
    a way     where they run: in this process (grpo/rewards/here.py), in worker processes (workers.py), in the event
              loop (event_loop.py). It takes a function and its Calls, and makes a Start
    Start     Samples -> Finish: what waits or runs elsewhere is under way when it returns
    Finish    gives the outcome of one call after the other, in order: its completions, and a score or Missing for each
    Further   (Samples, Finish of their first calls) -> Finish, in which what failed is called again
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from types import MethodType
from typing import Any

from grpo.errors import UserError, nearest
from grpo.rewards.samples import (
    AS_VERL,
    NAMED_BY_A_BATCH,
    NAMED_BY_ONE,
    OF_CHATS,
    OF_ONE_COMPLETION,
    OF_TEXTS,
    Samples,
    Source,
    column_source,
    only,
    where,
    where_batch,
    where_one,
)
from grpo.rewards.values import Missing, Score, fit_list, fit_one, shown


@dataclass(frozen=True)
class Call:
    """One call of a reward."""

    members: Sequence[int]  # which of the S completions it scores
    where: str  # the same in words
    arguments: dict[str, Any]


Calls = Callable[[Samples], Iterable[Call]]
Fit = Callable[[Any, int], list[Score | Missing]]  # what a call returned, how many it scores -> a score for each
Outcome = tuple[Sequence[int], Sequence[Score | Missing]]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Finish:
    """Calls that were begun."""

    outcomes: Callable[[], Iterator[Outcome]]  # one after the other, in the order of the calls; waits for them
    cancel: Callable[[], object] = _nothing  # those that wait for their turn are not made any more

    def __call__(self) -> Iterator[Outcome]:
        return self.outcomes()


Start = Callable[[Samples], Finish]
Further = Callable[[Samples, Finish], Finish]


@dataclass(frozen=True)
class Callee:
    """A reward as a way takes it: what is called, with what, and what its results are taken for."""

    name: str
    function: Callable
    fits: Fit
    calls: Calls
    by_group: bool  # no call scores completions of several groups


Way = Callable[[Callee], Start]  # where and how the calls of a reward run


_NAMES_A_BATCH = {"prompts", "completions", "completion_ids"}


def callee_of(
    name: str,
    function: Callable,
    columns: Iterable[str],
    chat: bool,
    probe: Samples | None,
    way: Way,
    group_by_group: bool = False,
) -> Callee:
    """Decide how `function` is called, so that scoring has nothing left to decide.

    In a chat task a batch function gets TRL's chat form, `[[{"role": "assistant", "content": ...}], ...]`,
    unless calling it on `probe` in this way shows that it wants strings. group_by_group: a batch function is called
    with one group at a time.
    """
    parameters = _parameters(name, function)
    sources_of_columns: dict[str, Source] = {column: column_source(column) for column in columns}

    def with_form(calls: Callable, fits: Fit, named: dict[str, Source], form: dict[str, Source]) -> Callee:
        sources = _choose_sources(name, parameters, sources_of_columns | form, named)
        return Callee(name, function, fits, partial(calls, sources), by_group=calls is not _call_of_all)

    if "completion" in parameters or (AS_VERL in parameters and AS_VERL not in sources_of_columns):
        return with_form(_calls_of_each, fit_one, NAMED_BY_ONE, OF_ONE_COMPLETION)
    _check_names_a_batch(name, parameters)
    of_batch = partial(with_form, _calls_of_groups if group_by_group else _call_of_all, fit_list, NAMED_BY_A_BATCH)
    if not chat:
        return of_batch(OF_TEXTS)
    if probe is None:
        return of_batch(OF_CHATS)
    return of_batch(_form_that_works(of_batch, way, probe))


def error_of(name: str, samples: Samples, members: Sequence[int], missing: Missing) -> UserError:
    """Why these completions have no score of a reward, in a sentence."""
    error = UserError(f"Reward `{name}` {missing.words} {where(samples, members)}. {missing.advice}")
    error.__cause__ = missing.error
    return error


def as_before(indices: Sequence[int], outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """What calls say of some completions, by their indices among all."""
    for members, scores in outcomes:
        yield [indices[member] for member in members], scores


def joined(parts: Sequence[tuple[Sequence[int], Finish]]) -> Finish:
    """Calls that were begun in parts, each with the indices of its completions among all."""
    return Finish(partial(_outcomes_of_parts, parts), partial(_cancel_parts, parts))


def _outcomes_of_parts(parts: Sequence[tuple[Sequence[int], Finish]]) -> Iterator[Outcome]:
    for indices, finish in parts:
        yield from as_before(indices, finish())


def _cancel_parts(parts: Sequence[tuple[Sequence[int], Finish]]) -> None:
    for _, finish in parts:
        finish.cancel()


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
    name: str, parameters: dict[str, inspect.Parameter], available: dict[str, Source], by_name: dict[str, Source]
) -> dict[str, Source]:
    """Those of the arguments that a function names, or all that are available if it takes **kwargs. A column goes
    before what is given by name alone."""
    everything = by_name | available
    named = {key: each for key, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    for key, parameter in named.items():
        if key not in everything and parameter.default is parameter.empty:
            raise UserError(
                f"Reward `{name}` asks for `{key}`, and the data set has no such column.{nearest(key, everything)} "
                f"It can ask for: {', '.join(everything)}."
            )
    asked = {key: everything[key] for key in named if key in everything}
    return available | asked if len(named) < len(parameters) else asked


def _calls_of_each(sources: dict[str, Source], samples: Samples) -> Iterator[Call]:
    columns = [source(samples) for source in sources.values()]
    for index, row in enumerate(zip(*columns, strict=True)):
        yield Call((index,), where_one(samples, index), dict(zip(sources, row, strict=True)))


def _call_of_all(sources: dict[str, Source], samples: Samples) -> Iterator[Call]:
    members = range(len(samples.completions))
    yield Call(members, where_batch(samples, members), {key: source(samples) for key, source in sources.items()})


def _calls_of_groups(sources: dict[str, Source], samples: Samples) -> Iterator[Call]:
    for _, members in groupby(range(len(samples.group)), key=samples.group.__getitem__):
        own = list(members)
        [call] = _call_of_all(sources, only(samples, own))
        yield Call(own, call.where, call.arguments)


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


def _form_that_works(of_batch: Callable[[dict[str, Source]], Callee], way: Way, probe: Samples) -> dict[str, Source]:
    """Chat messages if the function reads them, else strings if it runs on those.

    Running is not enough: `"</answer>" in completion` runs on a list of messages too, and is false there.
    """
    messages = [_WatchedMessage(role="assistant", content=completion.text) for completion in probe.completions]
    watched = OF_CHATS | {"completions": lambda samples: [[message] for message in messages]}
    chat_error = _error_of(of_batch(watched), way, probe)
    reads_chats = any(message.was_read for message in messages)
    if reads_chats and chat_error is None:
        return OF_CHATS
    text_error = _error_of(of_batch(OF_TEXTS), way, probe)
    if text_error is None:
        return OF_TEXTS
    if chat_error is None:
        return OF_CHATS
    raise chat_error if reads_chats else text_error


def _error_of(callee: Callee, way: Way, samples: Samples) -> UserError | None:
    try:
        for members, scores in way(callee)(samples)():
            for missing in scores:
                if isinstance(missing, Missing):
                    return error_of(callee.name, samples, members, missing)
    except UserError as error:
        return error
    return None
