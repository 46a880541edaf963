"""YOLO text and Pascal VOC as they come: what is read of them, and what is refused or left out."""

import warnings

import cv2
import numpy as np
import pytest

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.data.layout import find_sources, source_of
from rtmdet_fast.errors import UserError


class Folder:
    """A YOLO or VOC data set of 40 x 30 images under construction."""

    def __init__(self, path):
        self.path = path

    def file(self, name, text=""):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def image(self, name, shape=(30, 40)):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), np.zeros((*shape, 3), np.uint8))

    def yolo(self, **labels):
        """data.yaml, and train/images with an image of each name, and its label file where there is a text."""
        self.file("data.yaml", "train: train/images\nval: train/images\nnames: [cat, dog]\n")
        for name, text in labels.items():
            self.image(f"train/images/{name}.png")
            if text is not None:
                self.file(f"train/labels/{name}.txt", text)

    def voc(self, **objects):
        """train with an image of each name and its XML."""
        for name, text in objects.items():
            self.image(f"train/{name}.png")
            self.file(f"train/{name}.xml", f"<annotation><filename>{name}.png</filename>{text}</annotation>")

    def dataset(self, kind=CocoDataset, split="train", **options):
        return kind(find_sources(self.path, split), **options)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def boxes(dataset, index=0):
    sample = dataset.load(index)
    return sample.boxes.tolist(), [dataset.class_names[label] for label in sample.labels]


def test_yolo_boxes(folder):
    folder.yolo(a="1 0.5 0.5 0.25 0.2\n0 0.125 0.1 0.25 0.2\n", b="", c=None)
    dataset = folder.dataset()
    assert dataset.class_names == ("cat", "dog") and dataset.files == ("a.png", "b.png", "c.png")
    assert boxes(dataset) == ([[15, 12, 25, 18], [0, 0, 10, 6]], ["dog", "cat"])
    assert boxes(dataset, 1) == boxes(dataset, 2) == ([], [])
    assert dataset.skipped == {}
    assert dataset.noticed == {"image without a label file, taken for one without objects": ["c.png"]}
    assert len(folder.dataset(training=True)) == 1
    assert len(folder.dataset(training=True, keep_empty=True)) == 3


def test_yolo_polygons_and_oriented_boxes(folder):
    folder.yolo(a="1 0.25 0.2 0.75 0.2 0.5 0.8", b="0 0.25 0.1 0.75 0.1 0.75 0.3 0.25 0.3")
    masks = folder.dataset(masks=True)
    assert boxes(masks) == ([[10, 6, 30, 24]], ["dog"])
    assert masks.load(0).masks.render(30, 40).areas[0] == pytest.approx(20 * 18 / 2, abs=12)
    rotated = DotaDataset(find_sources(folder.path, "train"))
    assert rotated.load(1).boxes.tolist() == [[20, 6, 20, 6, pytest.approx(0, abs=1e-6)]]


def test_yolo_keypoints_are_no_polygon(folder):
    folder.yolo(a="0 0.5 0.5 0.25 0.2 0.1 0.1 0.9 0.9")
    folder.file("data.yaml", "train: train/images\nnames: [cat]\nkpt_shape: [2, 2]\n")
    assert boxes(folder.dataset()) == ([[15, 12, 25, 18]], ["cat"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 0.2", "4 fields"),
        ("0 0.5 0.5 0.2 0.2 0.9", "6 fields"),
        ("0 20 15 10 6", "written in pixels"),
        ("0 nan 0.5 0.2 0.2", "no share of the image's side"),
        ("0 0.5 0.5 -0.2 0.2", "negative side"),
        ("0.5 0.5 0.5 0.2 0.2", "no number of one"),
        ("cat 0.5 0.5 0.2 0.2", "could not convert"),
        ("0 0.5 0.5 0.2 0_1", "underscore"),
        ("2 0.5 0.5 0.2 0.2", "class number without a name"),
    ],
)
def test_yolo_faults(folder, line, reason):
    folder.yolo(a=f"0 0.5 0.5 0.25 0.2\n\n{line}\n")
    with pytest.raises(UserError, match=rf"data\.yaml: train/labels/a\.txt, line 3: .*{reason}.*--skip-bad"):
        folder.dataset()
    dataset = folder.dataset(skip_bad=True)
    assert boxes(dataset) == ([[15, 12, 25, 18]], ["cat"])
    assert list(dataset.skipped.values()) == [["train/labels/a.txt, line 3"]]


