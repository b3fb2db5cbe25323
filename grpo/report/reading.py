"""Reading: what a report keeps of a run's files, of any length. Knows nothing of pages.

Files are read line by line and once: a Reading remembers how far it is, so that a report that is made again and again
while a run goes on reads what is new. Of every completion there stay numbers of its step; of texts, a sample: the steps
are thinned to STEPS evenly spread ones, in each of which some groups are kept.

Everything is read as if somebody else had written it: a line that is none, or has something else where a number should
be, is counted and left out.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grpo.errors import UserError
from grpo.folder import CONFIG_FILE, read_json

STEPS = 24  # whose completions are kept; half as many at times
GROUPS = 4  # of each
EVALUATIONS = 24  # whose held-out answers are kept; half as many at times
HELD_OUT_PROMPTS = 48  # whose answers are kept
LONGEST_TEXT = 8_000  # characters of a text that is kept
OPENING = 4  # words by which answers are said to begin alike ...
LONGEST_OPENING = 80  # ... as far as they have no more characters
LARGEST_CHANGE = 100  # fields that a start is shown to have changed
LONGEST_REASON = 300  # characters of why a reward failed
SUSPECTS = 12
POINTS = 400  # of the picture of rewards against lengths
BAND = (0.1, 0.9)  # quantiles of a step's completions


@dataclass
class Text:
    """The beginning of a text, and how long it is."""

    text: str
    length: int

    @classmethod
    def of(cls, value: object) -> Text:
        text = value if isinstance(value, str) else ""
        return cls(text[:LONGEST_TEXT], len(text))


@dataclass
class Answer:
    """A completion as it is shown."""

    step: int
    group: int
    member: int
    prompt: str  # id
    text: Text
    tokens: int
    is_cut: bool
    parts: dict[str, float | None]
    reward: float
    advantage: float
    seed: int
    is_right: bool | None  # None where the task says of no answer that it is right
    failed: list[tuple[str, str]]  # (reward that failed on it, why): such an answer has no part in its step
    trace: dict[str, list] | None = None  # of tokens.jsonl


@dataclass
class StepNumbers:
    """What is kept of all completions of a step."""

    count: int = 0
    lengths: dict[bool, list[int]] = field(default_factory=lambda: {True: [], False: []})  # by right and wrong
    values: dict[str, list[float]] = field(default_factory=dict)  # reward and parts
    openings: Counter[str] = field(default_factory=Counter)

    def add(self, answer: Answer) -> None:
        self.count += 1
        if answer.is_right is not None:
            self.lengths[answer.is_right].append(answer.tokens)
        for name, value in {"reward/mean": answer.reward, **_named(answer.parts)}.items():
            if value is not None:
                self.values.setdefault(name, []).append(value)
        words = answer.text.text[: 4 * LONGEST_OPENING].split()[:OPENING]
        self.openings[" ".join(words)[:LONGEST_OPENING]] += 1

    def bands(self) -> dict[str, tuple[float, float]]:
        """Between which most of the step's completions lie."""
        return {name: tuple(np.quantile(values, BAND).tolist()) for name, values in self.values.items()}

    def mean_length(self, is_right: bool) -> float:
        lengths = self.lengths[is_right]
        return sum(lengths) / len(lengths) if lengths else math.nan


def _named(parts: dict[str, float | None]) -> dict[str, float | None]:
    return {f"reward/{name}": value for name, value in parts.items()}


class Tail:
    """The lines of a file that have not been read yet."""

    def __init__(self, path: Path):
        self.path, self.unreadable = path, 0
        self.at = 0  # bytes that are read
        self.began = 0  # where the line that was given last begins

    def lines(self) -> Iterator[dict[str, Any]]:
        """A last line without its end is still being written. A link is not followed: whoever packed a run would choose
        what of this machine is on a page that is passed on."""
        if not _is_file(self.path):
            return
        with self.path.open("rb") as file:
            file.seek(self.at)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.began, self.at = self.at, self.at + len(line)
                if (read := _object(line)) is None:
                    self.unreadable += 1
                else:
                    yield read

    def line_at(self, place: int) -> dict[str, Any]:
        """One that was read before, once more."""
        with self.path.open("rb") as file:
            file.seek(place)
            return _object(file.readline()) or {}


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) else None


