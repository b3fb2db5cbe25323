"""The page about models says what its script found, and what it did not try."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from tiny_models import CPU

from grpo.policy import load_model

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
    "layers": "those of transformers' B, a linear at a time, over packed sequences; "
    "slower than fused layers (layer 0 has (odd) norms)",
    "bases": {"float32": 1e-6, "bf16": 1e-6, "nf4": 1e-6},
}


def test_a_row_a_family_and_every_reason_once(monkeypatch):
    monkeypatch.setattr(script, "SHOWN", {"a": "Family A"})
    found = {"a": FUSED, "b": GENERIC, "c": GENERIC, "d": {"refused": "failed: nothing"}}
    page = script.page({family: out | {"with": "torch 2, vllm 3"} for family, out in found.items()})
    assert "on a CPU, with torch 2, vllm 3. Speed" in page
    assert "| Family A | `A` | **fused** | yes | 0.003 away | yes | shared | adapter, 0.03 away | refused (1) |" in page
    assert page.count("| `B` | transformers', packed (2) | yes | yes | yes |") == 2
    assert "| ? | refused (3) | - | - | - |" in page
    assert page.endswith("1. is / odd.\n2. Not fused: layer 0 has (odd) norms\n3. failed: nothing\n")


@pytest.mark.parametrize(
    ("name", "told"),
    [("llama", "**fused**"), ("starcoder2", "transformers', packed (1)")],
)
def test_the_way_of_layers_is_read_from_what_a_run_tells(name, told, tiny_config):
    notes, remarks = [], []
    load_model(tiny_config(name), CPU, 64, note=notes.append)
    [line] = [note.removeprefix("layers: ") for note in notes if note.startswith("layers: ")]
    assert script.way(line, remarks) == told
    assert remarks == [] or remarks[0].startswith("Not fused: layer 0 has no linears mlp.gate_proj")
    unpacked = line.replace("over packed sequences;", "a sequence at a time, as it has a convolution;")
    if name != "llama":
        assert script.way(unpacked, remarks) == "transformers', a sequence at a time (1) (2)"
        assert remarks[1] == "Not packed: it has a convolution"


def test_rows_are_written_anew_and_the_others_stay(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "RESULTS", tmp_path / "models.json")
    monkeypatch.setattr(script, "PAGE", tmp_path / "models.md")
    llama, bloom = FUSED | {"with": "torch 2"}, GENERIC | {"with": "torch 2"}
    script.keep({"bloom": bloom, "of long ago": bloom, "llama": llama})
    assert list(json.loads(script.RESULTS.read_text())) == ["llama", "bloom"]
    monkeypatch.setattr(script, "in_a_child", lambda families: dict.fromkeys(families, GENERIC))
    monkeypatch.setattr(script, "versions", lambda: "torch 3")
    monkeypatch.setattr(sys, "argv", ["script", "--only", "bloom,qwen3"])
    script.main()
    assert "torch 3" not in script.PAGE.read_text()
    sys.argv.append("--write")
    script.main()
    kept = json.loads(script.RESULTS.read_text())
    assert kept["llama"] == llama and kept["bloom"]["with"] == "torch 3" and list(kept) == ["llama", "qwen3", "bloom"]
    assert "with torch 2; torch 3. Speed" in script.PAGE.read_text()


def test_the_page_that_ships_is_made_of_the_results_that_ship(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "RESULTS", Path(shutil.copy(script.RESULTS, tmp_path)))
    there = script.PAGE.read_text()
    monkeypatch.setattr(script, "PAGE", tmp_path / "models.md")
    script.keep(json.loads(script.RESULTS.read_text()))
    assert script.PAGE.read_text() == there


def test_the_page_that_ships_is_of_is_of_families_that_the_script_knows():
    page = script.PAGE.read_text()
    assert all(f"| {shown} | `" in page for shown in script.SHOWN.values())
    assert " away" not in page and "failed" not in page
