import numpy as np
import pytest
import torch

from rtmdet_fast.errors import UserError
from rtmdet_fast.inference import drawing
from rtmdet_fast.inference.drawing import class_color, draw_detections
from rtmdet_fast.inference.masks import PredictedMasks
from rtmdet_fast.inference.results import Results

NAMES = ("person", "car", "bicycle")


def results(image, boxes, scores, labels, **kwargs):
    return Results(
        image, torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels).long(), NAMES, **kwargs
    )


@pytest.fixture
def street():
    image = np.full((240, 320, 3), 90, np.uint8)
    boxes = [[20.0, 30.0, 120.0, 200.0], [150.5, 60.0, 300.25, 180.0]]
    return results(image, boxes, [0.9, 0.5], [0, 2], path="photos/street.jpg")


def test_says_what_it_holds(street):
    assert len(street) == 2
    assert street.shape == (240, 320)
    assert street.names == NAMES
    assert street.label_names == ["person", "bicycle"]
    assert repr(street) == "Results(street.jpg: 1 person, 1 bicycle)"
    assert repr(results(None, [], [], [], shape=(480, 640))) == "Results(640x480 image: nothing found)"


def test_an_index_a_slice_a_list_and_a_mask_give_results_of_the_same_image(street):
    first, last = street[0], street[-1]
    assert (len(first), len(last)) == (1, 1)
    assert first.boxes.tolist() == [[20, 30, 120, 200]] and first.label_names == ["person"]
    assert last.labels.tolist() == [2] and last.scores.tolist() == [0.5]
    assert first.image is street.image and first.path == street.path and first.names == NAMES
    assert [one.label_names for one in street] == [["person"], ["bicycle"]]
    assert street[np.int64(1)].label_names == street[torch.tensor(1)].label_names == ["bicycle"]
    assert street[::-1].label_names == street[[1, 0]].label_names == ["bicycle", "person"]
    assert street[1:].label_names == street[street.scores < 0.6].label_names == ["bicycle"]
    assert street[np.array([False, True])].label_names == ["bicycle"]
    for none in (street[2:], street[[]], street[street.scores > 1]):
        assert len(none) == 0 and none.boxes.shape == (0, 4) and none.shape == (240, 320)
    for wrong in (2, -3, [2], torch.tensor([True]), 0.5):
        with pytest.raises((IndexError, TypeError)):
            street[wrong]


def test_masks_follow_the_index():
    found = masked(np.full((240, 320, 3), 90, np.uint8))
    ring = found[found.labels == 2]
    assert torch.equal(ring.masks, found.masks[1:2]) and ring.rles() == found.rles()[1:2]
    assert torch.equal(found[1].masks, ring.masks)


def test_to_coco_gives_plain_numbers(street):
    import json

    first, second = street.to_coco(image_id=7, category_ids=(1, 3, 90))
    assert first == {"image_id": 7, "category_id": 1, "bbox": [20, 30, 100, 170], "score": pytest.approx(0.9)}
    assert second["category_id"] == 90
    assert second["bbox"] == [150.5, 60, 149.75, 120]
    json.dumps([first, second])
    assert street.to_coco()[1]["category_id"] == 2


def test_plot_draws_in_class_colours_on_a_copy(street):
    before = street.image.copy()
    drawn = street.plot(line_width=3)
    assert np.array_equal(street.image, before)
    assert drawn.shape == before.shape and drawn.dtype == np.uint8
    assert tuple(drawn[120, 20]) == class_color(0)
    assert tuple(drawn[120, 300]) == class_color(2)
    assert np.array_equal(drawn[120, 70], before[120, 70])  # the inside stays


