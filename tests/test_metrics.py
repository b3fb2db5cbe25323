"""The table of metrics says what runs write: nothing more, nothing less."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toy_task import SMALL, TASK

from grpo.config import field_names
from grpo.metrics import _HEALTH, METRICS, find
from grpo.run import main

ROOT = Path(__file__).parents[1]
FLAGS = [
    [],
    "--dynamic-sampling --kl-coef 0.1 --entropy-coef 0.01 --mini-batches 2 --epochs 2".split(),
    "--correction sequence_mask --off-policy-mask 0.5 --top-entropy 0.5 --advantage gdpo".split(),
]
TELLS = """
def tells(completions, log_metric):
    log_metric("letters a line", 2.0)
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The names that runs of a toy task write, with several flags."""
    names = set()
    for place, flags in enumerate(FLAGS):
        folder = tmp_path_factory.mktemp(f"flags{place}")
        (folder / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0, tells: 1.0}", extra=TELLS))
        argv = [str(folder / "toy.py"), *SMALL, "--steps", "1", *flags, "--run-dir", str(folder / "run")]
        assert main(argv) == 0
        for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
            names |= json.loads(line).keys() - {"step"}
    return names


def test_every_metric_of_a_run_is_in_the_table(written):
    unknown = {name for name in written if find(name) is None}
    assert not unknown, f"say in grpo/metrics.py what these are: {unknown}"


def test_every_metric_in_the_table_is_written(written):
    found = {find(name).name for name in written}
    assert {metric.name for metric in METRICS if not metric.optional} <= found
    assert {metric.name for metric in METRICS if metric.column and "grpo" in metric.column.of} <= found
    assert "logged/<name>" in found


def test_a_name_is_of_one_row():
    assert find("reward/mean").name == "reward/mean"
    assert find("reward/correctness").name == "reward/<reward>"
    assert find("reward/correctness/failed").name == "reward/<reward>/failed"
    assert find("reward/judge/of\nall").name == "reward/<reward>/<part>"
    assert find("eval/pass@1/low").name == "eval/pass@1"
    assert find("eval/pass@16/high").name == "eval/pass@<k>"
    assert find("time/step").name == "time/step"
    assert find("speed/laps") is find("reward") is find("eval/pass@1/middle") is None


def test_the_table_stands_in_the_document():
    command = [sys.executable, str(ROOT / "scripts" / "write_metrics_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_healthy_is_said_in_words_and_in_numbers():
    checked = [metric for metric in METRICS if metric.health]
    assert {metric.name for metric in checked} == set(_HEALTH)
    for metric in checked:
        assert metric.healthy, metric.name
        assert -math.inf < metric.health.low or metric.health.high < math.inf
        assert metric.health.low < metric.health.high
        assert metric.health.outside.endswith(".") and metric.health.remedy.endswith(".")
        # A share or a number in the words is the number.
        for share in re.findall(r"(?:below|above) (\d+)%", metric.healthy):
            assert int(share) / 100 in (metric.health.low, metric.health.high)
    flags = re.findall(r"--[a-z-]+", " ".join(metric.health.remedy for metric in checked))
    assert {flag[2:].replace("-", "_") for flag in flags} <= set(field_names())
