"""The default run on this machine's CPU, once a seed: held-out scores before and after, and seconds.

    python benchmarks/embedded.py            seeds 0, 1, 2; writes benchmarks/results/embedded-cpu.json

The seconds are of the whole command, start-up included. scripts/write_readme_table.py puts the figures, and what the
first run showed, into README.md; docs/images/curves.png is what that run drew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "embedded-cpu.json"
CURVES = ROOT / "docs" / "images" / "curves.png"
COLUMNS = 150  # of the terminal whose picture README shows
SHOWN_EVERY = 10  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    about = machine("python benchmarks/embedded.py")
    rows = [run(seed, is_shown=seed == seeds[0]) for seed in seeds]
    RESULT.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")
    print(f"written: {RESULT.relative_to(ROOT)}")


def run(seed: int, is_shown: bool) -> dict[str, Any]:
    """One default run in a process of its own; of one that README shows, what it printed and drew too."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [sys.executable, "-m", "grpo.run", "tasks/gsm8k.py", "--model", "embedded", "--device", "cpu"]
        start = time.perf_counter()
        flags = ["--seed", str(seed), "--run-dir", str(folder)]
        environment = os.environ | {"COLUMNS": str(COLUMNS)}
        done = subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if is_shown:
            shutil.copy(folder / "curves.png", CURVES)
    print(next(line for line in done.stdout.splitlines() if line.startswith("held-out pass@1:")), f"({seconds:.0f} s)")
    evaluations = [line for line in lines if "eval/pass@1" in line]
    steps = [line for line in lines if "reward/mean" in line]
    return {
        "seed": seed,
        "steps": len(steps),
        "seconds": round(seconds, 1),
        "before": scores(evaluations[0]),
        "after": scores(evaluations[-1]),
        "first_reward": steps[0]["reward/mean"],
        "last_reward": steps[-1]["reward/mean"],
        "sync_share": sum(line["time/sync"] for line in steps) / sum(line["time/step"] for line in steps),
        **({"shown": shown(done.stdout)} if is_shown else {}),
    }


def shown(printed: str) -> str:
    """Of what a run prints: its held-out scores, the header once, every tenth step, the last completion."""
    lines = printed.splitlines()
    header = next(place for place, line in enumerate(lines) if line.split()[:1] == ["step"])
    ends = [place for place, line in enumerate(lines) if line.startswith("╰") and place > header]
    sample = next(place for place in range(ends[-1], 0, -1) if lines[place].startswith("╭"))
    steps = [line for line in lines if (step := re.match(r" *(\d+)/\d+ ", line)) and is_picked(int(step[1]))]
    scores = [line for line in lines if line.startswith("held-out")]
    before, after = scores[:1], scores[-2:]
    return "\n".join([*before, *lines[header - 1 : header + 1], *steps, *after, "", *lines[sample : ends[-1] + 1]])


def is_picked(step: int) -> bool:
    return step == 1 or step % SHOWN_EVERY == 0


def scores(line: dict[str, float]) -> list[float]:
    """pass@1 and its 95% interval."""
    return [line["eval/pass@1"], line["eval/pass@1/low"], line["eval/pass@1/high"]]


def machine(command: str) -> dict[str, Any]:
    """Where figures come from, and the command that makes them again."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # by others, for the runs have not begun
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": command,
    }


if __name__ == "__main__":
    main()
