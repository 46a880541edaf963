"""Images that cannot be read are found before a run reaches them."""

import json
import threading
import warnings

import cv2
import numpy as np
import pytest

from rtmdet_fast import RTMDet
from rtmdet_fast.cli import main
from rtmdet_fast.data import check
from rtmdet_fast.data.check import ImageCheck
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.errors import UserError

SCENE = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Six JPEGs with a box each."""
    images, annotations = [], []
    for i in range(6):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), SCENE)
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [2, 3, 10, 8]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path


def dataset(folder, **options):
    return CocoDataset(folder / "train.json", folder, **options)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def overwrite_end(path):
    content = path.read_bytes()
    path.write_bytes(content[:-100] + bytes(100))


def test_whole_files(folder):
    train, val = dataset(folder, training=True), dataset(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageCheck(train, val).report(wait=None, progress=True)
    assert not train.skipped and not train.noticed and not val.skipped


def test_unreadable_images_are_told_together(folder):
    for i in (1, 3, 4, 5):
        truncate(folder / f"{i}.jpg")
    match = r"train\.json: 4 of its 6 images cannot be read: 1\.jpg, 3\.jpg, 4\.jpg, … \(.*1\.jpg.*--skip-bad$"
    for options in ({}, {"training": True}):
        with pytest.raises(UserError, match=match):
            ImageCheck(dataset(folder, **options)).report(wait=None)
    train = dataset(folder, training=True, skip_bad=True)
    with pytest.warns(UserWarning, match=r"4 of its 6 images cannot be read.*left out"):
        ImageCheck(train).report(wait=None)
    assert train.skipped == {"unreadable image": ["1.jpg", "3.jpg", "4.jpg", "5.jpg"]}
    assert train.load(3).image_id == 0


def test_files_without_their_end_are_used_and_counted(folder):
    overwrite_end(folder / "2.jpg")
    train = dataset(folder, training=True)
    with pytest.warns(UserWarning, match=r"1 of its 6 images lack their end: 2\.jpg"):
        ImageCheck(train).report(wait=None)
    assert train.noticed == {"image file without its end": ["2.jpg"]} and not train.skipped
    assert train.load(2).image_id == 2


def test_what_is_found_later_is_told_later(folder, monkeypatch):
    truncate(folder / "5.jpg")
    go_on, check_image = threading.Event(), check.check_image

    def slow(path):
        go_on.wait()
        return check_image(path)

    monkeypatch.setattr(check, "check_image", slow)
    images = ImageCheck(dataset(folder))
    images.report()  # waits for nothing
    go_on.set()
    with pytest.raises(UserError, match=r"1 of its 6 images cannot be read: 5\.jpg \("):
        images.report(wait=None)
    images.report(wait=None)  # each once


@pytest.mark.filterwarnings("default")  # the command line shows warnings
def test_eval_tells_before_it_detects(folder, monkeypatch, capsys):
    monkeypatch.setattr(check, "CHECK_SECONDS", None)
    RTMDet("nano", class_names=["a"]).save(folder / "a.pth")
    truncate(folder / "4.jpg")
    overwrite_end(folder / "5.jpg")
    arguments = ["eval", "--weights", str(folder / "a.pth"), "--device", "cpu", "--image-size", "64"]
    arguments += ["--ann", str(folder / "train.json"), "--images", str(folder)]
    assert main(arguments) == 2
    assert "1 of its 6 images cannot be read: 4.jpg (" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad"]) == 0
    told = capsys.readouterr()
    assert "warning" in told.err and "left out: 1 x unreadable image" in told.out
    assert "noticed: 1 x image file without its end" in told.out


def test_a_loading_error_names_the_way_out(folder):
    truncate(folder / "1.jpg")
    with pytest.raises(UserError, match=r"1\.jpg.*train\.json.*--skip-bad"):
        dataset(folder).load(1)
