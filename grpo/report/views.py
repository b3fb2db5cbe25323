"""Views: what was read and judged of a run, as the template lays it out. Knows no HTML but the charts'.

The page's size is bounded, whatever the run's: texts share TEXT_BUDGET characters, coloured tokens TOKEN_BUDGET.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.metrics import is_share
from grpo.report.charts import Chart, Line, chart, scatter, stacked
from grpo.report.judging import (
    Finding,
    Paired,
    Suspicions,
    Verdict,
    headline_of,
    health,
    held_out_scores,
    paired,
    reward_names,
    suspicions,
    verdict,
)
from grpo.report.reading import Answer, Reading, Text, kinds_of, number, start_of, whole

TEXT_BUDGET = 1_400_000  # characters of prompts and completions on the page
SHORTEST, LONGEST = 300, 6_000  # characters of one
TOKEN_BUDGET = 12_000  # tokens that are coloured, of about 100 bytes each
HELD_OUT_SHOWN = 12  # prompts
EVALUATIONS_SHOWN = 8
PARTS_SHOWN = 8  # rewards with a curve of their own
STAGES = ("rollout", "audit", "score", "update", "sync")


@dataclass
class Shown:
    """A text as far as the page has it."""

    text: str
    left_out: int  # characters


@dataclass
class Token:
    """A token with its colours: weight w0 to w8 (4 is none), gap g0 to g4, entropy e0 to e4."""

    text: str
    colours: str
    numbers: str


@dataclass
class AnswerView:
    answer: Answer
    text: Shown
    tokens: list[Token]
    tokens_left_out: int


@dataclass
class GroupView:
    id: str
    number: int
    kinds: tuple[str, ...]
    asked: Shown
    gold: Shown
    row: int
    answers: list[AnswerView]


@dataclass
class StepView:
    step: int
    groups: list[GroupView]


@dataclass
class HeldOutView:
    """A held-out prompt at each evaluation."""

    asked: Shown
    gold: Shown
    row: int
    change: str
    answers: list[tuple[int, float, Answer, Shown]]  # (step, its share of right answers or mean reward, the first one)


@dataclass
class RunView:
    """A run on the page."""

    index: int
    name: str
    task: str
    reading: Reading
    verdict: Verdict
    steps_done: int
    steps_asked: int
    facts: list[tuple[str, str]]
    health: list[Finding]
    charts: list[Chart]
    suspicions: Suspicions
    scatter: Chart | None
    steps: list[StepView] = field(default_factory=list)
    held_out: list[HeldOutView] = field(default_factory=list)
    suspects: list[tuple[Answer, Shown, Shown]] = field(default_factory=list)  # answer, its text, what was asked
    chosen: list[tuple[str, str, str]] = field(default_factory=list)  # (field, value, from) that are no defaults
    defaults: list[tuple[str, str]] = field(default_factory=list)

    @property
    def start(self) -> dict[str, Any]:
        """The last line of starts.jsonl; empty texts where there is none."""
        return self.reading.starts[-1] if self.reading.starts else start_of({})

    @property
    def method(self) -> str:
        """What it learns from."""
        return str(_dict(self.reading.config.get("config")).get("method", "grpo"))

    @property
    def by_token(self) -> bool:
        """Whether each token has an advantage of its own, and a completion none."""
        return _dict(self.reading.config.get("config")).get("advantage") == "gae"

    @property
    def is_done(self) -> bool:
        return self.steps_done >= self.steps_asked


class Cutter:
    """Cuts every text to the same length, so that all of them fit."""

    def __init__(self, texts: int):
        self.longest = max(SHORTEST, min(LONGEST, TEXT_BUDGET // max(1, texts)))

    def __call__(self, text: Text) -> Shown:
        return Shown(text.text[: self.longest], max(0, text.length - self.longest))


def run_view(index: int, reading: Reading, budget: float = 1.0) -> RunView:
    """budget: the run's share of the page."""
    answers = sum(map(len, reading.answers.steps.values()))
    cut = Cutter(int((answers + HELD_OUT_SHOWN * EVALUATIONS_SHOWN) / budget))
    judged = suspicions(reading)
    config, origins = (_dict(reading.config.get(name)) for name in ("config", "origins"))
    # Where it lies is of this machine alone, and a page is passed on.
    config = {name: value for name, value in config.items() if name != "run_dir"}
    # Steps of what is taught have no reward.
    of_steps = (reading.metrics.get(name, {}) for name in ("reward/mean", "lessons/epoch"))
    done = 1 + max((step for steps in of_steps for step in steps), default=-1)
    changed = {name: str(origin) for name, origin in origins.items() if origin != "default" and name != "run_dir"}
    return RunView(
        index=index,
        name=reading.folder.resolve().name,
        task=str(reading.config.get("name", "")),
        reading=reading,
        verdict=verdict(reading),
        steps_done=done,
        steps_asked=whole(config.get("steps", done)),
        facts=facts(reading),
        health=health(reading),
        charts=charts(reading),
        suspicions=judged,
        scatter=scatter("Reward against length", judged.points, "tokens"),
        steps=[_step(index, reading, step, cut, TOKEN_BUDGET * budget) for step in reading.answers.steps],
        held_out=_held_out(reading, cut),
        suspects=[(each, cut(each.text), cut(reading.prompt(each.prompt)["asked"])) for each in judged.wrong_and_paid],
        chosen=[(name, _value(config.get(name)), origin) for name, origin in changed.items()],
        defaults=[(name, _value(value)) for name, value in config.items() if name not in changed],
    )


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _value(value: object) -> str:
    return value if isinstance(value, str) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# ---- numbers


