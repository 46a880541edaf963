"""A look at a data set: its figures, and each kind of defect on images made to have it."""

import json
import os

import cv2
import numpy as np
import pytest
from made_data import Maker, noise

from rtmdet_fast.data import inspection as module
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.data.inspection import find_duplicates, inspect, overlapping, same_pixels, scan_images
from rtmdet_fast.geometry.rotated import boxes_to_quads


@pytest.fixture
def made(tmp_path):
    return Maker(tmp_path)


def texts(inspection, word):
    return [finding for finding in inspection.findings if word in finding.text]


def test_figures_of_a_sound_data_set(made):
    many = [(2 + 6 * i, 4, 5, 10, "car") for i in range(10)]
    made.write("train", {f"{i}.png": (noise(i), [*many[: i + 1], (4, 20, 40, 20, "bus")]) for i in range(10)})
    made.write("val", {"a.png": (noise(50), many[:2]), "b.png": (noise(51, 128, 96), [(0, 0, 128, 96, "bus")])})
    inspection = made.inspect("train", "val", image_size=128)
    assert [(finding.level, finding.text) for finding in inspection.findings] == []
    assert inspection.per_class() == {
        "car": {"train": (55, 10), "val": (2, 1)},
        "bus": {"train": (10, 10), "val": (1, 1)},
    }
    train, val = inspection.splits
    np.testing.assert_array_equal(train.counts, np.arange(2, 12))
    np.testing.assert_array_equal(val.sizes, [(64, 48), (128, 96)])
    np.testing.assert_array_equal(val.sides, [(10, 20), (10, 20), (128, 96)])  # the first image grows twofold
    told = inspection.as_json()
    assert json.loads(json.dumps(told)) == told
    assert told["splits"]["val"]["objects"] == 3 and told["splits"]["val"]["objects_per_image"]["most"] == 2
    assert told["splits"]["train"]["per_class"]["bus"] == {"objects": 10, "images": 10, "objects_below_8_px": 0}


def test_copies_are_known_by_their_pixels(made):
    picture, other = noise(0), noise(1)
    encoded = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()
    box = [(4, 4, 20, 20, "car")]
    made.write(
        "train",
        {"a.png": (picture, box), "b.png": (other, box), "c.png": (other, box), "d.png": (noise(2), box)},
    )
    made.write("val", {"x.png": (encoded, box), "y.png": (noise(3), box)})
    assert (made.folder / "val/x.png").read_bytes() != (made.folder / "train/a.png").read_bytes()
    inspection = made.inspect("train", "val")
    assert inspection.duplicates == (((0, 0), (1, 0)), ((0, 1), (0, 2)))
    (leak,) = texts(inspection, "in train too")
    assert leak.level == "error" and leak.text.startswith("1 image of val (50.0%)")
    assert list(leak.names) == ["val: x.png = train: a.png"]
    (copy,) = texts(inspection, "a copy of others")
    assert copy.level == "warning" and list(copy.names) == ["train: b.png = train: c.png"]
    assert "1 of them as files too" in copy.text
    assert not texts(inspection, "other objects")
    assert inspection.findings[0] is leak


def test_a_copy_with_other_objects_is_told(made):
    picture = noise(0)
    made.write("train", {"a.png": (picture, [(4, 4, 20, 20, "car")]), "b.png": (picture, [(4, 4, 20, 20, "bus")])})
    inspection = made.inspect("train")
    assert list(texts(inspection, "with other objects")[0].names) == ["train: a.png = train: b.png"]


def test_images_that_cannot_be_read_are_told_and_no_copies_of_each_other(made):
    box = [(4, 4, 20, 20, "car")]
    broken = cv2.imencode(".png", noise(1))[1].tobytes()[:900]
    made.write("train", {"a.png": (noise(0), box), "b.png": (broken, box), "c.png": (broken, box), "d.png": (b"", box)})
    inspection = made.inspect("train")
    (finding,) = texts(inspection, "cannot be read")
    assert finding.level == "error" and finding.text.startswith("3 images of train")
    assert [name.split()[0] for name in finding.names] == ["b.png", "c.png", "d.png"]
    assert "empty" in finding.names[2]
    assert not inspection.duplicates and not any("\n" in name for name in finding.names)


