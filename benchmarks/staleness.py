"""Steps on a server, by turns with the update and beside it: `--staleness 0` and `1`, on one machine's CPU.

    python benchmarks/staleness.py           writes benchmarks/results/staleness-cpu.json

A `vllm serve` of the embedded model has one core, the trainer another, as a server has a card of its own; both compute
with one thread. The runs follow each other on the same server, in turn, so that each kind sees the machine's weather.
Medians over the steps of a kind, without the first two of each run. `predicted_s` is what a step of staleness 1 should
take by those of 0: rollout and update are as long as the longer of the two, the rest stays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from cases import results_path

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "grpo" / "embedded" / "model"
OF_TRAINER, OF_SERVER = 0, 1  # cores
UNTIMED = 2  # steps
STAGES = ("time/step", "time/rollout", "time/audit", "time/score", "time/update", "time/sync")
SERVE = """--dtype float32 --max-model-len 512 --enable-lora --max-lora-rank 32 --max-loras 2 --enforce-eager
--logprobs-mode processed_logprobs --generation-config vllm --no-enable-chunked-prefill""".split()
SETTINGS = dict(VLLM_ALLOW_RUNTIME_LORA_UPDATING="True", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1",
                VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1", VLLM_LOGGING_LEVEL="ERROR")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--turns", type=int, default=2, help="runs of each kind")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion at most")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    about = {"command": "python benchmarks/staleness.py", "date": str(date.today()), "cores": os.cpu_count()}
    about |= {"machine": platform.machine(), "load_before": round(os.getloadavg()[0], 2)}
    steps: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    with serving() as url:
        for _ in range(arguments.turns):
            for staleness in steps:
                steps[staleness] += run(url, staleness, arguments)
    kinds = {f"staleness {staleness}": medians(of_kind) for staleness, of_kind in steps.items()}
    found = about | {"load_after": round(os.getloadavg()[0], 2)} | kinds | ratios(*kinds.values())
    results_path(arguments.out, "staleness", "cpu").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server on its core."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # vllm-cpu has no `vllm` among the installed packages, which that command asks for its version.
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), *SERVE]
    command = [*on_core(OF_SERVER), *serve, "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, env=os.environ | SETTINGS, stdout=subprocess.DEVNULL) as server:
        url = f"http://127.0.0.1:{port}"
        while not is_up(url):
            try:
                raise SystemExit(f"The server ended with code {server.wait(timeout=1)}.")
            except subprocess.TimeoutExpired:
                continue
        yield url
        server.terminate()


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def run(url: str, staleness: int, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """The timed steps of a run on the trainer's core."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        task = [sys.executable, "-m", "grpo.run", "tasks/gsm8k.py", "--model", "embedded", "--device", "cpu"]
        flags = dict(engine="server", servers=url, staleness=staleness, steps=arguments.steps, threads=1, eval_every=0,
                     eval_prompts=4, max_completion_tokens=arguments.tokens, run_dir=folder)  # fmt: skip
        given = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        subprocess.run([*on_core(OF_TRAINER), *task, *given], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward/mean" in line][UNTIMED:]


def on_core(core: int) -> list[str]:
    """How a command is started that computes there alone."""
    return ["taskset", "--cpu-list", str(core)]


def medians(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Of each stage, in seconds; and how long each step was."""
    of_stages = {name: round(statistics.median(step.get(name, 0.0) for step in steps), 3) for name in STAGES}
    return of_stages | {"steps_s": [round(step["time/step"], 3) for step in steps]}


def ratios(by_turns: dict[str, Any], beside: dict[str, Any]) -> dict[str, float]:
    """Of steps beside the update over steps by turns, as predicted by the latter and as measured."""
    step, rollout, update = (by_turns[name] for name in ("time/step", "time/rollout", "time/update"))
    predicted = step - min(rollout, update)
    return {
        "predicted_s": round(predicted, 3),
        "predicted_ratio": round(predicted / step, 3),
        "ratio": round(beside["time/step"] / step, 3),
    }


if __name__ == "__main__":
    main()