def test_save_makes_the_folder_and_refuses_unknown_suffixes(street, tmp_path):
    import cv2

    path = street.save(tmp_path / "a" / "b" / "ü street.png")
    data = np.frombuffer(path.read_bytes(), np.uint8)
    assert np.array_equal(cv2.imdecode(data, cv2.IMREAD_COLOR), street.plot())
    for name in ("street.xyz", "street", "street.pgm"):
        with pytest.raises(UserError, match=name):
            street.save(tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        street.save(tmp_path / "file" / "street.png")


def test_plot_without_image_is_an_error():
    with pytest.raises(UserError, match="no image"):
        results(None, [[0.0, 0.0, 1.0, 1.0]], [0.5], [0], shape=(10, 10)).plot()


@pytest.mark.parametrize("size", [(3, 5), (40, 33), (240, 320), (1500, 2000)])
@pytest.mark.parametrize("scores", [True, False])
def test_draws_any_box_on_any_size(size, scores):
    h, w = size
    boxes = torch.tensor(
        [[0, 0, w, h], [-1e5, -50, 1e5, h + 50], [w - 1, h - 1, w, h], [2, 2, 2, 2], [w + 9, 0, w + 20, 5]]
    ).to(torch.bfloat16)
    values = torch.linspace(0, 1, 5) if scores else None
    drawn = draw_detections(np.zeros((h, w, 3), np.uint8), boxes, torch.zeros(5).long(), values, ["ein Wörterbuch"])
    assert drawn.shape == (h, w, 3)
    assert drawn.any()


def test_labels_of_a_crowd_do_not_cover_each_other():
    """Of 150 boxes at one place the best score keeps its label; far ones keep theirs."""
    boxes = np.tile(np.array([[100, 100, 300, 300]], np.float32), (151, 1))
    boxes[150] = [400, 400, 460, 460]
    labels = np.zeros(151, int)
    labels[150] = 1
    scores = np.linspace(0.3, 0.9, 151)
    blank = np.zeros((480, 640, 3), np.uint8)
    crowd = draw_detections(blank, boxes, labels, scores, NAMES)
    pair = draw_detections(blank, boxes[149:], labels[149:], scores[149:], NAMES)
    filled = [(image == class_color(1)).all(-1).sum() for image in (crowd, pair)]
    assert 0.3 * filled[1] < filled[0] < filled[1]  # smaller, but there
    # The outline, and no more labels than there are places around a box.
    assert (crowd == class_color(0)).all(-1).sum() < 4 * 200 * 2 + 8 * 80 * 16


def test_rotated_boxes_are_drawn_along_their_edges():
    black = np.zeros((200, 300, 3), np.uint8)
    box = np.array([[150.0, 100, 120, 30, np.pi / 6]], np.float32)
    picture = draw_detections(black, box, np.array([0]), None, ("",), line_width=1)
    along, across = np.array([np.cos(np.pi / 6), 0.5]), np.array([-0.5, np.cos(np.pi / 6)])
    for u, v in ((60, 0), (-60, 0), (0, 15), (0, -15), (40, 15), (-40, -15)):
        x, y = np.rint((150, 100) + u * along + v * across).astype(int)
        assert picture[y - 1 : y + 2, x - 1 : x + 2].max() > 100
    assert picture[100, 150].max() == 0 and not black.any()
    wild = np.array([[1e9, -1e9, 1e12, 5, 1], [5, 5, 0, 0, 0]], np.float32)
    assert draw_detections(black, wild, np.array([0, 0]), None, ("a",)).shape == black.shape
    assert not draw_detections(black, np.zeros((0, 5)), np.zeros(0), None, ("a",)).any()


@pytest.mark.parametrize("name", ["a\nb", "\ud800", "a\0b", "\x1b[31m", "", "x" * 10**5, "\u2028", "a\tb"])
def test_any_name_is_drawn(street, name):
    """Results are made with any names; those that files hold are cleaned where they are read."""
    street.names = (name, "car", name)
    drawn = street.plot()
    assert (drawn != street.image).any()


def test_a_name_whose_letters_the_font_lacks_is_drawn_as_its_label(street, monkeypatch):
    texts = []
    text = drawing._text
    monkeypatch.setattr(drawing, "_text", lambda words, size: texts.append(words) or text(words, size))
    street.names = ("円", "car", "हिन्दी 🦘")
    drawing.drawable_name.cache_clear()  # it is told once
    told = "on pictures #{} stands for the class "
    with pytest.warns(UserWarning, match=told.format(0)), pytest.warns(UserWarning, match=told.format(2)):
        street.plot()
    assert texts == ["#0 0.90", "#2 0.50"]
    texts.clear()
    street.names = ("Ελληνικά", "car", "é\nà")
    street.plot()
    assert texts == ["Ελληνικά 0.90", "é à 0.50"]


@pytest.mark.parametrize("columns", [4, 5])
def test_boxes_that_are_not_finite_are_not_drawn(columns):
    image = np.full((60, 80, 3), 90, np.uint8)
    boxes = torch.tensor([[10.0, 10, 40, 40, 0.1]] * 4)[:, :columns]
    boxes[0, 0], boxes[2, 2], boxes[3] = torch.nan, torch.inf, -torch.inf
    found = Results(image, boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 1, 2, 0]), NAMES)
    assert np.array_equal(found.plot(), found[1].plot()) and (found.plot() != image).any()
    masks = PredictedMasks(
        torch.stack([torch.full((8, 10), float(i == 1) - 0.5) for i in range(4)]), (1.0, 1.0), (60, 80)
    )
    found.predicted_masks = masks
    assert np.array_equal(found.plot(), found[1].plot())


