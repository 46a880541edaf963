"""COCO files as they come: sparse, crowded, empty, damaged and hostile ones."""

import json
import multiprocessing
import pickle
import warnings

import cv2
import numpy as np
import pytest

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.errors import UserError


def box(ident, image_id=1, bbox=(2, 3, 10, 8), category_id=7, **more):
    return {"id": ident, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), **more}


class Folder:
    """A dataset of 40 x 30 images under construction."""

    def __init__(self, path):
        self.path = path / "images"
        self.path.mkdir()
        self.file = path / "train.json"
        self.content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}],
        }

    def image(self, ident, name=None, shape=(30, 40), **more):
        name = name or f"{ident}.png"
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(self.path / name), np.full((*shape, 3), ident, np.uint8))
        entry = {"id": ident, "file_name": name, "width": 40, "height": 30, **more}
        self.content["images"].append(entry)
        return entry

    def add(self, *annotations):
        self.content["annotations"] += annotations

    def dataset(self, text=None, **options):
        self.file.write_text(json.dumps(self.content) if text is None else text, encoding="utf-8")
        return CocoDataset(self.file, self.path, **options)

    def refuses(self, match, **options):
        with pytest.raises(UserError, match=match) as caught:
            self.dataset(**options)
        assert "train.json" in str(caught.value) or "images" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_sample(folder):
    folder.image(1)
    folder.image(5, "deep/er/ünï.png")
    folder.add(box(1), box(2, 5, (0.5, 0, 39.5, 30), 90), box(3))
    dataset = folder.dataset()
    assert len(dataset) == 2 and dataset.image_ids == (1, 5) and dataset.skipped == {}
    assert dataset.class_names == ("cat", "dog") and dataset.category_ids == (7, 90)
    assert dataset.annotation_path == folder.file
    first, second = dataset.load(0), dataset.load(1)
    assert first.image.shape == (30, 40, 3) and (first.image == 1).all() and first.image_id == 1
    assert first.boxes.dtype == np.float32 and first.boxes.tolist() == [[2, 3, 12, 11]] * 2
    assert first.labels.dtype == np.int64 and first.labels.tolist() == [0, 0]
    assert second.boxes.tolist() == [[0.5, 0, 40, 30]] and second.labels.tolist() == [1]
    assert second.path == str(folder.path / "deep/er/ünï.png")


def test_labels_follow_the_files_order_or_the_names_given(folder):
    folder.image(1)
    folder.add(box(1, category_id=7), box(2, category_id=90))
    folder.content["categories"].reverse()
    dataset = folder.dataset()
    assert dataset.class_names == ("dog", "cat") and dataset.load(0).labels.tolist() == [1, 0]
    dataset = folder.dataset(class_names=("bird", "cat"))
    assert dataset.class_names == ("bird", "cat") and dataset.category_ids == (-1, 7)
    assert dataset.load(0).labels.tolist() == [1]
    assert dataset.skipped == {"category that is not among the classes": ["annotation 2"]}
    coco = dataset.to_coco()
    assert coco.getCatIds() == [7] and [a["category_id"] for a in coco.dataset["annotations"]] == [7]
    folder.refuses("none of the classes wanted", class_names=("bird",))


def test_crowd_is_kept_for_evaluation_only(folder, capsys):
    folder.image(1)
    rle = {"counts": [0, 1200], "size": [30, 40]}
    folder.add(box(0), box(9, bbox=(0, 0, 40, 30), iscrowd=1, area=1200.5, segmentation=rle), box(3, ignore=1))
    dataset = folder.dataset()
    assert len(dataset.load(0).boxes) == 1
    coco = dataset.to_coco()
    assert capsys.readouterr() == ("", "")  # pycocotools is a talker
    annotations = coco.loadAnns(coco.getAnnIds())
    # an id of 0 would count as "unmatched" in pycocotools
    assert [(a["id"], a["iscrowd"], a["area"]) for a in annotations] == [(1, 0, 80), (2, 1, 1200.5), (3, 0, 80)]
    assert coco.getImgIds() == [1]


