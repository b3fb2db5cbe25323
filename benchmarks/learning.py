"""GRPO's learning curve on one GPU: a model is half-taught from scratch, then `python -m grpo.run` teaches it the rest.
Knows nothing of how the product works inside: it is run as a user runs it, and its run folders are read.

    python benchmarks/learning.py --data ../gsm8k                 all of it: about 15 minutes on an H100
    python benchmarks/learning.py --stage teach --data ../gsm8k   one stage; --work keeps what it leaves for the next
    python benchmarks/learning.py --stage grpo --base nf4 --engine vllm
    python benchmarks/learning.py --stage report                  results/learning-<gpu>.json, docs/images/learning.png
    python benchmarks/learning.py --stage figure                  the figure anew, from the results, on any machine

What a stage finds finished in --work it leaves as it is (--again does it anew), and a run that was cut off goes on from
its last checkpoint. Flags after `--` go to `python -m grpo.run`: `... --stage grpo -- --learning-rate 3e-4`.

Teaching: word problems of levels 1 to 3 and, with --data, the training solutions of GSM8K, answered by the class of
students that also taught the embedded model (scripts/half_teaching.py). GRPO: learning_task.py, beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from learning_report import draw, result_of, summary, write
from learning_teach import SHAPES, teach

ROOT = Path(__file__).parents[1]
TASK = Path(__file__).with_name("learning_task.py")
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "images" / "learning.png"

GRACE = 90  # seconds that a run has to finish its step and save, when its time is over


def main() -> None:
    arguments = parse_arguments()
    if arguments.stage == "all":
        # Each stage in a process of its own: what teaching took of the GPU is free for the runs.
        words = sys.argv[1:]
        end = words.index("--") if "--" in words else len(words)
        for stage in ("teach", "grpo", "report"):
            subprocess.run([sys.executable, __file__, *words[:end], "--stage", stage, *words[end:]], check=True)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    {"teach": teach, "grpo": learn, "report": report, "figure": figure}[arguments.stage](arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["all", "teach", "grpo", "report", "figure"], default="all")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "learning", help="folder of model and runs")
    parser.add_argument("--again", action="store_true", help="do anew what is finished in --work")
    teaching = parser.add_argument_group("teach")
    teaching.add_argument("--data", default="", help="folder with GSM8K's train.jsonl and test.jsonl; may be left out")
    teaching.add_argument("--size", choices=SHAPES, default="64m", help="parameters of the model")
    teaching.add_argument("--minutes", type=float, default=4.0, help="length of the training")
    teaching.add_argument("--problems", type=int, default=800_000, help="word problems to make up")
    teaching.add_argument("--demonstrations", type=int, default=8, help="students that answer each row of --data")
    teaching.add_argument("--tokens", type=int, default=65_536, help="tokens of one optimizer step")
    teaching.add_argument("--learning-rate", type=float, default=1e-3)
    teaching.add_argument("--compile", action="store_true", help="torch.compile the layers; takes time at the start")
    teaching.add_argument("--prompts", type=int, default=256, help="held-out prompts that score the start model")
    teaching.add_argument("--seed", type=int, default=0)
    learning = parser.add_argument_group("grpo")
    learning.add_argument("--base", nargs="+", choices=["nf4", "bf16", "float32"], default=["nf4", "bf16"])
    learning.add_argument("--engine", choices=["auto", "vllm", "torch"], default="auto")
    learning.add_argument("--steps", type=int, default=80)
    learning.add_argument("--run-minutes", type=float, default=8.0, help="a run is stopped gently after this long")
    learning.add_argument("flags", nargs="*", help="after --, for python -m grpo.run")
    reporting = parser.add_argument_group("report, figure")
    reporting.add_argument("--result", type=Path, help=f"default: {RESULTS.relative_to(ROOT)}/learning-<gpu>.json")
    reporting.add_argument("--figure", type=Path, default=FIGURE, help="default: docs/images/learning.png")
    return parser.parse_args()


# ---- grpo: the product itself


def learn(arguments: argparse.Namespace) -> None:
    """One run for each base, in a process of its own."""
    if not (arguments.work / "teach.json").exists():
        sys.exit(f"There is no model in {arguments.work} yet; run --stage teach first.")
    failed = [base for base in arguments.base if not run(base, arguments)]
    if failed:
        sys.exit(f"The runs with base {', '.join(failed)} did not finish.")


def run(base: str, arguments: argparse.Namespace) -> bool:
    """Start the run of a base, or go on with it. Returns whether it is finished; its output goes to grpo-<base>.log."""
    folder = arguments.work / f"grpo-{base}"
    record = folder.with_suffix(".json")
    if arguments.again or not any(folder.glob("checkpoints/step-*")):
        shutil.rmtree(folder, ignore_errors=True)
        record.unlink(missing_ok=True)
    done = json.loads(record.read_text()) if record.exists() else {"seconds": 0.0, "calls": 0, "finished": False}
    if done["finished"]:
        print(f"{folder} is finished; --again runs it anew")
        return True
    chosen = {
        "--model": arguments.work.resolve() / "model",
        "--base": base,
        "--engine": arguments.engine,
        "--steps": arguments.steps,
        "--run-dir": folder.resolve(),
    }
    fresh = [str(TASK), *(str(word) for pair in chosen.items() for word in pair), *arguments.flags]
    words = ["--resume", str(folder.resolve())] if folder.exists() else fresh
    started = time.perf_counter()
    log = folder.with_suffix(".log")
    code = call([sys.executable, "-m", "grpo.run", *words], log, 60 * arguments.run_minutes)
    done |= {"seconds": done["seconds"] + time.perf_counter() - started, "calls": done["calls"] + 1}
    done |= {"engine": arguments.engine, "finished": code == 0}
    if folder.exists():
        record.write_text(json.dumps(done))
    print(f"{base}: exit code {code} after {done['seconds']:.0f} s; the end of {log}:")
    print("\n".join(log.read_text().splitlines()[-25:]), flush=True)
    return done["finished"]


def call(command: list[str], log: Path, seconds: float) -> int:
    """Run a command from the repository's root, its output added to `log`. After `seconds` it is asked to stop."""
    with log.open("a") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        for limit, end in ((seconds, signal.SIGINT), (GRACE, signal.SIGKILL)):
            try:
                return process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                process.send_signal(end)
        return process.wait()


# ---- report


def report(arguments: argparse.Namespace) -> None:
    """What --work holds, as a small file of results and a figure."""
    result = result_of(arguments.work, ["nf4", "bf16", "float32"])
    path = arguments.result or RESULTS / f"learning-{slug(result['machine']['gpu'])}.json"
    write(result, path)
    for line in summary(result):
        print(line)
    draw(result, arguments.figure)
    print(f"written: {path}, {arguments.figure}")


def figure(arguments: argparse.Namespace) -> None:
    """The figure anew, from the results of the one GPU there are, or from --result."""
    found = [arguments.result] if arguments.result else sorted(RESULTS.glob("learning-*.json"))
    if len(found) != 1:
        sys.exit(f"There are results of {len(found)} machines in {RESULTS}; name one by --result FILE.")
    draw(json.loads(found[0].read_text()), arguments.figure)
    print(f"written: {arguments.figure}")


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


if __name__ == "__main__":
    main()
