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
    names = [f"class{i:03d}" for i in range(50)]
    made = Maker(tmp_path / "set")
    made.folder.mkdir()
    boxes = [(4, 4, 20, 20, name) for i, name in enumerate(names) for _ in range(50 - i)]
    made.write("train", {"a.png": (noise(0), boxes)}, names)
    assert run("data", made.folder, "--page", tmp_path / "p.html") == 0
    told = capsys.readouterr().out
    assert "class000" in told and "class049" in told and "class025 " not in told and "10 classes in between" in told


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


@pytest.mark.parametrize("format", ["coco", "yolo"])
def test_dividing_loses_nothing_and_keeps_copies_together(shapes, tmp_path, format):
    source = tmp_path / "set"
    made = Maker(source)
    source.mkdir()
    images = {f"{i}.png": (noise(i), [(4, 4, 20, 20, "car"), (30, 4, 20, 20, "bus")][: 1 + i % 2]) for i in range(20)}
    images |= {"empty.png": (noise(99), []), "copy.png": (noise(3), images["3.png"][1])}
    made.write("train", images)
    made.write("val", {"7.png": (noise(50), [(4, 4, 20, 20, "bus")]), "copy.png": (noise(4), [(4, 4, 20, 20, "car")])})
    arguments = ["data", source, "--split", 0.75, "--convert", format]
    assert run(*arguments, "--out", tmp_path / "a", "--json", tmp_path / "a.json") == 0
    assert run(*arguments, "--out", tmp_path / "b") == 0
    assert run(*arguments, "--out", tmp_path / "c", "--seed", 1) == 0
    a, b, c = (written(tmp_path / name) for name in "abc")
    assert joined(a) == joined(b) == joined(c) == joined(written(source))
    train, val = held(a["train"]), held(a["val"])
    assert not train.keys() & val.keys()  # copies, which have the same pixels, too
    assert train == held(b["train"]) and train != held(c["train"])
    assert len(a["train"]) + len(a["val"]) == 24 and len(a["val"]) in (5, 6, 7)
    assert {name for objects in val.values() for o in objects for name, _ in o} == {"car", "bus"}
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["format"] == format and found["splits"]["train"]["images"] == len(a["train"])
    assert sum(split["objects"] for split in found["splits"].values()) == sum(
        len(dataset.objects()[2]) for dataset in written(source).values()
    )


def test_a_test_split_stays_as_it_is(shapes, tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    made = Maker(source)
    made.write("train", {f"{i}.png": (noise(i), [(4, 4, 20, 20, "car")]) for i in range(6)})
    made.write("test", {f"{i}.png": (noise(20 + i), [(4, 4, 20, 20, "bus")]) for i in range(3)})
    assert run("data", source, "--split", 0.5, "--out", tmp_path / "out") == 0
    divided = written(tmp_path / "out")
    assert {name: len(dataset) for name, dataset in divided.items()} == {"train": 3, "val": 3, "test": 3}
    assert held(divided["test"]) == held(written(source)["test"])


def test_dividing_rotated_boxes_and_masks(shapes, tmp_path):
    for task, format in (("rotated", "dota"), ("ins", "coco"), ("ins", "yolo")):
        out = tmp_path / f"{task}_{format}"
        assert run("data", shapes.root, "--task", task, "--split", 0.5, "--convert", format, "--out", out) == 0
        divided = written(out, task)
        whole = written(shapes.root, task)
        assert joined(divided).keys() == joined(whole).keys() and len(divided["train"]) == 9
        assert sum(len(d.objects()[2]) for d in divided.values()) == sum(len(d.objects()[2]) for d in whole.values())


def test_an_image_that_cannot_be_read_stops_dividing_or_is_left_out(tmp_path, capsys):
    source = tmp_path / "set"
    source.mkdir()
    broken = cv2.imencode(".png", noise(1))[1].tobytes()[:900]
    images = {f"{i}.png": (noise(i), [(4, 4, 20, 20, "car")]) for i in range(6)}
    Maker(source).write("train", {**images, "broken.png": (broken, [(4, 4, 20, 20, "car")])})
    assert run("data", source, "--split", 0.5, "--out", tmp_path / "out") == 2
    assert "broken.png" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run("data", source, "--split", 0.5, "--out", tmp_path / "out", "--skip-bad", "--json", tmp_path / "j") == 0
    assert json.loads((tmp_path / "j").read_text())["left_out"] == {"unreadable image": 1}
    assert "left out: 1 x unreadable image" in capsys.readouterr().out
    assert sum(map(len, written(tmp_path / "out").values())) == 6


def test_an_existing_folder_is_not_written_over(shapes, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert run("data", shapes.root, "--convert", "yolo", "--out", tmp_path / "out") == 2
    assert (tmp_path / "out/mine.txt").read_text() == "mine"
