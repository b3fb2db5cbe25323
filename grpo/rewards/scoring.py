"""From completions to rewards: call every reward function, check what it returned, add up with weights.

Knows nothing of how a function is called (`calling.py`) or of advantages. How rewards are called is decided
in `build_rewards`, so that `score` decides nothing. Axes: G completions of a group, S of all groups.

A scoring begins with the first group that is finished, while others are still being sampled: what is called elsewhere
(in workers, in the event loop), and needs no other group, is called from then on. What is called in this process waits
until all groups are there, because it would hold up the sampling. Scores, failures and their order are the same
whenever groups are handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain
from numbers import Real
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.rewards.calling import Callee, Finish, Further, Start, Way, callee_of, is_async, joined
from grpo.rewards.event_loop import way_async
from grpo.rewards.failures import NONE_MAY_FAIL, Ledger, Tolerance
from grpo.rewards.here import Pace, way_here
from grpo.rewards.names import name_of, reward_of
from grpo.rewards.options import Options, options_of
from grpo.rewards.retries import retrying
from grpo.rewards.samples import AT_THE_START, Logged, Samples, TrainerState, samples_of
from grpo.rewards.values import fit_list, paid, parts_of, shown
from grpo.rewards.whole_groups import in_whole_groups
from grpo.types import Completion, Group, Prompt
from grpo.watchdog import Limit

_TAKEN = ("mean", "std")  # `reward/mean` and `reward/std` are metrics of the weighted sum: see train.step_metrics


@dataclass(frozen=True)
class Reward:
    """A reward function, ready to be called. Its metric is `reward/<name>`."""

    name: str
    weight: float
    first: Start  # the first call of everything
    further: Further
    begin: Start  # the same of one group, while others are being sampled; begins nothing where it cannot
    rest: Callable[[Parts, Samples], Finish]  # the first call of everything, of which parts were begun
    is_async: bool
    callee: Callee
    options: Options
    limit: Limit | None  # of one call
    pace: Pace  # of its calls in this process
    probe: Samples | None  # something to call it on
    group_size: int | None  # of the run
    elsewhere: bool  # its calls run beside this thread: in the event loop, or in workers

    @property
    def may_fail(self) -> bool:
        """Within what is tolerated."""
        return self.options.on_failure == "missing"

    def start(self, samples: Samples) -> Finish:
        """All calls that a scoring takes."""
        return self.further(samples, self.first(samples))

    def called(self, way: Way) -> Reward:
        """The same reward, whose calls run in workers, in this way."""
        first = way(self.callee)
        further = _further(self.options, self.group_size, first, self.callee)
        begin, rest = _beginning(first, self.callee)
        return replace(self, elsewhere=True, first=first, further=further, begin=begin, rest=rest)


Parts = Sequence[tuple[range, Finish]]
_NOT_BEGUN = Finish(lambda: iter(()))


def _beginning(first: Start, callee: Callee) -> tuple[Start, Callable[[Parts, Samples], Finish]]:
    """`begin` and `rest` of a reward that is called elsewhere."""
    return (first, _all_begun) if callee.by_group else (_begin_nothing, partial(_all_to_begin, first))


def _all_begun(parts: Parts, samples: Samples) -> Finish:
    return joined(parts)


def _begin_nothing(samples: Samples) -> Finish:
    return _NOT_BEGUN


def _all_to_begin(first: Start, parts: Parts, samples: Samples) -> Finish:
    return first(samples)


@dataclass(frozen=True)
class Scorer:
    """How a run scores its groups, or an evaluation its own."""

    rewards: list[Reward]
    tolerance: Tolerance
    apart: Callable[[], AbstractContextManager[Any]] = nullcontext  # inside, what rewards do is kept from the run
    steps: int = 1  # of the run
    max_tokens: int = 0  # of a completion; 0: not known
    move: Callable[[set[str]], object] = set.clear  # is told which rewards took too long, before each scoring
    whole: Callable[[], AbstractContextManager[Any]] = field(init=False)  # what a scoring runs inside of
    last: Callable[[], AbstractContextManager[Any]] = field(init=False)  # and the end of it

    def __post_init__(self) -> None:
        # Of what is called in workers nothing can be seen here; async rewards print, and draw, beside a rollout.
        in_loop = any(reward.is_async and reward.callee.by_group for reward in self.rewards)
        whole, last = (self.apart, nullcontext) if in_loop else (nullcontext, self.apart)
        object.__setattr__(self, "whole", whole)
        object.__setattr__(self, "last", last)

    def __call__(self, groups: list[Group], step: int = 0) -> dict[str, float]:
        """As `score`, after so many steps."""
        with self.begun(step) as scoring:
            return scoring.finish(groups)

    @contextmanager
    def begun(self, step: int = 0) -> Iterator[Scoring]:
        """Inside, a scoring after so many steps, which takes groups as they are finished and ends when all are."""
        self.move(self.tolerance.late)
        state = TrainerState(step, self.steps, self.max_tokens)
        scoring = Scoring(self.rewards, self.tolerance, state, self.last)
        with self.whole():
            try:
                yield scoring
            finally:
                scoring.cancel()

    def failed(self) -> dict[str, float]:
        """The metrics of the rewards that have failed since this was last asked."""
        return self.tolerance.counted()


def build_rewards(
    rewards: Mapping[Callable | str, float],
    columns: Iterable[str],
    chat: bool,
    *,
    probe: tuple[Prompt, str] | None = None,
    tokenizer: Any = None,
    group_size: int | None = None,
    timeout: float | None = None,
) -> list[Reward]:
    """Reward functions and their weights, as a task file lists them -> rewards that `score` can call.

    columns  of the data set; a reward may name any of them as an argument
    chat     the task's prompts are chat messages, so TRL-style functions get chat-format completions
    probe    a prompt and its gold completion, on which a TRL-style function of a chat task is tried, to find
             out whether it reads chat messages or strings; without it, chat messages
    tokenizer, group_size  of the run, so that the probe looks like what the model says
    timeout  seconds that one call of a reward may take that does not say it itself; None for no limit
    """
    columns = list(columns)
    samples = probe and probe_samples(*probe, tokenizer, group_size or 2)
    built = []
    for key, weight in rewards.items():
        function = reward_of(key)
        name, options = name_of(key), options_of(function)
        limit, pace = _limit(options, timeout), Pace()
        in_loop = is_async(function)
        way: Way = partial(way_async, limit, options.concurrency) if in_loop else partial(way_here, limit, pace)
        tried = partial(_with_more_tries, options, group_size, way)
        callee = callee_of(name, function, columns, chat, samples, tried, options.batch == "group")
        first, weight = way(callee), _checked_weight(name, weight)
        further = _further(options, group_size, first, callee)
        begin, rest = _beginning(first, callee) if in_loop else (_begin_nothing, partial(_all_to_begin, first))
        of_calls = (callee, options, limit, pace, samples, group_size)
        built.append(Reward(name, weight, first, further, begin, rest, in_loop, *of_calls, elsewhere=in_loop))
    _check_together(built)
    return built


def _limit(options: Options, timeout: float | None) -> Limit | None:
    """The time of one call, by what the reward says of itself, else by what the run says."""
    name, seconds = "the --reward-timeout", timeout
    if options.time_limit is not None:
        name, seconds = "its time_limit", options.time_limit
    remedy = (
        "A time-out is never scored 0: mend the reward, give it more time, or have workers call it, which are ended "
        "alone (--reward-workers 2)."
    )
    return Limit(seconds, name, remedy) if seconds else None


def _further(options: Options, group_size: int | None, first: Start, callee: Callee) -> Further:
    """What follows the first calls: what fails is called again where that may help."""
    further: Further = _no_further
    if callee.fits is fit_list and group_size:
        further = in_whole_groups(first, group_size)
    if options.retries:
        further = partial(
            _one_after_the_other, further, retrying(_whole(first, further), options.retries, options.backoff)
        )
    return further


def _no_further(samples: Samples, finish: Finish) -> Finish:
    return finish


def _one_after_the_other(one: Further, other: Further, samples: Samples, finish: Finish) -> Finish:
    return other(samples, one(samples, finish))


def _whole(first: Start, further: Further) -> Start:
    return lambda samples: further(samples, first(samples))


def _with_more_tries(options: Options, group_size: int | None, way: Way, callee: Callee) -> Start:
    """A way in which what fails is called again where that may help."""
    first = way(callee)
    return _whole(first, _further(options, group_size, first, callee))


class Scoring:
    """One scoring: takes groups as they are finished, in any order, and gives what all of them earn.

    last: what the end of it runs inside of, when rewards of this process are called.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        tolerance: Tolerance,
        state: TrainerState,
        last: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.rewards, self.tolerance, self.state, self.last = rewards, tolerance, state, last
        self.logged = Logged()
        self.begun: dict[int, tuple[range, dict[str, Finish]]] = {}  # by a group's first place
        self.finishes: dict[str, Finish] = {}

    def begin(self, first: int, group: Group) -> None:
        """A group is finished, whose first completion stands at this place among all."""
        places = range(first, first + len(group.completions))
        samples = replace(samples_of([group], self.state), logged=self.logged, places=list(places))
        self.begun[first] = places, {reward.name: reward.begin(samples) for reward in self.rewards}

    def finish(self, groups: list[Group]) -> dict[str, float]:
        """All are. Fills them as `score` does.

        Raises:
            UserError: more have failed than is tolerated.
        """
        firsts = accumulate([len(group.completions) for group in groups[:-1]], initial=0)
        at = dict(zip(firsts, groups, strict=True))
        for first in sorted(at.keys() - self.begun.keys()):
            self.begin(first, at[first])
        samples = replace(samples_of(groups, self.state), logged=self.logged)
        with self.last():
            # What runs elsewhere is waited for last: it goes on while the others compute.
            self.finishes = {reward.name: self._finish_of(reward, samples) for reward in self.rewards}
            ledger = Ledger(samples, self.tolerance)
            for reward in sorted(self.rewards, key=attrgetter("elsewhere")):
                ledger.open(reward.name)
                for members, scores in self.finishes[reward.name]():
                    ledger.enter(reward, members, scores)
        _fill(groups, self.rewards, ledger)
        return samples.metrics

    def cancel(self) -> None:
        """Nothing more is called."""
        for _, begun in self.begun.values():
            for finish in begun.values():
                finish.cancel()
        for finish in self.finishes.values():
            finish.cancel()

    def _finish_of(self, reward: Reward, samples: Samples) -> Finish:
        parts = [(places, begun[reward.name]) for _, (places, begun) in sorted(self.begun.items())]
        return reward.further(samples, reward.rest(parts, samples))


