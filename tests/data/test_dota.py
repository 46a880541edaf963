"""Rotated annotations as they come: DOTA text with its variants and mistakes, JSON of every form."""

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from rtmdet_fast.class_names import DOTA_CLASSES
from rtmdet_fast.data.dota import DotaDataset, write_task1
from rtmdet_fast.data.formats.dota import read_labels
from rtmdet_fast.data.layout import find_sources
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.errors import UserError
from rtmdet_fast.geometry.rotated import boxes_to_quads, edges_cross, min_area_boxes, quads_to_boxes, regularize
from rtmdet_fast.images import read_size
from rtmdet_fast.kernels.rotated_iou import box_iou_rotated

UPRIGHT = "10 5 30 5 30 15 10 15"  # centre (20, 10), 20 x 10


def random_boxes(rng, n, size=200.0):
    return regularize(
        np.column_stack([rng.uniform(0, size, (n, 2)), rng.uniform(2, 60, (n, 2)), rng.uniform(-7, 7, n)])
    )


def same_boxes(a, b, tolerance):
    """Equal as sets of points: a square's angle, or one near -pi/2, has another value for the same box."""
    quads, others = boxes_to_quads(a).reshape(-1, 4, 2), boxes_to_quads(b).reshape(-1, 4, 2)
    distance = np.linalg.norm(quads[:, :, None] - others[:, None], axis=-1)
    return distance.min(2).max() < tolerance


class Folder:
    def __init__(self, path: Path):
        self.images, self.labels = path / "images", path / "labelTxt"
        self.images.mkdir()
        self.labels.mkdir()

    def image(self, name="a.png", shape=(30, 40)):
        assert cv2.imwrite(str(self.images / name), np.zeros((*shape, 3), np.uint8))

    def add(self, text, name="a.png", shape=(30, 40)):
        self.image(name, shape)
        (self.labels / name).with_suffix(".txt").write_bytes(text.encode())

    def dataset(self, **options):
        return DotaDataset(self.labels, self.images, **options)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_form_le90(rng):
    boxes = random_boxes(rng, 1000)
    assert (boxes[:, 2] >= boxes[:, 3]).all()
    assert (boxes[:, 4] >= -math.pi / 2).all() and (boxes[:, 4] < math.pi / 2).all()
    raw = np.array([[1.0, 2, 3, 4, 0], [1, 2, 4, 3, math.pi / 2], [1, 2, 4, 3, math.pi + 0.1]])
    assert np.allclose(regularize(raw), [[1, 2, 4, 3, -math.pi / 2], [1, 2, 4, 3, -math.pi / 2], [1, 2, 4, 3, 0.1]])
    below = np.array([[1, 2, 4, 3, np.nextafter(-math.pi / 2, -2)]])  # its remainder rounds to a whole half turn
    assert regularize(below)[0, 4] == -math.pi / 2


def test_angle_is_clockwise_on_a_screen_as_in_the_kernel(rng):
    down_right = boxes_to_quads(np.array([[50.0, 50, 40, 4, math.pi / 6]])).reshape(4, 2)
    assert down_right[down_right[:, 0].argmax(), 1] > 55  # y is down
    boxes = random_boxes(rng, 60)
    canvas = np.zeros((2, 1200, 1200), np.uint8)
    exact = box_iou_rotated(*(_tensor(boxes[i::2]) for i in (0, 1)), aligned=True).numpy()
    for a, b, iou in zip(boxes[::2], boxes[1::2], exact, strict=True):
        for layer, box in zip(canvas, (a, b), strict=True):
            layer[:] = 0
            quad = boxes_to_quads(box[None]).reshape(4, 2)
            cv2.fillPoly(layer, [np.rint((quad + 50) * 4 * 16).astype(np.int32)], 1, shift=4)
        inter, union = (canvas[0] & canvas[1]).sum(), (canvas[0] | canvas[1]).sum()
        assert inter / union == pytest.approx(iou, abs=0.03)


