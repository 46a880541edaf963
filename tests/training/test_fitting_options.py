"""Options that spare one the watching: each as promised, and a killed run that has it goes on to the bit."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from told import Told, assert_same_run, state

from rtmdet_fast import RTDETR, RTMDet, UserError
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.image_cache import ImageCache
from rtmdet_fast.training import setup
from rtmdet_fast.training import train as train_module
from rtmdet_fast.training.batch_size import fitting
from rtmdet_fast.training.callbacks import Callback
from rtmdet_fast.training.config import resolve
from rtmdet_fast.training.run_log import read_metrics
from rtmdet_fast.training.train import train

STEPS = 18 // 4
"""Of an epoch."""


@pytest.fixture(scope="module")
def weights(shapes, tmp_path_factory):
    """A file of weights with the data's classes."""
    names = [category["name"] for category in json.loads(shapes.train_ann.read_text())["categories"]]
    torch.manual_seed(3)
    model = RTMDet("nano", class_names=names)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    model.save(path)
    return str(path)


class Clock(Callback):
    """Seconds that pass with the steps alone."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def on_step(self, progress):
        self.now += 1


def run(config, monkeypatch, *callbacks):
    clock = Clock()
    monkeypatch.setattr(train_module, "clock", clock)
    return train(config, callbacks=[clock, *callbacks])


OPTIONS = {
    "patience": dict(patience=1, epochs=9, stage2_epochs=2),
    "time": dict(time=f"{5 * STEPS}s", epochs=60, stage2_epochs=20),
    "freeze, repeats and cache": dict(freeze="backbone", repeat_threshold=0.9, cache="400KB", num_workers=1),
    "batch size": dict(batch_size="auto"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_killed_run_goes_on_to_the_bit(config, weights, tmp_path, monkeypatch, option):
    config = replace(config, **{"epochs": 2, **OPTIONS[option]}, init=weights)
    whole_told, told = Told(), Told()
    whole = run(config, monkeypatch, whole_told)
    steps = len(whole_told.steps)
    broken = replace(config, out=tmp_path / "broken")
    run(broken, monkeypatch, Told(step=steps * 2 // 3))
    torch.manual_seed(12345)
    resumed = run(replace(broken, resume=True), monkeypatch, told)
    assert_same_run(whole, resumed)
    assert whole_told.steps[-1][:2] == told.steps[-1][:2] and resumed.ended_by == whole.ended_by
    # a validation, of whose time nothing is known yet, costs one of the five epochs that there is time for
    expected = {"patience": ("patience", 3), "time": ("time", 4)}
    assert (whole.ended_by, whole_told.epochs[-1][0]) == expected.get(option, (None, 2))


@pytest.mark.parametrize(
    "change",
    [
        dict(patience=2), dict(time="3h"), dict(freeze="backbone"), dict(repeat_threshold=0.5), dict(ema_momentum=0.1),
        dict(batch_size=5),
    ],
)  # fmt: skip
def test_a_run_does_not_go_on_by_another_plan(config, whole, weights, change):
    config = replace(config, epochs=1, stage2_epochs=0, init=weights, patience=1)
    config = replace(config, out=whole(config).last.parent, resume=True)
    with pytest.raises(UserError, match=f"--{next(iter(change)).replace('_', '-')} is .*, but the run in .* has"):
        train(replace(config, **change))
    with pytest.raises(UserError, match=r"--val-interval is 2, but the run in .* has 1"):  # it decides on the end
        train(replace(config, val_interval=2))


def test_time_breaks_an_epoch_off_where_there_is_none_for_it(config, monkeypatch):
    result = run(replace(config, time="2s"), monkeypatch)
    assert result.ended_by == "time" and result.best_epoch == 1 and state(result)["iteration"] == 3
    assert [row["iteration"] for row in read_metrics(config.out / "metrics.csv") if row["AP"]] == ["3"]
    again = Told()
    assert run(replace(config, time="2s", resume=True), monkeypatch, again).ended_by == "time" and not again.steps


def test_patience_needs_something_to_wait_for(config):
    with pytest.raises(UserError, match="--patience needs validation images"):
        train(replace(config, val=None, val_images=None, patience=3))


class Parts(Callback):
    """Weights and statistics of the backbone, and of the rest, as they are after each step."""

    def on_start(self, settings, iteration):
        self.seen = []

    def on_epoch(self, progress):
        self.seen.append({key: value.clone() for key, value in progress.model.state_dict().items()})


@pytest.mark.parametrize("family", ["rtmdet", "rtdetr"])
def test_a_frozen_backbone_stays_as_it_was_statistics_and_all(config, family):
    """The optimiser knows nothing of it, and the averaged weights are the same."""
    torch.manual_seed(0)
    classes = ["a", "b", "c", "d", "e", "f"][: len(json.loads(config.train.read_text())["categories"])]
    options = dict(size="nano") if family == "rtmdet" else dict(size="r18", queries=10)
    model = RTMDet("nano", class_names=classes) if family == "rtmdet" else RTDETR("r18", 1, class_names=classes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = replace(config, model=family, epochs=1, stage2_epochs=0, val=None, val_images=None, **options)
    with pytest.warns(UserWarning, match="are taken for those of the training data"):
        result = train(replace(config, freeze="backbone"), model=model)
    after = state(result)
    for part in ("model", "ema"):
        changed = {key.split(".")[0] for key, value in after[part].items() if not torch.equal(value, before[key])}
        assert "backbone" not in changed and len(changed) >= 2
    trained = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    assert sum(len(group["params"]) for group in after["optimizer"]["param_groups"]) == len(trained)
    assert len(after["optimizer"]["state"]) <= len(trained)
    loaded = type(model).from_pretrained(result.last)
    assert all(parameter.requires_grad for parameter in loaded.neck.parameters()) if family == "rtmdet" else True


def test_to_freeze_takes_weights(config):
    with pytest.raises(UserError, match=r"--freeze backbone keeps weights as they are.*--init"):
        train(replace(config, freeze="backbone"))
    with pytest.raises(UserError, match="--freeze 'neck' is unknown"):
        train(replace(config, freeze="neck"))


def test_batch_size_on_a_cpu_and_its_rate(config, capsys):
    result = train(replace(config, batch_size="auto", epochs=1, stage2_epochs=0, progress=True))
    settings = json.loads((config.out / "config.json").read_text())
    assert settings["batch_size"] == 4 and settings["lr"] == pytest.approx(2 * 4e-3 * (4 / 256) ** 0.5)
    told = "batch size 4 (auto), learning rate 0.001: 0.004 at 256 images a step, here 4, and 2.00 times that"
    assert told in capsys.readouterr().out
    assert result.ended_by is None


def test_a_batch_fits_by_a_constant_and_what_an_image_takes():
    def peak(images):
        return 2.0e9 + 0.5e9 * images

    assert fitting(peak, 20e9) == 32  # 36 would fit
    assert fitting(peak, 5e9) == 6
    assert fitting(peak, 1e9) == 1

    def crowded(images):
        raise torch.OutOfMemoryError("full")

    assert fitting(crowded, 80e9) == 1


def test_images_come_from_the_cache_as_they_are_from_the_file(config):
    """Those for which there is room; what a caller does to its copy changes none."""
    dataset = CocoDataset(config.train, config.train_images, training=True)
    plain = [dataset.load(i).image for i in range(len(dataset))]
    assert dataset.decoded_bytes == sum(image.size for image in plain)
    dataset.cache = ImageCache(len(dataset), dataset.decoded_bytes // 2)
    for _ in range(3):
        for i, image in enumerate(plain):
            found = dataset.load(i).image
            assert np.array_equal(found, image)
            found[:] = 0
    assert len(dataset.cache) == len(dataset) // 2


def test_loaders_fill_one_cache_and_say_its_size(config, capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(setup, "ImageCache", lambda *args: kept.append(ImageCache(*args)) or kept[-1])
    train(replace(config, epochs=1, stage2_epochs=0, cache="ram", num_workers=1, progress=True))
    # an epoch leaves out what is no whole batch
    assert len(kept) == 1 and len(kept[0]) >= STEPS * 4
    assert "cache: 0.00 GB of memory, shared by loaders, for all 18 images" in capsys.readouterr().out


def test_without_memory_to_share_a_run_goes_on_without_a_cache(config, monkeypatch):
    def refuse(length, capacity):
        raise MemoryError("the system has no 0.0 GB to share")

    monkeypatch.setattr(setup, "ImageCache", refuse)
    with pytest.warns(UserWarning, match="--cache ram: the system has no .* decoded each time"):
        train(replace(config, epochs=1, stage2_epochs=0, cache="ram"))
    with pytest.raises(UserError, match="--cache 8 is no amount"):
        train(replace(config, cache="8"))


PROCESSES = """
import sys
from dataclasses import replace
from pathlib import Path
from rtmdet_fast.training.callbacks import Callback
from rtmdet_fast.training.config import TrainConfig
from rtmdet_fast.training.train import train


