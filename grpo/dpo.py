"""The command line of direct preference optimisation: `python -m grpo.dpo [TASK.py] [flags]`. Knows nothing that
grpo.run does not: it is the same command, whose policy learns from pairs of a better and a worse answer.

    python -m grpo.dpo --data pairs.jsonl --model NAME         rows with `chosen` and `rejected`, and `prompt` or not
    python -m grpo.dpo TASK.py                                 a task whose rows have these columns
"""

from __future__ import annotations

import sys

from grpo.run import main as run


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default the process's own. Returns the exit code."""
    return run(argv, method="dpo")


if __name__ == "__main__":
    sys.exit(main())