def test_evaluates_with_pycocotools(folder):
    from pycocotools.cocoeval import COCOeval

    for i in (1, 2):
        folder.image(i)
    folder.add(box(0), box(1, 2, category_id=90))
    truth = folder.dataset().to_coco()
    found = [{"image_id": 1, "category_id": 7, "bbox": [2, 3, 10, 8], "score": 0.9}]
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(0.5)


def test_empty_images_stay_for_evaluation_and_go_for_training(folder):
    for i in (1, 2, 3):
        folder.image(i)
    folder.add(box(1, 2), box(2, 3, iscrowd=1))
    dataset = folder.dataset()
    assert dataset.image_ids == (1, 2, 3)
    empty = dataset.load(0)
    assert empty.boxes.shape == (0, 4) and empty.boxes.dtype == np.float32
    assert empty.labels.shape == (0,) and empty.labels.dtype == np.int64
    dataset = folder.dataset(training=True)
    assert dataset.image_ids == (2,) and dataset.skipped == {"image without a box": ["1.png", "3.png"]}
    with pytest.raises(RuntimeError):
        dataset.to_coco()


def test_boxes_are_clipped_and_those_without_area_dropped(folder):
    folder.image(1)
    folder.add(
        box(1, bbox=(-5, -5, 10, 10)),
        box(2, bbox=(35, 25, 100, 100)),
        box(3, bbox=(40, 0, 5, 5)),
        box(4, bbox=(-10, 5, 10, 5)),
        box(5, bbox=(5, 5, 0, 9)),
        box(6, bbox=(5, 5, 9, -2)),
        box(7, bbox=(5, 5, 0.5, 9)),
    )
    dataset = folder.dataset()
    assert dataset.load(0).boxes.tolist() == [[0, 0, 5, 5], [35, 25, 40, 30]]
    assert dataset.skipped == {
        "box outside the image": ["annotation 3", "annotation 4"],
        "box below one pixel": ["annotation 5", "annotation 6", "annotation 7"],
    }
    assert len(dataset.to_coco().dataset["annotations"]) == 7  # the evaluation is the file's


def test_nothing_to_train_on(folder):
    folder.image(1)
    folder.refuses("no box to train on", training=True)
    folder.add(box(1, bbox=(0.1, 0.1, 0.5, 0.5)), box(2, iscrowd=1))
    folder.refuses("no box to train on.*below one pixel: 1", training=True)
    folder.refuses("no box to train on", training=True, skip_bad=True)
    assert len(folder.dataset()) == 1
    del folder.content["annotations"]
    assert len(folder.dataset().load(0).boxes) == 0 and folder.dataset().to_coco().getAnnIds() == []


def test_small_images_are_not_trained_on(folder):
    folder.image(1)
    folder.image(2, shape=(7, 40), height=7)
    folder.add(box(1), box(2, 2))
    assert folder.dataset(training=True).skipped == {"image below 8 pixels": ["2.png"]}
    assert len(folder.dataset(training=True, min_size=7)) == 2


@pytest.mark.parametrize(
    "size",
    [
        {},
        {"width": None, "height": None},
        {"width": 0, "height": 0},
        {"width": "40"},
        {"width": 10**30, "height": 30},
        {"width": 40, "height": 1e7},
    ],
)
def test_size_missing_from_the_file(folder, size):
    entry = folder.image(1, shape=(30, 40))
    del entry["width"], entry["height"]
    entry.update(size)
    folder.add(box(1, bbox=(30, 20, 100, 100)), box(2, bbox=(50, 0, 9, 9)))
    for training in (False, True):
        assert folder.dataset(training=training).load(0).boxes.tolist() == [[30, 20, 40, 30]]
    folder.refuses("no box to train on", training=True, min_size=31)