def test_yolo_files_that_do_not_fit(folder):
    folder.yolo(a="0 0.5 0.5 0.25 0.2")
    folder.file("train/labels/lost.txt", "0 0.5 0.5 0.25 0.2")
    folder.file("train/labels/classes.txt", "cat\ndog\n")
    assert folder.dataset().skipped == {"label file without an image": ["lost.txt"]}
    folder.file("train/labels/b.txt", b"\xff\xfe0")
    folder.image("train/images/b.png")
    with pytest.raises(UserError, match=r"b\.txt: this label file is not UTF-8 text"):
        folder.dataset()
    assert "unreadable label file" in folder.dataset(skip_bad=True).skipped
    (folder.path / "train/labels/b.txt").write_text("")
    folder.file("train/images/b.png", b"no image")
    with pytest.raises(UserError, match=r"b\.png: unreadable image"):
        folder.dataset()
    assert folder.dataset(skip_bad=True).skipped["unreadable image"] == ["b.png"]


def test_yolo_without_any_label_file(folder):
    folder.yolo(a=None, b=None)
    with pytest.raises(UserError, match=r"none of its 2 images has a label file, such as .*train/labels/a\.txt"):
        folder.dataset()


def test_yolo_names_of_label_files_may_occur_in_several_folders(folder):
    folder.yolo(a=None, **{"x/a": "0 0.5 0.5 0.25 0.2", "y/a": "1 0.5 0.5 0.25 0.2"})
    dataset = folder.dataset()
    assert dataset.files == ("a.png", "x/a.png", "y/a.png") and boxes(dataset, 2)[1] == ["dog"]


def test_yolo_class_names(folder):
    folder.yolo(a="1 0.5 0.5 0.25 0.2")
    for names, expected in (
        ("names:\n  1: b  # two\n  0: 'a'\n", ("a", "b")),
        ("names:\n- a\n- 'b c'\n", ("a", "b c")),
        ("nc: 2\n", ("0", "1")),
    ):
        folder.file("data.yaml", f"train: train/images\n{names}")
        assert folder.dataset().class_names == expected
    folder.file("data.yaml", "train: train/images\nnames: 5\n")
    with pytest.raises(UserError, match=r"data\.yaml: names is neither a list"):
        folder.dataset()
    (folder.path / "data.yaml").unlink()
    dataset = folder.dataset()
    assert dataset.class_names == ("0", "1") and "class without a name, called by its number" in dataset.noticed
    folder.file("classes.txt", "kitten\npuppy\n")
    assert folder.dataset().class_names == ("kitten", "puppy")


def test_places_of_a_data_yaml(folder):
    folder.yolo(a="0 0.5 0.5 0.25 0.2")
    for text in (
        "train: ../train/images\nval: ../valid/images",  # Roboflow's
        f"path: {folder.path}\ntrain: train/images",
        "path: /nowhere/on/this/machine\ntrain: train",
        "train: list.txt",
        "train:\n- train/images\n- list.txt",
    ):
        folder.file("list.txt", "./train/images/a.png\n")
        yaml = folder.file("data.yaml", f"names: [cat]\n{text}\n")
        for data in (folder.path, yaml):
            dataset = CocoDataset(find_sources(data, "train"))
            assert len(dataset) == (2 if "\n-" in text else 1) and boxes(dataset)[1] == ["cat"]
    folder.file("data.yaml", "names: [cat]\ntrain: gone\n")
    with pytest.raises(UserError, match=r"data\.yaml: train is gone, which is not there \(looked for .*gone"):
        folder.dataset()
    folder.file("data.yaml", "names: [cat]\ntrain: train/images\n")
    with pytest.raises(UserError, match="no val found"):
        find_sources(folder.path, "val")


def test_yolo_list_of_images(folder):
    folder.yolo(a="0 0.5 0.5 0.25 0.2", b="1 0.5 0.5 0.25 0.2", c="0 0.5 0.5 0.25 0.2")
    folder.file("data.yaml", "names: [cat, dog]\ntrain: list.txt\n")
    folder.file("list.txt", "train/images/c.png\n\ntrain/images/b.png\n")
    dataset = folder.dataset()
    assert [path.rsplit("/", 1)[-1] for path in dataset.files] == ["c.png", "b.png"]  # its order
    assert boxes(dataset, 1)[1] == ["dog"] and dataset.load(0).path == str(folder.path / "train/images/c.png")
    folder.file("list.txt", "train/images/c.png\ntrain/images/b.png\n./train/images/c.png\n")
    dataset = folder.dataset()
    assert len(dataset) == 2 and dataset.skipped == {"image listed twice": ["list.txt, line 3"]}
    folder.file("list.txt", f"train/images/{'a' * 300}.png\ntrain/images/c.png\n")
    with pytest.raises(UserError, match="missing image"):
        folder.dataset()
    folder.file("list.txt", "train/images/c.png\ntrain/images/gone.png\nREADME\n")
    with pytest.raises(UserError, match=r"list\.txt, line 3: malformed"):
        folder.dataset()
    skipped = folder.dataset(skip_bad=True).skipped
    assert sorted(map(len, skipped.values())) == [1, 1] and "missing image" in skipped


