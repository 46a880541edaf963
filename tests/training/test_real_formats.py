"""Real data sets, written in every format, train to the very same weights from each."""

import re
import shutil

import pytest
import torch

from rtmdet_fast.data.convert import write_dataset
from rtmdet_fast.data.formats import FORMATS
from rtmdet_fast.data.layout import find_sources
from rtmdet_fast.tasks import TASKS
from rtmdet_fast.training.config import TrainConfig
from rtmdet_fast.training.run_log import read_metrics
from rtmdet_fast.training.train import train


def trained(root, task, out):
    """The weights after one epoch, and the losses and figures on the way."""
    settings = dict(size="nano", image_size=64, batch_size=16, epochs=1, num_workers=0, loggers=(), report=False)
    train(TrainConfig(data=(root,), task=task, out=out, **settings))
    weights = torch.load(out / "last.pth", weights_only=True)["state_dict"]
    return weights, [(row["loss"], row["AP50"]) for row in read_metrics(out / "metrics.csv")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), [("bccd", "det"), ("hit_uav", "rotated")])
def test_weights_are_the_same_from_every_format(shared, tmp_path, name, task):
    root = tmp_path / name
    shutil.copytree(shared / "data" / name, root)
    for path in root.glob("*/labelTxt/*.txt"):  # YOLO's text cannot say that an object is difficult
        path.write_text(re.sub(r" 1$", " 0", path.read_text(), flags=re.MULTILINE))
    expected = trained(root, task, tmp_path / "original")
    for format in FORMATS:
        opened = {split: TASKS[task].open_dataset(find_sources(root, split)) for split in ("train", "val")}
        assert write_dataset(opened, format, tmp_path / format) == {}, format
        weights, figures = trained(tmp_path / format, task, tmp_path / f"run-{format}")
        assert all(torch.equal(weights[key], value) for key, value in expected[0].items()), format
        assert figures == expected[1], format