def facts(reading: Reading) -> list[tuple[str, str]]:
    """What stands under the verdict."""
    metrics = reading.metrics
    tokens = sum(
        seconds * metrics.get("speed/tokens_per_second", {}).get(step, 0.0)
        for step, seconds in metrics.get("time/step", {}).items()
    )
    seconds = sum(value for value in metrics.get("time/step", {}).values() if math.isfinite(value))
    peak = max((value for value in metrics.get("memory/peak_gib", {}).values() if math.isfinite(value)), default=None)
    card = reading.starts[-1]["memory_gib"] if reading.starts else math.nan
    what = "tokens taught" if reading.is_taught else "tokens sampled"
    found = [("time in steps", in_time(seconds)), (what, in_count(tokens))]
    if peak is not None:
        of_card = f" of {card:.0f}" if math.isfinite(card) else ""
        found.append(("peak memory", f"{peak:.1f}{of_card} GiB"))
    return found


def in_time(seconds: float) -> str:
    """ "1 h 5 min", "48 s"."""
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if hours == 0 else f"{hours} h {minutes - 60 * hours} min"


def in_count(count: float) -> str:
    """ "1.2 M"."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def charts(reading: Reading) -> list[Chart]:
    """In the order of the page."""
    m = reading.metrics
    rewards = [Line("total", m.get("reward/mean", {}), 0, reading.bands.get("reward/mean", {}))]
    right, wrong = ({step: pair[i] for step, pair in reading.right_lengths.items()} for i in (0, 1))
    made = [
        _loss_chart(reading),
        chart("Reward", rewards, "mean of a step; the band holds the middle 80% of its completions"),
        _held_out_chart(reading),
        *(
            chart(name.removeprefix("reward/"), [Line(name, m[name], 1, reading.bands.get(name, {}))], "one reward")
            for name in reward_names(reading)[:PARTS_SHOWN]
        ),
        chart(
            "Length",
            [
                Line("all", m.get("completion/length", {}), 0),
                Line("right", right, 2, is_thin=True),
                Line("wrong", wrong, 3, is_thin=True),
            ],
            "tokens of an answer" if reading.is_taught else "tokens of a completion",
            zero=True,
        ),
        chart("Cut off", [Line("cut off", m.get("completion/truncated", {}), 0)], "share of completions", "%", True),
        chart("Entropy", [Line("entropy", m.get("policy/entropy", {}), 0)], "nats a token", zero=True),
        chart("Mismatch", [Line("KL", m.get("mismatch/kl", {}), 0)], "KL divergence of sampler and trainer"),
        chart("Clipped", [Line("clipped", m.get("policy/clip_fraction", {}), 0)], "share of tokens", "%", True),
        chart("Equal groups", [Line("equal", m.get("groups/zero_variance", {}), 0)], "share of groups", "%", True),
        chart("Gradient norm", [Line("norm", m.get("optim/grad_norm", {}), 0)], "before clipping", zero=True),
        stacked("Time", [Line(s, m.get(f"time/{s}", {}), i) for i, s in enumerate(STAGES)], "seconds of a step"),
        _memory_chart(reading),
    ]
    return [each for each in made if each is not None]


def _loss_chart(reading: Reading) -> Chart | None:
    """Of a run that is taught by given answers; that of GRPO's loss says nothing."""
    m = reading.metrics
    if not reading.is_taught:
        return None
    margin = [Line("margin", m["dpo/margin"], 1, is_thin=True)] if "dpo/margin" in m else []
    return chart("Loss", [Line("loss", m.get("policy/loss", {}), 0), *margin], "of a step")


