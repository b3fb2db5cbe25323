"""The page about models says what its script found, and what it did not try."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import write_models_table as script

FUSED = {
    "class": "A",
    "layers": "fused, over packed sequences (2 of A)",
    "bases": {"float32": 1e-6, "bf16": 3e-3, "nf4": 2e-6},
    "vllm": {"float32": "shared", "bf16": "adapter, 0.03 away", "nf4": "refused: /tmp/x/y is | odd."},
}
GENERIC = {
    "class": "B",
    "layers": "those of transformers' B, slower than fused layers over packed sequences (layer 0 has (odd) norms)",
    "bases": {"float32": 1e-6, "bf16": 1e-6, "nf4": 1e-6},
}


def test_a_row_a_family_and_every_reason_once(monkeypatch):
    monkeypatch.setattr(script, "SHOWN", {"a": "Family A"})
    page = script.page({"a": FUSED, "b": GENERIC, "c": GENERIC, "d": {"refused": "failed: nothing"}})
    assert "| Family A | `A` | **fused** | yes | 0.003 away | yes | shared | adapter, 0.03 away | refused (1) |" in page
    assert page.count("| `B` | transformers' (2) | yes | yes | yes |") == 2
    assert "| ? | refused (3) | - | - | - |" in page
    assert page.endswith("1. is / odd.\n2. Not fused: layer 0 has (odd) norms\n3. failed: nothing\n")


def test_the_page_that_ships_is_of_families_that_the_script_knows():
    page = script.PAGE.read_text()
    assert all(f"| {shown} | `" in page for shown in script.SHOWN.values())
    assert " away" not in page and "failed" not in page
