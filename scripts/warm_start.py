"""docs/images/warm-start.png: GRPO alone, and GRPO after a few steps of SFT, in a format that the model has never seen.

    python scripts/warm_start.py [--to docs/images/warm-start.png] [--folder runs/warm-start]

The task is this file: the generator's word problems, answered by a last line `Answer: 72`, which the embedded model was
never taught to write. Rewards pay for nothing else, so that GRPO alone has nothing to learn from.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from grpo import Config, Task
from grpo.embedded import word_problems

LAST_LINE = re.compile(r"\nAnswer: (-?\d+)$")


def rows(split, data):
    for row in word_problems(split, 400):
        solution, answer = row["answer"].rsplit("####", 1)
        yield {"question": row["question"], "solution": solution.strip(), "answer": answer.strip()}


def prompt(row):
    asked = "Solve it step by step. The last line is `Answer: ` and the number.\n\n"
    return [{"role": "user", "content": asked + row["question"]}]


def right(completion: str, answer: str) -> float:
    """1 for the right number on the last line."""
    found = LAST_LINE.search(completion.rstrip())
    return float(found is not None and found[1] == answer)


task = Task(
    name="warm-start",
    rows=rows,
    prompt=prompt,
    rewards={right: 1.0},
    gold="{solution}\nAnswer: {answer}",
    solved=("right", 1.0),
    data="embedded",
    made_up=True,
    answer=lambda text: found[1] if (found := LAST_LINE.search(text.rstrip())) else None,
    config=Config(
        model="embedded", base="float32", device="cpu", learning_rate=1e-3, max_completion_tokens=64, eval_prompts=32,
        eval_samples=2, eval_k=2, eval_every=5, save_every=100,
    ),
)  # fmt: skip

GRPO = ["--prompts-per-step", "4", "--group-size", "8"]
SFT = ["--steps", "15", "--prompts-per-step", "4", "--learning-rate", "1e-3"]


def main() -> None:
    """Three runs and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs/images/warm-start.png"))
    parser.add_argument("--folder", type=Path, default=Path("runs/warm-start"), help="of the runs; must not exist")
    parser.add_argument("--steps", type=int, default=20, help="of GRPO")
    arguments = parser.parse_args()
    from grpo import run, sft

    folders = {name: arguments.folder / name for name in ("alone", "sft", "after")}
    steps = ["--steps", str(arguments.steps)]
    commands = (
        (sft, [*SFT, "--run-dir", str(folders["sft"])]),
        (run, [*GRPO, *steps, "--adapter", str(folders["sft"]), "--run-dir", str(folders["after"])]),
        (run, [*GRPO, *steps, "--run-dir", str(folders["alone"])]),
    )
    for command, flags in commands:
        if code := command.main([__file__, *flags]):
            sys.exit(code)
    draw(folders, arguments.to)


def draw(folders: dict[str, Path], to: Path) -> None:
    """Held-out pass@1 of the three, SFT's steps before GRPO's."""
    from matplotlib.figure import Figure

    from grpo.record.jsonl import read_metrics

    def scores(folder: Path) -> tuple[list[int], list[float], list[float], list[float]]:
        found = [(step, record) for step, record in read_metrics(folder / "metrics.jsonl") if "eval/pass@1" in record]
        ends = ("eval/pass@1", "eval/pass@1/low", "eval/pass@1/high")
        return [step for step, _ in found], *([100 * (r[name] or 0.0) for _, r in found] for name in ends)

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    taught = max(scores(folders["sft"])[0])
    kinds = (
        ("sft", "SFT", "#d9622b", 0),
        ("after", "GRPO after it", "#1f5fbf", taught),
        ("alone", "GRPO alone", "#7a7f87", 0),
    )
    for name, label, colour, shift in kinds:
        steps, values, low, high = scores(folders[name])
        at = [step + shift for step in steps]
        axes.plot(at, values, color=colour, marker="o", markersize=4, label=label)
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out pass@1, %")
    axes.set_ylim(-2, 102)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=130)


if __name__ == "__main__":
    main()
