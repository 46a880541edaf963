"""What a run tells a callback, and whether two runs were the same."""

import torch

from rtmdet_fast.models.families import load_model
from rtmdet_fast.training.callbacks import Callback
from rtmdet_fast.training.run_log import read_metrics


class Told(Callback):
    """Keeps what it is told, and ends the run after a step or an epoch."""

    def __init__(self, step=None, epoch=None):
        self.events, self.steps, self.epochs, self.step, self.epoch = [], [], [], step, epoch

    def on_start(self, settings, iteration):
        self.events.append(("start", iteration))

    def on_step(self, progress):
        self.events.append(("step", progress.iteration))
        self.steps.append((progress.epoch, progress.iteration, progress.iterations, dict(progress.metrics)))
        assert sum(progress.losses.values()).isfinite() and not progress.model.training
        if progress.iteration == self.step:
            progress.stop()

    def on_epoch(self, progress):
        self.events.append(("epoch", progress.epoch))
        self.epochs.append((progress.epoch, progress.epochs, progress.iteration, dict(progress.metrics)))
        if progress.epoch == self.epoch:
            progress.stop()

    def on_end(self, result):
        self.events.append(("end", result))


def state(result):
    return torch.load(result.last, weights_only=True)["training"]


def assert_same_run(one, other):
    assert_same_files(one.last.parent, other.last.parent)
    assert one.metrics == other.metrics and one.best_epoch == other.best_epoch


def assert_same_files(one, other):
    """The folders of two runs: weights, moments and figures, to the bit."""
    a, b = (torch.load(out / "last.pth", weights_only=True)["training"] for out in (one, other))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    moments = a["optimizer"]["state"], b["optimizer"]["state"]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])
    assert a["iteration"] == b["iteration"] and a["epoch_losses"] == b["epoch_losses"]
    a, b = (load_model(out / "best.pth").state_dict() for out in (one, other))
    assert all(torch.equal(a[key], b[key]) for key in a)
    drop = {"images_per_second", "data_wait"}
    rows = [
        [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(out / "metrics.csv")]
        for out in (one, other)
    ]
    assert rows[0] == rows[1]
