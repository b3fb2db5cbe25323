"""Steps whose completions are cut off: that most are, and what to do about it, told once in a run.

Knows nothing of groups or of the configuration: what it says holds for every run with these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

MANY = 0.5  # a larger share of a step's completions is told

REMEDIES = (
    "raise --max-completion-tokens, where answers need their length; memory and time grow with it",
    "let them be shorter, by the words of the prompt, or with the model's thinking turned off or down "
    "(--chat-template-kwargs enable_thinking=False, or reasoning_effort=low, where its template reads that)",
    "teach it, by a reward that falls towards the limit (DAPO's soft overlong punishment, `overlong` of grpo.rewards) "
    "and --no-mask-truncated, so that completions that were cut off are trained on too",
)


class CutOff:
    """Watches the steps of a run, in their order."""

    def __init__(self) -> None:
        self._share = MANY  # from which it is told

    def seen(self, step: int, metrics: Mapping[str, float]) -> Iterator[str]:
        """A sentence for the first step in which more than half of the completions were cut off."""
        share = metrics.get("completion/truncated", 0.0)
        if share > self._share:
            self._share = 1.0
            yield "\n  - ".join(
                (
                    f"Step {step + 1}: {share:.0%} of the completions were cut off by the token limit before they "
                    "ended. What helps (completions.jsonl shows whether they would ever end):",
                    *REMEDIES,
                )
            )
