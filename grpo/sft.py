"""The command line of supervised fine-tuning: `python -m grpo.sft [TASK.py] [flags]`. Knows nothing that grpo.run does
not: it is the same command, whose policy learns from given answers.

    python -m grpo.sft tasks/gsm8k.py                          on the gold answers of a task
    python -m grpo.sft --data chats.jsonl --model NAME         on rows with `messages`, or `prompt` and `completion`
"""

from __future__ import annotations

import sys

from grpo.run import main as run


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default the process's own. Returns the exit code."""
    return run(argv, method="sft")


if __name__ == "__main__":
    sys.exit(main())