def test_files_without_end_and_of_another_size_are_told(made):
    box = [(4, 4, 20, 20, "car")]
    jpeg = cv2.imencode(".jpg", noise(1))[1].tobytes()
    made.write(
        "train",
        {"a.png": (noise(0), box), "b.jpg": (jpeg[:-64] + bytes(64), box), "c.png": (noise(2), box)},
        sizes={"c.png": (640, 480)},
    )
    inspection = made.inspect("train")
    assert list(texts(inspection, "without an end")[0].names) == ["b.jpg"]
    (finding,) = texts(inspection, "another size")
    assert list(finding.names) == ["c.png (64x48, annotated 640x480)"]


def test_objects_are_small_where_the_network_sees_them(made):
    boxes = [(10, 10, 30, 15, "car"), (10, 40, 200, 200, "car")]
    made.write("train", {"a.png": (noise(0, 640, 320), boxes), "b.png": (noise(1, 320, 320), boxes[:1])})
    (finding,) = texts(made.inspect("train", image_size=320), "below 8 px")
    assert finding.text.startswith("1 object of train (33.3%)") and list(finding.names) == ["a.png (1)"]
    assert finding.places[0].objects == (0,)
    assert not texts(made.inspect("train", image_size=640), "below 8 px")


def test_boxes_upon_each_other_and_beyond_the_image(made):
    made.write(
        "train",
        {
            "twice.png": (noise(0), [(10, 10, 20, 20, "car"), (40, 0, 9, 9, "car"), (10, 10, 20, 20, "car")]),
            "classes.png": (noise(1), [(10, 10, 20, 20, "car"), (10, 10, 20, 20, "bus")]),
            "hidden.png": (noise(2), [(10, 10, 20, 20, "car"), (12, 10, 20, 20, "car")]),  # IoU 0.82
            "beyond.png": (noise(3), [(50, 10, 20, 20, "car"), (-3, 0, 20, 20, "car"), (45, 0, 19.5, 9, "bus")]),
        },
    )
    inspection = made.inspect("train")
    found = {finding.text.partition(") ")[2]: finding for finding in inspection.findings}
    assert list(found["lying on one of the same class (IoU above 0.95), as if annotated twice"].names) == [
        "twice.png (1)"
    ]
    assert found["lying on one of the same class (IoU above 0.95), as if annotated twice"].places[0].objects == (0, 2)
    assert list(found["lying on one of another class (IoU above 0.95)"].names) == ["classes.png (1)"]
    hidden = found["overlapping one of the same class by an IoU above 0.65, of which NMS keeps one"]
    assert sorted(hidden.names) == ["hidden.png (1)", "twice.png (1)"] and hidden.level == "note"
    beyond = found["reaching beyond the image, where they are cut"]
    assert list(beyond.names) == ["beyond.png (2)"] and beyond.places[0].objects == (0, 1)
    assert list(texts(made.inspect("train", nms_iou=0.9), "NMS")[0].names) == ["twice.png (1)"]


def test_rotated_boxes_are_compared_as_they_lie(tmp_path):
    """Two crossing bars have one upright box around them."""
    (tmp_path / "images").mkdir(), (tmp_path / "labels").mkdir()
    bars = np.array([[40, 40, 60, 6, 0.8], [40, 40, 60, 6, -0.8], [40, 40, 60, 6, 0.81]], np.float64)
    for i, chosen in enumerate(([0, 1], [0, 2])):
        cv2.imwrite(str(tmp_path / f"images/{i}.png"), noise(i, 80, 80))
        quads = boxes_to_quads(bars[chosen]).tolist()
        lines = [" ".join(f"{value:.3f}" for value in quad) + " ship 0\n" for quad in quads]
        (tmp_path / f"labels/{i}.txt").write_text("".join(lines))
    dataset = DotaDataset(tmp_path / "labels", tmp_path / "images", skip_bad=True, training=True)
    inspection = inspect({"train": dataset}, 80, nms_iou=0.5)
    (finding,) = texts(inspection, "NMS")
    assert list(finding.names) == ["1.png (1)"]
    assert list(texts(inspection, "below 8 px")[0].names) == ["0.png (2)", "1.png (2)"]
    assert inspection.splits[0].sides[0].tolist() == pytest.approx([60, 6], abs=0.01)