def test_another_size_than_annotated(folder):
    for i in (1, 2):
        folder.image(i, shape=(20, 30))
    folder.image(3)
    folder.add(box(1, bbox=(10, 10, 25, 15)))
    dataset = folder.dataset()
    with pytest.warns(UserWarning, match=r"1\.png has 30x20 pixels where .* says 40x30"):
        sample = dataset.load(0)
    assert sample.boxes.tolist() == [[10, 10, 30, 20]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one is enough
        dataset.load(1)
        dataset.load(2)
    assert dataset.resized_count == 2


def test_exif_orientation_and_its_annotations(folder):
    Image = pytest.importorskip("PIL.Image")
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, size in ((1, (40, 30)), (2, (30, 40))):
        entry = folder.image(i, f"{i}.jpg")
        entry["width"], entry["height"] = size
        Image.new("RGB", (40, 30)).save(folder.path / f"{i}.jpg", exif=exif)
    dataset = folder.dataset()
    assert dataset.load(0).image.shape == (30, 40, 3)  # annotated on the pixels as stored
    assert dataset.load(1).image.shape == (40, 30, 3)  # annotated upright
    assert dataset.resized_count == 0


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/passwd", "..", "a/../../images2/x.png"])
def test_file_names_must_stay_in_the_folder(folder, name):
    folder.image(1)["file_name"] = name
    folder.refuses("leaves the image folder")
    folder.refuses("leaves the image folder", skip_bad=True)


def test_a_detour_within_the_folder_is_fine(folder):
    folder.image(1, "a.png")["file_name"] = "b/.././a.png"
    assert folder.dataset().load(0).image.shape == (30, 40, 3)


def bad_cases():
    def damaged(**changes):
        return lambda f: f.add({**box(2), **changes})

    yield "duplicate image id", lambda f: f.image(1, "other.png"), "other.png: duplicate image id"
    yield (
        "missing image",
        lambda f: f.image(4) and (f.path / "4.png").unlink(),
        r"4\.png: missing image .*does not exist",
    )
    yield (
        "malformed, it needs an integer id and a file_name",
        lambda f: f.content["images"].append({"id": "x"}),
        "integer id",
    )
    yield "duplicate annotation id", damaged(id=1), "annotation 1: duplicate"
    yield "of an image that is not listed", damaged(image_id=99), "annotation 2: of an image .*99"
    yield "of a category that is not listed", damaged(category_id=8), "annotation 2: of a category .*8"
    no_boxes = ([1, 2, 3], [1, 2, float("nan"), 4], [1, 2, 3, float("inf")], [1, 2, 3, 10**400], ["1", 2, 3, 4])
    yield "bbox reaches beyond 10,000,000 pixels", damaged(bbox=[0, 0, 1e8, 5]), "annotation 2: bbox reaches"
    for flag in ("iscrowd", "ignore"):
        for value in (2, -1, 0.5, float("inf"), "no", [], {}):
            yield f"{flag} is none of 0, 1, true and false", damaged(**{flag: value}), f"annotation 2: {flag} is none"
    yield "malformed", damaged(id=2**63), "malformed"
    yield "malformed", damaged(image_id=True), "malformed"
    for ident in (2**63, 1.0, True):
        yield (
            "malformed, it needs an integer id and a file_name",
            lambda f, i=ident: f.content["images"].append({"id": i, "file_name": "1.png"}),
            "integer id",
        )
    for name in ("a" * 252 + ".png", "a\nb.png", "a\0b.png", "\ud83d.png"):
        yield (
            "missing image",
            lambda f, n=name: f.content["images"].append({"id": 4, "file_name": n}),
            "missing image .*does not exist",
        )
    for bbox in (None, *no_boxes, 5, [True, 2, 3, 4]):
        yield "bbox is not four finite numbers x, y, w, h", damaged(bbox=bbox), "annotation 2: bbox"
    yield "malformed", lambda f: f.add("x"), "malformed"
    yield "malformed", damaged(image_id=[1]), "malformed"


@pytest.mark.parametrize(("reason", "damage", "message"), list(bad_cases()))
def test_bad_entries(folder, reason, damage, message):
    folder.image(1)
    folder.add(box(1))
    damage(folder)
    folder.refuses(message)
    dataset = folder.dataset(skip_bad=True, training=True)
    assert {k: len(v) for k, v in dataset.skipped.items()} == {reason: 1}
    assert dataset.image_ids == (1,) and dataset.load(0).boxes.tolist() == [[2, 3, 12, 11]]
    assert len(folder.dataset(skip_bad=True).to_coco().dataset["annotations"]) == 1


def test_flags(folder):
    folder.image(1)
    yes, no = (1, True, 1.0, "1", "true", "True"), (0, False, 0.0, "0", "false", "FALSE", None)
    flags = [*({"iscrowd": n, "ignore": n} for n in no), *({"iscrowd": y} for y in yes), *({"ignore": y} for y in yes)]
    folder.add(*(box(i, **f) for i, f in enumerate(flags)))
    dataset = folder.dataset()
    assert len(dataset.load(0).boxes) == len(no) and not dataset.skipped
    found = [a["iscrowd"] for a in dataset.to_coco().dataset["annotations"]]
    assert found == [0] * len(no) + [1] * len(yes) + [0] * len(yes) and all(type(flag) is int for flag in found)


def test_two_categories_of_one_name(folder):
    folder.image(1)
    folder.add(box(1))
    folder.content["categories"] += [{"id": 8, "name": "dog\n"}, {"id": 3, "name": " cat"}]
    dataset = folder.dataset()
    assert dataset.class_names == ("cat", "dog") and dataset.category_ids == (7, 90)
    twins = "category without annotations of the same name as another"
    assert dataset.skipped == {twins: ["category 8", "category 3"]}
    folder.add(box(2, category_id=8))  # then 90 is the one without
    dataset = folder.dataset(class_names=("dog", "cat"))
    assert dataset.category_ids == (8, 7) and dataset.load(0).labels.tolist() == [1, 0]
    folder.refuses("of which two are named 'cat'", class_names=("cat", "cat "))
    folder.add(box(3, category_id=90))
    folder.refuses("the categories 90 and 8 have the same name 'dog', and annotations both")
    folder.refuses("the categories 90 and 8", skip_bad=True)


def test_corners_in_place_of_width_and_height(folder):
    folder.image(1)
    folder.add(*(box(i, bbox=(4 * i, 10, 4 * i + 10, 25)) for i in range(6)), box(6), box(7))
    with pytest.warns(UserWarning, match=r"train\.json: 6 of 8 boxes pass the border .* are they x, y, x, y, where"):
        folder.dataset()
    folder.content["annotations"] = [box(i, bbox=(1, 1, 40.4, 30.2)) for i in range(9)]  # by more than a pixel
    folder.content["annotations"][:3] = [box(i, bbox=(1, 1, 90, 5)) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder.dataset()


SQUARE = [[4, 4, 20, 4, 20, 16, 4, 16]]


def test_masks(folder):
    folder.image(1)
    folder.add(
        box(1, segmentation=SQUARE),
        box(2, segmentation={"size": [30, 40], "counts": [0, 60, 1140]}),
        box(3, segmentation=[[1, 1, 5, 1, 5, 5, 1, 5], *SQUARE]),
        box(4, segmentation=SQUARE, iscrowd=1),
    )
    assert folder.dataset().load(0).masks is None
    dataset = folder.dataset(masks=True)
    assert dataset.has_masks and not dataset.skipped
    assert dataset.load(0).masks.render(30, 40).areas.tolist() == [16 * 12, 60, 16 + 16 * 12 - 1]
    coco = dataset.to_coco()
    assert [int(coco.annToMask(a).sum()) for a in coco.loadAnns(coco.getAnnIds())][1] == 60
    assert len(coco.getAnnIds()) == 4
    assert folder.dataset(masks=True, training=True).load(0).masks.render(30, 40).areas.tolist()[1] == 60


def test_masks_go_with_their_boxes(folder):
    """A box that is left out takes its mask along."""
    for i in (1, 2):
        folder.image(i)
    folder.add(
        box(1, bbox=(39.9, 0, 5, 5), segmentation=[[0, 0, 4, 0, 4, 4, 0, 4]]),
        box(2, bbox=(2, 3, 0.5, 5), segmentation=SQUARE),
        box(3, 2, segmentation=[[0, 0, 9, 0, 9, 9, 0, 9]]),
        box(4, segmentation=SQUARE),
    )
    dataset = folder.dataset(masks=True, training=True)
    areas = [dataset.load(i).masks.render(30, 40).areas.tolist() for i in (0, 1)]
    assert areas == [[16, 16 * 12], [81]] and [len(dataset.load(i).boxes) for i in (0, 1)] == [2, 1]


def test_bad_polygons_are_left_out_and_counted(folder):
    folder.image(1)
    folder.add(
        box(1, segmentation=SQUARE),
        box(2, segmentation=[[1, 1, 5, 5], *SQUARE]),
        box(3, segmentation=[[50, 1, 60, 1, 60, 9]]),
        box(4, segmentation=[]),
        box(5, segmentation=[[4, 4, 20, 16, 20, 4, 4, 16]]),
        box(6, segmentation={"size": [30, 40], "counts": [1200]}),
    )
    for options in ({}, {"training": True}):
        dataset = folder.dataset(masks=True, **options)
        assert dataset.skipped == {
            "polygon of fewer than 3 points": ["annotation 2"],
            "polygon outside the image": ["annotation 3"],
            "annotation without a mask": ["annotation 3", "annotation 4", "annotation 6"],
        }
        assert dataset.noticed == {"polygon that crosses itself, filled by the even-odd rule": ["annotation 5"]}
        assert dataset.load(0).masks.render(30, 40).areas.tolist()[:2] == [192, 192]
        assert len(dataset.load(0).boxes) == 3
    coco = folder.dataset(masks=True).to_coco()
    assert [a["segmentation"] for a in coco.loadAnns(coco.getAnnIds())][:2] == [SQUARE, SQUARE]
    assert all(coco.annToMask(a).any() for a in coco.loadAnns(coco.getAnnIds()))


def test_masks_without_a_pixel(folder):
    speck, sliver = [[1.1, 1.1, 1.2, 1.1, 1.2, 1.2]], [[1, 1, 20, 20, 10, 10]]
    folder.image(1)
    folder.add(box(1, segmentation=SQUARE), box(2, segmentation=speck), box(3, segmentation=sliver))
    training, evaluation = (folder.dataset(masks=True, training=training) for training in (True, False))
    assert training.skipped == {"mask without a pixel": ["annotation 2", "annotation 3"]}
    assert len(training.load(0).boxes) == len(training.load(0).masks) == 1
    assert not evaluation.skipped and evaluation.noticed == {
        "mask without a pixel, which COCO counts as missed": ["annotation 2", "annotation 3"]
    }
    assert len(evaluation.to_coco().getAnnIds()) == 3


def test_the_area_of_a_mask_where_the_file_tells_none(folder):
    folder.image(1)
    folder.add({**box(1, segmentation=SQUARE)})
    folder.content["annotations"][0].pop("area", None)
    (with_masks,), (without,) = (folder.dataset(masks=m).to_coco().anns.values() for m in (True, False))
    assert with_masks["area"] == 192 and without["area"] == 10 * 8


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (None, "has no segmentation, which masks are trained and evaluated on"),
        ([[1, 1, float("nan"), 5, 5, 5]], "segmentation holds a polygon that is not x, y, x, y, … in finite numbers"),
        ("x", "segmentation is neither a list of polygons nor an RLE"),
        ({"size": [40, 30], "counts": [1200]}, "segmentation is an RLE of 30x40 pixels in an image of 40x30"),
        ({"size": [30, 40], "counts": "~"}, "segmentation is an RLE whose counts cannot be read"),
        ({"size": [30, 40], "counts": [10**400, 0.5]}, "segmentation is an RLE whose counts cannot be read"),
        ([[10**400, 1.5, 2, 2, 2, 2]], "segmentation holds a polygon that is not a list of numbers"),
        (
            {"size": [30, 40], "counts": [2**62] * 3 + [2**62 + 1200]},  # 1200 in 64 bits
            "segmentation is an RLE whose counts do not add up to 40x30 pixels",
        ),
        ({"size": [2**17, 2**17], "counts": [2**34]}, "segmentation is an RLE larger than any image that can be read"),
    ],
)
def test_malformed_masks(folder, segmentation, reason):
    folder.image(1)
    folder.add(box(1, segmentation=SQUARE), box(2, segmentation=segmentation))
    assert len(folder.dataset().load(0).boxes) == 2  # boxes alone do not ask for masks
    for training in (False, True):
        folder.refuses(f"annotation 2: {reason}.*--skip-bad", masks=True, training=training)
        dataset = folder.dataset(masks=True, training=training, skip_bad=True)
        assert {k: len(v) for k, v in dataset.skipped.items()} == {reason: 1}
        assert len(dataset.load(0).boxes) == len(dataset.load(0).masks) == 1