def _held_out_chart(reading: Reading) -> Chart | None:
    m = reading.metrics
    names = [n for n in m if n.startswith("eval/") and "@" in n and n.count("/") == 1] or [headline_of(reading)]
    lines = []
    for place, name in enumerate(names):
        ends = [m.get(f"{name}/{end}", {}) for end in ("low", "high")]
        band = {step: (ends[0][step], ends[1][step]) for step in ends[0] if step in ends[1]} if place == 0 else {}
        lines.append(Line(name.removeprefix("eval/"), m.get(name, {}), place, band, is_thin=place > 0))
    return chart("Held-out", lines, "with the 95% interval", "%" if is_share(names[0]) else "g")


def _memory_chart(reading: Reading) -> Chart | None:
    peaks = reading.metrics.get("memory/peak_gib", {})
    card = reading.starts[-1]["memory_gib"] if reading.starts else math.nan
    whole = [Line("the card", dict.fromkeys(peaks, card), 3, is_thin=True)] if math.isfinite(card) else []
    return chart("Memory", [Line("peak", peaks, 0), *whole], "GiB, the most so far", zero=True)


# ---- texts


def _step(index: int, reading: Reading, step: int, cut: Cutter, tokens: float) -> StepView:
    left = int(tokens / max(1, len(reading.answers.steps)))  # tokens of this step
    groups = []
    for number_, answers in reading.of_step(step).items():
        views = []
        for answer in answers:
            colored, left_out = tokens_of(answer, left, is_sampled=not reading.is_taught)
            left -= len(colored)
            views.append(AnswerView(answer, cut(answer.text), colored, left_out))
        prompt = reading.prompt(answers[0].prompt)
        groups.append(
            GroupView(
                *(f"r{index}-s{step}-g{number_}", number_, kinds_of(answers)),
                *(cut(prompt["asked"]), cut(prompt["gold"]), prompt["row"], views),
            )
        )
    return StepView(step, groups)


def tokens_of(answer: Answer, most: int, is_sampled: bool) -> tuple[list[Token], int]:
    """The tokens of a completion that was traced, at most so many, and how many are left out. is_sampled: by an engine,
    from which the policy has a distance."""
    trace = answer.trace or {}
    columns = [trace.get(name) for name in ("texts", "weight", "gap", "entropy", "logprob")]
    if most <= 0 or not all(isinstance(column, list) for column in columns):
        return [], 0
    rows = list(zip(*columns, strict=False))[:most]  # type: ignore
    found = []
    for text, *numbers in rows:
        weight, gap, entropy, logprob = map(number, numbers)
        colours = f"w{_signed(weight)} g{_level(abs(gap), GAPS)} e{_level(entropy, ENTROPIES)}"
        p = math.exp(min(0.0, logprob)) if math.isfinite(logprob) else math.nan
        between = f"gap {gap:.1g}, " if is_sampled else ""
        said = f"weight {weight:+.2f}, {between}entropy {entropy:.2f}, p {p:.3f}"
        found.append(Token(text if isinstance(text, str) else "", colours, said))
    return found, max(0, answer.tokens - len(found))


GAPS = (1e-3, 1e-2, 0.1, 0.5)  # nats
ENTROPIES = (0.05, 0.3, 1.0, 2.0)
WEIGHTS = (0.05, 0.5, 1.0, 1.5)


