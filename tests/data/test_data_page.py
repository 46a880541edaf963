"""data.html: stands alone, shows what was found, worst first, whatever the names and images are."""

import json

import cv2
import numpy as np
import pytest
from browser import WIDTHS, beyond, needs_browser
from html_page import Page
from made_data import Maker, noise

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.data_page import write_data_page
from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.data.inspection import inspect
from rtmdet_fast.geometry.rotated import boxes_to_quads

NASTY = "<script>alert('x')</script> & $x$"


def pictures_of(page):
    return [address for address in page.addresses if address.startswith("data:image/jpeg;base64,")]


def page_of(tmp_path, inspection, **options):
    path = write_data_page(tmp_path / "pages/data.html", inspection, title=NASTY, **options)
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open and not page.tags & {"script", "link", "iframe"}
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    return page, " ".join(" ".join(page.words).split())


def test_the_page_shows_each_split_and_the_worst_first(tmp_path):
    made = Maker(tmp_path)
    broken = cv2.imencode(".png", noise(1))[1].tobytes()[:900]
    classes = ("car", NASTY)
    made.write(
        "train",
        {
            "a.png": (noise(0), [(4, 4, 20, 20, "car"), (4, 4, 20, 20, NASTY), (40, 4, 4, 4, "car")]),
            "broken.png": (broken, [(4, 4, 20, 20, "car")]),
            "beyond.png": (noise(2, 200, 4000), [(190, 3900, 30, 80, "car")]),
        },
        classes,
    )
    made.write("val", {"copy.png": (noise(0), [(4, 4, 20, 20, "car")]), "e.png": (noise(5), [])}, classes)
    page, words = page_of(tmp_path, made.inspect("train", "val"))
    # the copies 4 (twice: as leak and as copies that differ), one each of two classes, beyond, small and empty; samples
    assert len(pictures_of(page)) == 4 + 1 + 1 + 2 + 1 + (2 + 2)
    for expected in (
        "5 images: 3 train, 2 val",
        "2 errors",
        "error 1 image of train cannot be read broken.png",
        "copy.png = a.png",
        "Images of train",
        "Images of val",
        "Shorter side of the objects in pixels at 64 px",
        NASTY,
    ):
        assert expected in words, expected
    order = [words.index(text) for text in ("cannot be read", "in train too", "reaching beyond", "without objects")]
    assert order == sorted(order)
    none, _ = page_of(tmp_path, made.inspect("train", "val"), samples=0)
    assert len(pictures_of(page)) - len(pictures_of(none)) == 4


@needs_browser
def test_everything_fits_phones_and_desktops(tmp_path):
    made = Maker(tmp_path)
    boxes = {f"{'a long name' * 20} {i}.png": (noise(i), [(4, 4, 20, 20, f"{NASTY * 3} {i % 40}")]) for i in range(60)}
    made.write("train", boxes, [f"{NASTY * 3} {i}" for i in range(40)])
    page_of(tmp_path, made.inspect("train"))
    assert beyond(tmp_path / "pages/data.html") == {width: [] for width in WIDTHS}


def test_a_sound_data_set_has_nothing_to_tell(tmp_path):
    made = Maker(tmp_path)
    for split in ("train", "val"):
        boxes = [(2 + 6 * i, 4, 5, 10, name) for i, name in enumerate(("car", "bus") * 5)]
        made.write(split, {f"{i}.png": (noise(i + 50 * (split == "val")), boxes) for i in range(3)})
    _, words = page_of(tmp_path, made.inspect("train", "val", image_size=128))
    assert "Nothing that a training would suffer from was found." in words and "Worst first" not in words


def test_masks_and_rotated_boxes_are_drawn(tmp_path):
    image = np.full((60, 80, 3), 255, np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 60}],
        "categories": [{"id": 1, "name": "car"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [20, 10, 40, 40],
                "segmentation": [[20, 10, 60, 10, 40, 50]],
            }
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    masked = CocoDataset(tmp_path / "a.json", tmp_path, masks=True, training=True, keep_empty=True, skip_bad=True)
    (tmp_path / "labels").mkdir()
    quad = boxes_to_quads(np.array([[40.0, 30, 50, 12, 0.6]]))[0]
    (tmp_path / "labels/a.txt").write_text(" ".join(map(str, quad.tolist())) + " car 0\n")
    rotated = DotaDataset(tmp_path / "labels", tmp_path, skip_bad=True, training=True)

    def drawn(dataset):
        page, _ = page_of(tmp_path, inspect({"all": dataset}, 80, nms_iou=0.5))
        (address,) = pictures_of(page)
        return decoded(address)

    inside = drawn(masked)[int(25 * 380 / 80), int(40 * 380 / 80)]
    assert inside.min() < 200  # filled
    picture = drawn(rotated).astype(int)
    scale = 380 / 80
    colored = np.argwhere(np.ptp(picture, 2) > 60)[:, ::-1] / scale
    corners = quad.reshape(4, 2)
    for corner in corners:  # the outline is at its corners, and the middle is free
        assert np.hypot(*(colored - corner).T).min() < 1.5
    assert np.hypot(*(colored - [40, 30]).T).min() > 2


def decoded(address):
    import base64

    return cv2.imdecode(np.frombuffer(base64.b64decode(address.partition(",")[2]), np.uint8), cv2.IMREAD_COLOR)


@pytest.mark.parametrize("images", [{}, {"broken.png": (b"no image", [])}])
def test_a_data_set_of_nothing_has_a_page(tmp_path, images):
    made = Maker(tmp_path)
    made.write("val", images)
    _, words = page_of(tmp_path, made.inspect("val"))
    assert "0 objects" in words


def test_an_image_gone_since_is_left_out(tmp_path):
    made = Maker(tmp_path)
    made.write("train", {f"{i}.png": (noise(i), [(4, 4, 4, 20, "car")]) for i in range(3)})
    inspection = made.inspect("train")
    (tmp_path / "train/1.png").unlink()
    page, _ = page_of(tmp_path, inspection)
    assert len(pictures_of(page)) == 4  # small objects and samples, two each