def _tensor(array):
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))


def test_corners_there_and_back(rng):
    boxes = random_boxes(rng, 2000, size=20_000)
    assert same_boxes(quads_to_boxes(boxes_to_quads(boxes)), boxes, 1e-8)
    clear = boxes[:, 2] > 1.001 * boxes[:, 3]
    assert np.allclose(quads_to_boxes(boxes_to_quads(boxes))[clear], boxes[clear], atol=1e-7)
    shuffled = boxes_to_quads(boxes).reshape(-1, 4, 2)[:, [2, 0, 3, 1]].reshape(-1, 8)  # crossing, too
    assert same_boxes(quads_to_boxes(shuffled), boxes, 1e-8)


@pytest.mark.parametrize("k", [3, 4, 7])
def test_smallest_boxes_are_those_of_opencv(rng, k):
    points = rng.uniform(-100, 100, (500, k, 2)) * rng.uniform(0.02, 1, (500, 1, 2))
    boxes = min_area_boxes(points)
    for p, box in zip(points, boxes, strict=True):
        _, (w, h), _ = cv2.minAreaRect(p.astype(np.float32))
        assert box[2] * box[3] == pytest.approx(w * h, rel=1e-3, abs=1e-2)
    # and they hold all points
    local = points - boxes[:, None, :2]
    cos, sin = np.cos(boxes[:, None, 4]), np.sin(boxes[:, None, 4])
    assert (np.abs(local[..., 0] * cos + local[..., 1] * sin) <= boxes[:, None, 2] / 2 + 1e-9).all()
    assert (np.abs(local[..., 1] * cos - local[..., 0] * sin) <= boxes[:, None, 3] / 2 + 1e-9).all()


def test_degenerate_quadrilaterals():
    quads = np.array([[5, 5] * 4, [0, 0, 2, 2, 4, 4, 6, 6], [0, 0, 4, 0, 4, 0, 0, 0], [0, 0, 4, 0, 4, 2, 4, 2]], float)
    boxes = quads_to_boxes(quads)
    assert np.isfinite(boxes).all()
    assert np.allclose(boxes[0, :4], [5, 5, 0, 0])
    assert np.allclose(boxes[1], [3, 3, 6 * 2**0.5, 0, math.pi / 4], atol=1e-12)
    assert np.allclose(boxes[2], [2, 0, 4, 0, 0])
    assert boxes[3, 2:4].prod() > 3
    assert edges_cross([[0, 0, 4, 4, 4, 0, 0, 4], [0, 0, 4, 0, 4, 4, 0, 4], [0, 0, 1, 0.1, 4, 0, 1, 4]]).tolist() == [
        True,
        False,
        False,
    ]


def test_sample(folder):
    text = "imagesource:GoogleEarth\ngsd:0.146343\n10.0 5.0 30.0 5.0 30.0 15.0 10.0 15.0 small-vehicle 0\r\n\r\n"
    folder.add(text + "20 5 25 10 20 15 15 10 ship 0\n")
    folder.add(f"\ufeff{UPRIGHT} ship\n  \n{UPRIGHT} plane 1\n", "b.JPG")
    folder.add("", "c.tif")
    dataset = folder.dataset()
    assert len(dataset) == 3 and dataset.image_names == ("a", "b", "c") and dataset.image_ids == (1, 2, 3)
    assert dataset.class_names == ("plane", "small-vehicle", "ship") and dataset.skipped == {}
    a, b, c = (dataset.load(i) for i in range(3))
    assert a.image.shape == (30, 40, 3) and a.boxes.dtype == np.float32 and a.labels.dtype == np.int64
    assert np.allclose(a.boxes[0], [20, 10, 20, 10, 0], atol=1e-6) and a.labels.tolist() == [1, 2]
    assert same_boxes(a.boxes[1:], np.array([[20, 10, 50**0.5, 50**0.5, math.pi / 4]]), 1e-5)
    assert b.labels.tolist() == [2] and b.path == str(folder.images / "b.JPG")
    assert c.boxes.shape == (0, 5) and c.boxes.dtype == np.float32
    truth = dataset.ground_truth(1)
    assert truth.labels.tolist() == [2, 0] and truth.difficult.tolist() == [False, True]
    assert truth.boxes.dtype == np.float32 and np.allclose(truth.boxes[0], truth.boxes[1])
    assert dataset.ground_truth(2).boxes.shape == (0, 5)


