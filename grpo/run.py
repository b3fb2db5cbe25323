"""The command line: `python -m grpo.run TASK.py [flags]`. Loads a task, resolves the configuration, and starts.

    python -m grpo.run tasks/gsm8k.py                     train
    python -m grpo.run tasks/gsm8k.py --check             try data and rewards, no training
    python -m grpo.run --resume runs/gsm8k-...            go on where the last checkpoint was
    python -m grpo.run tasks/gsm8k.py --run-dir D --resume-or-start       the same command as often as a scheduler likes
    python -m grpo.run --eval runs/gsm8k-...              held-out score of a run, or of any model with a task file
    torchrun --nproc-per-node 2 -m grpo.run tasks/gsm8k.py       the same on two GPUs

Bad input, and memory or a disk that runs out, end with one sentence and exit code 2. Ctrl-C, SIGTERM and SIGHUP finish
the step, save, and end with exit codes 130, 143 and 129.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from contextlib import suppress

from grpo.command import Options
from grpo.errors import Stopped, ToldElsewhere, UserError, exits_in_words
from grpo.guards import no_happy_exit, stopped_by_signals
from grpo.launcher import Place, launched, launcher_told, leave_variables, take_own_gpu
from grpo.recipes import Method, module_of
from grpo.resolve import Resolved, resolve
from grpo.terminal import console, leave_a_broken_pipe, plain, plain_logs, say
from grpo.world import ALONE, FOLDER, World

NEEDS_SHARED = "Several hosts that resume need the run's folder on a file system that they share."
BROKEN_PIPE = 141  # as shells have it: 128 and the number of SIGPIPE, which not every system has


def main(argv: list[str] | None = None, method: Method | None = None) -> int:
    """Run a command line, by default the process's own. Returns the exit code. method: what teaches, where the command
    says it (grpo/sft.py, grpo/dpo.py)."""
    try:
        with stopped_by_signals(), no_happy_exit():
            if argv is None:
                _open_what_is_closed()
                _import_from_here()
                plain_logs()
            given, place = sys.argv[1:] if argv is None else argv, launched()
            return _with_others(place, given, method) if place else _dispatch(given, ALONE, method)
    except ToldElsewhere:
        return 2
    except UserError as error:
        return _tell(str(error))
    except BrokenPipeError:  # --help has a reader that has read enough
        leave_a_broken_pipe()
        return BROKEN_PIPE
    except OSError as error:  # what the system refuses outside of a run: a file of the command line's, mostly
        return _tell(f"{error.filename or 'The system'}: {error.strerror or error}.")
    except KeyboardInterrupt as error:
        say(" ".join(["Stopped at once.", *getattr(error, "__notes__", [])]))
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)


def _open_what_is_closed() -> None:
    """Where standard input, output or error is closed (`>&-`), the next file would take its number: what a library
    prints would be written into metrics.jsonl."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _import_from_here() -> None:
    """`grpo` finds the modules of rewards in the folder that it is called in, as `python -m grpo.run` does."""
    with suppress(FileNotFoundError):  # what is wrong with a folder that is gone is told where paths are read
        if not sys.flags.safe_path and not {"", os.getcwd()} & set(sys.path):
            sys.path.insert(0, os.getcwd())


def _tell(error: str) -> int:
    console.file.flush()
    print(f"error: {plain(error)}", file=sys.stderr)
    return 2


def _with_others(place: Place, argv: list[str], method: Method | None) -> int:
    """As one of several processes, of which rank 0 speaks for all."""
    with launcher_told(place, plain):
        take_own_gpu(place)
        from grpo.ranks import joined  # which needs PyTorch, and a process by itself does not

        leave_variables()
        with joined(place, _say_on_any_rank) as world:
            console.quiet = world.rank > 0
            return _dispatch(argv, world, method)


def _say_on_any_rank(text: str) -> None:
    """What rank 0 may not be there to say."""
    was_quiet, console.quiet = console.quiet, False
    say(text)
    console.quiet = was_quiet


def _dispatch(argv: list[str], world: World, method: Method | None) -> int:
    world.does("reading the command line and the task file")
    remembered = world.recall(FOLDER)
    try:
        options, resolved = resolve(argv, remembered, method)
    except UserError as error:
        if world.rank > 0 and (remembered or any(word.startswith("--resume") for word in argv)):
            raise UserError(f"{error} {NEEDS_SHARED}") from error
        raise
    with exits_in_words():
        return _do(options, resolved, shlex.join(["python", "-m", module_of(method), *argv]), world)


def _do(options: Options, resolved: Resolved, command: str, world: World) -> int:
    """Each verb is imported when it is wanted: all need PyTorch, and neither --help nor a mistyped flag does."""
    if options.check:
        from grpo.verbs.check import check

        return check(resolved) if world.rank == 0 else 0
    from grpo import api

    if options.eval:
        return api.score(resolved, options.eval, world)
    run = api.begin(options, resolved, command, world=world)
    run.close()
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
