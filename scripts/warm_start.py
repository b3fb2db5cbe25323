"""Makes the curve of docs/warm-start.md: GRPO in a format that the model was not taught, before and after a short SFT.

Knows nothing of how either learns: it runs the commands that the page shows, and writes down their held-out scores.

python scripts/warm_start.py            run all four on a CPU, in some minutes; then the figure and the page
python scripts/warm_start.py --write    the figures in the page alone, from benchmarks/results/warm-start-cpu.json
python scripts/warm_start.py --check    fail if that would change anything
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from embedded import machine, scores  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "warm-start-cpu.json"
PAGE = ROOT / "docs" / "warm-start.md"
FIGURE = ROOT / "docs" / "images" / "warm-start.png"
BEGIN, END = "<!-- figures begin: python scripts/warm_start.py -->", "<!-- figures end -->"
COMMANDS_BEGIN, COMMANDS_END = "<!-- commands begin: python scripts/warm_start.py -->", "<!-- commands end -->"
IDLE = 0.25  # processes of others a core, up to which a machine counts as idle

TASK = "examples/warm_start.py"
TAUGHT = 20  # steps of SFT before GRPO
TEACH = f"grpo.sft {TASK} --data few --prompts-per-step 16 --learning-rate 1e-3 --eval-every 10"

# name -> what the page calls it, and its command
RUNS = {
    "sft": ("SFT on 16 answers", f"{TEACH} --steps {TAUGHT} --run-dir runs/format"),
    "warm": ("then GRPO", f"grpo.run {TASK} --adapter runs/format --eval-every 10 --run-dir runs/warm"),
    "cold": ("GRPO from the start", f"grpo.run {TASK} --eval-every 10 --run-dir runs/cold"),
    "longer": ("more SFT instead", f"{TEACH} --steps 60 --run-dir runs/longer"),
}


def main() -> int:
    given = sys.argv[1:]
    if given in (["--write"], ["--check"]):
        return write(check=given == ["--check"])
    if given:
        sys.exit("It takes --write, --check, or nothing.")
    about = machine("python scripts/warm_start.py")
    with tempfile.TemporaryDirectory() as scratch:
        runs = {name: run(command, Path(scratch)) for name, (_, command) in RUNS.items()}
    RESULT.write_text(json.dumps({"machine": about, "runs": runs}, indent=2) + "\n")
    draw(runs)
    return write(check=False)


# ---- the runs


def run(command: str, scratch: Path) -> dict[str, Any]:
    """One command of the page in a process of its own, its folders put elsewhere."""
    words = [str(scratch / word) if word.startswith("runs/") else word for word in shlex.split(command)]
    print(f"python -m {command}", flush=True)
    begun = seconds_computed()
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    called = [sys.executable, "-m", *words, "--device", "cpu"]
    subprocess.run(called, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=one_thread)
    record = read(command, Path(words[words.index("--run-dir") + 1]), seconds_computed() - begun)
    first, *_, last = record["curve"]
    print(f"  {told(first[1:])} -> {told(last[1:])} ({record['core_seconds']:.0f} s of a core)", flush=True)
    return record


def read(command: str, folder: Path, seconds: float) -> dict[str, Any]:
    """What a run came to."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward/mean"] for line in lines if line.get("reward/mean") is not None]
    return {
        "command": f"python -m {command}",
        "core_seconds": round(seconds, 1),  # of the whole command; work of others makes it up to twice as long
        "curve": [[line["step"], *scores(line)] for line in lines if "eval/pass@1" in line],  # and its 95% interval
        "best_reward": max(rewards, default=None),  # mean of a step
    }


def seconds_computed() -> float:
    """That processes which have ended spent on a core."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- the figure


COLOURS = {"sft": "#c9a227", "warm": "#1f5fbf", "cold": "#d9622b", "longer": "#c9a227"}


def draw(runs: dict[str, Any]) -> None:
    """All curves over the steps since the model as it ships, GRPO's behind those of the SFT that it began from."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for name in ("cold", "longer", "warm", "sft"):
        steps, values, low, high = zip(*runs[name]["curve"], strict=True)
        shown = [step + (TAUGHT if name == "warm" else 0) for step in steps]
        style = "--" if name == "longer" else "-"
        axes.plot(shown, values, style, color=COLOURS[name], label=RUNS[name][0], marker="o", markersize=3.5)
        axes.fill_between(shown, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
    axes.axvline(TAUGHT, color="#b8bdc7", linewidth=1)
    axes.set(xlabel="optimizer steps since the model as it ships", ylabel="held-out pass@1", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e8eaee")
    handles = dict(zip(axes.get_legend_handles_labels()[1], axes.get_legend_handles_labels()[0], strict=True))
    order = [RUNS[name][0] for name in RUNS]
    axes.legend([handles[label] for label in order], order, frameon=False, loc="center right")
    figure.savefig(FIGURE, dpi=120)


# ---- the page


def write(check: bool) -> int:
    """The commands, and what they came to, between the page's markers."""
    result = json.loads(RESULT.read_text())
    old = PAGE.read_text()
    text = between(old, COMMANDS_BEGIN, commands(result["runs"]), COMMANDS_END)
    text = between(text, BEGIN, table(result), END)
    if check and text != old:
        sys.exit(f"{PAGE} is older than the results; run python scripts/warm_start.py --write")
    PAGE.write_text(text)
    return 0


def between(text: str, begin: str, new: str, end: str) -> str:
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{new}\n\n{end}{rest.split(end)[1]}"


def commands(runs: dict[str, Any]) -> str:
    return "\n".join(["```bash", *(runs[name]["command"] for name in RUNS), "```"])


def table(result: dict[str, Any]) -> str:
    """A line a run: where it began and ended, and what it took."""
    about = result["machine"]
    busy = f" that others kept busy (load average {about['load']:g})" * (about["load"] > IDLE * about["cores"])
    lines = ["| | steps | held-out pass@1 at first | at last | seconds of a core |", "|---|---:|---|---|---:|"]
    for name, (title, _) in RUNS.items():
        run = result["runs"][name]
        first, *_, last = run["curve"]
        lines.append(f"| {title} | {last[0]} | {told(first[1:])} | {told(last[1:])} | {run['core_seconds']:.0f} |")
    lines += ["", f"The best step of GRPO from the start earned {result['runs']['cold']['best_reward']:g}."]
    return (
        "\n".join(lines) + "\n\n(128 problems, 4 answers to each, 95% intervals, seed 0; the whole command's seconds, "
        f"scores included, one thread on {about['cores']} cores of an {about['processor']} CPU{busy}, torch "
        f"{about['torch']}, {about['date']}: `{about['command']}`.)"
    )


def told(score: list[float]) -> str:
    share, low, high = (100 * each for each in score)
    return f"{share:.1f}% [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    sys.exit(main())