def test_class_colours_differ():
    colors = np.array([class_color(i) for i in range(20)], int)
    distance = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(20, dtype=int)
    assert distance.min() > 60
    assert class_color(500) == class_color(500)


def test_plot_on_a_photograph(shared):
    import json

    import cv2

    data = json.loads((shared / "data/coco_tiny/instances_val.json").read_text())
    names = tuple(c["name"] for c in data["categories"])
    index = {c["id"]: i for i, c in enumerate(data["categories"])}
    image = data["images"][0]
    rows = [a for a in data["annotations"] if a["image_id"] == image["id"]]
    boxes = torch.tensor([a["bbox"] for a in rows]).float().reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    photo = cv2.imread(str(shared / "data/coco_tiny/val" / image["file_name"]))
    labels = torch.tensor([index[a["category_id"]] for a in rows]).long()
    result = Results(photo, boxes, torch.full((len(rows),), 0.8), labels, names)
    changed = (result.plot() != photo).any(-1)
    assert 0 < changed.mean() < 0.6


def masked(image, kept=3):
    """A disc, a ring and nothing, in an image twice as wide as the network's pixels."""
    y, x = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
    distance = ((x - 12) ** 2 + (y - 14) ** 2).sqrt()
    logits = torch.stack([8 - distance, 3 - ((x - 28) ** 2 + (y - 14) ** 2).sqrt().sub(7).abs(), -torch.ones(30, 40)])
    masks = PredictedMasks(logits[:kept], (1.0, 1.0), (240, 320))
    boxes = [[32.0, 48, 164, 180], [145, 33, 305, 193], [10, 10, 20, 20]][:kept]
    return results(image, boxes, [0.9, 0.5, 0.4][:kept], [0, 2, 1][:kept], predicted_masks=masks)


def test_masks_on_request():
    from pycocotools import mask

    found = masked(np.full((240, 320, 3), 90, np.uint8))
    assert found.masks.shape == (3, 240, 320) and found.masks.dtype == torch.bool
    assert found.masks.sum((1, 2)).tolist() == [mask.area(rle) for rle in found.rles()]
    assert found.masks[0, 116, 100] and not found.masks[0, 30, 30] and not found.masks[2].any()
    assert [len(polygons) > 0 for polygons in found.polygons()] == [True, True, False]
    entries = found.to_coco(3)
    assert [entry["segmentation"] for entry in entries] == found.rles() and "bbox" in entries[0]
    with pytest.raises(UserError, match="no masks"):
        _ = results(None, [], [], [], shape=(9, 9)).masks


