"""Every layout that --data takes, and what is said of those that it cannot tell."""

import os
import warnings

import numpy as np
import pytest

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.formats.files import find_images_below
from rtmdet_fast.data.layout import find_dataset, find_sources, source_of, training_images
from rtmdet_fast.errors import UserError
from rtmdet_fast.images import write_image

YOLO_LINE, DOTA_LINE = "0 0.5 0.5 0.1 0.1\n", "0 0 9 0 9 9 0 9 ship 0\n"
LAYOUTS = {
    "coco, as published": ("coco", "annotations/instances_val2017.json", "val2017"),
    "coco, short": ("coco", "val.json", "images"),
    "coco, other tasks beside": ("coco", "annotations/instances_val.json", "val", "annotations/captions_val.json"),
    "Roboflow's coco": ("coco", "valid/_annotations.coco.json", "valid"),
    "FiftyOne's coco": ("coco", "validation/labels.json", "validation/data"),
    "yolo, images first": ("yolo", "labels/val", "images/val", "labels/val/a.txt"),
    "yolo, split first": ("yolo", "valid/labels", "valid/images", "valid/labels/a.txt"),
    "yolo, list": ("yolo", "val.txt", "val.txt", "images/val/a.jpg"),
    "voc": ("voc", "Annotations", "JPEGImages", "Annotations/a.xml", "ImageSets/Main/val.txt"),
    "voc of a year": ("voc", "VOCdevkit/VOC2007/Annotations", "VOCdevkit/VOC2007/JPEGImages",
                      "VOCdevkit/VOC2007/Annotations/a.xml", "VOCdevkit/VOC2007/ImageSets/Main/val.txt"),
    "Roboflow's voc": ("voc", "valid", "valid", "valid/a.xml"),
    "voc in folders": ("voc", "annotations/val", "images/val", "annotations/val/a.xml"),
    "dota": ("dota", "val/labelTxt", "val/images", "val/labelTxt/a.txt"),
    "dota, images first": ("dota", "labelTxt/val", "images/val", "labelTxt/val/a.txt"),
}  # fmt: skip
WHOLE = {
    "CVAT's coco": ("coco", "annotations/instances_default.json", "images/default"),
    "Label Studio's coco": ("coco", "result.json", "images"),
    "Label Studio's yolo": ("yolo", "labels", "images", "labels/a.txt", "classes.txt"),
    "LabelImg's yolo": ("yolo", ".", ".", "a.txt", "classes.txt"),
    "voc": ("voc", "Annotations", "JPEGImages", "Annotations/a.xml"),
    "LabelImg's voc": ("voc", ".", ".", "a.xml"),
    "dota": ("dota", "labelTxt", "images", "labelTxt/a.txt"),
}


def lay(root, annotations, images, *files):
    (root / images).mkdir(parents=True, exist_ok=True) if not images.endswith(".txt") else root.mkdir(exist_ok=True)
    for name in [annotations, *files] if "." in annotations[1:] else files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = DOTA_LINE if "labelTxt" in name else YOLO_LINE if name.endswith("a.txt") else "images/val/a.jpg\n"
        path.write_text(text)


@pytest.mark.parametrize("inside", ["", "archive"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path, layout, inside):
    kind, annotations, images, *files = layout
    root = tmp_path / inside
    lay(root, annotations, images, *files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (source,) = find_sources(tmp_path, "val")
    assert (source.format, source.annotations, source.images) == (kind, root / annotations, root / images)
    assert find_dataset(tmp_path) == {"val": (source,)}
    assert find_dataset([tmp_path, tmp_path]) == {"val": (source, source)}


@pytest.mark.parametrize("layout", WHOLE.values(), ids=WHOLE)
def test_layouts_that_are_not_divided(tmp_path, layout):
    kind, annotations, images, *files = layout
    lay(tmp_path, annotations, images, *files)
    ((split, (source,)),) = find_dataset(tmp_path).items()
    assert (split, source.format, source.annotations) == ("all", kind, tmp_path / annotations)
    assert source.images == tmp_path / images
    with pytest.raises(UserError, match="not divided into train and val"):
        find_sources(tmp_path, "train")


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (("val", "valid", "test"), "val"),
        (("valid", "validation"), "valid"),
        (("validation", "test"), "validation"),
    ],
)
def test_names_of_the_validation_split(tmp_path, there, taken):
    for split in ("train", *there):
        lay(tmp_path, f"{split}/labelTxt", f"{split}/images", f"{split}/labelTxt/a.txt")
    (source,) = find_sources(tmp_path, "val")
    assert source.images == tmp_path / taken / "images"
    assert find_dataset(tmp_path).keys() == {"train", "val"} | ({"test"} & {*there})


