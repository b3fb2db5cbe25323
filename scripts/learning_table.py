"""The learning runs as README and docs/figures.md show them, from benchmarks/results/learning-*.json.

Knows nothing of how they were made.

`write_readme_table.py` puts it between its markers.
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

FIGURE = "images/learning.png"  # as seen from docs/


def learning(results: Path) -> str:
    """What was taught, a line a run, and the figure, for each GPU that was measured; empty if none was."""
    parts = [learning_of(json.loads(path.read_text())) for path in sorted(results.glob("learning-*.json"))]
    return "\n\n".join([*parts, f"![Reward and held-out score of these runs]({FIGURE})"]) if parts else ""


def learning_in_short(results: Path) -> str:
    """The runs over a 4-bit base alone, and of each only what it learned and how fast."""
    parts = []
    for path in sorted(results.glob("learning-*.json")):
        result = json.loads(path.read_text())
        header = (
            "| base | engine | pass@1 before | after | points | steps | seconds a step | peak GiB |\n"
            "|---|---|---|---|---:|---:|---:|---:|"
        )
        runs = [run for run in result["runs"] if run["base"] == "nf4"]
        parts.append("\n".join([origin_of(result), "", header, *map(short_line, runs)]))
    return "\n\n".join(parts)


def learning_of(result: dict[str, Any]) -> str:
    header = (
        "| base | engine | pass@1 before | after | points | steps | seconds a step | of these rollout, update, sync | "
        "rollout tokens/s | KL, sampler to trainer | peak GiB |\n|---|---|---|---|---:|---:|---:|---|---:|---:|---:|"
    )
    return "\n".join([origin_of(result), "", header, *map(line, result["runs"])])


def origin_of(result: dict[str, Any]) -> str:
    """What was trained, on what, by which command."""
    machine, start = result["machine"], result["start"]
    return (
        f"A model of {start['parameters'] / 1e6:.0f}M parameters, half-taught from scratch for "
        f"{start['seconds'] / 60:.1f} minutes ({start['tokens'] / 1e6:.0f}M tokens), then `python -m grpo.run`; one "
        f"{machine['gpu']}, {machine['date']} (`{machine['command']}`). Word problems with numbers up to 3,200, held "
        "out, scored before and after by the engine that the run samples with; one seed."
    )


def short_line(run: dict[str, Any]) -> str:
    before, after = run["held_out"][0]["pass@1"], run["held_out"][-1]["pass@1"]
    points = f"{100 * (after[0] - before[0]):+.1f}"
    ends = f"{points} | {run['steps']} | {run['stage_seconds']['step']:.2f} | {run['peak_gib']:.1f}"
    return f"| {run['base']} | {run['engine']} | {percent(before)} | {percent(after)} | {ends} |"


def line(run: dict[str, Any]) -> str:
    before, after = run["held_out"][0]["pass@1"], run["held_out"][-1]["pass@1"]
    stages = run["stage_seconds"]
    cells = (
        run["base"],
        run["engine"],
        percent(before),
        percent(after),
        f"{100 * (after[0] - before[0]):+.1f}",
        run["steps"],
        f"{stages['step']:.2f}",
        ", ".join(f"{stages[stage]:.2f}" for stage in ("rollout", "update", "sync")),
        f"{run['rollout_tokens_per_second']:,}",
        f"{median(value for value in run['curves']['kl'] if value is not None):.1e}",
        f"{run['peak_gib']:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def percent(score: list[float]) -> str:
    middle, low, high = (f"{100 * value:.1f}" for value in score)
    return f"{middle}% [{low}, {high}]"
