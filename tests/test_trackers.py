"""Trackers are told the numbers of a run, write into its folder, and go on with it. Each test wants its package."""

import math
import sqlite3
from importlib.util import find_spec

import pytest
from recorded import NAMES, group_of, held_out_of, metrics_of, scores_of

from grpo.config import Config, from_dict
from grpo.errors import UserError
from grpo.record import Recorder
from grpo.record.trackers import TRACKERS, About, build_trackers, check_installed


@pytest.fixture
def run_with(tmp_path, monkeypatch):
    """Two processes' worth of a run of three steps, told to a tracker of this name."""
    for variable in ("WANDB_MODE", "TRACKIO_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)

    def run(name):
        if find_spec(name) is None:  # trackio must not be imported before it is told where to write
            pytest.skip(f"{name} is not installed")
        about = About(tmp_path, "toy", "0123abcd", {"steps": 3, "dual_clip": math.inf, "log": [name]})
        position = None
        for steps in (range(2), range(2, 3)):
            with Recorder(tmp_path, 3, steps[0], "toy", NAMES, position) as recorder:
                for sink in build_trackers([name, name], about, recorder.message):
                    recorder.add(sink)
                for step in steps:
                    recorder.evaluation(step, scores_of(step), [held_out_of(step)])
                    recorder.step(step, metrics_of(step) | {"logged/<script>alert(1)</script>": 1.0})
                    recorder.completions(step, [group_of(step, text="<script>\x1b[31m\u202e")])
                position = recorder.position()
        return tmp_path

    return run


def test_wandb_is_offline_and_goes_on_under_its_id(run_with, capsys):
    folder = run_with("wandb")
    names = sorted(path.name for path in (folder / "wandb").glob("offline-run-*"))
    assert names and all(name.endswith("-0123abcd") for name in names)
    assert all(list((folder / "wandb" / name).glob("run-0123abcd.wandb")) for name in names)
    assert "not written any more" not in capsys.readouterr().out


def test_trackio_keeps_its_numbers_in_the_folder(run_with, capsys):
    folder = run_with("trackio")
    (database,) = (folder / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("select step, metrics from metrics order by id").fetchall()
    assert [step for step, _ in rows] == [0, 0, 1, 1, 2, 2]
    assert '"eval/pass@1"' in str(rows[0][1])
    said = capsys.readouterr().out
    assert "\x1b" not in said and "not written any more" not in said


def test_mlflow_has_every_number_under_one_run(run_with, capsys):
    folder = run_with("mlflow")
    from mlflow import MlflowClient

    client = MlflowClient((folder / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("grpo-toy").experiment_id])
    assert run.data.params["steps"] == "3"
    for name, expected in {"reward/mean": [0.1 + step / 3 for step in range(3)], "eval/pass_1_low": [0.25] * 3}.items():
        history = sorted((each.step, each.value) for each in client.get_metric_history(run.info.run_id, name))
        assert history == [(step, pytest.approx(value)) for step, value in enumerate(expected)]
    assert len(client.get_metric_history(run.info.run_id, "optim/grad_norm")) == 2  # one was not finite
    assert "not written any more" not in capsys.readouterr().out


def test_a_tracker_that_is_not_there_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("grpo.record.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--log wandb needs the package wandb.*pip install 'grpo\[log\]'"):
        check_installed(("wandb",))
    check_installed(())


def test_a_tracker_that_cannot_begin_is_told(monkeypatch, tmp_path):
    def refuse(about):
        raise ConnectionError("no such server")

    monkeypatch.setitem(TRACKERS, "wandb", refuse)
    with pytest.raises(UserError, match=r"--log wandb cannot begin: ConnectionError \(no such server\)"):
        build_trackers(["wandb"], About(tmp_path, "toy", "0", {}), print)


def test_the_configuration_says_which(tmp_path):
    assert from_dict({"log": ["wandb", "mlflow"]}).log == ("wandb", "mlflow")
    for wrong in ("wandb", ("comet",), (1,)):
        with pytest.raises(UserError, match=r"log is .* It must be a tuple of 'wandb', 'trackio', 'mlflow'"):
            Config(log=wrong)
