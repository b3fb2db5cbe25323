"""PPO's value head at work: how much of the returns' variance it knows, step by step, in a run of a minute or two.

    python scripts/ppo_values.py

The embedded model is asked about apples and about stickers. Whatever it says of apples is paid 1, of stickers 0: a
question shows what its answer is worth, so a head can know all of it, and the policy can do nothing about it. It is a
run as any other: `python -m grpo.run TASK.py --advantage gae`. What is printed stands in docs/algorithm.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from grpo.run import main as run

TASK = """
from grpo import Config, Task


def rows(split, data):
    things = ["apples", "stickers"]
    return [{"question": f"Sara has {n} {things[n % 2]} and buys {n + 2}.", "worth": 1 - n % 2} for n in range(4, 40)]


def prompt(row):
    return [{"role": "user", "content": row["question"]}]


def paid(completion, worth):
    return float(worth)


task = Task(
    name="apples",
    rows=rows,
    prompt=prompt,
    rewards={paid: 1.0},
    gold="{worth}",
    solved=None,
    data="embedded",
    config=Config(model="embedded", base="float32"),
)
"""
FLAGS = """--advantage gae --value-lr 3e-3 --steps 60 --prompts-per-step 8 --group-size 2 --max-completion-tokens 12
--no-mask-truncated --learning-rate 1e-4 --eval-every 0 --eval-prompts 2 --eval-samples 1 --eval-k 1 --save-every 1000
--held-out 0 --threads 1 --seed 0""".split()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        task, made = Path(folder) / "apples.py", Path(folder) / "run"
        task.write_text(TASK)
        if code := run([str(task), *FLAGS, "--run-dir", str(made)]):
            return code
        lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "value/loss" in line]
    print("\nstep  explained variance  value loss")
    for line in steps[::6] + steps[-1:]:
        print(f"{line['step'] + 1:4}  {line['value/explained_variance']:18.2f}  {line['value/loss']:10.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