def test_last_resorts(tmp_path):
    lists = "ImageSets/Main/trainval.txt", "ImageSets/Main/test.txt"
    lay(tmp_path, "Annotations", "JPEGImages", "Annotations/a.xml", *lists)
    with pytest.warns(UserWarning, match="has no val or valid or validation; its test is taken for it"):
        (source,) = find_sources(tmp_path, "val")
    assert source.listing == tmp_path / lists[1]
    with pytest.warns(UserWarning, match="has no train or training; its trainval is taken for it"):
        (source,) = find_sources(tmp_path, "train")
    assert source.listing == tmp_path / lists[0]


def test_years_of_voc_are_taken_together(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        lay(tmp_path, f"{year}/Annotations", f"{year}/JPEGImages",
            f"{year}/Annotations/a.xml", f"{year}/ImageSets/Main/train.txt")  # fmt: skip
    assert [source.images.parent.name for source in find_sources(tmp_path, "train")] == ["VOC2007", "VOC2012"]


def test_a_tie_is_an_error(tmp_path):
    lay(tmp_path, "annotations/instances_val.json", "images/val", "labels/val/a.txt")
    with pytest.raises(UserError) as told:
        find_sources(tmp_path, "val")
    assert "its val could be COCO (annotations/instances_val.json) and YOLO (labels/val)" in str(told.value)
    yaml = tmp_path / "coco.yaml"
    yaml.write_text("names: [cat]\nval: images/val\n")
    (source,) = find_sources(yaml, "val")  # which tells
    assert source.format == "yolo" and source.images == tmp_path / "images/val"


def test_unknown_layouts_tell_what_was_looked_for(tmp_path):
    for name in ("a.jpg", "notes.txt"):
        (tmp_path / name).write_text("")
    for find in (find_dataset, lambda data: find_sources(data, "val")):
        with pytest.raises(UserError) as told:
            find(tmp_path)
        assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)
        for wanted in ("COCO: annotations/instances_", "YOLO: data.yaml", "Pascal VOC: Annotations", "DOTA: "):
            assert wanted in str(told.value)
    with pytest.raises(UserError, match="validation, test; looked for"):
        find_sources(tmp_path, "val")
    with pytest.raises(UserError, match=r"a\.jpg is neither a folder nor a data\.yaml"):
        find_sources(tmp_path / "a.jpg", "val")
    with pytest.raises(UserError, match="gone is not there"):
        find_sources(tmp_path / "gone", "val")


def test_several_files_of_a_split(tmp_path):
    for name in ("instances_val2014.json", "instances_val2017.json"):
        lay(tmp_path, f"annotations/{name}", "val2017")
    with pytest.raises(UserError, match=r"several val annotation files \(instances_val2014\.json, .*2017.*name one"):
        find_sources(tmp_path, "val")
    (tmp_path / "annotations/instances_val2014.json").rename(tmp_path / "annotations/instances_valuable.json")
    (source,) = find_sources(tmp_path, "val")
    assert source.annotations.name == "instances_val2017.json"


def test_a_coco_file_without_images(tmp_path):
    lay(tmp_path, "val.json", "pictures")
    with pytest.raises(UserError, match=r"has val\.json but no image folder val or images"):
        find_sources(tmp_path, "val")


def test_training_images_of_what_is_no_data_set(tmp_path):
    (tmp_path / "photos").mkdir()
    assert training_images(tmp_path / "photos") is None and training_images(tmp_path / "gone") is None
    lay(tmp_path, "train/labelTxt", "train/images", "train/labelTxt/a.txt")
    assert training_images(tmp_path) == tmp_path / "train/images"


def test_folders_that_links_lead_to_again_are_read_once(tmp_path):
    for name in ("a/1.jpg", "a/b/2.jpg", "c/3.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/4.jpg").write_bytes(b"")
    for name, target in (("up", ".."), ("a/up", "../.."), ("a/b/up", ".."), ("other", "../other"), ("gone", "nothing")):
        (tmp_path / "images" / name).symlink_to(target)
    skipped = []
    found = find_images_below(tmp_path / "images", lambda *told: skipped.append(told))
    assert sorted(path.name for path in found) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert skipped and {reason for _, reason in skipped} == {"folder that a link leads to again"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("name", ["labels/train/a.txt", "annotations/instances_train.json", "Annotations/a.xml"])
def test_annotations_that_are_a_pipe_or_a_device_are_told(tmp_path, name):
    images = tmp_path / "images/train"
    images.mkdir(parents=True)
    write_image(images / "a.jpg", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / name).parent.mkdir(parents=True)
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        (tmp_path / name).unlink(missing_ok=True)
        make(tmp_path / name)
        with pytest.raises(UserError, match=r"pipe or device|none of its 1 images has a label file"):
            CocoDataset([source_of((tmp_path / name).parent if name[0] != "a" else tmp_path / name, images)])
