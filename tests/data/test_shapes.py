import json
import math
import os
import shutil

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from rtmdet_fast.data.shapes import CLASSES, draw_scene, make_shapes
from rtmdet_fast.errors import UserError
from rtmdet_fast.geometry.masks import Region, outline


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=60, num_val=12, image_size=128)


@pytest.fixture(scope="module")
def coco(shapes):
    return COCO(str(shapes.train_ann))


def test_files(shapes, coco):
    assert len(coco.imgs) == 60
    assert len(json.loads(shapes.val_ann.read_text())["images"]) == 12
    assert [c["name"] for c in coco.dataset["categories"]] == list(CLASSES)
    for image in coco.imgs.values():
        assert cv2.imread(str(shapes.train_images / image["file_name"])).shape == (128, 128, 3)
    assert sorted(p.name for p in shapes.val_images.iterdir()) == [f"{i:06d}.jpg" for i in range(12)]


def test_every_class_and_crowded_and_small_and_large(coco):
    labels = [a["category_id"] for a in coco.anns.values()]
    assert min(labels.count(i + 1) for i in range(len(CLASSES))) > 20
    counts = [len(coco.getAnnIds(i)) for i in coco.imgs]
    assert min(counts) <= 1 and max(counts) >= 8
    sides = [max(a["bbox"][2:]) for a in coco.anns.values()]
    assert min(sides) < 20 and max(sides) > 56


def test_polygons_boxes_and_area_agree(coco):
    for ann in coco.anns.values():
        mask = coco.annToMask(ann)
        assert abs(int(mask.sum()) - ann["area"]) <= 0.06 * ann["area"] + 1
        y, x = np.nonzero(mask)
        found = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
        x, y, w, h = ann["bbox"]
        assert np.abs(found - [x, y, x + w, y + h]).max() <= 1
        assert x >= 0 and y >= 0 and x + w <= 128 and y + h <= 128
        assert ann["iscrowd"] == 0


def test_visible_parts_do_not_overlap(coco):
    for image in coco.imgs:
        masks = [coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(image))]
        if masks:
            assert (sum(m.astype(int) for m in masks) > 1).mean() < 0.01  # edges of simplified polygons at most


def test_rotated_box_is_le90_and_tight(coco):
    upright = 0
    for ann in coco.anns.values():
        cx, cy, w, h, angle = ann["rbox"]
        assert w >= h > 0 and -math.pi / 2 <= angle < math.pi / 2
        y, x = np.nonzero(coco.annToMask(ann))
        c, s = math.cos(angle), math.sin(angle)
        u = c * (x + 0.5 - cx) + s * (y + 0.5 - cy)
        v = c * (y + 0.5 - cy) - s * (x + 0.5 - cx)
        assert abs(np.abs(u).max() - w / 2) < 1.5 and abs(np.abs(v).max() - h / 2) < 1.5
        upright += min(abs(angle), abs(angle + math.pi / 2)) < 0.02
        if CLASSES[ann["category_id"] - 1] == "rectangle":  # a rectangle that nothing hides fills its box
            assert ann["area"] <= 1.15 * w * h
    assert upright < 0.5 * len(coco.anns)


def test_a_hole_is_no_part_of_the_mask():
    """A small object upon a large one: COCO polygons know no holes, so the outer one comes in pieces."""
    mask = np.zeros((40, 50), bool)
    mask[5:35, 5:45] = True
    mask[15:25, 15:25] = False
    mask[18:22, 30:36] = False
    polygons = outline(Region(0, 0, mask))
    drawn = COCO()
    drawn.imgs = {1: {"height": 40, "width": 50}}
    found = drawn.annToMask({"image_id": 1, "segmentation": polygons})
    assert (found != mask).mean() < 0.01


def test_a_class_leans_to_its_hue(shapes, coco):
    """Nine of ten objects are nearer to the hue of their own class than to that of another."""
    near = []
    for image in coco.imgs.values():
        pixels = cv2.imread(str(shapes.train_images / image["file_name"]))
        for ann in coco.loadAnns(coco.getAnnIds(image["id"])):
            colour = np.median(pixels[coco.annToMask(ann) > 0], axis=0).astype(np.uint8)
            hue = 2 * int(cv2.cvtColor(colour[None, None], cv2.COLOR_BGR2HSV)[0, 0, 0])
            distance = [abs((hue - 72 * label + 180) % 360 - 180) for label in range(len(CLASSES))]
            near.append(int(np.argmin(distance)) + 1 == ann["category_id"])
    assert np.mean(near) > 0.9