class Reading:
    """A run's folder, as far as it was read.

    Raises:
        UserError: it is no run's folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir() or not _is_file(folder / "metrics.jsonl"):
            raise UserError(f"{folder} is no run's folder: there is no metrics.jsonl in it. Give one of runs/.")
        self.config = read_json(folder / CONFIG_FILE) if _is_file(folder / CONFIG_FILE) else {}
        names = ("metrics", "prompts", "tokens", "completions", "held_out", "starts")
        self._tails = {name: Tail(folder / f"{name}.jsonl") for name in names}
        self.starts: list[dict[str, Any]] = []
        self.metrics: dict[str, dict[int, float]] = {}  # name -> step -> value
        self._prompts: dict[str, int] = {}  # id -> where its line is: there may be a million
        self._now: list[Answer] = []  # of the step that is being read
        self.bands: dict[str, dict[int, tuple[float, float]]] = {}  # name -> step -> quantiles
        self.right_lengths: dict[int, tuple[float, float]] = {}  # step -> mean length of right and of wrong answers
        self.openings: dict[int, tuple[str, int, int]] = {}  # step -> (most frequent opening, how often, of how many)
        self.answers = Thinned(STEPS)
        self.traces = Thinned(STEPS)
        self.suspects: list[Answer] = []  # wrong and best paid, the best paid first and the latest of these
        self.points: list[tuple[int, float, bool | None]] = []  # (tokens, reward, right) of some completions
        self.counts: Counter[bool | None] = Counter()  # completions by right and wrong
        self._evaluations = Thinned(EVALUATIONS)
        self.held_out: dict[int, dict[str, list[Answer]]] = {}  # step -> id of a prompt -> answers, the texts of some
        self.held_out_prompts: list[str] = []  # whose texts are kept
        self._stride = 1

    @property
    def unreadable(self) -> int:
        """Lines that are none."""
        return sum(tail.unreadable for tail in self._tails.values())

    @property
    def is_taught(self) -> bool:
        """Whether the run learns from answers that somebody gave (SFT, DPO)."""
        config = self.config.get("config")
        return isinstance(config, dict) and config.get("method", "grpo") != "grpo"

    @property
    def solved(self) -> tuple[str, float] | None:
        """(reward, its value from which an answer is right), as the last start has it."""
        solved = self.starts[-1]["solved"] if self.starts else None
        if isinstance(solved, list) and len(solved) == 2 and isinstance(solved[0], str):
            return solved[0], number(solved[1])
        return None

    def advance(self) -> None:
        """Read what is new."""
        self.starts += map(start_of, self._tails["starts"].lines())
        solved = self.solved
        for record in self._tails["metrics"].lines():
            step = whole(record.pop("step", None))
            for name, value in record.items():
                self.metrics.setdefault(name, {})[step] = number(value)
        for record in self._tails["prompts"].lines():
            self._prompts[str(record.get("id"))] = self._tails["prompts"].began
        for record in self._tails["tokens"].lines():
            self.traces.add(whole(record.get("step")), record)
        for record in self._tails["completions"].lines():
            self._completion(answer_of(record, solved))
        self._end_step()
        for record in self._tails["held_out"].lines():
            self._held_out(answer_of(record, solved))
        self.held_out = {step: by_prompt(answers) for step, answers in self._evaluations.steps.items()}

    def of_step(self, step: int) -> dict[int, list[Answer]]:
        """group -> its answers, the best paid first, with the traces of their tokens."""
        traces = {(whole(t.get("group")), whole(t.get("member"))): t for t in self.traces.steps.get(step, [])}
        groups: dict[int, list[Answer]] = {}
        for answer in self.answers.steps.get(step, []):
            answer.trace = traces.get((answer.group, answer.member))
            groups.setdefault(answer.group, []).append(answer)
        for group in groups.values():
            group.sort(key=lambda answer: (-answer.reward, answer.member))
        return dict(sorted(groups.items()))

    def prompt(self, id: str) -> dict[str, Any]:
        """What is shown of a prompt."""
        place = self._prompts.get(id)
        return _prompt({} if place is None else self._tails["prompts"].line_at(place))

    def _completion(self, answer: Answer) -> None:
        if self._now and self._now[0].step != answer.step:
            self._end_step()
        self._now.append(answer)
        self.counts[answer.is_right] += 1
        if answer.is_right is False and all(answer.text != each.text for each in self.suspects):
            self.suspects = sorted([*self.suspects, answer], key=lambda each: (-each.reward, -each.step))[:SUSPECTS]
        if self.counts.total() % self._stride == 0:
            self.points.append((answer.tokens, answer.reward, answer.is_right))
        if len(self.points) >= 2 * POINTS:
            self.points, self._stride = self.points[1::2], 2 * self._stride

    def _end_step(self) -> None:
        """All lines of a step are read: they were written together."""
        if not self._now:
            return
        step, numbers = self._now[0].step, StepNumbers()
        for answer in self._now:
            numbers.add(answer)
        for name, band in numbers.bands().items():
            self.bands.setdefault(name, {})[step] = band
        self.right_lengths[step] = (numbers.mean_length(True), numbers.mean_length(False))
        self.openings[step] = (*numbers.openings.most_common(1)[0], numbers.count)
        for answer in chosen(self._now):
            self.answers.add(step, answer)
        self._now = []

    def _held_out(self, answer: Answer) -> None:
        if answer.prompt not in self.held_out_prompts and len(self.held_out_prompts) < HELD_OUT_PROMPTS:
            self.held_out_prompts.append(answer.prompt)
        if answer.prompt not in self.held_out_prompts or answer.member > 0:
            answer.text = Text("", answer.text.length)
        self._evaluations.add(answer.step, answer)


def by_prompt(answers: list[Answer]) -> dict[str, list[Answer]]:
    """id of a prompt -> its answers. Where a step was scored anew, after its rewards were changed say, that counts."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        several = found.setdefault(answer.prompt, [])
        if several and several[-1].member >= answer.member:
            several.clear()
        several.append(answer)
    return found