def test_masks_need_the_images_size(folder):
    del folder.image(1)["width"]
    folder.add(box(1, segmentation=SQUARE))
    folder.refuses("annotation 1: is of an image without width and height", masks=True)


def test_annotations_go_with_their_missing_image(folder):
    for i in (1, 2):
        folder.image(i)
    folder.add(box(1), box(2, 2), box(3, 2))
    (folder.path / "2.png").unlink()
    dataset = folder.dataset(skip_bad=True)
    assert dataset.skipped == {"missing image": ["2.png"]}
    assert dataset.to_coco().getImgIds() == [1] and len(dataset.to_coco().getAnnIds()) == 1


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def test_truncated_file(folder):
    for i in (1, 2, 3):
        folder.image(i)
        folder.add(box(i, i))
    truncate(folder.path / "2.png")
    for options in ({}, {"training": True}, {"skip_bad": True}):  # evaluation must not take one image for another
        with pytest.raises(UserError, match=r"2\.png.*truncated.*train\.json.*--skip-bad"):
            folder.dataset(**options).load(1)
    dataset = folder.dataset(training=True, skip_bad=True)
    assert dataset.skipped == {}
    assert [dataset.load(1).image_id for _ in range(2)] == [3, 3]
    assert dataset.skipped == {"unreadable image": ["2.png"]}
    for i in (1, 3):
        truncate(folder.path / f"{i}.png")
    with pytest.raises(UserError, match="none of its images"):
        dataset.load(0)


