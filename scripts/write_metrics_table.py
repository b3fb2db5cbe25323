"""Writes docs/metrics.md from the table in grpo/metrics.py, never by hand.

python scripts/write_metrics_table.py            write
python scripts/write_metrics_table.py --check    exit 1 if the document says something else
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpo.metrics import TIMING_PREFIXES, markdown

DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"

ABOUT = f"""# What a run writes down

<!-- written by python scripts/write_metrics_table.py from grpo/metrics.py -->

`metrics.jsonl` has a line for each step and one for each held-out score, TensorBoard has the same numbers, and the step
line shows some of them. `step` counts from 0: it is the number of updates behind the policy that sampled, in a held-out
score too. A number that is not finite is `null`; a step that trained nothing has no entropy and no mismatch.
`<...>` stands for what a run puts there. Names that begin with {", ".join(f"`{kind}`" for kind in TIMING_PREFIXES)} may
differ between two runs that are otherwise equal. "Healthy" is where a number should be, where that can be said of
every run.

"""


def main() -> int:
    text = ABOUT + markdown() + "\n"
    if "--check" not in sys.argv[1:]:
        DOCUMENT.write_text(text)
    elif not DOCUMENT.exists() or DOCUMENT.read_text() != text:
        print(f"{DOCUMENT} is not what grpo/metrics.py says: run python {sys.argv[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