def test_classes_are_held_against_the_training_images(made):
    made.write("train", {"a.png": (noise(0), [(4, 4, 20, 20, "bus")])})
    made.write("val", {"b.png": (noise(1), [(4, 4, 20, 20, "car"), (30, 4, 20, 20, "tram")])}, classes=("tram", "car"))
    inspection = made.inspect("train", "val")
    assert inspection.class_names == ("car", "bus", "tram")
    np.testing.assert_array_equal(inspection.splits[1].labels, [0, 2])
    (unknown,) = texts(inspection, "without an object in train")
    assert unknown.level == "error" and list(unknown.names) == ["car (1 object)", "tram (1 object)"]
    assert list(texts(inspection, "fewer than 10 objects")[0].names) == ["bus (1)"]
    assert list(texts(inspection, "nothing is measured")[0].names) == ["bus"]


def test_what_readers_leave_out_is_told_by_name(made):
    made.write("train", {"a.png": (noise(0), [(4, 4, 20, 20, "car"), (4, 4, 0, 20, "car")]), "b.png": (noise(1), [])})
    content = json.loads((made.folder / "train.json").read_text())
    content["annotations"].append({"id": 9, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1})
    (made.folder / "train.json").write_text(json.dumps(content))
    inspection = made.inspect("train")
    (finding,) = texts(inspection, "left out of train")
    assert finding.level == "warning" and list(finding.names) == ["annotation 2"]
    assert list(texts(inspection, "without objects")[0].names) == ["b.png"]
    assert texts(inspection, "1 object of train to be ignored")
    assert texts(inspection, "--split 0.8")  # there is nothing to validate on


def test_overlapping_boxes_are_those_of_all_pairs(monkeypatch):
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 100, (1200, 4)).astype(np.float32)  # more than are compared at once
    boxes[:, 2:] += boxes[:, :2]
    first, second, iou = overlapping(boxes, 0.7)
    x0, y0, x1, y1 = boxes.astype(np.float64).T
    w = np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0)
    h = np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0)
    shared = w.clip(0) * h.clip(0)
    areas = (x1 - x0) * (y1 - y0)
    expected = np.triu(shared / (areas[:, None] + areas - shared), 1)
    np.testing.assert_array_equal(np.stack([first, second], 1), np.argwhere(expected > 0.7))
    np.testing.assert_allclose(iou, expected[first, second])


def test_scanning_needs_no_more_than_digests(made):
    made.write("train", {f"{i}.png": (noise(i % 3), [(4, 4, 20, 20, "car")]) for i in range(9)})
    dataset = CocoDataset(made.folder / "train.json", made.folder / "train")
    (scan,) = scan_images([dataset])
    assert {len(digest) for digest in (*scan.files, *scan.pixels)} == {module.DIGEST}
    np.testing.assert_array_equal(same_pixels([scan]), [0, 1, 2] * 3)
    assert find_duplicates([scan, scan])[0] == tuple((s, i) for s in (0, 1) for i in (0, 3, 6))


def test_the_size_is_part_of_what_is_compared(made):
    """The same bytes as one row and as two are two images."""
    flat = noise(0, 64, 2)
    made.write("train", {"a.png": (flat, []), "b.png": (flat.reshape(1, 128, 3), [])})
    dataset = CocoDataset(made.folder / "train.json", made.folder / "train")
    assert not find_duplicates(scan_images([dataset]))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="whoever may read everything reads this too")
def test_a_file_without_permission_is_told(made):
    made.write("train", {"a.png": (noise(0), [(4, 4, 20, 20, "car")])})
    (made.folder / "train/a.png").chmod(0)
    assert texts(made.inspect("train"), "cannot be read")
