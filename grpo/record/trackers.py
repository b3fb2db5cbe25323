"""Trackers: W&B, trackio and MLflow as sinks. They are libraries of others, imported where a run asks for them.

Nothing leaves the machine unasked: each writes into the run's folder, where its own viewer finds it (`wandb sync
RUN/wandb/offline-run-*`, `TRACKIO_DIR=RUN/trackio trackio show`, `mlflow ui --backend-store-uri RUN/mlflow`), unless
its own environment variables name a server. A run that goes on goes on there under the same id.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from grpo.errors import UserError, in_words
from grpo.record.jsonl import finite
from grpo.record.sinks import Numbers, Sink, TokenRecords, Tolerated
from grpo.terminal import plain
from grpo.types import Group

STEPS_BETWEEN_TABLES = 10  # a table of completions in every step would be most of what is sent


@dataclass(frozen=True)
class About:
    """What a tracker calls a run."""

    folder: Path
    task: str
    id: str
    config: Mapping[str, Any]


def check_installed(names: Sequence[str]) -> None:
    """To be asked before a model is loaded for nothing.

    Raises:
        UserError: a tracker's package is not here.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"--log {name} needs the package {name}, which is not installed: `pip install 'grpo[log]'`, or leave "
                "it out. metrics.jsonl and TensorBoard's events are written in any case."
            )


def build_trackers(names: Sequence[str], about: About, tell: Callable[[str], object]) -> list[Sink]:
    """The trackers of these names, each once; a later fault of one stops no run.

    Raises:
        UserError: one cannot begin.
    """
    sinks: list[Sink] = []
    for name in dict.fromkeys(names):
        try:
            sinks.append(Tolerated(name, TRACKERS[name](about), tell))
        except Exception as error:  # of a library, a login, a server
            raise UserError(
                f"--log {name} cannot begin: {in_words(error)}. Mend that, or leave it out: metrics.jsonl is written "
                "in any case."
            ) from error
    return sinks


class WandB(Sink):
    """Weights & Biases; offline unless WANDB_MODE says otherwise."""

    def __init__(self, about: About):
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", f"grpo-{about.task}"),
            id=about.id,
            name=about.folder.name,
            dir=str(about.folder),
            config=dict(about.config),
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")

    def step(self, step: int, metrics: Numbers) -> None:
        self._run.log({"step": step, **finite(metrics)})

    def evaluation(self, step: int, scores: Numbers, groups: Sequence[Group] = ()) -> None:
        self._run.log({"step": step, **finite(scores)})

    def completions(self, step: int, groups: Sequence[Group], tokens: TokenRecords) -> None:
        if step % STEPS_BETWEEN_TABLES == 0:
            group = groups[0]
            rows = [
                [plain(group.prompt.text), plain(completion.text), reward, advantage]
                for completion, reward, advantage in zip(
                    group.completions, group.rewards.tolist(), group.advantages.tolist(), strict=True
                )
            ]
            table = self._table(columns=["prompt", "completion", "reward", "advantage"], data=rows)
            self._run.log({"step": step, "completions": table})

    def close(self) -> None:
        self._run.finish()


class Trackio(Sink):
    """trackio; in the run's folder unless TRACKIO_DIR says otherwise, and on a Space only if TRACKIO_SPACE_ID does."""

    def __init__(self, about: About):
        os.environ.setdefault("TRACKIO_DIR", str(about.folder / "trackio"))  # read when it is imported
        import trackio

        self._quiet = redirect_stdout(StringIO())  # it prints how to see it, in colours
        with self._quiet:
            self._run = trackio.init(
                project=f"grpo-{about.task}",
                name=about.folder.name,
                config=dict(about.config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self._finish = trackio.finish

    def step(self, step: int, metrics: Numbers) -> None:
        self._run.log(finite(metrics), step=step)

    def evaluation(self, step: int, scores: Numbers, groups: Sequence[Group] = ()) -> None:
        self._run.log(finite(scores), step=step)

    def close(self) -> None:
        with self._quiet:
            self._finish()


class MLflow(Sink):
    """MLflow; in the run's folder unless MLFLOW_TRACKING_URI names a server."""

    def __init__(self, about: About):
        # Without a server there is its folder of files, which it keeps but wants to be asked for.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric = Metric
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", (about.folder / "mlflow").as_uri()))
        name = f"grpo-{about.task}"
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([experiment_id], f"tags.grpo_run = '{about.id}'")
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            tags = {"grpo_run": about.id}
            self._run = self._client.create_run(experiment_id, run_name=about.folder.name, tags=tags).info.run_id
            for key, value in about.config.items():
                self._client.log_param(self._run, key, value)

    def step(self, step: int, metrics: Numbers) -> None:
        known = {_name_of(name): value for name, value in finite(metrics).items()}
        now = int(1000 * time.time())
        entities = [self._metric(name, value, now, step) for name, value in known.items() if value is not None]
        self._client.log_batch(self._run, metrics=entities)

    def evaluation(self, step: int, scores: Numbers, groups: Sequence[Group] = ()) -> None:
        self.step(step, scores)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _name_of(metric: str) -> str:
    """For MLflow, to which @ is no letter of a name, and for which what stands before a / is a folder: eval/pass@1/low
    is eval/pass_1_low."""
    first, _, rest = metric.partition("/")
    return f"{first}/" + re.sub(r"[^\w\-. :]", "_", rest)


TRACKERS: dict[str, Callable[[About], Sink]] = {"wandb": WandB, "trackio": Trackio, "mlflow": MLflow}
