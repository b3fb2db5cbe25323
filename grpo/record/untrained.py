"""Steps that train nothing: that they do, why, and what to do about it, from the numbers of the step.

Knows nothing of groups or of the configuration: what it says holds for every run with these numbers. They are those of
metrics.jsonl, None where one is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

# So many in a row are worth a warning when the run is over.
MANY = 3

_EQUAL_REMEDY = (
    "If all are right, the rows are too easy for this model; if none is, they are too hard. What helps: other rows, a "
    "reward that also pays for part of the way, a larger --group-size, or --dynamic-sampling, which takes other rows."
)
_SOLVED_REMEDY = "These rows have no more to teach it: take harder ones, or fewer --steps."
_LENGTH_REMEDY = (
    "Raise --max-completion-tokens, ask for shorter answers in the prompt, or see in completions.jsonl whether the "
    "model ends its answers at all."
)


class Untrained:
    """Watches the steps of a run, in their order."""

    def __init__(self) -> None:
        self._steps = 0  # seen
        self._count = 0  # of them trained nothing
        self._row = 0  # of the last ones
        self._longest = (0, 0, "")  # (steps in a row, the last of them, why)
        self._lowest, self._highest = math.inf, -math.inf  # mean reward of a step

    def seen(self, step: int, metrics: Mapping[str, float | None]) -> Iterator[str]:
        """A sentence where the step trained nothing; a short one where the step before it did not either."""
        self._steps += 1
        mean = _number(metrics, "reward/mean")
        self._lowest, self._highest = min(self._lowest, mean), max(self._highest, mean)
        if 0 in (metrics.get("groups/trained"), metrics.get("optim/grad_norm")):
            yield from self._empty(step, metrics)
        else:
            self._row = 0

    def warnings(self) -> Iterator[str]:
        """What the end of the run should say again."""
        row, last, why = self._longest
        if row >= MANY:
            share = f"{self._count} of the {self._steps} steps trained nothing"
            yield f"{share}, {row} of them in a row (to step {last + 1}). Why: {why}"

    def _empty(self, step: int, metrics: Mapping[str, float | None]) -> Iterator[str]:
        self._count += 1
        self._row += 1
        # The most that a step ever earned, where it has been less.
        why = explain(metrics, solved=self._lowest < self._highest == _number(metrics, "reward/mean"))
        self._longest = max(self._longest, (self._row, step, why))
        if self._row == 1:
            yield f"Step {step + 1} trained nothing: {why}"
        else:
            yield f"Step {step + 1} trained nothing either, {self._row} in a row: {why.partition('. ')[0]}."


def explain(metrics: Mapping[str, float | None], solved: bool = False) -> str:
    """Why a step with these numbers trained nothing, and what helps. solved: no step has earned more, some less."""
    rolled_out, trained = _number(metrics, "groups/rolled_out"), _number(metrics, "groups/trained")
    equal = round(_number(metrics, "groups/zero_variance") * rolled_out) if rolled_out else -1  # not known
    all_cut_off = metrics.get("completion/truncated") == 1
    length = f"after {_number(metrics, 'completion/length'):.0f} tokens"
    if all_cut_off and (trained == 0 or equal == rolled_out):
        rewards = ", and their rewards are equal in every group" if equal == rolled_out else ""
        return f"every completion was cut off {length}{rewards}. {_LENGTH_REMEDY}"
    if equal == rolled_out and metrics.get("reward/std") == 0 and solved:
        return f"every completion earned {_number(metrics, 'reward/mean'):g}, the most so far. {_SOLVED_REMEDY}"
    if equal == rolled_out:
        paid = f", {_number(metrics, 'reward/mean'):g} for all" if metrics.get("reward/std") == 0 else ""
        return f"in every group all completions earned the same{paid}, so there is nothing to compare. {_EQUAL_REMEDY}"
    if trained == 0 and rolled_out:
        return (
            f"in {equal} of {rolled_out:.0f} groups all completions earned the same, and in the others what would "
            f"count was cut off, which --mask-truncated leaves out. {_LENGTH_REMEDY}"
        )
    return _no_gradient(metrics, trained)


def _no_gradient(metrics: Mapping[str, float | None], trained: float) -> str:
    groups = f"groups have a part in the update ({trained:.0f} of them), but"
    if metrics.get("policy/kept") == 0:
        return (
            f"{groups} --off-policy-mask or --top-entropy leaves no token of them in the loss. Raise "
            "--off-policy-mask, or leave it out; mismatch/kl says how far sampler and trainer are apart."
        )
    if metrics.get("mismatch/correction") == 0:
        return (
            f"{groups} --correction masks every token of them: sampler and trainer are too far apart (mismatch/kl "
            f"{_number(metrics, 'mismatch/kl'):.2g}). Take --correction token_tis, which masks nothing, or widen "
            "--correction-floor and --correction-cap."
        )
    return f"{groups} the gradient of their loss is 0. If that stays so, look at the rewards in completions.jsonl."


def _number(metrics: Mapping[str, float | None], name: str) -> float:
    """The metric; 0 where it is missing or None."""
    return metrics.get(name) or 0.0