def test_unreadable_images_of_unknown_size_are_counted_once(folder):
    for i in (1, 2, 3):
        del folder.image(i)["width"]
        folder.add(box(i, i))
    truncate(folder.path / "1.png")
    folder.refuses(r"1\.png.*truncated", training=True)
    dataset = folder.dataset(training=True, skip_bad=True)
    truncate(folder.path / "2.png")
    assert dataset.load(0).image_id == 3
    assert dataset.skipped == {"unreadable image": ["1.png", "2.png"]}


def _load_all(dataset):
    for i in range(len(dataset)):
        dataset.load(i)


def test_skips_in_loader_workers_are_seen_by_the_main_process(folder):
    for i in (1, 2):
        folder.image(i)
        folder.add(box(i, i))
    truncate(folder.path / "1.png")
    dataset = folder.dataset(training=True, skip_bad=True)
    process = multiprocessing.get_context("fork").Process(target=_load_all, args=(dataset,))
    process.start()
    process.join()
    assert dataset.skipped == {"unreadable image": ["1.png"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [],\n"annotations": [}', "line 2, column 17"),
        ("", "line 1, column 1"),
        ("[1]", "is a JSON list"),
        ('"x"', "is a JSON str"),
        ("{}", 'lacks the list "images"'),
        ('{"images": {}}', 'lacks the list "images"'),
        ('{"images": [], "annotations": 3, "categories": []}', 'lacks the list "annotations"'),
        ('{"images": [], "annotations": []}', 'lacks the list "categories"'),
        ('{"images": [], "annotations": [], "categories": []}', "no categories"),
        ('{"images": [], "categories": [{"id": 1}]}', "an integer id and a name"),
        (
            '{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "category id 1 occurs twice",
        ),
        ('{"images": [], "categories": [{"id": 18446744073709551616, "name": "a"}]}', "an integer id and a name"),
        ('{"images": [], "categories": [{"id": 1, "name": "\\n"}]}', "an integer id and a name"),
        ('{"images": [], "categories": [{"id": 1, "name": ["a"]}]}', "an integer id and a name"),
        ('{"images": [], "categories": [{"id": 1, "name": ' + "[" * 900 + "]" * 900 + "}]}", "integer id|nested"),
        ('{"images": [' + "9" * 5000 + '], "categories": []}', "thousands of digits|integer id"),
        ("[" * 100_000, "nested|line"),
    ],
)
def test_malformed_files(folder, text, message):
    with pytest.raises(UserError, match=rf"train\.json.*{message}"):
        folder.dataset(text)