def test_plot_lets_the_image_shine_through_masks():
    image = np.random.default_rng(0).integers(60, 120, (240, 320, 3), np.uint8)
    found = masked(image.copy())
    drawn = found.plot()
    assert np.array_equal(found.image, image)
    inside, color = drawn[116, 100].astype(int), np.array(class_color(0))
    expected = 0.55 * image[116, 100] + 0.45 * color
    assert np.abs(inside - expected).max() <= 1
    assert np.array_equal(drawn[225, 10], image[225, 10])
    assert np.array_equal(drawn[116, 230], image[116, 230])  # the hole of the ring
    assert np.array_equal(masked(image, kept=0).plot(), image)


def test_rotated_boxes_tell_their_corners():
    import json

    boxes = torch.tensor([[50.0, 40.0, 20.0, 10.0, 0.0], [100.0, 60.0, 30.0, 8.0, np.pi / 2 - 0.3]])
    found = Results(None, boxes, torch.tensor([0.9, 0.8]), torch.tensor([1, 0]), NAMES, shape=(100, 200))
    corners = found.corners()
    assert corners.shape == (2, 4, 2)
    assert corners[0] == pytest.approx(np.array([[40, 35], [60, 35], [60, 45], [40, 45]]))
    x, y = np.moveaxis(corners, -1, 0)
    area = ((x * np.roll(y, -1, 1)).sum(1) - (y * np.roll(x, -1, 1)).sum(1)) / 2
    assert area == pytest.approx([200, 240])  # positive: clockwise on a screen
    first, second = found.to_coco(image_id=3, category_ids=(10, 20, 30))
    assert first == {
        "image_id": 3,
        "category_id": 20,
        "bbox": pytest.approx([40, 35, 20, 10]),
        "score": pytest.approx(0.9),
        "rbox": [50, 40, 20, 10, 0],
        "segmentation": [pytest.approx([40, 35, 60, 35, 60, 45, 40, 45])],
        "area": 200,
    }
    low, high = corners[1].min(0), corners[1].max(0)
    assert second["bbox"] == pytest.approx([*low, *(high - low)])
    json.dumps([first, second])
    empty = Results(None, torch.zeros(0, 5), torch.zeros(0), torch.zeros(0).long(), NAMES, shape=(10, 10))
    assert empty.corners().shape == (0, 4, 2) and empty.to_coco() == []


def test_upright_boxes_have_corners_too(street):
    assert street.corners()[0].tolist() == [[20, 30], [120, 30], [120, 200], [20, 200]]


def test_labels_leave_most_of_a_small_picture_free(monkeypatch):
    covered = []
    monkeypatch.setattr(drawing, "_put_label", lambda canvas, glyphs, *place: covered.append(glyphs.size))
    image = np.zeros((128, 128, 3), np.uint8)
    corners = np.random.default_rng(0).uniform(0, 100, (40, 2))
    boxes = np.concatenate([corners, corners + 20], 1)
    drawing.draw_detections(image, boxes, np.zeros(40, int), np.linspace(0.9, 0.3, 40), ["rectangle"])
    assert len(covered) > 1 and 0.15 < sum(covered) / 128**2 <= 0.25
    covered.clear()
    drawing.draw_detections(image[:30, :40], np.array([[2, 18, 30, 28]]), np.zeros(1, int), np.full(1, 0.5), ["a"])
    assert len(covered) == 1  # the best has one, however small the picture


def rotated(image=None, **kwargs):
    boxes = torch.tensor([[50.0, 40.0, 20.0, 10.0, 0.0], [100.0, 60.0, 30.0, 8.0, np.pi / 2 - 0.3]])
    kwargs = {"shape": (100, 200), **kwargs}
    return Results(image, boxes, torch.tensor([0.9, 0.8]), torch.tensor([1, 0]), NAMES, **kwargs)


def with_ids(found, ids):
    found.track_ids = torch.tensor(ids)
    return found


