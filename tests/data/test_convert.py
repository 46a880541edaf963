"""Data sets written in every format and read again: the same batches, to the bit."""

import json

import cv2
import numpy as np
import pytest
from torch.utils.data import DataLoader

from rtmdet_fast.data.augment import collate
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.convert import joined, traced, write_dataset
from rtmdet_fast.data.layout import find_sources
from rtmdet_fast.data.masks import MaskStore, read_segmentation
from rtmdet_fast.data.plan import PlanSampler
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.errors import UserError
from rtmdet_fast.tasks import TASKS
from rtmdet_fast.training.recipe import rtmdet_recipe

FORMATS = ("coco", "yolo", "voc", "dota")
SIDE = 64


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Scenes whose boxes have digits that no power of two divides; one image is empty, one is out of order."""
    shapes = make_shapes(tmp_path_factory.mktemp("drawn"), num_train=12, num_val=3, image_size=SIDE, seed=2)
    content = json.loads(shapes.train_ann.read_text())
    for i, a in enumerate(content["annotations"]):
        a["bbox"] = [v + (i % 10) / 30 for v in a["bbox"][:2]] + [round(v - 0.37, 2) for v in a["bbox"][2:]]
        if i % 3 == 0:
            a["bbox"][2 + i % 2] = 1  # the least that is no "box below one pixel"
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]
    for e in content["images"][::3]:  # of another shape: 1 / 49 * 49 is less than 1
        path = shapes.train_images / e["file_name"]
        cv2.imwrite(str(path), cv2.imread(str(path))[:61, :49])
        e |= {"width": 49, "height": 61}
    content["annotations"] = [a for a in content["annotations"] if sum(a["bbox"][::2]) < 49 and a["bbox"][1] < 55]
    shapes.train_ann.write_text(json.dumps(content))
    return shapes.root


def opened(root, task, **options):
    splits = {}
    for split in ("train", "val"):
        splits[split] = TASKS[task].open_dataset(find_sources(root, split), **options)
    return splits


def batches(dataset, task):
    recipe = rtmdet_recipe("tiny", None, task, None)
    sampler = PlanSampler(len(dataset), 2, recipe.caches, 5, 0)
    for stage2 in (False, True):
        sampler.set_stage2(stage2)
        yield from DataLoader(recipe.augment(dataset, SIDE), batch_sampler=sampler, collate_fn=collate)


def same_to_the_bit(a, b):
    for name in a.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or x.numpy().tobytes() == y.numpy().tobytes(), name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("task", ["det", "rotated"])
def test_batches_are_the_same_to_the_bit(drawn, tmp_path, task, format):
    assert write_dataset(opened(drawn, task), format, tmp_path / "out") == {}
    before, after = (opened(root, task, training=True)["train"] for root in (drawn, tmp_path / "out"))
    assert before.class_names == after.class_names
    pairs = list(zip(batches(before, task), batches(after, task), strict=True))
    assert len(pairs) > 5
    for a, b in pairs:
        same_to_the_bit(a, b)


@pytest.mark.parametrize("format", FORMATS)
def test_corners_stay_the_same_to_the_bit(drawn, tmp_path, format):
    """Boxes that were written as four corners, as DOTA's are, of many digits."""
    write_dataset(opened(drawn, "rotated"), "dota", tmp_path / "corners")
    write_dataset(opened(tmp_path / "corners", "rotated"), format, tmp_path / "out")
    before, after = (opened(tmp_path / name, "rotated", training=True)["train"] for name in ("corners", "out"))
    for a, b in zip(batches(before, "rotated"), batches(after, "rotated"), strict=True):
        same_to_the_bit(a, b)


@pytest.mark.parametrize("format", FORMATS)
def test_validation_is_the_same(drawn, tmp_path, format):
    write_dataset(opened(drawn, "det"), format, tmp_path / "out")
    before, after = (opened(root, "det")["train"] for root in (drawn, tmp_path / "out"))
    assert len(before) == len(after) == 12  # the empty one too
    for a, b in zip(before.content["annotations"], after.content["annotations"], strict=True):
        assert np.allclose(a["bbox"], b["bbox"], rtol=0, atol=1e-9)
        assert (a["image_id"], a["category_id"] - a["category_id"]) == (b["image_id"], 0)
    assert after.noticed == {} and after.skipped == {}


