"""DOTA's mAP beside a plain computation: shapely's polygons, and the loop of the published evaluation."""

from fractions import Fraction

import numpy as np
import pytest

from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.data.layout import find_sources
from rtmdet_fast.evaluation.dota import THRESHOLDS, rotated_map
from rtmdet_fast.geometry.rotated import boxes_to_quads

NAMES = ("a", "b", "c", "nowhere")


def scene(rng, images=12, gts=9, dets=25):
    """Random ground truth; detections near it, at it twice, and anywhere."""
    truth, found = [], []
    for _ in range(images):
        m, n = rng.integers(gts + 1), rng.integers(dets + 1)
        boxes = np.column_stack([rng.uniform(0, 150, (m, 2)), rng.uniform(4, 50, (m, 2)), rng.uniform(-2, 2, m)])
        labels = rng.integers(3, size=m)
        truth.append((boxes.astype(np.float32), labels, rng.random(m) < 0.2))
        source = rng.integers(max(m, 1), size=n)
        if m:
            near = boxes[source] + rng.normal(0, 1, (n, 5)) * (2, 2, 2, 2, 0.05) * rng.uniform(0, 2, (n, 1))
        else:
            near = rng.uniform(1, 100, (n, 5))
        near[:, 2:4] = np.abs(near[:, 2:4])
        of_class = np.where(rng.random(n) < 0.85, labels[source] if m else 0, rng.integers(4, size=n))
        found.append((near.astype(np.float32), rng.permutation(n) / 7 + 0.001, of_class))
    return truth, found


def plain_map(truth, found, num_classes, threshold):
    """Class by class (AP by 11 points, AP by area) or None, with loops, exact polygons and fractions."""
    shapely = pytest.importorskip("shapely")

    def polygon(box):
        return shapely.Polygon(boxes_to_quads(box[None]).reshape(4, 2))

    figures = []
    for c in range(num_classes):
        gts = [[(polygon(b), d) for b, k, d in zip(*t, strict=True) if k == c] for t in truth]
        total = sum(not d for image in gts for _, d in image)
        if not total:
            figures.append(None)
            continue
        every = [(s, i, polygon(b)) for i, f in enumerate(found) for b, s, k in zip(*f, strict=True) if k == c]
        covered, true, false, points = set(), 0, 0, []
        for _, i, poly in sorted(every, key=lambda item: -item[0]):
            ious = [poly.intersection(g).area / poly.union(g).area for g, _ in gts[i]]
            best = int(np.argmax(ious)) if ious else -1
            if not ious or ious[best] < threshold:
                false += 1
            elif gts[i][best][1]:
                pass
            elif (i, best) in covered:
                false += 1
            else:
                covered.add((i, best))
                true += 1
            points.append((Fraction(true, total), true / max(true + false, 1)))
        eleven = sum(max([p for r, p in points if r >= Fraction(k, 10)], default=0) for k in range(11)) / 11
        area, last = 0.0, Fraction(0)
        for r, _ in points:
            if r > last:
                area += float(r - last) * max(p for q, p in points if q >= r)
                last = r
        figures.append((eleven, area))
    return figures


@pytest.mark.parametrize("seed", range(4))
def test_equals_plain_computation(seed):
    truth, found = scene(np.random.default_rng(seed))
    result = rotated_map(truth, found, NAMES)
    by_threshold = np.array([[f or (-1, -1) for f in plain_map(truth, found, 4, t)] for t in THRESHOLDS])
    expected = by_threshold.transpose(1, 2, 0)  # class, kind, threshold
    for c, name in enumerate(NAMES):
        figures = result.per_class[name]
        for kind, suffix in enumerate(("", "_area")):
            assert figures[f"AP50{suffix}"] == pytest.approx(expected[c, kind, 0])
            assert figures[f"AP75{suffix}"] == pytest.approx(expected[c, kind, 5])
            assert figures[f"AP{suffix}"] == pytest.approx(expected[c, kind].mean())
    assert 0.2 < result.metrics["mAP50"] < 1
    assert result.metrics["mAP50"] == pytest.approx(expected[:3, 0, 0].mean())
    assert result.metrics["mAP75_area"] == pytest.approx(expected[:3, 1, 5].mean())
    assert result.metrics["mAP"] == pytest.approx(expected[:3, 0].mean())
    assert result.per_class["nowhere"]["gts"] == 0 and "nowhere" not in result.pr_curves


BOX = np.array([[10.0, 10, 8, 4, 0.3], [50.0, 10, 8, 4, 0.3]])
YES, NO = np.array([True]), np.array([False, False])
TWO = np.zeros(2, int)


