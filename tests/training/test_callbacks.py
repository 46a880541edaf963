"""What a run tells while it goes, how it is ended from there, and that neither changes its numbers."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from told import Told, assert_same_run, state

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.training.callbacks import Callback, Logger
from rtmdet_fast.training.run_log import read_metrics
from rtmdet_fast.training.train import train

STEPS = 18 // 4
"""Of an epoch."""


def test_a_callback_is_told_every_step_every_epoch_and_the_end(config):
    told = Told()
    result = train(config, callbacks=[told])
    expected = [("start", 0)]
    for epoch in range(3):
        expected += [("step", epoch * STEPS + step + 1) for step in range(STEPS)] + [("epoch", epoch + 1)]
    assert told.events == [*expected, ("end", result)]
    assert [step[:3] for step in told.steps] == [(i // STEPS + 1, i + 1, 3 * STEPS) for i in range(3 * STEPS)]
    rows = read_metrics(config.out / "metrics.csv")
    logged = [step for step in told.steps if step[3]]
    assert [f"{step[3]['loss']:.6g}" for step in logged] == [row["loss"] for row in rows if row["loss"]]
    assert [f"{epoch[3]['AP']:.6g}" for epoch in told.epochs] == [row["AP"] for row in rows if row["AP"]]
    assert all(epoch[3]["loss"] > 0 for epoch in told.epochs)
    assert result.ended_by is None


class Broken(Logger):
    def __init__(self, event):
        self.calls = 0
        setattr(self, event, self.fail)

    def fail(self, *_):
        self.calls += 1
        raise OSError("no\nroute to host")


@pytest.mark.parametrize(("event", "calls"), [("on_start", 1), ("on_step", 2 * STEPS), ("on_epoch", 2), ("on_end", 1)])
def test_a_logger_that_fails_is_told_once_and_changes_nothing(config, whole, event, calls):
    config = replace(config, epochs=2)
    logger = Broken(event)
    with pytest.warns(UserWarning, match="^Broken failed, and the training goes on: no route to host$") as warned:
        result = train(config, callbacks=[logger])
    assert len(warned) == 1 and logger.calls == calls
    assert_same_run(whole(config), result)


def test_a_callback_that_fails_ends_the_run(config):
    class Failing(Callback):
        def on_step(self, progress):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        train(config, callbacks=[Failing()])
    with pytest.raises(TypeError, match=r"is no .*Callback"):
        train(replace(config, out=config.out / "b"), callbacks=[print])


@pytest.mark.parametrize(("step", "workers", "accumulate"), [(1, 0, 2), (STEPS + 2, 1, 1), (2 * STEPS, 0, 1)])
def test_a_run_that_a_callback_ended_goes_on_to_the_bit(config, whole, step, workers, accumulate):
    """In the middle of the first epoch, of a later one, and at the end of one; mosaic and mixup included."""
    config = replace(config, num_workers=workers, accumulate=accumulate)
    told = Told(step=step)
    stopped = train(config, callbacks=[told])
    assert stopped.ended_by == "callback" and told.steps[-1][1] == step and state(stopped)["iteration"] == step
    assert stopped.best.exists() and stopped.report is None
    again = Told()
    resumed = train(replace(config, resume=True), callbacks=[again])
    assert again.events[0] == ("start", step) and resumed.ended_by is None
    assert_same_run(whole(config), resumed)


class Drawing(Told):
    """Draws random numbers whenever it is told something."""

    def on_start(self, settings, iteration):
        random.random(), np.random.rand(), torch.rand(3)

    def on_step(self, progress):
        self.on_start(None, 0)
        super().on_step(progress)

    on_epoch = on_step


def test_random_numbers_drawn_by_a_callback_change_none_of_the_runs(config, tmp_path):
    """RT-DETR's denoising draws from the generator that everyone has; neither does being broken off change it."""
    config = replace(config, model="rtdetr", size=None, queries=20, epochs=1, stage2_epochs=0, val=None)
    config = replace(config, val_images=None)
    whole = train(config)
    broken = replace(config, out=tmp_path / "broken")
    train(broken, callbacks=[Drawing(step=2)])
    torch.manual_seed(12345)
    assert_same_run(whole, train(replace(broken, resume=True), callbacks=[Drawing()]))


def test_a_run_ended_after_an_epoch_was_validated(config):
    result = train(config, callbacks=[Told(epoch=2)])
    assert result.ended_by == "callback" and state(result)["epoch"] == 2 and result.metrics
    assert train(replace(config, out=config.out / "b"), callbacks=[Told(epoch=3)]).ended_by is None


def test_a_run_starts_from_a_model_in_memory(config):
    """Which stays as it is; of other classes its layers start fresh."""
    torch.manual_seed(1)
    names = ("a", "b", "c", "d", "e", "f", "g")
    start = RTMDet("nano", class_names=names)
    before = {key: value.clone() for key, value in start.state_dict().items()}
    seen = {}

    class Look(Callback):
        def on_step(self, progress):
            seen.setdefault("model", {k: v.clone() for k, v in progress.model.state_dict().items()})
            progress.stop()

    with pytest.warns(UserWarning, match="the model given: freshly initialised for"):
        result = train(replace(config, lr=1e-12), model=start, callbacks=[Look()])
    assert all(torch.equal(before[key], value) for key, value in start.state_dict().items())
    key = "backbone.stem.0.conv.weight"
    assert torch.allclose(seen["model"][key], before[key], atol=1e-6)
    assert RTMDet.from_pretrained(result.last).class_names != names


def test_a_model_in_memory_of_another_kind_is_refused(config):
    with pytest.raises(UserError, match="the model given does not fit a nano det model"):
        train(config, model=RTMDet("tiny", num_classes=3))
