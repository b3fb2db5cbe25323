"""Held-out scores: pass@1, pass@k, majority@k, or the mean reward, each with a 95% interval. Knows nothing of training.

The same prompts and the same engine each time, at the training temperature, n samples a prompt of which c are right:

    pass@1       c / n
    pass@k       1 - C(n - c, k) / C(n, k), unbiased: Chen et al. 2021, arXiv 2107.03374, equation 1
    majority@k   whether the answer given most often by k samples is right; ties count their share of right answers

Every score is the mean of one number in [0, 1] a prompt, so its interval is that of a clustered proportion: Wilson's
(1927) with the effective sample size p (1 - p) / SE^2, SE the standard error between prompts (Dean and Pagano 2015).
Where a task says of no answer that it is right, the score is the mean reward, with the normal interval of the prompts'
means.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from grpo.exchange import Share
from grpo.metrics import HEADLINES, is_share
from grpo.rewards import Scorer
from grpo.rollout import Engine
from grpo.rollout.sampling import sample_groups
from grpo.types import Group, Prompt, sampled_tokens
from grpo.world import ALONE, World

Measure = Callable[[list[Group]], dict[str, float]]  # scored groups -> held-out scores

Z_95 = 1.959964  # of the normal distribution, two-sided 95%


@dataclass(frozen=True)
class Evaluator:
    """What is asked, how often, and what is measured of the answers."""

    prompts: list[Prompt]
    score: Scorer
    measure: Measure
    samples: int  # n
    max_tokens: int  # of a completion
    seed: int
    world: World = ALONE

    def __call__(self, engine: Engine) -> dict[str, float]:
        """{"eval/pass@1": 0.31, "eval/pass@1/low": ..., "eval/pass@1/high": ..., ...}."""
        return self.scores(self.answers(engine))

    def answers(self, engine: Engine, step: int = 0) -> list[Group]:
        """What the policy says to the held-out prompts, and what the rewards say of it after so many steps."""
        share = Share(self.world, self.prompts, self.samples * self.max_tokens)
        with self.score.begun(step) as scoring:
            own = sample_groups(
                engine, share.prompts, self.samples, self.max_tokens, self.seed, share.rows, scoring.begin
            )
            scoring.finish(own)
        return share.exchange(own, self.score.failed())[0]

    def scores(self, groups: list[Group]) -> dict[str, float]:
        """Of these answers."""
        rewards = torch.cat([group.rewards for group in groups])
        failed = sum(len(members) for group in groups for members in group.failed.values())
        return {
            **self.measure(groups),
            "eval/reward": float(rewards[~rewards.isnan()].mean()),
            "eval/length": sampled_tokens(groups) / (len(groups) * self.samples),
            "eval/truncated": truncated_share(groups),
            **({"eval/failed": failed} if failed else {}),
        }


def measure_solved(
    solved: tuple[str, float], answer: Callable[[str], str | None], k: int, groups: list[Group]
) -> dict[str, float]:
    """pass@1, pass@k and majority@k, where a completion can be right.

    solved: (name of a reward, its value from which a completion is right).
    answer: what a completion votes for in majority@k; None abstains.

    A completion that the reward failed on is neither right nor wrong: it is left out, and a prompt of which fewer are
    left than a score needs.
    """
    name, value = solved
    known = [[at for at in range(len(g.completions)) if at not in g.failed.get(name, ())] for g in groups]
    right = [(group.parts[name][own] >= value).tolist() for group, own in zip(groups, known, strict=True)]
    votes = [[answer(group.completions[at].text) for at in own] for group, own in zip(groups, known, strict=True)]
    majorities = [majority_at_k(vote, row, k) for vote, row in zip(votes, right, strict=True) if len(row) >= k]
    return {
        **_named("eval/pass@1", interval([sum(row) / len(row) for row in right if row])),
        **_named(f"eval/pass@{k}", interval([pass_at_k(len(row), sum(row), k) for row in right if len(row) >= k])),
        **_named(f"eval/majority@{k}", interval(majorities)),
    }


def measure_reward(groups: list[Group]) -> dict[str, float]:
    """The mean reward with its interval, where nothing is right or wrong. What has no score is left out."""
    scored = [group.rewards[~group.rewards.isnan()] for group in groups]
    return _named("eval/reward", normal_interval([float(rewards.mean()) for rewards in scored if len(rewards)]))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples, drawn from the n of which c are right, is right."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(votes: list[str | None], right: list[bool], k: int) -> float:
    """The mean, over the full runs of k samples in order, of whether the most frequent answer is right, in [0, 1]."""
    return sum(_majority(votes[s : s + k], right[s : s + k]) for s in _starts(len(votes), k)) / len(
        _starts(len(votes), k)
    )


def _starts(n: int, k: int) -> range:
    return range(0, n - k + 1, k)


def _majority(votes: list[str | None], right: list[bool]) -> float:
    counts = Counter(vote for vote in votes if vote is not None)
    most = max(counts.values(), default=0)
    leaders = {vote for vote, count in counts.items() if count == most}
    correct = {vote for vote, is_right in zip(votes, right, strict=True) if is_right}
    return len(leaders & correct) / max(1, len(leaders))


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high) of one number in [0, 1] a prompt: the 95% interval of the mean; NaN of no prompt."""
    if not values:
        return math.nan, math.nan, math.nan
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
    # Where all prompts agree there is no spread to learn from: then each prompt counts as one trial.
    effective = mean * (1 - mean) / (variance / n) if variance > 0 else float(n)
    z2 = Z_95**2 / effective
    center = (mean + z2 / 2) / (1 + z2)
    half = Z_95 / (1 + z2) * math.sqrt(mean * (1 - mean) / effective + z2 / (4 * effective))
    return mean, min(mean, max(0.0, center - half)), max(mean, min(1.0, center + half))


