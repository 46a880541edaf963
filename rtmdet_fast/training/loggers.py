"""Where the figures of a run go besides metrics.csv: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtmdet_fast.errors import UserError
from rtmdet_fast.files import write_json
from rtmdet_fast.training.callbacks import Logger, Progress

if TYPE_CHECKING:
    from rtmdet_fast.training.config import Settings, TrainResult


class TensorBoard(Logger):
    """Events in the folder of the run."""

    def on_start(self, settings: Settings, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(settings.out), purge_step=iteration + 1 if iteration else None)

    def on_step(self, progress: Progress) -> None:
        self._write("train", progress)

    def on_epoch(self, progress: Progress) -> None:
        self._write("val", progress)

    def on_end(self, result: TrainResult) -> None:
        self._board.flush()  # which tells what its thread could not write, as `close` does not
        self._board.close()

    def _write(self, group: str, progress: Progress) -> None:
        for name, value in scalars(group, progress).items():
            self._board.add_scalar(name, value, progress.iteration)


class WeightsAndBiases(Logger):
    """A run of Weights & Biases, online or offline as WANDB_MODE says; a resumed training goes on with it."""

    def on_start(self, settings: Settings, iteration: int) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rtmdet-fast"),
            name=settings.out.name,
            dir=str(settings.out),
            config=settings.as_json(),
            id=earlier_run(settings.out, "wandb") if iteration else None,
            resume="allow",
            reinit="create_new",  # which leaves a run that a notebook has open alone
            settings=wandb.Settings(silent=not settings.progress),
        )
        keep_run(settings.out, "wandb", self._run.id)
        self._run.define_metric("*", step_metric="iteration")

    def on_step(self, progress: Progress) -> None:
        self._write("train", progress)

    def on_epoch(self, progress: Progress) -> None:
        self._write("val", progress)

    def on_end(self, result: TrainResult) -> None:
        self._run.summary.update({f"best/{name}": value for name, value in result.metrics.items()})
        self._run.finish()

    def _write(self, group: str, progress: Progress) -> None:
        if found := scalars(group, progress):
            self._run.log({**found, "epoch": progress.epoch, "iteration": progress.iteration})


class MLflow(Logger):
    """A run of MLflow where MLFLOW_TRACKING_URI says, else in the folder `mlruns` beside that of the training."""

    def on_start(self, settings: Settings, iteration: int) -> None:
        import mlflow

        if mlflow.is_tracking_uri_set():
            place = mlflow.get_tracking_uri()
        else:
            place = (settings.out.resolve().parent / "mlruns").as_uri()
        if not place.startswith(("http", "databricks")):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which 3.7 and later want to be asked for
        self._client: Any = mlflow.MlflowClient(place)
        self._run = earlier_run(settings.out, "mlflow") if iteration else None
        if self._run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rtmdet-fast")
            experiment = self._client.get_experiment_by_name(name)
            ident = experiment.experiment_id if experiment else self._client.create_experiment(name)
            self._run = self._client.create_run(ident, run_name=settings.out.name).info.run_id
            keep_run(settings.out, "mlflow", self._run)
            params = {key: str(value) for key, value in settings.as_json().items() if value is not None}
            self._client.log_batch(self._run, params=[mlflow.entities.Param(*item) for item in params.items()])

    def on_step(self, progress: Progress) -> None:
        self._write(scalars("train", progress), progress.iteration)

    def on_epoch(self, progress: Progress) -> None:
        self._write(scalars("val", progress), progress.iteration)

    def on_end(self, result: TrainResult) -> None:
        self._write({f"best/{name}": value for name, value in result.metrics.items()}, 0)
        self._client.set_terminated(self._run)

    def _write(self, found: dict[str, float], iteration: int) -> None:
        from mlflow.entities import Metric

        if found:
            now = int(time.time() * 1000)
            self._client.log_batch(self._run, metrics=[Metric(*item, now, iteration) for item in found.items()])


LOGGERS: dict[str, tuple[type[Logger], str, str]] = {
    "tensorboard": (TensorBoard, "tensorboard", "tensorboard"),
    "wandb": (WeightsAndBiases, "wandb", "'rtmdet-fast[wandb]'"),
    "mlflow": (MLflow, "mlflow", "'rtmdet-fast[mlflow]'"),
}
"""By the names that a user gives them: the logger, what it imports, what pip is to install for it."""


def check_loggers(names: Sequence[str]) -> None:
    """Raises UserError where a logger is unknown, or what it needs is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"--loggers {name} is unknown; choose any of {', '.join(LOGGERS)}")
        _, module, requirement = LOGGERS[name]
        if find_spec(module) is None:
            raise UserError(f"--loggers {name} needs a package that is not installed: pip install {requirement}")


RUNS = "loggers.json"
"""In the folder of a training: the ids of its runs elsewhere, which a resumed one goes on with."""


def earlier_run(out: Path, logger: str) -> str | None:
    """The id that `keep_run` wrote; None where there is none."""
    try:
        found = json.loads((out / RUNS).read_text())[logger]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def keep_run(out: Path, logger: str, ident: str) -> None:
    """Writes the id of a logger's run into the folder of the training."""
    others = {name: found for name in LOGGERS if name != logger and (found := earlier_run(out, name))}
    write_json(out / RUNS, {**others, logger: ident})


def scalars(group: str, progress: Progress) -> dict[str, float]:
    """The figures there are, as group/name; of an epoch those of its validation."""
    return {f"{group}/{name}": value for name, value in progress.metrics.items() if (group, name) != ("val", "loss")}