def score(
    groups: list[Group],
    rewards: list[Reward],
    tolerance: Tolerance = NONE_MAY_FAIL,
    state: TrainerState = AT_THE_START,
) -> dict[str, float]:
    """Fill `parts[name]` [G], `failed`, `extra` and `rewards` [G] of each group; return what rewards told `log_metric`.

    parts    what each reward returned, float32, unweighted; NaN where it returned None, and where it failed. Of
             numbers by name what they pay together, and each of them under `name/its name`
    rewards  the sum over the rewards of weight * part, a NaN part counting as 0. A completion to which no
             reward applies therefore gets 0; `preflight` refuses a task whose gold answers are like that. NaN where a
             reward has failed that has a weight

    Raises:
        UserError: more have failed than is tolerated.
    """
    scoring = Scoring(rewards, tolerance, state)
    try:
        return scoring.finish(groups)
    finally:
        scoring.cancel()


def _fill(groups: list[Group], rewards: Sequence[Reward], ledger: Ledger) -> None:
    columns = {name: column for reward in rewards for name, column in _columns(reward.name, ledger)}  # [S] each
    sizes = [len(group.completions) for group in groups]
    for name, column in columns.items():
        for group, part in zip(groups, column.split(sizes), strict=True):
            group.parts[name] = part
    for group in groups:
        group.rewards = weighted_sum(group.parts, rewards)
    ledger.close(groups)


