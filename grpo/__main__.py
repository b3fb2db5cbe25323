"""The command `grpo`, which is `python -m grpo` too: one word for each of the package's commands.

    grpo gsm8k                    train; `grpo run gsm8k` in full: what is no command below is a task or a flag of run
    grpo sft [TASK]               learn from given answers: of a task, or rows with messages
    grpo dpo [TASK]               learn from pairs of a better and a worse answer
    grpo chat RUN                 talk to what was trained, and to its base beside it
    grpo report RUN [RUN ...]     report.html about a run, or several compared
    grpo export RUN --to DIR      the adapter or the whole model, for other programs
    grpo rewards                  the rewards that ship; tries one on a text or a whole run
    grpo new NAME --data FILE     a task file for some data
    grpo doctor [TASK]            would a run start here, with what, and what is in its way

`grpo COMMAND --help` has the flags of each. Knows nothing of them.
"""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module

from grpo.errors import nearest
from grpo.task import shipped_tasks
from grpo.terminal import leave_a_broken_pipe

COMMANDS = {
    "run": "grpo.run",
    "sft": "grpo.sft",
    "dpo": "grpo.dpo",
    "chat": "grpo.chat.__main__",
    "report": "grpo.report.__main__",
    "export": "grpo.export.__main__",
    "rewards": "grpo.rewards.__main__",
    "new": "grpo.new",
    "doctor": "grpo.doctor.__main__",
}
HELP = ("-h", "--help", "help")


def main() -> int:
    """Run the process's own command line. Returns the exit code."""
    words = sys.argv[1:]
    if not words or words[0] in HELP:
        return _show((__doc__ or "").strip().removesuffix(" Knows nothing of them."), 0 if words else 2)
    if words[0] in COMMANDS:
        sys.argv = [f"{sys.argv[0]} {words[0]}", *words[1:]]
    elif hint := _meant(words[0]):
        print(f"error: There is neither a command nor a task {words[0]!r}.{hint}", file=sys.stderr)
        return 2
    return import_module(COMMANDS.get(words[0], COMMANDS["run"])).main()


def _show(text: str, code: int) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has read enough
        leave_a_broken_pipe()
    return code


def _meant(word: str) -> str:
    """ " Did you mean `doctor`?" of what is no task, no path, no flag and nearly a command; else nothing."""
    is_name = re.fullmatch(r"\w+", word) and word not in shipped_tasks() and not os.path.lexists(word)
    return nearest(word, COMMANDS) if is_name else ""


if __name__ == "__main__":
    sys.exit(main())