def test_training_drops_images_without_boxes(folder):
    folder.add(f"{UPRIGHT} ship 0")
    folder.add("gsd:null\n", "b.png")
    folder.add(f"{UPRIGHT} ship 2", "c.png")
    folder.add(f"{UPRIGHT} ship", "d.png", (7, 40))
    folder.add(f"{UPRIGHT} ship 1", "e.png")
    dataset = folder.dataset(training=True)
    assert dataset.image_names == ("a", "e")  # difficult 1 is no difference, 2 is what a split cut
    assert dataset.skipped == {
        "box cut by a split, or to be ignored": ["annotation c.txt:1"],
        "image without a box": ["b.png", "c.png"],
        "image below 8 pixels": ["d.png"],
    }
    with pytest.raises(RuntimeError, match="training"):
        dataset.ground_truth(0)


def test_classes_in_dotas_order_or_by_name_or_as_given(folder):
    folder.add("\n".join(f"{UPRIGHT} {name} 0" for name in reversed(DOTA_CLASSES)))
    assert folder.dataset().class_names == DOTA_CLASSES
    folder.add(f"{UPRIGHT} ship 0\n{UPRIGHT} Tank 0\n{UPRIGHT} crane 2\n")
    assert folder.dataset().class_names == ("Tank", "crane", "ship")
    dataset = folder.dataset(class_names=("plane", "ship"))
    assert dataset.class_names == ("plane", "ship") and dataset.load(0).labels.tolist() == [1]
    assert dataset.skipped == {"category that is not among the classes": ["annotation a.txt:2"]}
    assert dataset.ground_truth(0).labels.tolist() == [1]
    with pytest.raises(UserError, match="none of the classes wanted"):
        folder.dataset(class_names=("plane",))
    folder.add("")
    assert len(folder.dataset(class_names=("plane",))) == 1
    with pytest.raises(UserError, match="no categories"):
        folder.dataset()


@pytest.mark.parametrize(
    "line",
    [
        "1 2 3 4 5 6 7 8",
        f"{UPRIGHT} ship 0 0",
        f"{UPRIGHT} small vehicle 0",
        "1,2,3,4,5,6,7,8 ship 0",
        "1 2 3 4 5 6 7 x ship 0",
        "1 2 3 4 5 6 7 nan ship 0",
        "1 2 3 4 5 6 7 inf ship 0",
        f"{UPRIGHT} 0 ship",
        f"{UPRIGHT} ship 0.5",
        f"{UPRIGHT} ship -1",
        f"{UPRIGHT} sh\0ip 0",
    ],
)
def test_malformed_lines(folder, line):
    folder.add(f"gsd:1\n{UPRIGHT} ship 0\n\n{line}\n{UPRIGHT} ship 0\n")
    with pytest.raises(UserError, match=r"a\.txt, line 4: malformed line") as caught:
        folder.dataset()
    assert "\n" not in str(caught.value) and "--skip-bad" in str(caught.value)
    dataset = folder.dataset(skip_bad=True, training=True)
    assert dataset.skipped == {"malformed line": ["a.txt, line 4"]} and len(dataset.load(0).boxes) == 2
    with pytest.raises(UserError, match=r"a\.txt, line 4"):
        read_labels(folder.labels / "a.txt")


