"""The default run on this machine's CPU, once a seed: held-out scores before and after, and seconds.

    python benchmarks/embedded.py            seeds 0, 1, 2; writes benchmarks/results/embedded-cpu.json

The seconds are of the whole command, start-up included. scripts/write_readme_table.py puts the figures into README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    rows = [run(seed) for seed in seeds]
    RESULT.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    print(f"written: {RESULT.relative_to(ROOT)}")


def run(seed: int) -> dict[str, Any]:
    """One default run in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [sys.executable, "-m", "grpo.run", "tasks/gsm8k.py", "--model", "embedded", "--device", "cpu"]
        start = time.perf_counter()
        flags = ["--seed", str(seed), "--run-dir", str(folder)]
        done = subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
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
    }


def scores(line: dict[str, float]) -> list[float]:
    """pass@1 and its 95% interval."""
    return [line["eval/pass@1"], line["eval/pass@1/low"], line["eval/pass@1/high"]]


def machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": "python benchmarks/embedded.py",
    }


if __name__ == "__main__":
    main()
