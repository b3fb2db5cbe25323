"""examples/: the package of a reward is built, installed, found in the list, and used by name in a task."""

import doctest
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.task import load_task

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples" / "reward_plugin"


def test_the_reward_of_the_package_does_what_it_says():
    spec = importlib.util.spec_from_file_location("reward_plugin", PLUGIN / "reward_plugin.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert doctest.testmod(module).failed == 0
    assert module.mentions("", ["a"]) == 0.0
    assert len((PLUGIN / "reward_plugin.py").read_text().splitlines()) <= 20


def test_the_task_of_the_warm_start_pays_for_its_format_alone():
    task = load_task(ROOT / "examples" / "warm_start.py")
    [pays] = task.rewards
    few, rows = (list(task.rows("train", data)) for data in ("few", "embedded"))
    assert (len(few), len(rows)) == (16, 2000)
    assert few == rows[:16]
    for row in few:
        gold = task.gold_text(row)
        assert pays(gold, row["answer"]) == pays(gold.strip(), row["answer"]) == 1.0
        assert pays(gold, row["answer"] + "1") == 0.0
        block = f"<answer>\n{row['answer']}\n</answer>"
        for text in (
            f"<reasoning>\n{row['solution']}\n</reasoning>\n{block}",
            block,
            row["solution"],
            f"{gold}{gold}",
            "",
        ):
            assert pays(text, row["answer"]) == 0.0


@pytest.mark.slow
def test_the_package_installs_shows_up_and_is_used_by_name(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(PLUGIN, source)  # a build writes beside its source
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(source)], check=True, capture_output=True, text=True)
    paths = os.pathsep.join([str(target), str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}

    def run(*command):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = run("grpo.rewards")
    entry = next(entry for entry in listed.split("\n\n") if entry.startswith("mentions("))
    assert "package reward-plugin 0.1   range 0 to 1" in entry
    assert entry.splitlines()[-1].endswith("is 0.5")
    keywords = 'keywords:=["coast", "Peru"]'
    assert run("grpo.rewards", "mentions", "--completion", "on the coast", "--column", keywords) == "mentions 0.5\n"
    checked = run("grpo.run", str(PLUGIN / "task.py"), "--check", "--model", "embedded")
    assert "full marks from `mentions`" in checked
