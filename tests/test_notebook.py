"""examples/notebook.ipynb does what it says, in a kernel as Jupyter starts it."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook.ipynb"


def text_of(cell):
    """What a cell has shown."""
    shown = [each.get("text") or each.get("data", {}).get("text/plain", "") for each in cell.outputs]
    return "".join(shown)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    read = nbformat.read(NOTEBOOK, 4)
    folder = str(tmp_path_factory.mktemp("notebook"))
    done = nbclient.NotebookClient(read, timeout=240, resources={"metadata": {"path": folder}}).execute()
    return [cell for cell in done.cells if cell.cell_type == "code"]


@pytest.mark.slow
def test_every_cell_runs_and_shows_what_it_promises(cells):
    trained, rewards, samples, score, _, dots, gone_on, again = cells
    lines = text_of(trained).splitlines()
    assert any(line.lstrip().startswith("1/3 ") for line in lines) and any(
        line.lstrip().startswith("3/3 ") for line in lines
    )
    assert "run.resume(steps=6)" in text_of(trained)
    assert not any(len(line) > 110 for line in lines if "/3 " in line[:6])
    assert len(eval(text_of(rewards))) == 3
    assert text_of(samples).count(" | stop | ") + text_of(samples).count(" | length | ") == 2
    assert 0 <= float(text_of(score).splitlines()[-1]) <= 1
    assert "two steps are enough" in text_of(dots) and "step 2 of 50" in text_of(dots)
    assert text_of(gone_on).splitlines()[-1].startswith("(True, [")
    assert text_of(again).strip().splitlines()[-1]


@pytest.mark.slow
def test_lines_are_text_that_a_notebook_keeps(cells):
    """Not a picture of a terminal a line, and no control codes."""
    kinds = {output.output_type for output in cells[0].outputs}
    assert kinds == {"stream"} and "\x1b" not in text_of(cells[0])


def test_it_is_committed_without_what_it_has_shown():
    nbformat = pytest.importorskip("nbformat")
    cells = nbformat.read(NOTEBOOK, 4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