def _columns(name: str, ledger: Ledger) -> Iterator[tuple[str, Tensor]]:
    """What a reward gave, [S], and if that has parts, each of them by its own name."""
    scores = ledger.scores[name]
    yield name, torch.tensor([paid(score) for score in scores], dtype=torch.float32)
    for part in dict.fromkeys(chain.from_iterable(map(parts_of, scores))):
        column = [parts_of(score).get(part) for score in scores]
        yield f"{name}/{part}", torch.tensor([paid(number) for number in column], dtype=torch.float32)


def weighted_sum(parts: dict[str, Tensor], rewards: Sequence[Reward]) -> Tensor:
    """{reward name: [G]} -> [G]: the sum of weight * part, a NaN part counting as 0."""
    return torch.stack([reward.weight * parts[reward.name] for reward in rewards]).nansum(dim=0)


def probe_samples(prompt: Prompt, text: str, tokenizer: Any, group_size: int) -> Samples:
    """A group as a step has it, of completions that nobody sampled: some functions compare those of a batch."""
    return samples_of([Group(prompt, [unsampled(text, tokenizer) for _ in range(group_size)])])


def unsampled(text: str, tokenizer: Any = None) -> Completion:
    """A completion with this text as the model would give it: in its own tokens with the stop token, and without what
    its tokenizer leaves out. Without a tokenizer a token is a byte."""
    if tokenizer is None:
        tokens = [*text.encode(), 0]
    else:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        tokens = [*tokens, tokenizer.eos_token_id or 0]
    return Completion(tokens, [0.0] * len(tokens), text, finish="stop", policy_version=0)


def cut_off(completion: Completion, tokenizer: Any = None) -> Completion:
    """The first half of a completion, cut off by a token limit."""
    tokens = completion.tokens[: (len(completion.tokens) - 1) // 2]
    if tokenizer is None:
        text = bytes(tokens).decode(errors="replace")
    else:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Completion(tokens, [0.0] * len(tokens), text, finish="length", policy_version=0)


def _checked_weight(name: str, weight: Any) -> float:
    # A comparison, because float() of a large integer raises; NaN compares false.
    if isinstance(weight, bool) or not (isinstance(weight, Real) and _fits_float32(weight)):
        raise UserError(
            f"Reward `{name}` has the weight {shown(weight)}. A weight is a finite number that float32 can hold, "
            "like 1.0."
        )
    return float(weight)


def _fits_float32(number: Any) -> bool:
    return bool(abs(number) <= torch.finfo(torch.float32).max)


def _check_together(rewards: list[Reward]) -> None:
    if not any(reward.weight for reward in rewards):
        raise UserError("No reward of the task has a weight other than 0: there is nothing to learn from.")
    names = [reward.name for reward in rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"Two rewards are called `{twice[0]}`. The name is the metric's name: rename one, or give it "
            "another `__name__`."
        )
    taken = [name for name in names if name in _TAKEN]
    if taken:
        raise UserError(
            f"A reward is called `{taken[0]}`, but the metric reward/{taken[0]} is that of the sum of all rewards. "
            "Rename the function."
        )