def test_only_some_classes(street):
    assert street.only("bicycle").label_names == street.only("BICYCLE", "car").label_names == ["bicycle"]
    assert len(street.only("car")) == 0 and street.only("person", "bicycle").labels.tolist() == [0, 2]
    for wanted, told in (
        (["persn"], "class 'persn' is none of the model's: the nearest is 'person'"),
        (["person", "zzz"], "class 'zzz' is none of the model's: there are person, car, bicycle"),
    ):
        with pytest.raises(UserError, match=f"^{told}$"):
            street.only(*wanted)


def test_iterating_gives_each_detection(street):
    assert [len(one) for one in street] == [1, 1] and [one.label_names for one in street] == [["person"], ["bicycle"]]
    assert list(street[:0]) == []


def test_dicts_and_json_tell_all_in_plain_numbers(street):
    import json

    told = street.to_dict()
    assert (told["path"], told["width"], told["height"]) == ("photos/street.jpg", 320, 240)
    assert told["detections"][1] == {"name": "bicycle", "label": 2, "score": 0.5, "box": [150.5, 60, 300.25, 180]}
    found = with_ids(masked(np.zeros((240, 320, 3), np.uint8)), [7, -1, 3])
    assert json.loads(found.to_json()) == found.to_dict()
    assert [row["mask"] for row in found.to_dict()["detections"]] == found.rles()
    assert [row["track_id"] for row in found.to_dict()["detections"]] == [7, None, 3]
    (first, second) = rotated().to_dict()["detections"]
    assert first["rbox"] == [50, 40, 20, 10, 0] and first["box"] == [40, 35, 60, 45]
    assert np.array(second["corners"]) == pytest.approx(rotated().corners()[1])
    assert (
        results(None, [], [], [], shape=(4, 5)).to_json() == '{"path": null, "width": 5, "height": 4, "detections": []}'
    )


def test_track_ids_follow_the_index_and_are_written_and_drawn(monkeypatch):
    texts = []
    text = drawing._text
    monkeypatch.setattr(drawing, "_text", lambda words, size: texts.append(words) or text(words, size))
    found = with_ids(masked(np.zeros((240, 320, 3), np.uint8)), [7, -1, 3])
    assert found[1:].track_ids.tolist() == [-1, 3] and found[0].track_ids.tolist() == [7]
    assert [entry.get("track_id") for entry in found.to_coco()] == [7, None, 3]
    found.plot()
    assert texts == ["person #7 0.90", "bicycle 0.50", "car #3 0.40"]
    found.boxes[0] = torch.nan  # what is not drawn takes no other's id away
    texts.clear()
    found.plot()
    assert texts == ["bicycle 0.50", "car #3 0.40"]


def numbers(line):
    return [float(value) for value in line.split()[1:]]


def test_yolo_lines_are_shares_of_the_image(street):
    assert street.to_yolo()[0] == "0 0.218750 0.479167 0.312500 0.708333"
    assert [line.split()[0] for line in street.to_yolo()] == ["0", "2"]
    quads = np.array([numbers(line) for line in rotated().to_yolo()]).reshape(2, 4, 2) * (200, 100)
    assert quads == pytest.approx(rotated().corners(), abs=1e-3)


def test_yolo_lines_of_masks_draw_the_masks():
    """The ring too, whose hole no polygon has: its parts are joined."""
    import cv2

    found = masked(np.zeros((240, 320, 3), np.uint8))
    for line, mask in zip(found.to_yolo()[:2], found.masks.numpy(), strict=False):
        polygon = np.array(numbers(line)).reshape(-1, 2) * (320, 240)
        drawn = np.zeros((240, 320), np.uint8)
        cv2.fillPoly(drawn, [np.rint(polygon).astype(np.int32)], 1)
        assert (drawn & mask).sum() / (drawn | mask).sum() > 0.95
    empty = np.array(numbers(found.to_yolo()[2])).reshape(4, 2) * (320, 240)
    assert empty == pytest.approx(np.array([[10, 10], [20, 10], [20, 20], [10, 20]]), abs=1e-3)