BOX = "<bndbox><xmin>10</xmin><ymin>5</ymin><xmax>30</xmax><ymax>15</ymax></bndbox>"


def voc_object(name="cat", box=BOX, more=""):
    return f"<object><name>{name}</name>{more}{box}</object>"


def test_voc_objects(folder):
    folder.voc(a=voc_object() + voc_object("dog", more="<truncated>1</truncated>"), b="")
    dataset = folder.dataset()
    assert dataset.class_names == ("cat", "dog") and dataset.files == ("a.png", "b.png")
    assert boxes(dataset) == ([[10, 5, 30, 15]] * 2, ["cat", "dog"]) and boxes(dataset, 1) == ([], [])
    assert dataset.skipped == dataset.noticed == {}


def test_voc_difficult(folder):
    folder.voc(a=voc_object() + voc_object(more="<difficult>1</difficult>"))
    assert len(folder.dataset(training=True).load(0).boxes) == 2
    dataset = folder.dataset()
    assert len(dataset.load(0).boxes) == 1
    assert [a["iscrowd"] for a in dataset.to_coco().dataset["annotations"]] == [0, 1]


def test_voc_of_the_challenge_counts_pixels_from_one(folder):
    folder.voc(a="<source><database>The VOC2007 Database</database></source>" + voc_object())
    assert boxes(folder.dataset())[0] == [[9, 4, 30, 15]]


def test_voc_shapes(folder):
    values = zip(("x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4"), (10, 5, 30, 5, 30, 15, 10, 15), strict=True)
    corners = f"<polygon>{''.join(f'<{tag}>{value}</{tag}>' for tag, value in values)}</polygon>"
    rotated = "<robndbox><cx>20</cx><cy>10</cy><w>20</w><h>10</h><angle>0</angle></robndbox>"
    folder.voc(a=voc_object(box=corners) + voc_object(box=rotated))
    assert boxes(folder.dataset())[0] == [[10, 5, 30, 15]] * 2
    assert np.allclose(folder.dataset(DotaDataset).load(0).boxes, [[20, 10, 20, 10, 0]] * 2, atol=1e-5)
    folder.voc(a=voc_object(box=BOX + corners))
    assert folder.dataset(masks=True).load(0).masks.render(30, 40).areas.tolist() == [200]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (voc_object(name=" "), "no name"),
        (voc_object(box=""), "no bndbox, polygon or robndbox"),
        (voc_object(box=BOX.replace("30", "wide")), "xmax of its bndbox is no number: 'wide'"),
        (voc_object(box=BOX.replace("30", "inf")), "xmax of its bndbox is not finite"),
        (voc_object(more="<difficult>very</difficult>"), "difficult is none of"),
    ],
)
def test_voc_faults(folder, text, reason):
    folder.voc(a=voc_object() + text)
    with pytest.raises(UserError, match=rf"train: a\.xml, object 2: malformed object .*{reason}.*--skip-bad"):
        folder.dataset()
    dataset = folder.dataset(skip_bad=True)
    assert len(dataset.load(0).boxes) == 1 and dataset.skipped == {"malformed object": ["a.xml, object 2"]}


ENTITIES = '<!DOCTYPE a [<!ENTITY x "{0}">]><annotation><object><name>&x;</name></object></annotation>'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ENTITIES.format("a" * 50), "has a DOCTYPE"),
        (ENTITIES.replace('"{0}"', 'SYSTEM "file:///etc/passwd"'), "has a DOCTYPE"),
        (('<?xml version="1.0" encoding="utf-16"?>' + ENTITIES.format("b")).encode("utf-16"), "has a DOCTYPE"),
        ("<annotation>&x;</annotation>", "not valid XML"),
        ("<annotation>", "not valid XML"),
        ("", "not valid XML"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "not valid XML"),
        ("<a>" * 2000 + "</a>" * 2000, "nested too deeply"),
        ("<html></html>", "root is <html>"),
    ],
)
def test_unsafe_and_broken_xml(folder, text, reason):
    folder.voc(a=voc_object(), b="")
    folder.file("train/b.xml", text)
    with pytest.raises(UserError, match=rf"b\.xml.*{reason}"):
        folder.dataset()
    dataset = folder.dataset(skip_bad=True)
    assert len(dataset) == 1 and dataset.skipped == {"unreadable label file": ["b.xml"]}


def test_voc_files_that_do_not_fit(folder):
    folder.voc(a=voc_object())
    folder.image("train/lonely.png")
    assert folder.dataset().skipped == {"image without a label file": ["lonely.png"]}
    folder.file("train/gone.xml", "<annotation><filename>/etc/passwd</filename></annotation>")
    with pytest.raises(UserError, match="missing image"):
        folder.dataset()
    assert folder.dataset(skip_bad=True).skipped["missing image"] == ["passwd"]
    folder.file("train/lonely.xml", "<annotation><filename>before it was renamed.png</filename></annotation>")
    assert folder.dataset(skip_bad=True).files == ("a.png", "lonely.png")