def test_boxes_that_cannot_be_used(folder):
    lines = ["0 0 5 5 10 10 15 15", "5 5 5 5 5 5 5 5", "1 1 9 1 9 1.5 1 1.5", "50 0 60 0 60 9 50 9", UPRIGHT]
    folder.add("\n".join(f"{line} ship 0" for line in lines) + "\n10 5 30 15 30 5 10 15 ship 0")
    dataset = folder.dataset()
    assert dataset.skipped == {
        "box without area": ["annotation a.txt:1", "annotation a.txt:2"],
        "box below one pixel": ["annotation a.txt:3"],
        "box outside the image": ["annotation a.txt:4"],
    }
    assert dataset.crossing_count == 1
    sample = dataset.load(0)
    assert np.allclose(sample.boxes, [[20, 10, 20, 10, 0]] * 2, atol=1e-5)
    assert len(dataset.ground_truth(0).boxes) == 4  # what has no area cannot be found


def test_files_missing_damaged_and_left_over(folder, tmp_path):
    with pytest.raises(UserError, match="no label files"):
        folder.dataset()
    folder.add(f"{UPRIGHT} ship 0")
    folder.image("extra.png")
    (folder.labels / "b.txt").write_text(f"{UPRIGHT} ship 0")
    with pytest.raises(UserError, match=r"b\.png.*does not exist"):
        folder.dataset()
    folder.image("b.png")
    folder.image("b.jpg")
    with pytest.raises(UserError, match=r"b\.txt: several images.*b\.jpg, b\.png"):
        folder.dataset()
    (folder.images / "b.jpg").unlink()
    (folder.labels / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"b\.txt.*UTF-8"):
        folder.dataset()
    dataset = folder.dataset(skip_bad=True)
    assert dataset.image_names == ("a",)
    assert dataset.skipped == {
        "unreadable label file": ["b.txt"],
        "image without a label file": ["extra.png"],
    }
    with pytest.raises(UserError, match="cannot read"):
        DotaDataset(tmp_path / "none", folder.images)
    with pytest.raises(UserError, match="no such folder"):
        DotaDataset(folder.labels, tmp_path / "none")


def test_damaged_image(folder):
    folder.add(f"{UPRIGHT} ship 0")
    folder.add(f"{UPRIGHT} ship 0", "b.png")
    (folder.images / "b.png").write_bytes(b"no image")
    assert read_size(folder.images / "b.png") == (0, 0)
    with pytest.raises(UserError, match=r"labelTxt: b\.png: unreadable image"):
        folder.dataset(training=True)
    assert folder.dataset(training=True, skip_bad=True).skipped == {"unreadable image": ["b.png"]}


def json_dataset(folder, *annotations, **options):
    folder.image()
    path = folder.images.parent / "train.json"
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 4, "file_name": "a.png", "width": 40, "height": 30}],
                "annotations": [
                    {"id": i, "image_id": 4, "category_id": 9, **a} for i, a in enumerate(annotations, start=1)
                ],
                "categories": [{"id": 9, "name": "ship"}],
            }
        )
    )
    return DotaDataset(path, folder.images, **options)


QUAD = [10, 5, 30, 5, 30, 15, 10, 15]


