"""curves.png is drawn of whatever there is."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from grpo.record import draw_curves
from grpo.record.curves import _running_mean, _thinned


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 0, "eval/pass@1": 0.5}],
        [{"step": 0, "reward/mean": None, "reward/a": 1.0, "policy/entropy": None, "mismatch/kl": -1e-5}],
        [{"step": step, "reward/mean": step, **{f"reward/{part}": 1 for part in range(12)}} for step in range(50)],
        [
            {"step": step, "reward/mean": sign * 1e308, "reward/答_$x$_{": 1, "policy/entropy": sign * 10**400}
            for step, sign in enumerate([1, -1, 1])
        ],
        [{"step": 0, "reward/mean": 1}, {"step": 1, "reward/mean": 1, "reward/new": 2, "eval/pass@1": 1}],
    ],
)
def test_curves_are_drawn_of_whatever_there_is(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1, "re')
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        assert len(set(picture.convert("L").getdata())) > 10
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("length", [1, 1999, 2000, 2001, 5000])
def test_curves_of_many_steps_are_means_of_neighbours(length):
    columns = np.stack([np.arange(length, dtype=np.float64), np.arange(length) % 7.0])
    columns[1, ::3] = np.nan
    size = math.ceil(length / 2000)
    thin = _thinned(columns)
    assert thin.shape == (2, math.ceil(length / size))
    for place in (0, thin.shape[1] // 2, thin.shape[1] - 1):
        steps, values = columns[:, size * place : size * (place + 1)]
        known = values[~np.isnan(values)]
        expected = [steps.mean(), known.mean() if len(known) else np.nan]
        np.testing.assert_allclose(thin[:, place], expected)


def test_nothing_is_drawn_of_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(("length", "reach"), [(1, 0), (1, 3), (2, 5), (9, 0), (9, 1), (10, 4), (7, 20)])
def test_the_running_mean_is_that_of_the_neighbours_known(length, reach):
    values = np.arange(length, dtype=np.float64) ** 2
    values[::4] = np.nan
    expected = [
        np.mean([each for each in values[max(0, at - reach) : at + reach + 1] if not np.isnan(each)] or [np.nan])
        for at in range(length)
    ]
    np.testing.assert_allclose(_running_mean(values, reach), expected)
