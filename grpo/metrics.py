"""Metrics: every number that a run writes down, once: its name, what it means, its unit, where it should be.

Knows nothing of how one is computed. The step line's columns are made from this table, the report's table of a run's
health too, and docs/metrics.md is written from it (scripts/write_metrics_table.py). In a name, <...> stands for what a
run puts there: a reward, k, a stage.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

# Metrics of these kinds may differ between two runs that are otherwise equal.
TIMING_PREFIXES = ("time/", "speed/", "memory/")

# Which held-out score says how good a policy is: the first that has an interval. The others have no column.
HEADLINES = ("eval/pass@1", "eval/reward", "eval/accuracy", "eval/logprob")
# The ways of teaching (`Config.algorithm`) whose step line may have a column: those whose answers are sampled, and all.
SAMPLED = ("grpo", "ppo")
METHODS = (*SAMPLED, "sft", "dpo")

_STANDS_FOR = {"<reward>": "[^/]+", "<part>": ".+", "<name>": ".+", "<stage>": ".+", "<k>": r"\d+"}


@dataclass(frozen=True)
class Column:
    """How the step line shows a metric. `rank` says what goes first when the terminal is narrow: the highest."""

    title: str  # its words stand one above the other; empty: the metric's own name
    spec: str  # of format(), without a width
    width: int  # that the numbers need
    rank: int
    of: tuple[str, ...] = METHODS


@dataclass(frozen=True)
class Health:
    """Where a metric is when all is well, in numbers, and what to think where it is not."""

    outside: str  # what that means
    remedy: str  # what to do about it
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Metric:
    """A row of the table."""

    name: str
    meaning: str
    unit: str
    healthy: str = ""  # where it should be, if that can be said of every run
    interval: bool = False  # <name>/low and <name>/high, its 95% interval, are written with it
    optional: bool = False  # some runs have nothing to write under it
    column: Column | None = None

    @property
    def health(self) -> Health | None:
        """None where no number says that a run is well."""
        return _HEALTH.get(self.name)

    @property
    def pattern(self) -> re.Pattern[str]:
        """What the names match that a run writes this metric under."""
        ends = "(/low|/high)?" if self.interval else ""
        words = (_STANDS_FOR.get(word, re.escape(word)) for word in re.split("(<[^>]+>)", self.name))
        return re.compile("".join(words) + ends, re.DOTALL)


_ABOVE_0 = 1e-9

_HEALTH = {
    "reward/std": Health(
        "Every completion of a step earned the same: there is nothing to compare, and nothing is learnt.",
        "If all are right, take harder rows; if none is, easier ones, a reward that pays for part of the way, or a "
        "larger --group-size.",
        low=_ABOVE_0,
    ),
    "eval/truncated": Health(
        "Held-out answers are cut off before they are done: the score is too low.",
        "Raise --max-completion-tokens, or ask for shorter answers.",
        high=0.1,
    ),
    "completion/truncated": Health(
        "Completions are cut off before their answer, and are left out of the loss.",
        "Raise --max-completion-tokens, ask for shorter answers, or see whether the model ends its answers at all.",
        high=0.1,
    ),
    "groups/zero_variance": Health(
        "Most groups are all right or all wrong, and teach nothing.",
        "Early in a run: other rows, a larger --group-size, or --dynamic-sampling. Late, where the held-out score rose "
        "too, the task is solved; where it did not, the reward is earned by something else than right answers.",
        high=0.8,
    ),
    "groups/trained": Health(
        "A step had nothing to learn from.",
        "See reward/std and completion/truncated for why.",
        low=1,
    ),
    "policy/entropy": Health(
        "The policy has one answer to everything: it explores no more, and groups become equal.",
        "Where the score still has to rise: a lower --learning-rate, --clip-high 0.28 or more, a little "
        "--entropy-coef. Where all is solved it is what to expect.",
        low=0.01,
    ),
    "policy/clip_fraction": Health(
        "The update leaves the range in which the rollout speaks for the policy.",
        "Lower --learning-rate, --epochs or --mini-batches.",
        high=0.2,
    ),
    "policy/kept": Health(
        "A mask drops most of the tokens from the loss.",
        "Look at --off-policy-mask and --top-entropy; mismatch/kl says how far sampler and trainer are apart.",
        low=0.1,
    ),
    "mismatch/kl": Health(
        "The engine's numbers are far from the policy's: what is learnt from is not what the policy would say.",
        "Keep --correction on. --engine torch samples with the policy's own numerics; please report the model.",
        high=1e-2,
    ),
    "mismatch/gap": Health(
        "Single tokens' log-probabilities differ by a tenth and more between engine and policy.",
        "As for mismatch/kl.",
        high=0.1,
    ),
    "mismatch/correction": Health(
        "The correction of the engine's numerics changes the weights of tokens much.",
        "As for mismatch/kl.",
        low=0.8,
        high=1.25,
    ),
    "optim/grad_norm": Health(
        "A step had no gradient: nothing was learnt in it.",
        "See groups/zero_variance: equal rewards teach nothing.",
        low=_ABOVE_0,
    ),
    "sync/unproved": Health(
        "For many updates the engine was not seen to follow the policy, because the policy hardly moved.",
        "Usually the gradient is 0: see optim/grad_norm.",
        high=20,
    ),
}

# In the order in which the step line shows those that have a column.
METRICS = (
    Metric("reward/mean", "Weighted sum of the rewards, mean of the step's completions.", "reward", "rises",
           column=Column("mean reward", ".3f", 7, 0, SAMPLED)),
    Metric("reward/<reward>/failed", "Completions that the reward failed on (an exception, a time-out, a process that "
           "ended, no number): they have no part in the step, and completions.jsonl says why.", "completions",
           "not there, or few", optional=True),
    Metric("reward/<reward>/<part>", "What one part gave of a reward that names its parts.", "reward", optional=True),
    Metric("reward/<reward>", "What one reward gave, without its weight: mean of the completions that it applies to.",
           "reward", column=Column("", ".2f", 6, 3, SAMPLED)),
    Metric("reward/std", "Standard deviation of the weighted sum over the step's completions.", "reward", "above 0"),
    Metric("eval/pass@1", "Held-out: share of completions that are right.", "share", "rises", interval=True,
           optional=True, column=Column("held-out pass@1", ".1%", 6, 1)),
    Metric("eval/pass@<k>", "Held-out: probability that at least one of k completions is right.", "share",
           interval=True, optional=True),
    Metric("eval/majority@<k>", "Held-out: probability that the answer given most often by k completions is right.",
           "share", interval=True, optional=True),
    Metric("eval/reward", "Held-out: weighted sum of the rewards, mean of the completions; with its interval where a "
           "task says of no answer that it is right.", "reward", "rises", interval=True,
           column=Column("held-out reward", ".3f", 7, 1)),
    Metric("eval/accuracy", "Held-out: share of pairs whose chosen answer has gained on the rejected one, from the "
           "reference policy on; a tie is a half.", "share", "rises above 50%", interval=True, optional=True,
           column=Column("held-out accuracy", ".1%", 8, 1, ("dpo",))),
    Metric("eval/margin", "Held-out: how much more the chosen answer has gained than the rejected one: the difference "
           "of their implicit rewards.", "reward", "rises", interval=True, optional=True),
    Metric("eval/logprob", "Held-out: mean log p of a token of the given answers.", "nats a token", "rises",
           interval=True, optional=True, column=Column("held-out log p", ".3f", 8, 1, ("sft",))),
    Metric("eval/loss", "Held-out: the loss of given answers or pairs, without `--sft-coef`.", "1", "falls",
           optional=True),
    Metric("eval/length", "Held-out: mean length of a completion.", "tokens"),
    Metric("eval/failed", "Held-out: completions that a reward failed on, which are left out of what it measures.",
           "completions", "not there, or few", optional=True),
    Metric("eval/truncated", "Held-out: share of completions cut off by the token limit.", "share", "below 10%"),
    Metric("completion/length", "Mean length of a completion.", "tokens",
           column=Column("mean length", ".0f", 5, 2)),
    Metric("completion/truncated", "Share of completions cut off by `--max-completion-tokens`.", "share", "below 10%",
           column=Column("cut off", ".0%", 4, 20, SAMPLED)),
    Metric("rollout/age", "Optimizer steps between the policy that sampled the completions and the one that is "
           "trained on them, with `--staleness`.", "updates", "1", optional=True),
    Metric("groups/zero_variance", "Share of groups whose rewards teach nothing, because all advantages are 0.",
           "share", "below 80%", column=Column("zero var.", ".0%", 4, 21, SAMPLED)),
    Metric("groups/trained", "Groups that have a part in the update.", "groups", "above 0"),
    Metric("groups/rolled_out", "Groups sampled for the step: more than it trains on with `--dynamic-sampling`.",
           "groups"),
    Metric("lessons/epoch", "How often the given answers or pairs were gone through.", "epochs", optional=True),
    Metric("dpo/accuracy", "Share of the step's pairs whose chosen answer has gained on the rejected one, from the "
           "reference policy on; a tie is a half.", "share", "rises above 50%", optional=True,
           column=Column("pairs right", ".0%", 5, 3, ("dpo",))),
    Metric("dpo/margin", "How much more the chosen answer has gained than the rejected one: the difference of their "
           "implicit rewards.", "reward", "rises", optional=True, column=Column("margin", ".3f", 7, 4, ("dpo",))),
    Metric("dpo/chosen", "Implicit reward of the chosen answer: beta x (log p - log p of the reference policy), or its "
           "mean a token.", "reward", optional=True),
    Metric("dpo/rejected", "The same of the rejected answer.", "reward", "falls", optional=True),
    Metric("policy/entropy", "Mean entropy of the policy where it sampled, at the sampling temperature.",
           "nats a token", "falls slowly, stays above 0", column=Column("entropy nats", ".3f", 6, 23)),
    Metric("policy/loss", "The loss of the step's update, mean of its optimizer steps. Of GRPO its size says nothing: "
           "the gradient does; of sft it is the mean -log p of a token that is taught.", "1",
           column=Column("loss", ".3f", 7, 0, ("sft", "dpo"))),
    Metric("value/loss", "`--advantage gae`: half the squared error of the value head, mean of the sampled tokens.",
           "reward squared", "falls", optional=True),
    Metric("value/explained_variance", "`--advantage gae`: share of the returns' variance that the value head knew "
           "before the update: 1 - var(return - value) / var(return). 0 is a head that says the same of everything.",
           "share", "rises above 0", optional=True, column=Column("values explain", ".2f", 6, 5, ("ppo",))),
    Metric("policy/clip_fraction", "Share of sampled tokens whose ratio the objective clips; 0 with one optimizer step "
           "a rollout.", "share", "below 20%"),
    Metric("policy/kept", "Share of sampled tokens that `--off-policy-mask` and `--top-entropy` leave in the loss.",
           "share", "above 10%"),
    Metric("policy/split_batches", "Batches that the memory did not hold and that were computed in two halves: the "
           "result is the same, and later batches are no larger than the halves.", "batches", "0 but for a first step"),
    Metric("mismatch/kl", "KL divergence from sampler to trainer, estimated on the sampled tokens (k3): how far the "
           "engine's numerics are from the policy's.", "nats a token", "about 1e-13 in float32, below 1e-2 in bf16",
           column=Column("mismatch KL", ".1e", 7, 24, SAMPLED)),
    Metric("mismatch/gap", "Mean |log p of the trainer - log p of the sampler| of the sampled tokens.",
           "nats a token", "below 0.1"),
    Metric("mismatch/correction", "Mean factor by which `--correction` weighs a token.", "1", "about 1"),
    Metric("mismatch/rank", "Where the sampled tokens stand among all that could have come, likeliest first: 0.5 where "
           "they are drawn from the policy.", "share of probability", "about 0.5", optional=True),
    Metric("optim/grad_norm", "Norm of the gradient before it is clipped: the largest of the step's optimizer steps.",
           "1", "above 0, no lasting rise", column=Column("gradient norm", ".3f", 7, 25)),
    Metric("optim/learning_rate", "AdamW's learning rate.", "1", column=Column("learning rate", ".1e", 7, 26)),
    Metric("sync/gap", "Mean |log p of the engine - log p of the policy| on the canary after the update.",
           "nats a token", "no larger than at the start"),
    Metric("sync/moved", "How far the engine's log-probabilities of the canary moved with the update.",
           "nats a token", "above 0 where something was trained"),
    Metric("sync/unproved", "Updates since the canary last showed that the engine follows the policy.", "updates",
           "at most 20", optional=True),
    Metric("sync/rerouted", "Choices of experts on the canary (of a token, a layer, one of its experts) that the "
           "engine makes and the policy does not.", "share", "about 0.1 or less", optional=True),
    Metric("speed/tokens_per_second", "Sampled tokens over the time of the whole step.", "tokens/s",
           column=Column("tokens /s", ",.0f", 7, 22)),
    Metric("speed/rollout_tokens_per_second", "Sampled tokens over the time of the rollout alone.", "tokens/s"),
    Metric("time/step", "Time of the whole step, without evaluation and checkpoint.", "s"),
    Metric("time/<stage>", "Time of one stage: rollout, audit, score, update, sync.", "s"),
    Metric("memory/peak_gib", "Most memory held so far: of the GPU, or of the process on a CPU.", "GiB",
           column=Column("memory GiB", ".1f", 6, 27)),
    Metric("logged/<name>", "What a reward told `log_metric`.", "its own", optional=True),
)  # fmt: skip


def is_share(name: str) -> bool:
    """Whether a held-out score is shown as a percentage."""
    return "@" in name or name == "eval/accuracy"


@cache
def find(name: str) -> Metric | None:
    """The row of the table that a name is written under; a name spelled out goes before a pattern."""
    return next((metric for metric in METRICS if metric.name == name), None) or next(
        (metric for metric in METRICS if metric.pattern.fullmatch(name)), None
    )


def markdown() -> str:
    """The table for the documents."""
    lines = ["| metric | meaning | unit | healthy |", "|---|---|---|---|"]
    for metric in METRICS:
        ends = ", `/low`, `/high`" if metric.interval else ""
        name = metric.name.replace("|", r"\|")
        meaning = metric.meaning.replace("|", r"\|")
        lines.append(f"| `{name}`{ends} | {meaning} | {metric.unit} | {metric.healthy} |")
    return "\n".join(lines)
