"""What the documents show is what is there: the task file in the README, the tables, the flags."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.config import field_names

ROOT = Path(__file__).parents[1]


def test_the_readme_shows_the_task_file_as_it_is():
    assert (ROOT / "tasks" / "gsm8k.py").read_text() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", ["write_readme_table.py", "write_kernel_table.py"])
def test_tables_are_those_of_the_results(script):
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", ["README.md", "docs/algorithm.md", "docs/metrics.md", "tasks/README.md"])
def test_flags_in_the_documents_exist(document):
    flags = {name.replace("_", "-") for name in field_names()} | {"check", "resume", "eval", "help"}
    commands = " ".join(re.findall(r"grpo\.run[^\n`]*|`--[a-z][^`]*`", (ROOT / document).read_text()))
    used = set(re.findall(r"--([a-z][a-z-]+)", commands))
    assert used <= flags | {f"no-{name}" for name in flags}, used - flags


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/algorithm.md", "tasks/README.md"])
def test_links_to_files_lead_somewhere(document):
    path = ROOT / document
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text())
    assert all((path.parent / target).exists() for target in targets), targets