def test_same_seed_same_scene_whatever_the_number(shapes, tmp_path):
    again = make_shapes(tmp_path, num_train=3, num_val=1, image_size=128)
    for i in range(3):
        name = f"{i:06d}.jpg"
        assert (again.train_images / name).read_bytes() == (shapes.train_images / name).read_bytes()
    first, _ = draw_scene(np.random.default_rng(1), 96)
    other, _ = draw_scene(np.random.default_rng(2), 96)
    assert not np.array_equal(first, other)


def test_complete_set_is_reused_and_a_broken_one_redrawn(tmp_path):
    paths = make_shapes(tmp_path, num_train=4, num_val=2, image_size=64)
    os.utime(paths.train_ann, (0, 0))
    make_shapes(tmp_path, num_train=4, num_val=2, image_size=64)
    assert paths.train_ann.stat().st_mtime == 0
    (paths.val_images / "000001.jpg").unlink()
    make_shapes(tmp_path, num_train=4, num_val=2, image_size=64)
    assert (paths.val_images / "000001.jpg").exists()
    make_shapes(tmp_path, num_train=2, num_val=2, image_size=64, seed=1)
    assert len(list(paths.train_images.iterdir())) == 2


def test_never_overwrites_another_data_set(tmp_path):
    paths = make_shapes(tmp_path / "a", num_train=1, num_val=1, image_size=64)
    data = json.loads(paths.train_ann.read_text())
    del data["info"]
    other = tmp_path / "b" / "annotations" / "instances_train.json"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps(data))
    shutil.copytree(paths.train_images, tmp_path / "b" / "train")
    with pytest.raises(UserError, match=r"instances_train\.json"):
        make_shapes(tmp_path / "b", num_train=1, num_val=1, image_size=64)
    assert json.loads(other.read_text()) == data


def small(root, **more):
    return make_shapes(root, **{"num_train": 2, "num_val": 1, "image_size": 64, **more})


@pytest.mark.parametrize("entry", [{"file_name": "../../victim.txt"}, {"file_name": "victim.txt"}, {"file_name": 3}, 3])
def test_deletes_only_what_it_drew(tmp_path, entry):
    """An annotation file says which files are its own, and anybody may have written it."""
    root = tmp_path / "demo"
    paths = make_shapes(root, num_train=1, num_val=1, image_size=64)
    victims = [tmp_path / "victim.txt", paths.train_images / "victim.txt"]
    for victim in victims:
        victim.write_text("mine")
    data = json.loads(paths.train_ann.read_text())
    data["images"].append(entry)
    paths.train_ann.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"instances_train\.json"):
        make_shapes(root, num_train=1, num_val=1, image_size=64, seed=1)
    assert all(victim.read_text() == "mine" for victim in victims)
    assert json.loads(paths.train_ann.read_text()) == data


def test_images_of_the_user_are_not_drawn_over(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val/000000.jpg").write_text("a holiday")
    with pytest.raises(UserError, match=r"val.000000\.jpg was not drawn here"):
        small(tmp_path)
    assert (tmp_path / "val/000000.jpg").read_text() == "a holiday" and not (tmp_path / "train").exists()


@pytest.mark.parametrize("place", ["train", "annotations", "annotations/instances_val.json"])
def test_links_are_not_followed(tmp_path, place):
    paths = small(tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    (paths.root / place).rename(tmp_path / "elsewhere/it")
    (paths.root / place).symlink_to(tmp_path / "elsewhere/it")
    with pytest.raises(UserError, match="is a link"):
        small(paths.root, seed=1)


def test_an_interrupted_drawing_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("rtmdet_fast.data.shapes._annotation", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path, num_train=9)
    paths = small(tmp_path)
    assert len(list(paths.train_images.iterdir())) == 2 and json.loads(paths.train_ann.read_text())["annotations"]


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_val": 0}, {"image_size": 8}, {"seed": -1}])
def test_wrong_arguments(tmp_path, wrong):
    with pytest.raises(UserError, match="at least"):
        make_shapes(tmp_path, **wrong)
