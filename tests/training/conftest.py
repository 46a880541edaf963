"""A run of seconds on drawn scenes."""

from dataclasses import replace

import pytest

from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.training.config import TrainConfig
from rtmdet_fast.training.train import train


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=18, num_val=4, image_size=96)


@pytest.fixture
def config(shapes, tmp_path):
    return TrainConfig(
        train=shapes.train_ann,
        train_images=shapes.train_images,
        val=shapes.val_ann,
        val_images=shapes.val_images,
        out=tmp_path / "run",
        size="nano",
        epochs=3,
        stage2_epochs=1,
        batch_size=4,
        image_size=64,
        num_workers=0,
        device="cpu",
        val_interval=1,
        progress=False,
        report=False,
    )


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Runs that nothing ended, by their settings; each is made once."""
    runs = {}

    def run(config):
        key = str(replace(config, out=None, save_every="30m", keep=1))
        if key not in runs:
            runs[key] = train(replace(config, out=tmp_path_factory.mktemp("whole") / "run", save_every="30m", keep=1))
        return runs[key]

    return run