class Stop(Callback):
    def on_step(self, progress):
        progress.stop()

train_file, images, val, val_images, init, out = map(Path, sys.argv[1:])
config = TrainConfig(
    train=train_file, train_images=images, val=val, val_images=val_images, init=str(init), out=out / "whole",
    size="nano", epochs=9, stage2_epochs=2, batch_size=4, image_size=64, num_workers=0, device="cpu", val_interval=1,
    progress=False, report=False, patience=1, freeze="backbone", repeat_threshold=0.9, cache="ram", time="3h",
)
whole = train(config)
broken = train(replace(config, out=out / "broken"), callbacks=[Stop()])
assert broken.ended_by == "callback", broken
resumed = train(replace(config, out=out / "broken", resume=True))
assert whole.ended_by == resumed.ended_by == "patience", resumed
"""


def test_several_processes_agree_on_the_end_and_go_on_to_the_bit(config, weights, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    paths = [config.train, config.train_images, config.val, config.val_images, weights, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / name / "last.pth", weights_only=True)["training"] for name in ("whole", "broken"))
    assert a["epoch"] == 3 and a["iteration"] == b["iteration"] and a["horizon"] == b["horizon"]
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])


def test_settings_of_the_options(config):
    assert resolve(replace(config, time="1h")).time == 3600
    with pytest.raises(UserError, match="--repeat-threshold is 2"):
        resolve(replace(config, repeat_threshold=2.0))
