"""The command: `python -m grpo.report RUN [RUN ...] --out FILE` makes the page from the folders alone.

Two runs or more are compared, the first with each of the others.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpo.errors import UserError
from grpo.folder import run_of
from grpo.report.page import write_report
from grpo.report.reading import Reading
from grpo.report.sink import REPORT
from grpo.terminal import plain, say

MOST_RUNS = 8  # as many as there are colours


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default the process's own. Returns the exit code."""
    given = command_line().parse_args(argv)
    try:
        say(str(_make(list(dict.fromkeys(given.runs)), given.out)))
        return 0
    except UserError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
    except OSError as error:
        print(f"error: {plain(str(error.filename or 'The system'))}: {error.strerror or error}.", file=sys.stderr)
    return 2


def command_line() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo.report", description="One HTML file about a run, or several runs compared."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", metavar="FILE", help=f"where to write it; {REPORT} in the folder of one run")
    return parser


def _make(runs: list[str], out: str | None) -> Path:
    """Write it; returns where.

    Raises:
        UserError: a folder is no run's, or it is not said where the page of several is to go.
    """
    if len(runs) > 1 and not out:
        raise UserError("The report of several runs belongs to none of their folders: give --out FILE.")
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs are too many for one page. Give at most {MOST_RUNS}.")
    readings = [Reading(run_of(Path(run))) for run in runs]
    path = Path(out) if out else readings[0].folder / REPORT
    if path.is_dir():
        raise UserError(f"{path} is a folder. --out takes the name of the file to write.")
    if not path.parent.is_dir():
        raise UserError(
            f"There is no folder {path.parent} to write {path.name} into. Make it, or choose another --out."
        )
    write_report(readings, path)
    return path


if __name__ == "__main__":
    sys.exit(main())