def figures(truth, found, names=("a",)):
    return rotated_map([truth], [found], names)


def test_second_detection_is_wrong():
    truth = (BOX, TWO, NO)
    result = figures(truth, (BOX[[0, 0]], np.array([0.3, 0.9]), TWO))
    # one of two found, after which precision is 1/1: recalls 0 to 0.5 are reached
    assert result.metrics["mAP50"] == pytest.approx(6 / 11)
    assert result.metrics["mAP50_area"] == pytest.approx(0.5)
    both = figures(truth, (BOX[[0, 0, 1]], np.array([0.9, 0.8, 0.7]), np.zeros(3, int)))
    assert both.metrics["mAP50"] == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert both.metrics["mAP50_area"] == pytest.approx(0.5 + 0.5 * 2 / 3)
    recall, precision = both.pr_curves["a"]
    assert recall.shape == precision.shape == (101,)
    assert precision[50] == 1 and precision[51] == pytest.approx(2 / 3)


def test_difficult_counts_neither_way():
    truth = (BOX, TWO, np.array([True, False]))
    perfect = figures(truth, (BOX[[0, 0, 1]], np.array([0.9, 0.8, 0.7]), np.zeros(3, int)))
    assert perfect.metrics == pytest.approx(dict.fromkeys(perfect.metrics, 1.0))
    assert perfect.per_class["a"]["gts"] == 1 and perfect.per_class["a"]["detections"] == 3
    only = figures((BOX[:1], TWO[:1], YES), (BOX[:1], np.array([0.9]), TWO[:1]))
    assert only.metrics["mAP50"] == -1 and only.per_class["a"]["AP50"] == -1


def test_recall_of_three_in_ten():
    boxes = np.column_stack([np.arange(10) * 40.0, np.zeros(10), np.full(10, 8), np.full(10, 4), np.zeros(10)])
    for k in range(11):
        truth = (boxes, np.zeros(10, int), np.zeros(10, bool))
        result = figures(truth, (boxes[:k], np.linspace(1, 0.5, k), np.zeros(k, int)))
        assert result.metrics["mAP50"] == pytest.approx((k + 1) / 11 if k else 0)


def test_nothing_to_compare():
    empty = (np.zeros((0, 5)), np.zeros(0), np.zeros(0))
    assert rotated_map([], [], ("a",)).metrics["mAP50"] == -1
    assert rotated_map([empty], [empty], ("a",)).metrics["mAP"] == -1
    assert rotated_map([(BOX, TWO, NO)], [empty], ("a",)).metrics["mAP"] == 0
    wild = (np.array([[np.nan] * 5, [10, 10, 0, 0, 0], [1e30] * 5]), np.ones(3), np.zeros(3, int))
    assert rotated_map([(BOX, TWO, NO)], [wild], ("a",)).metrics["mAP"] == 0
    with pytest.raises(ValueError, match="1 images, detections of 2"):
        rotated_map([empty], [empty, empty], ("a",))


def test_many_pairs_are_computed_in_parts(monkeypatch):
    truth, found = scene(np.random.default_rng(9))
    whole = rotated_map(truth, found, NAMES)
    monkeypatch.setattr("rtmdet_fast.evaluation.overlaps.CHUNK", 7)
    parts = rotated_map(truth, found, NAMES)
    assert parts.metrics == whole.metrics and parts.per_class == whole.per_class


def test_hit_uav_with_jittered_boxes(shared):
    dataset = DotaDataset(find_sources(shared / "data/hit_uav", "val"))
    rng = np.random.default_rng(3)
    truth = [dataset.ground_truth(i) for i in range(40)]
    found = []
    for boxes, labels, _ in truth:
        source = rng.integers(len(boxes), size=2 * len(boxes))
        noise = rng.normal(0, 0.12, (len(source), 4)) * boxes[source][:, [2, 3, 2, 3]]
        moved = boxes[source] + np.column_stack([noise, rng.normal(0, 0.2, len(source))])
        found.append((moved.astype(np.float32), rng.random(len(source)), labels[source]))
    result = rotated_map(truth, found, dataset.class_names)
    for threshold, key in ((0.5, "AP50"), (0.75, "AP75")):
        expected = plain_map(truth, found, 4, threshold)
        for name, figure in zip(dataset.class_names, expected, strict=True):
            assert result.per_class[name][key] == pytest.approx(figure[0] if figure else -1)
            assert result.per_class[name][f"{key}_area"] == pytest.approx(figure[1] if figure else -1)
    assert 0.1 < result.metrics["mAP"] < result.metrics["mAP50"] < 1
