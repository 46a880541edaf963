"""Weights & Biases offline, MLflow's file store, and what is told where a logger cannot be had."""

import json
from dataclasses import replace

import pytest
from told import Told

from rtmdet_fast import UserError
from rtmdet_fast.training.loggers import earlier_run, keep_run
from rtmdet_fast.training.run_log import read_metrics
from rtmdet_fast.training.train import train

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture
def logged(config):
    """Of 12 steps, one of which has its figures logged before the run is broken off, one after it went on."""
    return replace(config, epochs=6, stage2_epochs=1, val_interval=2)


def rows(out):
    found = read_metrics(out / "metrics.csv")
    losses = {int(row["iteration"]): float(row["loss"]) for row in found if row["loss"]}
    return losses, {int(row["iteration"]): float(row["AP"]) for row in found if row["AP"]}


def wandb_records(path):
    """Of a file that W&B keeps offline: a header, then records in pieces, as LevelDB's logs have them."""
    from wandb.proto import wandb_internal_pb2

    data, at, found = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        found += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(found)
            yield record
            found = b""


def test_weights_and_biases_offline(logged, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = replace(logged, loggers=("wandb",))
    train(config, callbacks=[Told(step=11)])
    train(replace(config, resume=True))
    assert wandb.run is None  # that of a notebook would have stayed
    ident = earlier_run(config.out, "wandb")
    found = {}
    files = sorted(config.out.glob("wandb/offline-run-*/*.wandb"))
    assert [path.stem for path in files] == [f"run-{ident}"] * 2  # one run, in two sittings
    for path in files:
        for record in wandb_records(path):
            items = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for key in {"train/loss", "val/AP"} & items.keys():
                found.setdefault(key, {})[items["iteration"]] = items[key]
    losses, figures = rows(config.out)
    assert found["train/loss"] == pytest.approx(losses, rel=1e-5) and len(losses) == 3
    assert found["val/AP"] == pytest.approx(figures, rel=1e-5) and len(figures) == 3


def test_mlflow_in_files(logged, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = replace(logged, loggers=("mlflow", "tensorboard"))
    train(config, callbacks=[Told(step=11)])
    train(replace(config, resume=True))
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("rtmdet-fast").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run" and run.data.params["size"] == "nano"
    losses, figures = rows(config.out)
    for key, expected in (("train/loss", losses), ("val/AP", figures)):
        history = {point.step: point.value for point in client.get_metric_history(run.info.run_id, key)}
        assert history == pytest.approx(expected, rel=1e-5) and len(history) == 3
    assert any(path.name.startswith("events.out.tfevents") for path in config.out.iterdir())


def test_a_logger_that_is_unknown_or_not_installed_is_told(config, monkeypatch):
    with pytest.raises(UserError, match="--loggers comet is unknown; choose any of tensorboard, wandb, mlflow"):
        train(replace(config, loggers=("comet",)))
    monkeypatch.setattr("rtmdet_fast.training.loggers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--loggers wandb needs .*: pip install 'rtmdet-fast\[wandb\]'"):
        train(replace(config, loggers=("wandb",)))


def test_without_loggers_metrics_csv_is_all(config):
    train(replace(config, epochs=1, stage2_epochs=0, loggers=()))
    assert not [path for path in config.out.iterdir() if "tfevents" in path.name]
    assert rows(config.out)[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_without_a_place_to_write_costs_no_training(config, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", refuse)
    with pytest.warns(UserWarning, match="^TensorBoard failed, and the training goes on: .*No space left on device$"):
        result = train(replace(config, epochs=1, stage2_epochs=0))
    assert result.metrics


def test_ids_of_runs_elsewhere(tmp_path):
    assert earlier_run(tmp_path, "wandb") is None
    keep_run(tmp_path, "wandb", "a")
    keep_run(tmp_path, "mlflow", "b")
    keep_run(tmp_path, "wandb", "c")
    assert (earlier_run(tmp_path, "wandb"), earlier_run(tmp_path, "mlflow")) == ("c", "b")
    (tmp_path / "loggers.json").write_text("[1")
    assert earlier_run(tmp_path, "wandb") is None
