"""Judging: what a run's numbers say: the verdict, its health, what looks like a reward that was tricked.

Pure functions, which know nothing of pages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from grpo.metrics import HEADLINES, METRICS, is_share
from grpo.report.reading import Answer, Reading

Z_95 = 1.959964
EXACT_UP_TO = 14  # prompts whose signs are all tried
SIGN_FLIPS = 20_000  # that are drawn otherwise
SIGNIFICANT = 0.05
LAST_SHARE = 0.1  # of the steps, of which a metric's value is the mean


# ---- the verdict


@dataclass(frozen=True)
class Paired:
    """How a score differs between two sets of answers to the same prompts."""

    prompts: int
    difference: float  # the mean over the prompts
    low: float  # its 95% interval
    high: float
    p: float  # of a difference so large if none were there
    better: int  # prompts
    worse: int

    @property
    def has_interval(self) -> bool:
        """Where all prompts differ by the same there is no spread to tell it from."""
        return self.low < self.high


def paired(before: Mapping[str, float], after: Mapping[str, float]) -> Paired | None:
    """{prompt: score} twice -> the difference, over the prompts that both have; None where they are fewer than two.

    p: by the paired permutation test: without a difference each prompt's could as well be of the other sign (Fisher
    1935, section 21). Exact for few prompts, else of SIGN_FLIPS draws, itself among them.
    """
    common = [id for id in before if id in after]
    gains = np.array([after[id] - before[id] for id in common], dtype=np.float64)
    gains = gains[np.isfinite(gains)]
    if len(gains) < 2:
        return None
    mean, error = float(gains.mean()), float(gains.std(ddof=1)) / math.sqrt(len(gains))
    if len(gains) <= EXACT_UP_TO:
        signs = np.array(list(product((1.0, -1.0), repeat=len(gains))))
    else:
        drawn = np.random.default_rng(0).integers(0, 2, (SIGN_FLIPS - 1, len(gains)), dtype=np.int8)
        signs = np.concatenate([np.ones((1, len(gains)), dtype=np.int8), 2 * drawn - 1])
    sums = np.abs(signs @ gains)
    p = float((sums >= abs(gains.sum()) - 1e-9).mean())
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    return Paired(len(gains), mean, mean - Z_95 * error, mean + Z_95 * error, p, better, worse)


def held_out_scores(reading: Reading, step: int, headline: str) -> dict[str, float]:
    """prompt -> the share of its answers that are right, or their mean reward."""
    answers = reading.held_out.get(step, {})
    return {id: _mean([_worth(each, headline) for each in several]) for id, several in answers.items()}


def _worth(answer: Answer, headline: str) -> float:
    return float(bool(answer.is_right)) if "@" in headline else answer.reward


@dataclass(frozen=True)
class Score:
    """A held-out score with its interval."""

    step: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What a run came to."""

    headline: str  # the metric
    first: Score | None
    last: Score | None
    best: Score | None
    paired: Paired | None
    judgement: str  # better, worse, equal, unknown

    @property
    def is_share(self) -> bool:
        return is_share(self.headline)


def verdict(reading: Reading) -> Verdict:
    """First against last held-out score."""
    headline = headline_of(reading)
    scores = [
        Score(step, value, _at(reading, f"{headline}/low", step), _at(reading, f"{headline}/high", step))
        for step, value in sorted(reading.metrics.get(headline, {}).items())
        if math.isfinite(value)
    ]
    if not scores:
        return Verdict(headline, None, None, None, None, "unknown")
    last, best = scores[-1], max(scores, key=lambda score: score.value)
    # Other held-out prompts may have been asked in between: then the comparison begins where these were.
    asked = set(reading.held_out.get(last.step, {}))
    first = next(score for score in scores if asked <= set(reading.held_out.get(score.step, asked)))
    if len(scores) == 1:
        return Verdict(headline, first, last, best, None, "unknown")
    test = paired(*(held_out_scores(reading, score.step, headline) for score in (first, last)))
    return Verdict(headline, first, last, best, test, _judgement(first, last, test))


def paired_line(folder: Path) -> Iterator[str]:
    """The test of first against last held-out score in a line, where there is one.

    Raises:
        UserError: it is no run's folder.
    """
    reading = Reading(folder)
    reading.advance()
    found = verdict(reading)
    if test := found.paired:
        scale, form, unit = (100, "+.1f", " points") if found.is_share else (1, "+.3f", "")
        difference, low, high = (format(scale * value, form) for value in (test.difference, test.low, test.high))
        p = "p < 0.001" if test.p < 0.001 else f"p = {test.p:.3f}"
        interval = f" (95%: {low} to {high})" if test.has_interval else ""
        yield (
            f"paired over {test.prompts} prompts: {difference}{unit}{interval}, {p}; {test.better} of them did better, "
            f"{test.worse} worse"
        )


