"""Writes the table of recipes in docs/algorithm.md from grpo/recipes.py.

python scripts/write_recipe_table.py            rewrite what stands between the two markers
python scripts/write_recipe_table.py --check    fail if that would change anything
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpo.config import Config
from grpo.recipes import RECIPES

DOCUMENT = Path(__file__).parents[1] / "docs" / "algorithm.md"
BEGIN, END = "<!-- recipes begin: python scripts/write_recipe_table.py -->", "<!-- recipes end -->"


def main() -> None:
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    written = f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"
    if "--check" in sys.argv[1:]:
        sys.exit(f"{DOCUMENT} is older than grpo/recipes.py; run python {sys.argv[0]}" if written != text else 0)
    DOCUMENT.write_text(written)


def table() -> str:
    """A line a field, a column a recipe, beside the field's default; a dash where a recipe leaves it as it is."""
    fields = list(dict.fromkeys(name for values in RECIPES.values() for name in values))
    header = ["", "default", *(f"`{recipe}`" for recipe in RECIPES)]
    lines = [[f"`{name}`", shown(getattr(Config(), name)), *recipe_values(name)] for name in fields]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])


def recipe_values(name: str) -> list[str]:
    return [shown(values[name]) if name in values else "-" for values in RECIPES.values()]


def shown(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
