"""Patches of large images: what they show, which boxes they keep, and what a second run does."""

import json
import os

import cv2
import numpy as np
import pytest

from rtmdet_fast.cli import main
from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.data.formats.dota import read_labels
from rtmdet_fast.data.split import (
    SplitSettings,
    cut_patch,
    polygon_area,
    scaled_windows,
    split_images,
    visible_area,
)
from rtmdet_fast.errors import UserError
from rtmdet_fast.geometry.rotated import boxes_to_quads

SMALL = SplitSettings(size=64, overlap=16)


@pytest.fixture
def source(tmp_path):
    """Two images of smooth noise, 150 x 100 and 50 x 40, with boxes."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "labelTxt").mkdir()
    for name, (w, h) in {"P1.png": (150, 100), "P2.jpg": (50, 40)}.items():
        noise = cv2.resize(rng.integers(0, 255, (h // 8, w // 8, 3), np.uint8), (w, h), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(tmp_path / "images" / name), noise)
    lines = ["imagesource:GoogleEarth", "gsd:0.1", "10 10 30 10 30 20 10 20 ship 0", "44 30 64 30 64 50 44 50 plane 1"]
    lines += ["60 2 90 2 90 6 60 6 ship 0", "5 5 5 5 5 5 5 5 ship 0"]
    (tmp_path / "labelTxt/P1.txt").write_text("\n".join(lines))
    (tmp_path / "labelTxt/P2.txt").write_text("")
    return tmp_path


def split(source, out="out", settings=SMALL, labels=True, **options):
    label_dir = source / "labelTxt" if labels else None
    return split_images(source / "images", label_dir, source / out, settings, progress=False, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_visible_area_against_shapely():
    shapely = pytest.importorskip("shapely")
    rng = np.random.default_rng(1)
    boxes = np.column_stack([rng.uniform(-20, 120, (400, 2)), rng.uniform(1, 90, (400, 2)), rng.uniform(-2, 2, 400)])
    quads = boxes_to_quads(boxes) + rng.normal(0, 3, (400, 8)) * (rng.random((400, 1)) < 0.5)
    quads[:100] = np.rint(quads[:100] / 10) * 10  # edges and corners on the window's
    quads = quads[[shapely.Polygon(q.reshape(4, 2)).is_valid for q in quads]]
    assert len(quads) > 300
    quads[::2] = quads[::2].reshape(-1, 4, 2)[:, ::-1].reshape(-1, 8)  # the other way round
    polygons = [shapely.Polygon(q.reshape(4, 2)) for q in quads]
    window = shapely.box(10, 30, 74, 94)
    expected = [p.intersection(window).area for p in polygons]
    assert np.allclose(visible_area(quads, 10, 30, 64), expected, atol=1e-9)
    assert np.allclose(polygon_area(quads), [p.area for p in polygons])
    assert (np.array(expected) > 0).sum() > 100
    far = quads + 15_000
    assert np.allclose(visible_area(far, 15_010, 15_030, 64), expected, atol=1e-6)
    concave = np.array([[0.0, 0, 40, 20, 0, 40, 10, 20]])  # an arrow, whose hull is larger
    assert visible_area(concave, 0, 0, 20) == pytest.approx(visible_area(concave, 0, 0, 64) / 2 - 100)


def test_windows_over_scales():
    one = SplitSettings(size=1024, overlap=256)
    assert scaled_windows(1000, 500, one) == [(1, 0, 0)]
    assert scaled_windows(1025, 1024, one) == [(1, 0, 0), (1, 1, 0)]
    several = SplitSettings(size=1024, overlap=500, rates=(0.5, 1.0, 1.5))
    found = scaled_windows(1600, 1600, several)
    # at 0.5 the image fills 0.61 of a patch, at 0.45 it would not
    assert [p for p in found if p[0] == 0.5] == [(0.5, 0, 0)]
    assert sorted({x for r, x, _ in found if r == 1}) == [0, 524, 576]
    assert sorted({x for r, x, _ in found if r == 1.5}) == [0, 524, 1048, 1376]
    assert not any(r == 0.5 for r, *_ in scaled_windows(1500, 1500, several))
    assert scaled_windows(200, 200, several) == [(1.5, 0, 0)]  # where it is largest


def test_a_label_file_without_an_image(source):
    (source / "labelTxt/P9.txt").write_text("0 0 9 0 9 9 0 9 ship 0\n")
    with pytest.raises(UserError, match=r"P9\.txt: there is no image of this name in .*images"):
        split(source)
    assert split(source, skip_bad=True).skipped["label file without an image"] == ["P9.txt"]


def test_patches_and_boxes(source):
    summary = split(source)
    assert (summary.images, summary.patches, summary.written, summary.no_area) == (2, 7, 7, 1)
    assert names(source / "out/images") == sorted(
        [f"P1__1__{x}___{y}.png" for x in (0, 48, 86) for y in (0, 36)] + ["P2__1__0___0.png"]
    )
    image = cv2.imread(str(source / "images/P1.png"))
    for path in (source / "out/images").glob("P1*"):
        x, y = map(int, path.stem.split("__1__")[1].split("___"))
        assert (cv2.imread(str(path)) == image[y : y + 64, x : x + 64]).all()
    padded = cv2.imread(str(source / "out/images/P2__1__0___0.png"))
    assert padded.shape == (64, 64, 3) and (padded[40:] == 114).all() and (padded[:, 50:] == 114).all()
    assert (source / "out/labelTxt/P2__1__0___0.txt").read_text() == ""

    def labels(x, y):
        found = read_labels(source / f"out/labelTxt/P1__1__{x}___{y}.txt")
        return [(label.name, label.difficult, label.quad) for label in found]

    ship, plane = [10, 10, 30, 10, 30, 20, 10, 20], [44, 30, 64, 30, 64, 50, 44, 50]
    # the second ship shows 4 of its 30 pixels in the first patch, all in the second, 4 in the third
    assert labels(0, 0) == [("ship", 0, ship), ("plane", 1, plane), ("ship", 2, [60, 2, 90, 2, 90, 6, 60, 6])]
    moved = (np.array(plane) - [48, 0] * 4).tolist()
    assert labels(48, 0) == [("plane", 1, moved), ("ship", 0, [12, 2, 42, 2, 42, 6, 12, 6])]
    assert labels(86, 0) == [("ship", 2, [-26, 2, 4, 2, 4, 6, -26, 6])]
    assert labels(0, 36) == [("plane", 1, (np.array(plane) - [0, 36] * 4).tolist())]  # 0.7 of it: just enough
    assert labels(86, 36) == []
    assert summary.boxes == 3 + 2 + 1 + 1 + 1 and summary.cut == 3  # the last is the plane in (48, 36)

    dataset = DotaDataset(source / "out/labelTxt", source / "out/images")
    assert len(dataset) == 7 and dataset.skipped == {}


@pytest.mark.parametrize("rate", [0.5, 0.7, 1.5, 2])
def test_scaled_patches_show_the_scaled_image(source, rate):
    image = cv2.imread(str(source / "images/P1.png"))
    size = (round(150 * rate), round(100 * rate))
    whole = cv2.resize(image, size, interpolation=cv2.INTER_AREA if rate < 1 else cv2.INTER_LINEAR)
    x, y = max(size[0] - 64, 0), max(size[1] - 64, 0)
    for place in ((0, 0), (x // 2, y // 2), (x, y)):
        patch = cut_patch(image, rate, *place, 64)
        expected = whole[place[1] : place[1] + 64, place[0] : place[0] + 64]
        difference = np.abs(patch[: expected.shape[0], : expected.shape[1]].astype(int) - expected)
        assert difference.mean() < 2
        shifted = np.abs(patch[1 : expected.shape[0], : expected.shape[1]].astype(int) - expected[:-1])
        assert shifted.mean() > 2 * difference.mean()
        assert (patch[expected.shape[0] :] == 114).all() and (patch[:, expected.shape[1] :] == 114).all()


def test_scaled_labels(source):
    split(source, settings=SplitSettings(size=64, overlap=16, rates=(0.5, 2)))
    (ship, *_) = read_labels(source / "out/labelTxt/P1__2__0___0.txt")
    assert ship.quad == [20, 20, 60, 20, 60, 40, 20, 40]
    (ship, *_) = read_labels(source / "out/labelTxt/P1__0.5__0___0.txt")
    assert ship.quad == [5, 5, 15, 5, 15, 10, 5, 10]


def test_crossing_corners_are_put_right(source):
    (source / "labelTxt/P1.txt").write_text("10 10 30 20 30 10 10 20 ship 0")
    split(source)
    dataset = DotaDataset(source / "out/labelTxt", source / "out/images")
    assert np.allclose(dataset.load(0).boxes, [[20, 15, 20, 10, 0]], atol=0.02)


def test_an_interrupted_run_goes_on(source):
    split(source)
    for path in (source / "out/images").iterdir():
        os.utime(path, (0, 0))  # two writes within a tick of the file system's clock bear one time
    (source / "out/labelTxt/P1__1__48___0.txt").unlink()
    (source / "out/images/P2__1__0___0.png").unlink()
    summary = split(source)
    assert (summary.patches, summary.written) == (7, 2)
    changed = [p.name for p in (source / "out/images").iterdir() if p.stat().st_mtime]
    assert sorted(changed) == ["P1__1__48___0.png", "P2__1__0___0.png"]
    assert len(names(source / "out/labelTxt")) == 7


def test_nothing_else_is_overwritten(source, tmp_path):
    with pytest.raises(UserError, match="holds the images to split"):
        split(source, out="")
    split(source)
    other = SplitSettings(size=64, overlap=32)
    with pytest.raises(UserError, match=r"other images or settings.*--overwrite"):
        split(source, settings=other)
    summary = split(source, settings=other, overwrite=True)
    assert len(names(source / "out/images")) == summary.patches != 7
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not empty"):
            split(source, out="mine", overwrite=overwrite)
    assert names(tmp_path / "mine") == ["notes.txt"]


def test_overwriting_takes_patches_away_and_nothing_else(source):
    split(source)
    (source / "out/images/holiday.png").write_bytes(b"mine")
    (source / "out/labelTxt/notes.txt").write_text("mine")
    summary = split(source, settings=SplitSettings(size=96, overlap=0), overwrite=True)
    assert len(names(source / "out/images")) == summary.patches + 1 and "holiday.png" in names(source / "out/images")
    assert len(names(source / "out/labelTxt")) == summary.patches + 1


def test_larger_images_than_elsewhere_are_read(source, monkeypatch):
    monkeypatch.setattr("rtmdet_fast.data.split.OPENCV_MAX_PIXELS", 6000)
    with pytest.raises(UserError, match="limit of 6,000"):
        split(source)
    monkeypatch.setenv("RTMDET_FAST_MAX_PIXELS", "100000")
    assert split(source).patches == 7


def test_bad_input(source):
    (source / "labelTxt/P2.txt").write_text("\n1 2 3")
    with pytest.raises(UserError, match=r"labelTxt/P2\.txt, line 2: malformed line .*--skip-bad"):
        split(source)
    (source / "images/P1.png").write_bytes(b"nothing")
    cv2.imwrite(str(source / "images/P3.png"), np.zeros((9, 9, 3), np.uint8))
    summary = split(source, out="out1", skip_bad=True)
    assert summary.skipped == {
        "image without a label file": ["P3.png"],
        "unreadable image or label file": ["P1.png"],
        "malformed line": ["P2.txt, line 2"],
    }
    assert names(source / "out1/images") == ["P2__1__0___0.png"]
    with pytest.raises(UserError, match=r"P1\.png"):
        split(source, out="out2", labels=False)
    with pytest.raises(UserError, match="no image to split"):
        split_images(source / "out/labelTxt", None, source / "out3", SMALL, progress=False)


@pytest.mark.parametrize(
    "options", [{"overlap": 1024}, {"size": 8, "overlap": 0}, {"rates": ()}, {"rates": (1, 1)}, {"rates": (0.0,)}]
)
def test_settings_that_cannot_be(options):
    with pytest.raises(UserError):
        SplitSettings(**options)


def test_command_with_two_processes(source, capsys):
    (source / "DOTA/train").mkdir(parents=True)
    for name in ("images", "labelTxt"):
        (source / name).rename(source / "DOTA/train" / name)
    (source / "DOTA/test/images").mkdir(parents=True)
    cv2.imwrite(str(source / "DOTA/test/images/Q.bmp"), np.zeros((70, 64, 3), np.uint8))
    arguments = ["split", "--data", source / "DOTA", "--out", source / "cut", "--size", 64, "--overlap", 16]
    arguments += ["--rates", 1, 0.5, "--workers", 2, "--json", source / "s.json"]
    assert main([str(a) for a in arguments]) == 0
    told = json.loads((source / "s.json").read_text())
    assert told["train"]["images"] == 2 and told["train"]["patches"] == len(names(source / "cut/train/images"))
    assert names(source / "cut/test") == ["images", "split.json"]
    assert names(source / "cut/test/images") == ["Q__1__0___0.png", "Q__1__0___6.png"]
    assert "patches of 2 images" in capsys.readouterr().out
    assert main(["split", "--out", str(source / "cut")]) == 2
    assert "--data" in capsys.readouterr().err