@pytest.mark.parametrize(
    "annotation",
    [
        {"bbox": QUAD},
        {"bbox": [20, 10, 20, 10, 0]},
        {"bbox": [20, 10, 10, 20, math.pi / 2]},
        {"bbox": [1, 2, 3, 4], "rbox": [20, 10, 20, 10, -math.pi]},
        {"bbox": [1, 2, 3, 4], "segmentation": [QUAD]},
        {"segmentation": [[10, 5, 20, 5, 30, 5, 30, 15, 20, 14, 10, 15]]},
        {"segmentation": [[10, 5, 12, 5, 10, 15], [30, 5, 30, 15, 29, 15]]},
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_json_forms(folder, annotation, training):
    dataset = json_dataset(folder, annotation, training=training)
    sample = dataset.load(0)
    assert sample.boxes.dtype == np.float32 and np.allclose(sample.boxes, [[20, 10, 20, 10, 0]], atol=1e-5)
    assert sample.image_id == 4 and dataset.image_ids == (4,) and dataset.image_names == ("a",)
    if not training:
        coco = dataset.to_coco()  # the boxes around
        assert np.allclose(coco.loadAnns(coco.getAnnIds())[0]["bbox"], [10, 5, 20, 10], atol=1e-5)


@pytest.mark.parametrize("flag", ["difficult", "ignore", "iscrowd"])
def test_json_difficult(folder, flag):
    dataset = json_dataset(folder, {"bbox": QUAD, flag: 1}, {"bbox": QUAD}, {"bbox": QUAD, "difficult": "0"})
    assert len(dataset.load(0).boxes) == 2 and dataset.ground_truth(0).difficult.tolist() == [True, False, False]
    training = json_dataset(folder, {"bbox": QUAD, flag: 1}, {"bbox": QUAD}, training=True)
    assert len(training.load(0).boxes) == (2 if flag == "difficult" else 1)


def test_forms_of_difficult(folder):
    levels = [0, "0", False, None, "false", 1, 1.0, "1", True, "true", 2, "2"]
    dataset = json_dataset(folder, *({"bbox": QUAD, "difficult": level} for level in levels))
    assert dataset.ground_truth(0).difficult.tolist() == [False] * 5 + [True] * 7
    training = json_dataset(folder, *({"bbox": QUAD, "difficult": level} for level in levels), training=True)
    assert len(training.load(0).boxes) == 10
    folder.add(f"{UPRIGHT} ship {9**30}\n{UPRIGHT} ship 0")
    assert folder.dataset().ground_truth(0).difficult.tolist() == [True, False]


@pytest.mark.parametrize("flag", ["difficult", "ignore", "iscrowd"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1, 3, "hard", [1]])
def test_malformed_flags(folder, flag, value):
    annotations = ({"bbox": QUAD}, {"bbox": QUAD, flag: value})
    with pytest.raises(UserError, match=f"annotation 2: {flag} is none of 0, 1, true and false.*--skip-bad"):
        json_dataset(folder, *annotations)
    dataset = json_dataset(folder, *annotations, skip_bad=True)
    assert len(dataset.load(0).boxes) == 1
    assert dataset.skipped == {f"{flag} is none of 0, 1, true and false": ["annotation 2"]}


@pytest.mark.parametrize("polygon", [[5, 5] * 3, [5, 5] * 5])
def test_a_polygon_that_is_one_point_has_no_area(folder, polygon):
    dataset = json_dataset(folder, {"segmentation": [polygon]}, {"bbox": QUAD})
    assert len(dataset.load(0).boxes) == 1 and dataset.skipped == {"box without area": ["annotation 1"]}


def test_boxes_at_the_end_of_the_world(folder):
    folder.add(f"{UPRIGHT} ship\n0 0 1e200 0 1e200 1e200 0 1e200 ship")
    with pytest.raises(UserError, match=r"line 2: malformed line.*beyond 10,000,000 pixels"):
        folder.dataset()
    with pytest.raises(UserError, match="beyond 10,000,000 pixels"):
        json_dataset(folder, {"bbox": [0, 0, 1e200, 5, 0]})


def test_ids_of_classes_that_a_folder_lacks(folder):
    folder.add(f"{UPRIGHT} ship 0\n{UPRIGHT} dinghy 0\n")
    dataset = folder.dataset(class_names=("plane", "ship", "harbor"))
    assert dataset.category_ids == (1, 2, 3)
    assert dataset.ground_truth(0).labels.tolist() == [1]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"bbox": [1, 2, 3, 4]}, "neither"),
        ({"bbox": QUAD, "rbox": [1, 2, 3]}, "neither"),
        ({"bbox": [1, 2, 3, 4], "segmentation": {"counts": [1], "size": [3, 4]}}, "neither"),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "neither"),
        ({"rbox": [20, 10, -20, 10, 0]}, "negative side"),
        ({"rbox": [20, 10, 20, 10, 45]}, "radians"),
    ],
)
def test_json_faults(folder, annotation, reason):
    with pytest.raises(UserError, match=rf"train\.json: annotation 2: .*{reason}"):
        json_dataset(folder, {"bbox": QUAD}, annotation)
    dataset = json_dataset(folder, {"bbox": QUAD}, annotation, skip_bad=True)
    assert len(dataset.load(0).boxes) == 1 and len(dataset.skipped) == 1