def _level(value: float, bounds: Sequence[float]) -> int:
    return sum(value >= bound for bound in bounds)


def _signed(weight: float) -> int:
    """0 to 8: pushed down much ... not at all ... up much."""
    level = _level(abs(weight), WEIGHTS)
    return 4 + level if weight > 0 else 4 - level


CHANGES = {
    "got right": "wrong before, right after",
    "got wrong": "right before, wrong after",
    "never right": "never right",
    "always right": "right before and after",
    "in between": "in between",
    "reward": "mean reward",
}


def _held_out(reading: Reading, cut: Cutter) -> list[HeldOutView]:
    """Some held-out prompts, of each kind of change some."""
    steps = sorted(reading.held_out)
    if not steps:
        return []
    spread = steps[:: -(-len(steps) // EVALUATIONS_SHOWN)]
    spread = [*spread[: EVALUATIONS_SHOWN - 1], steps[-1]] if spread[-1] != steps[-1] else spread
    headline = "eval/reward" if reading.solved is None else "eval/pass@1"
    scores = {step: held_out_scores(reading, step, headline) for step in {*spread, steps[0]}}
    first, last = scores[steps[0]], scores[steps[-1]]
    kinds: dict[str, list[str]] = {}
    for id in reading.held_out_prompts:
        if id in first and id in last:
            kinds.setdefault(_change(first[id], last[id], headline), []).append(id)
    share = -(-HELD_OUT_SHOWN // max(1, len(kinds)))
    chosen = [(kind, id) for kind in CHANGES for id in kinds.get(kind, [])[:share]][:HELD_OUT_SHOWN]
    views = []
    for kind, id in chosen:
        prompt = reading.prompt(id)
        answers = []
        for step in spread:
            if several := reading.held_out[step].get(id):
                answers.append((step, scores[step][id], several[0], cut(several[0].text)))
        change = "" if kind == "reward" and reading.is_taught else CHANGES[kind]  # each answer says what it is worth
        views.append(HeldOutView(cut(prompt["asked"]), cut(prompt["gold"]), prompt["row"], change, answers))
    return views


def _change(first: float, last: float, headline: str) -> str:
    if "reward" in headline:
        return "reward"
    if first < 0.5 <= last:
        return "got right"
    if last < 0.5 <= first:
        return "got wrong"
    return {0.0: "never right", 2.0: "always right"}.get(first + last, "in between")


# ---- several runs


@dataclass
class Comparison:
    """Runs side by side."""

    charts: list[Chart]
    differences: list[tuple[str, list[str]]]  # (field of the configuration, its value in each run)
    tests: list[tuple[str, Paired | None]]  # (name of the run, its last held-out score against the first run's)


COMPARED = (
    ("Reward", "reward/mean", "g"),
    ("Held-out pass@1", "eval/pass@1", "%"),
    ("Held-out reward", "eval/reward", "g"),
    ("Length", "completion/length", "g"),
    ("Cut off", "completion/truncated", "%"),
    ("Entropy", "policy/entropy", "g"),
    ("Equal groups", "groups/zero_variance", "%"),
    ("Seconds a step", "time/step", "g"),
)


def compare(runs: Sequence[RunView]) -> Comparison:
    """The first run is what the others are compared with."""
    made = [
        chart(title, [Line(run.name, run.reading.metrics.get(metric, {}), run.index) for run in runs], "", form)
        for title, metric, form in COMPARED
    ]
    configs = [dict([*((name, value) for name, value, _ in run.chosen), *run.defaults]) for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    rows = [(name, [config.get(name, "–") for config in configs]) for name in names]
    return Comparison(
        charts=[each for each in made if each is not None],
        differences=[(name, values) for name, values in rows if len(set(values)) > 1],
        tests=[(run.name, _against(runs[0], run)) for run in runs[1:]],
    )


def _against(one: RunView, other: RunView) -> Paired | None:
    last: list[Mapping[str, float]] = []
    for run in (one, other):
        steps = sorted(run.reading.held_out)
        last.append(held_out_scores(run.reading, steps[-1], run.verdict.headline) if steps else {})
    return paired(*last)


def form_of(verdict_: Verdict) -> str:
    """How its numbers are shown."""
    return "%1" if verdict_.is_share else "g"
