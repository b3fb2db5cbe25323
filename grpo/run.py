"""The command line: `python -m grpo.run TASK.py [flags]`. Loads a task, resolves the configuration, and starts.

    python -m grpo.run tasks/gsm8k.py                     train
    python -m grpo.run tasks/gsm8k.py --check             try data and rewards, no training
    python -m grpo.run --resume runs/gsm8k-...            go on where the last checkpoint was
    python -m grpo.run --eval runs/gsm8k-...              held-out score of a run, or of any model with a task file

Bad input, and memory or a disk that runs out, end with one sentence and exit code 2; Ctrl-C finishes the step, saves,
and ends with exit code 130.
"""

from __future__ import annotations

import sys

from grpo.errors import UserError
from grpo.resolve import resolve
from grpo.terminal import console, say


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(argv)
    except UserError as error:
        console.file.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("Stopped at once. What the last checkpoint holds is there: go on with --resume.")
        return 130


def _dispatch(argv: list[str]) -> int:
    """Each verb is imported when it is wanted: all need PyTorch, and neither --help nor a mistyped flag does."""
    arguments, resolved = resolve(argv)
    if arguments.check:
        from grpo.verbs.check import check

        return check(resolved)
    if arguments.eval:
        from grpo.verbs.evaluate import evaluate

        return evaluate(resolved, arguments.eval)
    from grpo.verbs.train import start

    return start(resolved, arguments.resume)


if __name__ == "__main__":
    sys.exit(main())
