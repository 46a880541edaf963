"""What --data leads to, before anything is read."""

import pytest

from rtmdet_fast.cli.eval import EvalConfig
from rtmdet_fast.errors import UserError
from rtmdet_fast.training.config import TrainConfig, resolve


@pytest.fixture
def yolo(tmp_path):
    root = tmp_path / "yolo"
    for place in ("train/images", "train/labels", "valid/images", "valid/labels"):
        (root / place).mkdir(parents=True)
    (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cat]\n")
    return root


@pytest.fixture
def dota(tmp_path):
    root = tmp_path / "dota"
    for place in ("train/images", "train/labelTxt"):
        (root / place).mkdir(parents=True)
    (root / "train/labelTxt/a.txt").write_text("0 0 9 0 9 9 0 9 cat 0\n")
    return root


def test_folder_and_data_yaml_lead_to_the_same(yolo):
    one, other = (resolve(TrainConfig(data=data)) for data in ((yolo,), (yolo / "data.yaml",)))
    assert one.train_sources == other.train_sources and one.val_sources == other.val_sources
    (source,) = one.val_sources
    assert source.format == "yolo" and source.images == yolo / "valid/images"
    assert resolve(TrainConfig(data=yolo)).train_sources == one.train_sources  # as one writes it in Python


def test_what_is_written_down_says_where_the_data_lie(yolo, dota):
    told = resolve(TrainConfig(data=(yolo, dota))).as_json()
    assert told["train"] == f"{yolo / 'data.yaml'} {dota / 'train/labelTxt'}" and told["data"] is None
    assert told["val_images"] == str(yolo / "valid/images")
    named = TrainConfig(train=dota / "train/labelTxt", train_images=dota / "train/images")
    by_folder = resolve(TrainConfig(data=(dota, yolo))).train_sources[0]
    assert resolve(named).train_sources[0].annotations == by_folder.annotations
    told = resolve(named).as_json()
    assert told["val"] is None and told["val_images"] is None and "train_sources" not in told


def test_no_validation_at_all(dota):
    with pytest.raises(UserError, match="no val found under the names val, valid, validation, test; looked for"):
        resolve(TrainConfig(data=(dota,)))


def test_evaluation_takes_the_same(yolo):
    from rtmdet_fast.cli.eval import run_eval

    for config, reason in (
        (EvalConfig(weights="x.pth", data=(yolo,), ann=yolo), "stands in place"),
        (EvalConfig(weights="x.pth", data=(yolo / "gone",)), "gone is not there"),
        (EvalConfig(weights="x.pth"), "or --data FOLDER"),
    ):
        with pytest.raises(UserError, match=reason):
            run_eval(config)
