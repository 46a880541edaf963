"""rtmdet-fast data: looking, converting, dividing."""

import json

import cv2
import numpy as np
import pytest
from made_data import Maker, noise

from rtmdet_fast.cli import main
from rtmdet_fast.data.layout import find_dataset
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.tasks import TASKS


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=14, num_val=4, image_size=64)


def written(folder, task="det"):
    return {name: TASKS[task].open_dataset(sources) for name, sources in find_dataset(folder).items()}


def held(dataset):
    """By the pixels of each image its objects, as sorted (class, box in whole pixels)."""
    found = {}
    for i in range(len(dataset)):
        sample = dataset.load(i)
        names = [dataset.class_names[label] for label in sample.labels]
        boxes = np.rint(sample.boxes[:, :4]).astype(int).tolist()
        found.setdefault(sample.image.tobytes(), []).append(sorted(zip(names, map(tuple, boxes), strict=True)))
    return found


def joined(datasets):
    everything = {}
    for dataset in datasets.values():
        for pixels, objects in held(dataset).items():
            everything.setdefault(pixels, []).extend(objects)
    return everything


def test_a_look_writes_the_page_and_says_what_is_there(shapes, tmp_path, capsys):
    page = tmp_path / "pages/look.html"
    assert run("data", shapes.root, "--page", page, "--json", tmp_path / "look.json", "--image-size", 64) == 0
    told = capsys.readouterr().out
    assert "train: 14 images, 0 of them without objects" in told and f"page {page}" in told
    found = json.loads((tmp_path / "look.json").read_text())
    assert found["task"] == "det" and found["formats"] == ["coco"] and found["image_size"] == 64
    content = json.loads(shapes.train_ann.read_text())
    assert found["splits"]["train"]["objects"] == len(content["annotations"])
    assert sum(c["objects"] for c in found["splits"]["train"]["per_class"].values()) == len(content["annotations"])
    assert page.read_text(encoding="utf-8").count("data:image/jpeg") >= 12


@pytest.mark.parametrize("task", ["ins", "rotated"])
def test_a_look_at_masks_and_rotated_boxes(shapes, tmp_path, task):
    assert run("data", shapes.root, "--task", task, "--page", tmp_path / "p.html", "--json", tmp_path / "p.json") == 0
    assert json.loads((tmp_path / "p.json").read_text())["image_size"] == (1024 if task == "rotated" else 640)


def test_defects_are_counted_not_fatal(tmp_path, capsys):
    made = Maker(tmp_path / "set")
    made.folder.mkdir()
    broken = cv2.imencode(".png", noise(1))[1].tobytes()[:900]
    made.write("train", {"a.png": (noise(0), [(4, 4, 20, 20, "car")]), "b.png": (broken, [(4, 4, 20, 20, "bus")])})
    assert run("data", made.folder, "--page", tmp_path / "p.html") == 0
    assert "error: 1 image of train cannot be read: b.png" in capsys.readouterr().out


def test_a_class_table_of_many_classes_shows_both_ends(tmp_path, capsys):
    names = [f"class{i:03d}" for i in range(100)]
    made = Maker(tmp_path / "set")
    made.folder.mkdir()
    boxes = [(4, 4, 20, 20, name) for i, name in enumerate(names) for _ in range(100 - i)]
    made.write("train", {"a.png": (noise(0), boxes)}, names)
    assert run("data", made.folder, "--page", tmp_path / "p.html") == 0
    told = capsys.readouterr().out
    assert "class000" in told and "class099" in told and "class050 " not in told and "60 classes in between" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "1.2", "--out", "x"], "--split is 1.2"),
        (["--split", "nan", "--out", "x"], "--split is nan"),
        (["--split", "0.8"], "--out FOLDER goes with"),
        (["--out", "x"], "--out FOLDER goes with"),
        (["--task", "pose"], "--task 'pose'"),
        (["--image-size", "4"], "--image-size is 4"),
        (["--samples", "-1"], "--samples is -1"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_wrong_options_are_one_sentence(shapes, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert run("data", shapes.root, *arguments) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_no_data_set_is_one_sentence(tmp_path, capsys):
    assert run("data", tmp_path / "nowhere") == 2
    (tmp_path / "empty").mkdir()
    assert run("data", tmp_path / "empty") == 2
    assert capsys.readouterr().err.count("error: ") == 2
