"""What the run folders of benchmarks/learning.py hold, as one small dictionary, a few lines and a figure.
Knows nothing of how the runs were made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from grpo.config import Config
from grpo.record.jsonl import read_lines

# A run's metrics, step by step, under the names that the result gives them.
CURVES = {
    "reward": "reward/mean",
    "kl": "mismatch/kl",
    "gap": "mismatch/gap",
    "sync_gap": "sync/gap",
    "length": "completion/length",
    "entropy": "policy/entropy",
}
STAGES = ("rollout", "score", "update", "sync", "step")

COLOURS = {"nf4": "#1f5fbf", "bf16": "#d9622b", "float32": "#2a9d6f"}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#b8bdc7",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8eaee",
    "legend.frameon": False,
}


def result_of(work: Path, bases: list[str]) -> dict[str, Any]:
    """All that the results file holds: the machine, the start model, and the run of each base that took a step."""
    start = json.loads((work / "teach.json").read_text())
    machine = start.pop("machine") | {"command": "python benchmarks/learning.py"}
    begun = [base for base in bases if any((work / f"grpo-{base}").glob("checkpoints/step-*"))]
    runs = [run_of(base, work / f"grpo-{base}", work / f"grpo-{base}.json") for base in begun]
    start["scores"] = {
        name: {f"pass@{k}": _score(scores, k) for k in (1, 8)} for name, scores in start["scores"].items()
    }
    return {"machine": machine, "start": start, "runs": runs}


def run_of(base: str, folder: Path, record: Path) -> dict[str, Any]:
    """One run: its scores with 95% intervals, curves, seconds of the stages of a step, speed and memory."""
    done = json.loads(record.read_text())
    lines = list(read_lines(folder / "metrics.jsonl"))
    steps = [line for line in lines if "reward/mean" in line]
    evaluations = [line for line in lines if "eval/pass@1" in line]
    saved = json.loads((folder / "config.json").read_text())["config"]
    # The first step compiles and warms up.
    settled = steps[1:] or steps
    return {
        "base": base,
        "engine": done["engine"],
        "finished": done["finished"],
        "seconds": round(done["seconds"], 1),
        "calls": done["calls"],
        "steps": len(steps),
        "config": _chosen(saved),
        "held_out": [
            {"step": line["step"], **{f"pass@{k}": _score(line, k) for k in (1, saved["eval_k"])}}
            for line in evaluations
        ],
        "curves": {name: [_short(step[metric]) for step in steps] for name, metric in CURVES.items()},
        "stage_seconds": {stage: _short(mean(step[f"time/{stage}"] for step in settled)) for stage in STAGES},
        "first_step_seconds": _short(steps[0]["time/step"]),
        "tokens_per_second": round(median(step["speed/tokens_per_second"] for step in settled)),
        "rollout_tokens_per_second": round(median(step["speed/rollout_tokens_per_second"] for step in settled)),
        "peak_gib": _short(max(step["memory/peak_gib"] for step in steps)),
    }


def _chosen(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a run's configuration that are no defaults, without its paths."""
    defaults = json.loads(json.dumps(asdict(Config())))  # as the file has them
    chosen = [name for name, value in config.items() if value != defaults[name]]
    return {name: config[name] for name in chosen if name not in ("model", "run_dir", "data")}


def _score(line: dict[str, float], k: int) -> list[float | None]:
    """pass@k and its 95% interval."""
    return [_short(line[f"eval/pass@{k}{end}"]) for end in ("", "/low", "/high")]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def write(result: dict[str, Any], path: Path) -> None:
    """As JSON, a list of numbers a line."""
    text = json.dumps(result, indent=1, allow_nan=False)
    path.write_text(re.sub(r"\[[^][{}]*\]", lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text) + "\n")


def summary(result: dict[str, Any]) -> Iterator[str]:
    """The result in a few lines for the screen."""
    start = result["start"]
    speed = start["tokens"] / start["seconds"]
    yield f"{start['parameters']:,} parameters, taught {start['tokens']:,} tokens, {speed:,.0f} a second"
    for name, scores in start["scores"].items():
        yield f"start model, {name}: pass@1 {_percent(scores['pass@1'])}, pass@8 {_percent(scores['pass@8'])}"
    for run in result["runs"]:
        curves, stages = run["curves"], run["stage_seconds"]
        before, after = run["held_out"][0], run["held_out"][-1]
        yield (
            f"{run['base']} ({run['engine']}), {run['steps']} steps in {run['seconds']:.0f} s: held-out pass@1 "
            f"{_percent(before['pass@1'])} before, {_percent(after['pass@1'])} after step {after['step']}; reward "
            f"{curves['reward'][0]:.2f} to {curves['reward'][-1]:.2f}"
        )
        yield (
            f"  mismatch KL median {_known_median(curves['kl']):.1e}, mean |gap| {_known_median(curves['gap']):.1e}, "
            f"sync/gap {_known_median(curves['sync_gap']):.1e}; seconds a step "
            + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items())
            + f"; {run['rollout_tokens_per_second']:,} tokens/s in rollouts; {run['peak_gib']:.1f} GiB"
        )


def _percent(score: list[float]) -> str:
    middle, low, high = (f"{100 * value:.1f}" for value in score)
    return f"{middle}% [{low}, {high}]"


def _known_median(values: list[float | None]) -> float:
    return median([value for value in values if value is not None] or [float("nan")])


def draw(result: dict[str, Any], out_png: Path) -> None:
    """Reward, held-out pass@1 with its interval, and sampler against trainer: a line a run."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        reward, held_out, mismatch = figure.subplots(1, 3)
        for run in result["runs"]:
            colour = COLOURS[run["base"]]
            _draw_curve(reward, run["curves"]["reward"], colour, run["base"])
            _draw_held_out(held_out, run["held_out"], colour, run["base"])
            _draw_curve(mismatch, run["curves"]["kl"], colour, run["base"])
        reward.set_title("Reward, mean of a step")
        held_out.set_title("Held-out pass@1, with 95% interval")
        held_out.set_ylim(0, 1)
        held_out.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
        mismatch.set_title("KL, sampler to trainer")
        mismatch.set_yscale("log")
        for axes in (reward, held_out, mismatch):
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        held_out.legend(title="base weights", loc="lower right")
        figure.savefig(out_png, format="png", dpi=120)


def _draw_curve(axes: Axes, values: list[float | None], colour: str, label: str) -> None:
    """The values as they are, faint, and the running mean of five."""
    known = [float("nan") if value is None else value for value in values]
    smooth = [mean(known[max(0, place - 2) : place + 3]) for place in range(len(known))]
    axes.plot(known, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(smooth, color=colour, linewidth=2, label=label)


def _draw_held_out(axes: Axes, scores: list[dict[str, Any]], colour: str, label: str) -> None:
    steps = [score["step"] for score in scores]
    middle, low, high = zip(*(score["pass@1"] for score in scores), strict=True)
    axes.plot(steps, middle, color=colour, linewidth=2, marker="o", markersize=4, label=label)
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
