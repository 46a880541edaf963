"""Parts of the objects, the worst images and what is told of them."""

import json

import numpy as np
import pytest
from made_detections import made_dataset, made_detections, overlaps

from rtmdet_fast.evaluation.analysis import analyse, best_score_thresholds, greatest_overlaps
from rtmdet_fast.evaluation.coco import Evaluation, score_detections
from rtmdet_fast.evaluation.overlaps import rotated_overlaps


def analysed(o, names=("cat", "dog")):
    return analyse(Evaluation({}, {}, {}, [], overlaps=o, image_ids=tuple(range(o.image_count))), names)


def test_small_objects_are_counted_apart():
    small = [(i, 0, 0, 0, 10, 10) for i in range(12)]
    large = [(i, 0, 100, 100, 70, 70) for i in range(4)]
    found = [(i, 0, 0.9, 0, 0, 10, 10) for i in range(6)]
    found += [(i, 0, 0.8, 100, 100, 70, 70) for i in range(4)] + [(i, 0, 0.95, 300, 300, 90, 90) for i in range(3)]
    parts = {part.name: part for part in analysed(overlaps(small + large, found)).by_size}
    assert list(parts) == ["0-16", "16-32", "32-64", "64-128"]
    assert (parts["0-16"].objects, parts["0-16"].found) == (12, 0.5)
    # what is wrong is large, and so takes nothing from the small ones
    assert parts["0-16"].ap50 == pytest.approx(51 / 101) and parts["64-128"].ap50 == pytest.approx(4 / 7)
    assert parts["16-32"].objects == 0 and parts["16-32"].ap == parts["16-32"].found == -1


def test_ap_of_a_size_is_cocos(tmp_path, monkeypatch):
    monkeypatch.setattr("rtmdet_fast.evaluation.analysis.SIDES", (0, 32, 96))
    rng = np.random.default_rng(2)
    dataset = made_dataset(tmp_path, rng, images=30)
    evaluation = score_detections(dataset, made_detections(dataset, rng))
    # COCO's medium begins at 32² itself and ends with 96² itself, where no object lies
    small, medium = analyse(evaluation, dataset.class_names).by_size
    assert medium.ap == pytest.approx(evaluation.metrics["APm"]) and small.ap == pytest.approx(
        evaluation.metrics["APs"]
    )


def test_crowded_images_are_counted_apart():
    objects = [(0, 0, 0, 0, 10, 10)] + [(1, 0, 20 * i, 0, 10, 10) for i in range(12)]
    found = [(0, 0, 0.9, 0, 0, 10, 10)] + [(1, 0, 0.8, 20 * i, 0, 10, 10) for i in range(3)]
    found += [(0, 0, 0.95, 50, 50, 9, 9)]
    parts = {part.name: part for part in analysed(overlaps(objects, found)).by_crowd}
    assert (parts["1-2"].objects, parts["1-2"].ap50) == (1, pytest.approx(0.5))
    assert (parts["11-20"].objects, parts["11-20"].ap50, parts["11-20"].found) == (12, pytest.approx(26 / 101), 0.25)


def test_overlap_with_another_object():
    upright = [(0, 0, 0, 0, 10, 10), (0, 1, 0, 5, 10, 10), (0, 0, 80, 80, 10, 10), (1, 0, 0, 0, 10, 10)]
    assert greatest_overlaps(overlaps(upright, [])) == pytest.approx([1 / 3, 1 / 3, 0, 0])
    crowd = overlaps(upright, [], ignored=[1])
    assert greatest_overlaps(crowd) == pytest.approx([0, 0, 0, 0])
    boxes = np.array([[0.0, 0, 10, 10, 0.5], [5, 0, 10, 10, 0.5], [90, 0, 10, 10, 0]])
    truth = [(boxes, np.zeros(3, int), np.zeros(3, bool)), (boxes[:1], np.zeros(1, int), np.zeros(1, bool))]
    nothing = (np.zeros((0, 5)), np.zeros(0), np.zeros(0, int))
    found = greatest_overlaps(rotated_overlaps(truth, [nothing, nothing]))
    assert found[0] == found[1] > 0.2 and found[2:].tolist() == [0, 0]


def test_the_worst_images_come_first_and_are_told_of():
    objects = [(0, 0, 0, 0, 10, 10), (1, 0, 0, 0, 10, 10), (1, 1, 50, 0, 10, 10), (2, 1, 0, 0, 10, 10)]
    found = [
        (0, 0, 0.9, 0, 0, 10, 10),
        (1, 1, 0.9, 0, 0, 10, 10),  # a cat taken for a dog; the dog is missed
        (1, 0, 0.9, 200, 0, 10, 10),
        (1, 0, 0.9, 220, 0, 10, 10),
        (2, 1, 0.9, 0, 0, 10, 4),
        (2, 1, 0.01, 90, 0, 10, 10),  # below the threshold
    ]
    o = overlaps(objects, found, images=4)
    analysis = analysed(o)
    assert analysis.worst_images(o, 9) == [1, 2] and analysis.worst_images(o, 1) == [1]
    assert analysis.told(o, 1) == "2 x cat where nothing is, missed dog, cat taken for dog"
    assert analysis.told(o, 2) == "dog badly placed" and analysis.told(o, 0) == ""


def test_all_is_missed_where_nothing_is_found():
    o = overlaps([(0, 0, 0, 0, 10, 10), (2, 0, 0, 0, 10, 10), (2, 1, 50, 0, 10, 10)], [], images=3)
    analysis = analysed(o)
    assert analysis.worst_images(o, 9) == [2, 0] and analysis.told(o, 2) == "missed cat, missed dog"


def test_an_analysis_can_be_written(tmp_path):
    rng = np.random.default_rng(3)
    dataset = made_dataset(tmp_path, rng)
    evaluation = score_detections(dataset, made_detections(dataset, rng))
    analysis = analyse(evaluation, dataset.class_names)
    told = json.loads(json.dumps(analysis.as_json(), allow_nan=False))
    assert set(told["errors"]) == set(told["dAP"]) - {"false positives", "false negatives"}
    assert analysis.gains.ap50 == pytest.approx(evaluation.metrics["AP50"])
    assert best_score_thresholds(evaluation, len(dataset.class_names)) == tuple(analysis.thresholds)


def test_without_an_object_there_is_nothing_to_analyse():
    o = overlaps([], [(0, 0, 0.9, 0, 0, 10, 10)])
    assert analysed(o) is None
    assert best_score_thresholds(Evaluation({}, {}, {}, [], overlaps=o), 2) is None