def headline_of(reading: Reading) -> str:
    """The held-out score that says how good a policy is."""
    return next((name for name in HEADLINES if f"{name}/low" in reading.metrics), HEADLINES[0])


def _judgement(first: Score, last: Score, test: Paired | None) -> str:
    """By the paired test; by the intervals of the scores where the answers were not recorded."""
    apart = test.p < SIGNIFICANT if test else last.low > first.high or last.high < first.low
    if not apart:
        return "equal"
    return "better" if (test.difference if test else last.value - first.value) > 0 else "worse"


def _at(reading: Reading, name: str, step: int) -> float:
    return reading.metrics.get(name, {}).get(step, math.nan)


# ---- health


@dataclass(frozen=True)
class Finding:
    """A row of the table of health."""

    metric: str
    meaning: str
    healthy: str
    value: float  # the mean of the last steps
    unit: str
    state: str  # well, was (outside before), outside
    first_outside: int | None  # step
    outside_steps: int
    steps: int
    outside: str  # what that means
    remedy: str


OF_ROLLOUTS = ("policy/entropy", "groups/trained")  # whose range, and the remedy outside of it, is of what is sampled


def health(reading: Reading) -> list[Finding]:
    """Of each metric that has a range and that the run has, the worst first."""
    findings = []
    for metric in METRICS:
        points = sorted((s, v) for s, v in reading.metrics.get(metric.name, {}).items() if math.isfinite(v))
        if metric.health is None or not points or (reading.is_taught and metric.name in OF_ROLLOUTS):
            continue
        low, high = metric.health.low, metric.health.high
        outside = [step for step, value in points if not low <= value <= high]
        value = _mean([value for _, value in points[-max(1, round(LAST_SHARE * len(points))) :]])
        state = "well" if not outside else "was" if low <= value <= high else "outside"
        findings.append(
            Finding(
                *(metric.name, metric.meaning, metric.healthy, value, metric.unit, state),
                *(outside[0] if outside else None, len(outside), len(points)),
                *(metric.health.outside, metric.health.remedy),
            )
        )
    return sorted(findings, key=lambda finding: ["outside", "was", "well"].index(finding.state))


# ---- rewards that may have been tricked


@dataclass(frozen=True)
class Suspicions:
    """What is worth a look by a human."""

    wrong_and_paid: list[Answer]  # wrong answers that earned most
    mean_right: float  # what right answers of the sample earned
    openings: list[tuple[int, str, float]]  # (step, the most frequent opening, its share), of some steps
    opening_before: float  # that share in the first steps
    opening_after: float  # and in the last
    correlation: float  # of reward and length; NaN where either stands still
    paid: list[tuple[str, float, float]]  # (reward, its mean in the first steps, in the last ones)
    points: list[tuple[int, float, bool | None]]


def suspicions(reading: Reading) -> Suspicions:
    """The signs of rewards that are paid for something else than what is wanted."""
    shares = [(step, opening, count / of) for step, (opening, count, of) in sorted(reading.openings.items())]
    edge = max(1, round(LAST_SHARE * len(shares)))
    spread = sorted({*range(0, len(shares), max(1, len(shares) // 6)), len(shares) - 1}) if shares else []
    right = [reward for _, reward, is_right in reading.points if is_right]
    lengths = np.array([length for length, _, _ in reading.points], dtype=np.float64)
    rewards = np.array([reward for _, reward, _ in reading.points], dtype=np.float64)
    moves = len(lengths) > 2 and lengths.std() > 0 and rewards.std() > 0
    return Suspicions(
        wrong_and_paid=reading.suspects,
        mean_right=_mean(right),
        openings=[shares[place] for place in spread],
        opening_before=_mean([share for _, _, share in shares[:edge]]),
        opening_after=_mean([share for _, _, share in shares[-edge:]]),
        correlation=float(np.corrcoef(lengths, rewards)[0, 1]) if moves else math.nan,
        points=reading.points,
        paid=[(name.removeprefix("reward/"), *_ends(reading.metrics[name])) for name in reward_names(reading)],
    )


def reward_names(reading: Reading) -> list[str]:
    """The metrics of the rewards, without their failures and without the parts that a reward names."""
    return [name for name in reading.metrics if re.fullmatch("reward/(?!(mean|std)$)[^/]+", name)]


def _ends(points: Mapping[int, float]) -> tuple[float, float]:
    """The means of the first and of the last steps."""
    values = [value for _, value in sorted(points.items()) if math.isfinite(value)]
    edge = max(1, round(LAST_SHARE * len(values)))
    return _mean(values[:edge]), _mean(values[-edge:])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