def test_lists_of_voc(folder):
    for name in ("a", "b", "c"):
        folder.image(f"JPEGImages/{name}.jpg")
        folder.file(f"Annotations/{name}.xml", f"<annotation>{voc_object()}</annotation>")
    folder.file("ImageSets/Main/train.txt", "c\na\n")
    folder.file("ImageSets/Main/val.txt", "b 1\n")
    dataset = folder.dataset()
    assert dataset.files == ("c.jpg", "a.jpg") and dataset.skipped == {}
    assert folder.dataset(split="val").files == ("b.jpg",)
    folder.file("ImageSets/Main/train.txt", "c\na\nc\n")
    assert folder.dataset().skipped == {"image listed twice": ["train.txt, line 3"]}
    folder.file("ImageSets/Main/train.txt", "c\ngone\n../a\n")
    with pytest.raises(UserError, match=r"train\.txt, line 2: missing label file"):
        folder.dataset()
    assert folder.dataset(skip_bad=True).skipped == {
        "missing label file": ["train.txt, line 2"],
        "malformed, it is no name of an image": ["train.txt, line 3"],
    }


def test_order_of_classes_by_a_file(folder):
    folder.voc(a=voc_object("cat") + voc_object("ant"))
    assert folder.dataset().class_names == ("ant", "cat")
    folder.file("classes.txt", "cat\nbee\nant\n")
    assert folder.dataset().class_names == ("cat", "bee", "ant")
    folder.file("classes.txt", "cat\n")
    assert folder.dataset().class_names == ("cat", "ant")
    folder.file("classes.txt", "cat\ncat\n")
    with pytest.raises(UserError, match=r"classes\.txt: lists the class 'cat' twice"):
        folder.dataset()


def test_several_sets_are_merged_by_class_name(tmp_path):
    first, second = Folder(tmp_path / "first"), Folder(tmp_path / "second")
    first.yolo(a="0 0.5 0.5 0.25 0.2\n1 0.5 0.5 0.25 0.2")
    second.voc(a=voc_object("dog") + voc_object("emu"), b=voc_object("cat"))
    sets = (first.path, second.path)
    dataset = CocoDataset(find_sources(sets, "train"), training=True)
    assert dataset.class_names == ("cat", "dog", "emu") and dataset.image_ids == (1, 2, 3)
    assert [boxes(dataset, i)[1] for i in range(3)] == [["cat", "dog"], ["dog", "emu"], ["cat"]]
    assert [dataset.load(i).path for i in range(3)] == [
        str(first.path / "train/images/a.png"), str(second.path / "train/a.png"), str(second.path / "train/b.png")
    ]  # fmt: skip
    (validation,) = find_sources(sets, "val")  # the second has none
    assert CocoDataset([validation], class_names=dataset.class_names).category_ids == (0, 1, -1)
    evaluated = CocoDataset(find_sources(sets, "train"))
    assert len(evaluated.to_coco().getAnnIds()) == 5
    second.file("train/b.xml", "<annotation>")
    with pytest.raises(UserError, match=r"second/train/b\.xml"):
        CocoDataset(find_sources(sets, "train"))
    with pytest.raises(UserError, match=r"second: no val found|second.*not divided"):
        find_sources(second.path, "val")


def test_named_one_by_one(folder):
    folder.yolo(a="0 0.5 0.5 0.25 0.2")
    source = source_of(folder.path / "train/labels", folder.path / "train/images")
    assert source.format == "yolo" and CocoDataset([source]).class_names == ("cat", "dog")
    folder.voc(b=voc_object())
    assert source_of(folder.path / "train", folder.path / "train").format == "voc"
    folder.file("text/a.txt", "imagesource:x\ngsd:1\n0 0 9 0 9 9 0 9 ship 0\n")
    assert source_of(folder.path / "text", folder.path).format == "dota"
    assert source_of(folder.path / "a.json", folder.path).format == "coco"


def test_turned_images_are_annotated_as_shown(folder):
    Image = pytest.importorskip("PIL.Image")
    exif = Image.Exif()
    exif[0x0112] = 6
    folder.yolo(a="0 0.5 0.5 0.2 0.25")
    (folder.path / "train/images/a.png").unlink()
    Image.new("RGB", (40, 30)).save(folder.path / "train/images/a.jpg", exif=exif)
    dataset = folder.dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dataset.load(0).image.shape == (40, 30, 3) and boxes(dataset)[0] == [[12, 15, 18, 25]]