class Thinned:
    """What comes of steps in their order, of which at most `most` evenly spread ones are kept, and the last."""

    def __init__(self, most: int):
        self.steps: dict[int, list[Any]] = {}
        self._most, self._stride = most, 1

    def add(self, step: int, item: Any) -> None:
        if step not in self.steps:
            last = next(reversed(self.steps), None)
            if last is not None and last % self._stride:
                del self.steps[last]  # it was there as the last one
            self.steps[step] = []
            while len(self.steps) > self._most:
                self._stride *= 2
                self.steps = {at: kept for at, kept in self.steps.items() if at % self._stride == 0 or at == step}
        self.steps[step].append(item)


def chosen(answers: list[Answer]) -> list[Answer]:
    """Of a step's completions those of GROUPS groups: first two that taught something, of which there are the tokens,
    then one of each other kind."""
    groups: dict[int, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.group, []).append(answer)
    taught = [number for number, group in groups.items() if any(each.advantage for each in group)][:2]
    by_kind = {kinds_of(groups[number]): number for number in reversed(groups) if number not in taught}
    kept = list(dict.fromkeys([*taught, *by_kind.values(), *groups]))[:GROUPS]
    return [answer for number in sorted(kept) for answer in groups[number]]


def kinds_of(group: list[Answer]) -> tuple[str, ...]:
    """What a group can be looked for by."""
    right = {each.is_right for each in group if each.is_right is not None}
    kinds = {
        "all-right": right == {True},
        "all-wrong": right == {False},
        "mixed": right == {True, False},
        "cut-off": any(each.is_cut for each in group),
        "disagree": disagree(group),
        "tokens": any(each.trace for each in group),
    }
    return tuple(kind for kind, is_so in kinds.items() if is_so)


