"""Writes the tables of kernels/README.md from benchmarks/results/kernels-*.json.
Knows nothing of how the figures were measured.

    python scripts/write_kernel_table.py           rewrite what stands between the two markers
    python scripts/write_kernel_table.py --check   fail if that would change anything
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "kernels" / "README.md"
BEGIN, END = "<!-- table begins: python scripts/write_kernel_table.py -->", "<!-- table ends -->"
HEADER = (
    "| operation | shape | entry | ms | × floor | target | peak GiB | error |\n|---|---|---|---:|---:|---:|---:|---|"
)


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    results = [
        json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("kernels-*.json"))
    ]
    written = before + BEGIN + "\n\n" + "\n\n".join(map(section, results)) + "\n\n" + END + after
    if "--check" in sys.argv[1:]:
        sys.exit(f"{README} is older than the results; run python {Path(__file__).name}" if written != text else 0)
    README.write_text(written)


def section(result: dict[str, Any]) -> str:
    """One GPU's table, under a sentence that says where the figures come from."""
    machine = result["machine"]
    origin = (
        f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date']}: "
        f"`{machine['command']}`. The last run also measured a copy at {machine['copy_tb_per_s']} TB/s, "
        f"read and written, and an 8192-cubed bfloat16 product at {machine['matmul_tflop_per_s']} TFLOP/s."
    )
    tables = []
    for floor, rows in groupby(result["rows"], key=floor_of(result["rows"])):
        measured = [line(row) for row in rows if not row["skipped"]]
        tables.append(f"Floor: {floor}.\n\n{HEADER}\n" + "\n".join(measured))
    skipped = sorted({f"{row['entry']} ({row['skipped']})" for row in result["rows"] if row["skipped"]})
    if skipped:
        tables.append("Skipped: " + ", ".join(skipped) + ".")
    return f"### {machine['gpu']}\n\n{origin}\n\n" + "\n\n".join(tables)


def floor_of(rows: list[dict[str, Any]]):
    """The key that puts rows of one floor together; a skipped entry has none and stands with its operation."""
    floors = {(row["operation"], row["shape"]): row["floor"] for row in rows if not row["skipped"]}
    return lambda row: floors.get((row["operation"], row["shape"]), "none measured")


def line(row: dict[str, Any]) -> str:
    name = f"**{row['entry']}**" if row["entry"].startswith("ours") else row["entry"]
    errors = ", ".join(f"{output} {error:.0e}" for output, error in row["errors"].items())
    target = f"≤ {row['target']}" if row["target"] and row["entry"] == "ours" else ""
    return (
        f"| {row['operation']} | {row['shape']} | {name} | {row['ms']:.3g} | {row['ratio']:.2f} | {target} "
        f"| {row['peak_gib']:.2f} | {errors} |"
    )


if __name__ == "__main__":
    main()