def normal_interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high) of one number of any size a prompt: the normal 95% interval of the mean; of one alone, none."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    half = Z_95 * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return mean, mean - half, mean + half


def _named(name: str, estimate: tuple[float, float, float]) -> dict[str, float]:
    mean, low, high = estimate
    return {name: mean, f"{name}/low": low, f"{name}/high": high}


def truncated_share(groups: list[Group]) -> float:
    """Share of completions that were cut off by the token limit."""
    finishes = [completion.finish for group in groups for completion in group.completions]
    return finishes.count("length") / len(finishes)


def score_lines(scores: dict[str, float]) -> Iterator[str]:
    """ "pass@1 31.2% (95% interval 27.5% to 35.1%)" for each score that has an interval."""
    for name, value in scores.items():
        if f"{name}/low" in scores:
            low, high = scores[f"{name}/low"], scores[f"{name}/high"]
            form = format_of(name)
            interval = "" if math.isnan(low) else f" (95% interval {low:{form}} to {high:{form}})"
            yield f"{name.removeprefix('eval/')} {value:{form}}{interval}"


def comparison(before: dict[str, float], after: dict[str, float]) -> str:
    """The final line: first against last held-out score."""
    name = headline(after)
    form = format_of(name)
    if f"{name}/low" not in before:  # the task's `solved` was changed on the way
        return f"held-out {name.removeprefix('eval/')}: {after[name]:{form}} after; before, something else was measured"
    ends = [(s[f"{name}/low"], s[f"{name}/high"]) for s in (before, after)]
    told = ["" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]" for low, high in ends]
    first, last = f"{before[name]:{form}}{told[0]}", f"{after[name]:{form}}{told[1]}"
    gain = after[name] - before[name]
    gained = f"{100 * gain:+.1f} points" if is_share(name) else f"{gain:+.3f}"
    apart = ends[1][0] > ends[0][1] or ends[1][1] < ends[0][0]
    verdict = "the 95% intervals are apart" if apart else "the 95% intervals overlap"
    verdict = verdict if all(told) else "one alone has no interval"
    return f"held-out {name.removeprefix('eval/')}: {first} before, {last} after: {gained}; {verdict}"


def headline(scores: dict[str, float]) -> str:
    """The one of the scores that says how good the policy is."""
    return next(name for name in HEADLINES if f"{name}/low" in scores)


def standing(scores: dict[str, float]) -> tuple[float, float]:
    """(the headline's score, what decides where two are equal): the greater is the better policy.

    Few held-out pairs are soon all right, and few prompts are often equally many right. The loss of answers that are
    given, where there are any, still tells which policy is surer. Without such answers the first stays the best.
    """
    return scores[headline(scores)], -scores.get("eval/loss", 0.0)


def format_of(name: str) -> str:
    """Shares are shown as percentages, rewards as they are."""
    return ".1%" if is_share(name) else ".3f"