def test_crops_are_what_the_boxes_show():
    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    boxes = [
        [20.0, 30, 120, 200],
        [150.5, 60.2, 300.25, 180.7],
        [-9, -9, 3.5, 2],
        [319.5, 239.9, 330, 250],
        [5, 5, 5, 5],
    ]
    found = results(image, boxes, [0.9] * 5, [0] * 5)
    whole, widened, corner, pixel, empty = found.crop()
    assert np.array_equal(whole, image[30:200, 20:120]) and np.array_equal(widened, image[60:181, 150:301])
    assert np.array_equal(corner, image[:2, :4]) and np.array_equal(pixel, image[239:, 319:])
    assert empty.shape == (1, 1, 3)
    whole[:] = 0
    assert image[30:200, 20:120].any()
    with pytest.raises(UserError, match="no image"):
        rotated().crop()


def test_crops_of_rotated_boxes_are_turned_upright():
    """A bar, red where its box begins and blue where that ends."""
    import cv2

    found = rotated(np.zeros((100, 200, 3), np.uint8))
    (*_, box) = found.corners()
    for color, along in (((0, 0, 255), 0), ((255, 0, 0), 1)):
        half = (box + box[[1, 0, 3, 2]]) / 2
        part = np.where(np.array([along, 1 - along, 1 - along, along], bool)[:, None], half, box)
        cv2.fillPoly(found.image, [np.rint(part * 16).astype(np.int32)], color, shift=4)
    level, turned = found.crop()
    assert level.shape == (10, 20, 3) and turned.shape == (8, 30, 3)
    assert turned[2:6, 2:12].mean((0, 1)) == pytest.approx([0, 0, 255], abs=25)
    assert turned[2:6, 18:28].mean((0, 1)) == pytest.approx([255, 0, 0], abs=25)


def test_pandas(street):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    table = street.to_pandas()
    assert list(table.columns) == ["name", "label", "score", "x1", "y1", "x2", "y2"]
    assert table.loc[1].tolist() == ["bicycle", 2, 0.5, 150.5, 60, 300.25, 180]
    assert list(rotated().to_pandas().columns[-5:]) == ["cx", "cy", "w", "h", "angle"]
    assert with_ids(rotated(), [4, -1]).to_pandas()["track_id"].tolist() == [4, -1]
    assert isinstance(street[:0].to_pandas(), pandas.DataFrame) and len(street[:0].to_pandas()) == 0


def test_supervision(street):
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    found = street.to_supervision()
    assert isinstance(found, supervision.Detections)
    assert found.xyxy.tolist() == street.boxes.tolist() and found.class_id.tolist() == [0, 2]
    assert found.confidence.tolist() == street.scores.tolist()
    assert found.data["class_name"].tolist() == ["person", "bicycle"] and found.mask is None
    assert len(street[:0].to_supervision()) == 0
    masks = with_ids(masked(np.zeros((240, 320, 3), np.uint8)), [7, -1, 3])
    assert np.array_equal(masks.to_supervision().mask, masks.masks.numpy())
    assert masks.to_supervision().tracker_id.tolist() == [7, -1, 3]
    turned = rotated().to_supervision()
    drawn = supervision.OrientedBoxAnnotator().annotate(np.zeros((100, 200, 3), np.uint8), turned)
    assert drawn[35:46, 40:61].any() and turned.data["xyxyxyxy"] == pytest.approx(rotated().corners())


@pytest.mark.parametrize("name", ["pandas", "supervision"])
def test_without_an_extra_one_sentence_says_what_to_install(street, monkeypatch, name):
    import sys

    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"^to_{name} needs {name}: pip install {name}$"):
        getattr(street, f"to_{name}")()


def test_a_notebook_shows_the_picture(street):
    import cv2

    picture = cv2.imdecode(np.frombuffer(street._repr_png_(), np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(picture, street.plot())
    assert results(None, [], [], [], shape=(4, 5))._repr_png_() is None  # repr is shown then
