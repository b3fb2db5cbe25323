"""A run's completions scored anew by another reward: what it pays, and where it differs from what was earned then.

Knows nothing of the command line. What is needed lies in the run's folder: completions.jsonl and prompts.jsonl; the
task's file is not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from grpo.errors import UserError
from grpo.folder import is_run, run_of
from grpo.record.jsonl import read_lines
from grpo.rewards.failures import Tolerance
from grpo.rewards.scoring import Reward, build_rewards, score
from grpo.types import Completion, Group, Prompt

GROUPS_AT_ONCE = 32  # so that a run of any length is scored in little memory
_SHOWN = 3  # completions of a kind
_LONGEST_END = 400  # characters of a text that are kept, its end
_PROMPT = {"id": str, "prompt": int, "text": str, "fields": dict}
_COMPLETION = {"id": str, "step": int, "prompt": int, "text": str, "finish": str, "tokens": int, "parts": dict}

Record = dict[str, Any]


@dataclass
class Anew:
    """What a reward pays for a run's completions, and beside it what these had earned.

    now      [S]; NaN where it does not apply or has failed
    then     name -> [S]: each recorded reward, and "reward", their weighted sum
    records  [S] of completions.jsonl: step, prompt, reward, and the end of the text
    """

    name: str
    now: list[float] = field(default_factory=list)
    then: dict[str, list[float]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    failed: int = 0

    def scored(self) -> np.ndarray:
        """[S'] what it pays where it applies."""
        now = np.array(self.now, dtype=float)
        return now[~np.isnan(now)]

    def agreements(self) -> list[Agreement]:
        """With each recorded reward, "reward" last."""
        names = sorted(self.then, key=lambda name: name == "reward")
        return [_agreement(name, self.now, self.then[name]) for name in names]

    def differing(self, only_now: bool) -> list[Record]:
        """The first completions that are at their best by one and not by the other: now, or by the sum recorded."""
        now, then = (_at_best(np.array(values, dtype=float)) for values in (self.now, self.then["reward"]))
        picked = (now & ~then) if only_now else (then & ~now)
        different = {self.records[index]["text"]: self.records[index] for index in np.flatnonzero(picked)}
        return list(different.values())[:_SHOWN]


@dataclass(frozen=True)
class Agreement:
    """How two rewards go together, over the completions that both apply to.

    correlation  Pearson's; NaN where one of them is constant
    same         share that is at its best by both or by neither; only_then, only_now: counts of the others
    """

    name: str
    count: int
    mean: float
    correlation: float
    same: float
    only_then: int
    only_now: int


def rescore(
    run: str, key: Callable | str, limit: int | None, seconds: float | None, tell: Callable[[str], object]
) -> Anew:
    """Score the completions of a run's training steps, at most `limit` of its groups. `tell` hears of failures.

    Raises:
        UserError: it is no run, has no completions, or the reward cannot be called on them.
    """
    folder = _folder(run)
    prompts = {record["id"]: record for record in _lines(folder / "prompts.jsonl", _PROMPT)}
    groups = islice(_groups(folder, prompts), limit)
    anew, rewards, tolerance = Anew(""), [], Tolerance(share=1.0, tell=tell)
    while some := list(islice(groups, GROUPS_AT_ONCE)):
        if not rewards:
            rewards = _build(key, some[0][0], prompts, seconds)
            anew.name = rewards[0].name
        score([group for group, _ in some], rewards, tolerance)
        for group, records in some:
            _enter(anew, group, records)
    if not anew.records:
        raise UserError(
            f"{folder}/completions.jsonl has no completion whose prompt is known: there is nothing to score."
        )
    return anew


def _build(key: Callable | str, first: Group, prompts: dict[str, Record], seconds: float | None) -> list[Reward]:
    columns = dict.fromkeys(name for record in prompts.values() for name in record["fields"])
    chat = first.prompt.messages is not None
    probe = (first.prompt, first.completions[0].text)
    return build_rewards({key: 1.0}, columns, chat, probe=probe, group_size=len(first.completions), timeout=seconds)


def _folder(run: str) -> Path:
    folder = run_of(Path(run))
    if "\0" in run or not is_run(folder):
        raise UserError(f"{run} is no run's folder. --on takes one, such as runs/gsm8k-20260101-120000.")
    for name in ("completions.jsonl", "prompts.jsonl"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}, which says what was answered and asked. Runs of this version write it from "
                "their first step on."
            )
    return folder


def _lines(path: Path, needed: dict[str, type]) -> Iterator[Record]:
    """The lines of a file, each with what is needed of it.

    Raises:
        UserError: one lacks it, or has something else there.
    """
    for number, record in enumerate(read_lines(path), 1):
        wrong = sorted(name for name, kind in needed.items() if not isinstance(record.get(name), kind))
        if wrong:
            raise UserError(f"{path} is damaged: line {number} does not say {', '.join(wrong)} as it must.")
        yield record


def _groups(folder: Path, prompts: dict[str, Record]) -> Iterator[tuple[Group, list[Record]]]:
    """The groups of completions.jsonl, each with its lines; those of prompts that nobody knows are left out."""
    records = _lines(folder / "completions.jsonl", _COMPLETION)
    for (_, _, id), lines in groupby(records, key=lambda record: (record["step"], record.get("group"), record["id"])):
        if id in prompts:
            members = list(lines)
            yield Group(_prompt(prompts[id]), [_completion(record) for record in members]), members


def _prompt(record: Record) -> Prompt:
    return Prompt(record["prompt"], record["text"], [], record["fields"], record.get("messages"))


def _completion(record: Record) -> Completion:
    """Its tokens are not recorded: as many zeros stand for them."""
    count = record["tokens"]
    return Completion([0] * count, [0.0] * count, record["text"], record["finish"], policy_version=0)


def _enter(anew: Anew, group: Group, records: list[Record]) -> None:
    anew.now += group.parts[anew.name].tolist()
    anew.failed += sum(map(len, group.failed.values()))
    for record in records:
        earned = {name: value for name, value in record["parts"].items() if "/" not in name}
        earned["reward"] = record.get("reward")
        for name, value in earned.items():
            column = anew.then.setdefault(name, [math.nan] * len(anew.records))
            column.append(float(value) if isinstance(value, int | float) else math.nan)
        kept = {name: record[name] for name in ("step", "prompt")} | {"reward": record.get("reward")}
        anew.records.append(kept | {"text": record["text"][-_LONGEST_END:]})
    for column in anew.then.values():  # of a reward that these lines do not know
        column += [math.nan] * (len(anew.records) - len(column))


def _agreement(name: str, now: list[float], then: list[float]) -> Agreement:
    both = np.array([now, then], dtype=float)
    both = both[:, ~np.isnan(both).any(axis=0)]
    if not both.size:
        return Agreement(name, 0, math.nan, math.nan, math.nan, 0, 0)
    ours, theirs = _at_best(both[0]), _at_best(both[1])
    varies = (both.min(axis=1) < both.max(axis=1)).all()
    correlation = float(np.corrcoef(both)[0, 1]) if varies else math.nan
    only_then, only_now = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    return Agreement(
        name, both.shape[1], float(both[1].mean()), correlation, float((ours == theirs).mean()), only_then, only_now
    )


def _at_best(values: np.ndarray) -> np.ndarray:
    """Whether each earns what the best one does; NaN never does."""
    return values >= np.nanmax(values) if not np.isnan(values).all() else np.zeros(len(values), bool)