@pytest.mark.parametrize("format", ["coco", "yolo", "voc"])
def test_masks_are_the_same(drawn, tmp_path, format):
    lost = write_dataset(opened(drawn, "ins"), format, tmp_path / "out")
    before, after = (opened(root, "ins", training=True)["train"] for root in (drawn, tmp_path / "out"))
    assert lost == {} and len(before) == len(after)
    for i in range(len(before)):
        a, b = before.load(i), after.load(i)
        masks = [sample.masks.render(*sample.image.shape[:2]) for sample in (a, b)]
        assert all(x.tobytes() == y.tobytes() for x, y in zip(*masks, strict=True))
        assert a.labels.tolist() == b.labels.tolist()
        if format != "yolo":  # whose boxes are those around the polygons
            assert a.boxes.tobytes() == b.boxes.tobytes()


def test_what_a_format_cannot_hold_is_told(tmp_path):
    cv2.imwrite(str(tmp_path / "a b.png"), np.zeros((30, 40, 3), np.uint8))
    rle = {"size": [30, 40], "counts": [0, 1200]}
    entries = [
        {"bbox": [2, 3, 10, 8], "segmentation": [[2, 3, 12, 3, 12, 11]]},
        {"bbox": [0, 0, 40, 30], "iscrowd": 1, "segmentation": rle},
        {"bbox": [2, 3, 10, 8], "ignore": 1, "segmentation": [[2, 3, 12, 3, 12, 11]]},
        {"bbox": [35, 3, 10, 8], "difficult": 1, "segmentation": [[35, 3, 45, 3, 45, 11]]},
    ]
    content = {
        "images": [{"id": 1, "file_name": "a b.png", "width": 40, "height": 30}],
        "annotations": [{"id": i, "image_id": 1, "category_id": 5, **e} for i, e in enumerate(entries)],
        "categories": [{"id": 5, "name": "a cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    splits = {"train": CocoDataset(tmp_path / "a.json", tmp_path, masks=True)}
    names = ["a b.png"]
    expected = {
        "coco": {},
        "yolo": {"crowd region or object to be ignored": names * 2, "that an object is difficult": names},
        "voc": {"crowd region or object to be ignored": names * 2},
        "dota": {
            "white space in the name of a class, written as a-cat": ["a cat"],
            "mask, of which DOTA has the oriented box around it": names * 2,
        },
    }
    left = {"coco": (4, 1), "yolo": (2, 2), "voc": (2, 1), "dota": (4, 1)}  # all, and those to be found
    for format, lost in expected.items():
        assert write_dataset(splits, format, tmp_path / format) == lost
        dataset = CocoDataset(find_sources(tmp_path / format, "train"))
        found = (len(dataset.content["annotations"]), len(dataset.load(0).boxes))
        assert found == left[format] and dataset.class_names == ("a-cat" if format == "dota" else "a cat",)
    again = CocoDataset(find_sources(tmp_path / "coco", "train"), masks=True).content["annotations"]
    before = splits["train"].content["annotations"]
    assert [{**a, "id": 0, "category_id": 0, "area": 0} for a in again] == [
        {**a, "id": 0, "category_id": 0, "area": 0} for a in before
    ]
    assert CocoDataset(find_sources(tmp_path / "yolo", "train")).load(0).boxes.tolist()[1] == [35, 3, 40, 11]


def named(tmp_path, names, **sizes):
    images = []
    for i, name in enumerate(names, start=1):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", np.full((30, 40, 3), i, np.uint8))[1].tobytes())
        images.append({"id": i, "file_name": name, "width": 40, "height": 30})
    annotations = [{"id": i, "image_id": i, "category_id": 1, "bbox": [i, 2, 9, 9]} for i in range(1, len(names) + 1)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": 'c"\n\t\\é: #'}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    return CocoDataset(tmp_path / "a.json", tmp_path / "images")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("split", ["train", "all"])
def test_odd_names_and_orders(tmp_path, format, split):
    names = ["z/a.png", "b.png", "y/a.jpg", "A.png", "line\nbreak.png", " c.png", "ü.png", "y/z/a.png", "n.n.png"]
    before = named(tmp_path, names)
    write_dataset({split: before}, format, tmp_path / "out")
    if split == "all":
        after = CocoDataset(find_dataset_of(tmp_path / "out"))
    else:
        after = CocoDataset(find_sources(tmp_path / "out", split))
    assert after.skipped == after.noticed == {} and after.class_names[0].replace("-", " ") == before.class_names[0]
    loaded = [after.load(i) for i in range(len(names))]
    found = [(int(s.image[0, 0, 0]), s.boxes.tolist()) for s in loaded]
    expected = [(i, [[i, 2, i + 9, 11]]) for i in range(1, len(names) + 1)]
    keeps_order = format == "coco" or (format in ("yolo", "voc") and split == "train")
    assert (found if keeps_order else sorted(found)) == expected


def find_dataset_of(root):
    from rtmdet_fast.data.layout import find_dataset

    ((split, sources),) = find_dataset(root).items()
    assert split == "all"
    return sources


@pytest.mark.parametrize("stored", [False, True])
def test_turned_images(tmp_path, stored):
    Image = pytest.importorskip("PIL.Image")
    before = named(tmp_path, ["a.jpg"])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(3600, dtype=np.uint8).reshape(30, 40, 3)).save(before.image_dir / "a.jpg", exif=exif)
    content = json.loads((tmp_path / "a.json").read_text())
    if not stored:
        content["images"][0] |= {"width": 30, "height": 40}
    (tmp_path / "a.json").write_text(json.dumps(content))
    before = CocoDataset(tmp_path / "a.json", tmp_path / "images")
    lost = write_dataset({"train": before}, "yolo", tmp_path / "out")
    assert len(lost) == stored
    after = CocoDataset(find_sources(tmp_path / "out", "train"))
    assert after.load(0).image.tobytes() == before.load(0).image.tobytes()
    assert after.load(0).boxes.tobytes() == before.load(0).boxes.tobytes()


def test_folders_are_not_overwritten_by_mistake(tmp_path):
    dataset = named(tmp_path, ["a.png"])
    out = tmp_path / "out"
    out.mkdir()
    write_dataset({"train": dataset}, "yolo", out)  # an empty one is fine
    with pytest.raises(UserError, match=r"holds a data set already.*--overwrite"):
        write_dataset({"train": dataset}, "yolo", out)
    write_dataset({"train": dataset}, "coco", out, overwrite=True)
    assert not (out / "data.yaml").exists() and (out / "train/a.png").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "images", "out"}  # no leftovers
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("")
    with pytest.raises(UserError, match="was not written by a conversion"):
        write_dataset({"train": dataset}, "coco", tmp_path / "precious", overwrite=True)
    copy = CocoDataset(find_sources(out, "train"))
    with pytest.raises(UserError, match="holds the images to write"):
        write_dataset({"train": copy}, "coco", out, overwrite=True)
    (tmp_path / "images/a.png").unlink()
    with pytest.raises(UserError, match=r"cannot write .*No such file"):
        write_dataset({"train": dataset}, "coco", tmp_path / "half")
    assert not (tmp_path / "half").exists()
    for splits, format, reason in (
        ({"train": dataset}, "csv", "no format that can be written"),
        ({}, "coco", "splits to write are none"),
        ({"left": dataset}, "coco", "splits to write are left"),
    ):
        with pytest.raises(UserError, match=reason):
            write_dataset(splits, format, tmp_path / "half")


def test_traced_masks_are_the_same_pixels():
    from pycocotools import mask

    rng = np.random.default_rng(0)
    for _ in range(60):
        pixels = (cv2.GaussianBlur(rng.random((23, 31)), (0, 0), rng.uniform(0.1, 3)) > 0.5).astype(np.uint8)
        if not pixels.any():
            continue
        encoded = mask.encode(np.asfortranarray(pixels))
        rle = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
        segmentation, _ = read_segmentation([joined(traced(rle))], 31, 23)
        region = MaskStore([segmentation]).load(0, 1, 31, 23).region(0)
        found = np.zeros_like(pixels)
        height, width = region.pixels.shape
        found[region.y : region.y + height, region.x : region.x + width] = region.pixels
        assert (found == pixels).all()
