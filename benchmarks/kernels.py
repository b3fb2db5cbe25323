"""Every kernel against its floor and its rivals on one GPU: prints a table, writes results/kernels-<gpu>.json.
Knows nothing of any kernel: the cases are listed by the files of kernel_cases/, a file a kernel.

    python benchmarks/kernels.py                       ours only
    python benchmarks/kernels.py --peers               and every rival that is installed
    python benchmarks/kernels.py --only linear_logprob cases whose file or operation contains the word
"""

import argparse
import gc
import importlib
import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from contest import Case, Contest, Run, copy_bandwidth, matmul_rate, milliseconds, peak_gib, rough_milliseconds
from kernel_cases import FILES

RESULTS = Path(__file__).parent / "results"
LONG_MS = 2.0  # a floor from which on every entry keeps the GPU busy for longer than the host needs to queue it


def main() -> None:
    arguments = parse_arguments()
    cases = [
        case
        for file in FILES
        for case in importlib.import_module(f"kernel_cases.{file}").CASES
        if arguments.only in f"{file} {case.operation}"
    ]
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "copy_tb_per_s": round(bandwidth / 1e12, 2),
        "matmul_tflop_per_s": round(rate / 1e12),
    }
    print(json.dumps(machine))
    print_row("operation", "shape", "entry", "ms", "floor", "ratio", "GiB", "errors, or why it was skipped")
    rows, path = [], None
    for case in cases:
        rows += run_case(case, bandwidth, arguments.peers)
        path = write(machine, rows)
    print(f"wrote {path}" if path else f"No case has {arguments.only!r} in its name.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="time installed rivals too")
    parser.add_argument("--only", default="", help="run the cases whose file or operation contains this")
    return parser.parse_args()


def run_case(case: Case, bandwidth: float, with_peers: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    contest = case.prepare()
    builders: dict[str, Callable[[], Run]] = {entry: lambda run=run: run for entry, run in contest.entries.items()}
    if with_peers:
        builders |= contest.peers
    rows = []
    for entry, build in builders.items():
        row = {"operation": case.operation, "shape": case.shape, "entry": entry, "target": case.target}
        try:
            row |= measure(contest, build(), bandwidth) | {"skipped": ""}
        except ImportError as missing:
            row["skipped"] = f"not installed: {missing.name}"
        except torch.OutOfMemoryError:
            row["skipped"] = "out of memory"
        except Exception as error:
            # What is not ours may fail in ways of its own, and the rest is worth measuring all the same.
            if entry not in contest.peers:
                raise
            row["skipped"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        rows.append(row)
        errors = " ".join(f"{name} {error:.1e}" for name, error in row.get("errors", {}).items())
        numbers = [row.get(key) for key in ("ms", "floor_ms", "ratio", "peak_gib")]
        print_row(case.operation, case.shape, entry, *numbers, row["skipped"] or errors)
    del contest, builders
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def measure(contest: Contest, run: Run, bandwidth: float) -> dict[str, Any]:
    """A run's time, its floor, its memory and its errors.

    A floor that is itself a run is timed before and after, because a GPU's clock falls as it warms.
    """
    errors = {} if contest.errors is None else contest.errors(run())
    is_short = contest.floor_run is None or rough_milliseconds(contest.floor_run) < LONG_MS
    floor_before = floor_ms(contest, bandwidth, is_short)
    ms = milliseconds(run, waits=is_short) / contest.times
    floor = (floor_before + floor_ms(contest, bandwidth, is_short)) / 2
    return {
        "ms": round(ms, 4),
        "floor_ms": round(floor, 4),
        "floor": contest.floor_note,
        "ratio": round(ms / floor, 3),
        "peak_gib": round(peak_gib(run), 3),
        "errors": errors,
    }


def floor_ms(contest: Contest, bandwidth: float, is_short: bool) -> float:
    """The slower of the two floors: bytes over the copy bandwidth measured in this process, and the floor's own run."""
    floor = contest.floor_bytes / bandwidth * 1e3
    if contest.floor_run is None:
        return floor
    return max(floor, milliseconds(contest.floor_run, waits=is_short) / contest.times)


def print_row(*cells: Any) -> None:
    widths = (42, 28, 34, 9, 9, 7, 7)
    fixed = "".join(f"{'' if cell is None else cell!s:<{width}}" for cell, width in zip(cells, widths, strict=False))
    print(fixed + str(cells[-1]), flush=True)


def write(machine: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Cases that were not run keep what an earlier run of the same GPU wrote, and all keep their places."""
    path = RESULTS / f"kernels-{machine['gpu'].replace(' ', '-').lower()}.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = [row for case in (by_case(before) | by_case(rows)).values() for row in case]
    peers = " --peers" if any(not row["entry"].startswith("ours") for row in merged) else ""
    machine = machine | {"command": f"python benchmarks/kernels.py{peers}"}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": merged}, indent=1) + "\n")
    return path


def by_case(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The rows of each operation and shape, in the order in which these come."""
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["operation"], row["shape"]), []).append(row)
    return cases


if __name__ == "__main__":
    main()