def test_files_that_cannot_be_read(folder, tmp_path):
    with pytest.raises(UserError, match=r"none\.json.*No such file"):
        CocoDataset(tmp_path / "none.json", folder.path)
    with pytest.raises(UserError, match="directory"):
        CocoDataset(tmp_path, folder.path)
    with pytest.raises(UserError, match="no such folder"):
        CocoDataset(tmp_path / "none.json", tmp_path / "none")
    folder.file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        CocoDataset(folder.file, folder.path)


def test_an_empty_file_is_an_empty_dataset(folder):
    dataset = folder.dataset()
    assert len(dataset) == 0 and dataset.skipped == {} and dataset.to_coco().getImgIds() == []
    folder.refuses("no box to train on", training=True)


def test_what_is_not_used_may_be_anything(folder):
    folder.image(1)
    nested = json.loads("[" * 800 + "]" * 800)  # too deep for pickle and deepcopy
    folder.content["info"] = folder.content["categories"][0]["more"] = nested
    folder.add(box(1, more=nested, segmentation=nested))
    dataset = folder.dataset()
    pickle.dumps(dataset)
    coco = dataset.to_coco()
    coco.loadRes([{"image_id": 1, "category_id": 7, "bbox": [2, 3, 10, 8], "score": 0.9}])