def disagree(group: list[Answer]) -> bool:
    """Whether a wrong answer was paid as much as a right one, or more."""
    right = [each.reward for each in group if each.is_right is True]
    wrong = [each.reward for each in group if each.is_right is False]
    return bool(right and wrong) and max(wrong) >= min(right)


# ---- values of lines that anybody may have written


def number(value: object) -> float:
    """NaN where it is none."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else math.nan


def whole(value: object) -> int:
    """0 where it is none."""
    return value if isinstance(value, int) and abs(value) < 2**63 else 0


def start_of(record: dict[str, Any]) -> dict[str, Any]:
    """A line of starts.jsonl: all that a page says of it, as texts."""
    names = ("time", "command", "task", "model", "device", "engine")
    versions, changed = (record.get(name) for name in ("versions", "changed"))
    return {
        **{name: str(record.get(name, ""))[:LONGEST_TEXT] for name in names},
        "step": whole(record.get("step")),
        "threads": whole(record.get("threads")),
        "memory_gib": number(record.get("memory_gib")),
        "solved": record.get("solved"),
        "versions": {str(n): str(v) for n, v in versions.items()} if isinstance(versions, dict) else {},
        "changed": _changes(changed) if isinstance(changed, dict) else [],
    }


def _changes(changed: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(field, value so far, value from then on) of what a run went on with otherwise."""
    pairs = [(name, pair) for name, pair in changed.items() if isinstance(pair, list) and len(pair) == 2]
    return [
        (str(name), str(before)[:LONGEST_REASON], str(now)[:LONGEST_REASON])
        for name, (before, now) in pairs[:LARGEST_CHANGE]
    ]


def answer_of(record: dict[str, Any], solved: tuple[str, float] | None) -> Answer:
    """A line of completions.jsonl or held_out.jsonl."""
    parts = record.get("parts")
    values = {str(name): number(value) for name, value in parts.items()} if isinstance(parts, dict) else {}
    known = {name: None if math.isnan(value) else value for name, value in values.items()}
    reward, advantage = (number(record.get(name)) for name in ("reward", "advantage"))
    failed = record.get("failed")
    failures = (
        [(str(n), str(why)[: LONGEST_OPENING * 4]) for n, why in failed.items()] if isinstance(failed, dict) else []
    )
    # What nobody judged, as an answer that is taught, or could judge is neither right nor wrong.
    is_judged = solved is not None and solved[0] in values and solved[0] not in dict(failures)
    is_right = values[solved[0]] >= solved[1] if solved and is_judged else None
    return Answer(
        step=whole(record.get("step")),
        group=whole(record.get("group")),
        member=whole(record.get("member")),
        prompt=str(record.get("id")),
        text=Text.of(record.get("text")),
        tokens=whole(record.get("tokens")),
        is_cut=record.get("finish") == "length",
        parts=known,
        reward=0.0 if math.isnan(reward) else reward,
        advantage=0.0 if math.isnan(advantage) else advantage,
        seed=whole(record.get("seed")),
        is_right=is_right,
        failed=failures,
    )


def _prompt(record: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a line of prompts.jsonl: what was asked, what would have been right."""
    messages = record.get("messages")
    asked = messages[-1].get("content") if isinstance(messages, list) and messages and _is_dict(messages[-1]) else None
    return {
        "asked": Text.of(asked if isinstance(asked, str) else record.get("text")),
        "whole": Text.of(record.get("text")),
        "gold": Text.of(record.get("gold")),
        "row": whole(record.get("prompt")),
        "split": "held-out" if record.get("split") == "held-out" else "train",
    }


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)
