"""Card: the README.md of what is pushed to the hub: how it is used there, and what the run's records say of it.

Names of tasks, rewards and models stand in it as text, never as Markdown, HTML or YAML. Of this machine nothing does: a
folder is named by its last part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from grpo.config import Config, field_names
from grpo.errors import UserError
from grpo.export.source import Source, read_step
from grpo.folder import run_of
from grpo.report.judging import Paired, Score, held_out_scores, paired, verdict
from grpo.report.reading import Reading
from grpo.usage import escaped, one_line

OF_THE_MACHINE = ("model", "data", "adapter", "run_dir", "device", "threads", "log")  # fields that others cannot use
LONGEST = 200  # characters of a value
TAGS = {
    "grpo": ["grpo", "reinforcement-learning"],
    "ppo": ["ppo", "reinforcement-learning"],
    "sft": ["sft"],
    "dpo": ["dpo"],
}
ALGORITHMS = {
    "grpo": "GRPO ({config.advantage} advantages, {config.objective} objective)",
    "ppo": "PPO (advantages by GAE from a value head, {config.objective} objective)",
    "sft": "SFT on given answers",
    "dpo": "DPO on pairs of answers ({config.dpo_loss} loss)",
}


def public_name(base: str) -> str:
    """A model as others may find it: its name on the hub, or the last part of its folder here."""
    return Path(base).name if Path(base).is_absolute() or base.startswith((".", "~")) or Path(base).is_dir() else base


def card(usage: str, source: Source, library: str) -> str:
    """usage: the README of the same without numbers. library: that opens it, as the hub calls it."""
    name = public_name(source.base)
    about = {
        "library_name": library,
        **({"base_model": name} if name.count("/") == 1 else {}),
        "pipeline_tag": "text-generation",
        # Of an adapter that came without a run nobody knows by what it was taught.
        "tags": [*(TAGS[source.config.algorithm] if source.config else []), *(["lora"] if library == "peft" else [])],
    }
    # JSON is YAML, whatever is in the names.
    head = ["---", *(f"{key}: {json.dumps(value)}" for key, value in about.items()), "---", ""]
    return "\n".join([*head, usage.rstrip("\n"), "", *_numbers(source)]) + "\n"


def _numbers(source: Source) -> Iterator[str]:
    """What the run's records say; nothing of an adapter that came without any."""
    if source.config is None:
        return
    try:
        reading = Reading(run_of(source.folder))
        reading.advance()
    except UserError:  # its files are not here any more
        return
    yield from _held_out(reading, read_step(source.folder))
    yield "## How it was trained"
    yield ""
    start = reading.starts[-1] if reading.starts else {}
    yield from _list(
        {
            "task": source.title.partition(",")[0],
            "algorithm": ALGORITHMS[source.config.algorithm].format(config=source.config),
            "base weights": source.config.base,
            "steps": f"{read_step(source.folder)} of {source.config.steps}",
            "device": start.get("device", ""),
            "versions": ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items()),
        }
    )
    yield from _list(_chosen(source.config))


def _held_out(reading: Reading, step: int) -> Iterator[str]:
    """The held-out score before, and of this checkpoint, with the test between the two."""
    found = verdict(reading)
    if found.first is None:
        return
    own = reading.metrics.get(found.headline, {}).get(step, math.nan)
    ends = [reading.metrics.get(f"{found.headline}/{end}", {}).get(step, math.nan) for end in ("low", "high")]
    here = Score(step, own, *ends)
    rows = [("before training", found.first)] + [("this checkpoint", here)] * (
        step != found.first.step and math.isfinite(own)
    )
    form = "{:.1%}" if found.is_share else "{:.3f}"
    yield "## What it has learned"
    yield ""
    yield f"| held-out {escaped(found.headline.removeprefix('eval/'))} | step | score | 95% interval |"
    yield "|---|---:|---:|---:|"
    for told, score in rows:
        yield f"| {told} | {score.step} | {form.format(score.value)} | {_interval(score, form)} |"
    yield ""
    if len(rows) == 2 and (test := paired(*(held_out_scores(reading, s.step, found.headline) for _, s in rows))):
        yield from (_tested(test, found.is_share), "")


def _interval(score: Score, form: str) -> str:
    known = math.isfinite(score.low) and math.isfinite(score.high)
    return f"{form.format(score.low)} to {form.format(score.high)}" if known else ""


def _tested(test: Paired, is_share: bool) -> str:
    scale, form, unit = (100, "+.1f", " points") if is_share else (1, "+.3f", "")
    p = "p < 0.001" if test.p < 0.001 else f"p = {test.p:.3f}"
    return (
        f"The same {test.prompts} prompts before and after: {format(scale * test.difference, form)}{unit} (paired "
        f"permutation test, {p}); {test.better} better, {test.worse} worse."
    )


def _chosen(config: Config) -> dict[str, str]:
    """What is not at its default, and of use elsewhere."""
    plain = Config()
    names = [name for name in field_names() if name not in OF_THE_MACHINE]
    return {name: str(value) for name in names if (value := getattr(config, name)) != getattr(plain, name)}


def _list(items: dict[str, str]) -> Iterator[str]:
    for name, value in items.items():
        if value:
            yield f"* {escaped(name)}: {escaped(one_line(value)[:LONGEST])}"
    yield ""