def test_byte_order_mark(folder):
    folder.image(1)
    assert len(folder.dataset("\ufeff" + json.dumps(folder.content))) == 1


@pytest.mark.parametrize("part", ["train", "val"])
def test_coco_tiny(shared, part):
    root = shared / "data" / "coco_tiny"
    dataset = CocoDataset(root / f"instances_{part}.json", root / part)
    content = json.loads((root / f"instances_{part}.json").read_text())
    assert len(dataset) == 80 and len(dataset.class_names) == 80 and dataset.category_ids[-1] == 90
    assert len(dataset.to_coco().getAnnIds()) == len(content["annotations"])
    crowds = sum(a["iscrowd"] for a in content["annotations"])
    dropped = sum(len(what) for what in dataset.skipped.values())
    assert sum(len(dataset.load(i).boxes) for i in range(80)) == len(content["annotations"]) - crowds - dropped


@pytest.mark.parametrize("part", ["train", "val"])
def test_coco_tinys_masks_are_pycocotools(shared, part):
    root = shared / "data" / "coco_tiny"
    dataset = CocoDataset(root / f"instances_{part}.json", root / part, masks=True)
    coco = dataset.to_coco()
    objects = differing = pixels = 0
    for index in range(0, 80, 4):
        sample = dataset.load(index)
        anns = coco.loadAnns(coco.getAnnIds(sample.image_id, iscrowd=False))
        anns = [a for a in anns if min(a["bbox"][2:]) >= 1]
        assert len(anns) == len(sample.masks)
        height, width = sample.image.shape[:2]
        for i, annotation in enumerate(anns):
            x, y, mask = sample.masks.region(i)
            full = np.zeros((height, width), bool)
            full[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
            expected = coco.annToMask(annotation).astype(bool)
            objects, pixels = objects + 1, pixels + expected.sum()
            differing += (full ^ expected).sum()
    assert objects > 100 and differing < 0.01 * pixels