def test_drawn_shapes_load_as_rotated(tmp_path):
    shapes = make_shapes(tmp_path, num_train=6, num_val=2, image_size=96)
    (source,) = find_sources(tmp_path, "train")
    assert (source.annotations, source.images) == (shapes.train_ann, shapes.train_images)
    dataset = DotaDataset([source])
    content = json.loads(source.annotations.read_text())
    for i, ident in enumerate(dataset.image_ids):
        boxes = [a["rbox"] for a in content["annotations"] if a["image_id"] == ident]
        assert same_boxes(dataset.load(i).boxes, np.array(boxes).reshape(-1, 5), 1e-3) if boxes else True


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("val/images", "val/labelTxt"),
        ("val/images", "val/annfiles"),
        ("val/images", "val/labelTxt-v1.0"),
        ("val/images", "val/labelTxt-v1.0/labelTxt"),
        ("images/val", "labelTxt/val"),
    ],
)
def test_layouts(tmp_path, images, labels):
    with pytest.raises(UserError, match="labelTxt"):
        find_sources(tmp_path, "val")
    (tmp_path / images).mkdir(parents=True)
    (tmp_path / labels).mkdir(parents=True)
    (tmp_path / labels / "a.txt").write_text("")
    (source,) = find_sources(tmp_path, "val")
    assert (source.annotations, source.images) == (tmp_path / labels, tmp_path / images)


def test_task1_submission(tmp_path, rng):
    boxes = random_boxes(rng, 5)
    scores, labels = np.array([0.9, 0.5, 0.25, 0.125, 1e-7]), np.array([0, 2, 0, 2, 2])
    nothing = (np.zeros((0, 5)), np.zeros(0), np.zeros(0, int))
    files = write_task1(tmp_path / "out", ("a", "b-c", "d"), [("P1", boxes, scores, labels), ("P2", *nothing)])
    odd = write_task1(tmp_path, ("a",), [("\udcff", boxes[:1], scores[:1], labels[:1])])  # a name that is not UTF-8
    assert odd[0].read_bytes().startswith(b"\xff 0.9")
    assert [f.name for f in files] == ["Task1_a.txt", "Task1_b-c.txt", "Task1_d.txt"]
    assert files[1].read_text() == ""
    for file, label in ((files[0], 0), (files[2], 2)):
        rows = [line.split() for line in file.read_text().splitlines()]
        assert [row[0] for row in rows] == ["P1"] * (labels == label).sum()
        assert np.allclose([float(row[1]) for row in rows], scores[labels == label], atol=1e-6)
        quads = np.array([row[2:] for row in rows], float)
        assert quads.shape[1] == 8 and same_boxes(quads_to_boxes(quads), boxes[labels == label], 0.05)


@pytest.mark.parametrize(("split", "images", "boxes", "difficult"), [("train", 360, 3391, 16), ("val", 100, 857, 7)])
def test_hit_uav(shared, split, images, boxes, difficult):
    dataset = DotaDataset(find_sources(shared / "data/hit_uav", split))
    assert len(dataset) == images and dataset.class_names == ("Bicycle", "Car", "OtherVehicle", "Person")
    truth = [dataset.ground_truth(i) for i in range(images)]
    assert sum(len(t.boxes) for t in truth) == boxes and sum(t.difficult.sum() for t in truth) == difficult
    assert dataset.load(3).image.shape == (512, 640, 3)
