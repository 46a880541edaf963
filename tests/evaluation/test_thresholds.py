"""F1 by score, the best thresholds, and confusions, counted by hand."""

import numpy as np
import pytest
from made_detections import overlaps

from rtmdet_fast.evaluation.thresholds import GRID, confusion_matrix, score_curves


def spread(scores_right, scores_wrong, missed=0, label=0):
    """Objects and detections of a class in a row: each in an image of its own."""
    objects, detections = [], []
    for i, score in enumerate(scores_right):
        objects.append((i, label, 0, 0, 10, 10))
        detections.append((i, label, score, 0, 0, 10, 10))
    detections += [(i, label, score, 50, 50, 10, 10) for i, score in enumerate(scores_wrong)]
    objects += [(i, label, 100, 100, 10, 10) for i in range(missed)]
    return objects, detections


def test_f1_by_threshold():
    o = overlaps(*spread([0.9, 0.7, 0.5], [0.6, 0.2], missed=1))
    curves = score_curves(o, 1)
    at = {score: 2 * tp / (tp + fp + 4) for score, tp, fp in ((0, 3, 2), (0.2, 3, 2), (0.21, 3, 1), (0.5, 3, 1))}
    at |= {0.51: 4 / 7, 0.6: 4 / 7, 0.61: 4 / 6, 0.7: 4 / 6, 0.71: 2 / 5, 0.9: 2 / 5, 0.91: 0}
    for score, f1 in at.items():
        assert curves.f1[0, round(100 * score)] == pytest.approx(f1), score
    assert curves.f1_of_all == pytest.approx(curves.f1[0])


def test_the_best_threshold_is_the_middle_of_where_it_is_best():
    o = overlaps(*spread(np.linspace(0.6, 0.9, 20), np.linspace(0.1, 0.3, 20)))
    assert score_curves(o, 1).thresholds() == pytest.approx([0.45])  # of 0.31 to 0.60


def test_rare_classes_take_the_threshold_of_all():
    objects, detections = spread(np.linspace(0.6, 0.9, 20), np.linspace(0.1, 0.3, 20))
    few = spread([0.2, 0.2], [], label=1)
    o = overlaps(objects + few[0], detections + few[1])
    curves = score_curves(o, 3)
    assert curves.thresholds().tolist() == [curves.thresholds()[0]] * 3 == [GRID[curves.best_of_all]] * 3
    assert np.isnan(curves.f1[2]).all()


@pytest.mark.parametrize("right", [[], [0.01] * 20])
def test_nothing_to_choose_by(right):
    o = overlaps(*spread(right, [0.4] * 3, missed=20))
    assert score_curves(o, 1).thresholds().tolist() == [0.3]


def test_detections_in_a_crowd_are_neither_right_nor_wrong():
    o = overlaps([(0, 0, 0, 0, 100, 100)], [(0, 0, 0.9, 0, 0, 10, 10)], ignored=[0])
    curves = score_curves(o, 1)
    assert not curves.true.any() and not curves.false.any() and curves.objects.tolist() == [0]


def test_confusions():
    objects = [(0, 0, 0, 0, 10, 10), (0, 0, 50, 0, 10, 10), (0, 1, 0, 50, 10, 10), (0, 1, 50, 50, 10, 10)]
    detections = [
        (0, 0, 0.9, 0, 0, 10, 10),  # right
        (0, 1, 0.95, 0, 0, 10, 10),  # on an object that is found: nothing else is there
        (0, 1, 0.8, 50, 0, 10, 10),  # taken for another class,
        (0, 2, 0.7, 50, 0, 10, 10),  # and once more
        (0, 1, 0.6, 0, 50, 10, 10),  # below the threshold
        (0, 0, 0.9, 200, 200, 10, 10),  # nothing there
    ]
    o = overlaps(objects, detections)
    kept = o.scores >= 0.65
    matrix = confusion_matrix(o, kept, o.match([0.5])[:, 0], 3)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0], [1, 1, 1, 0]]
    assert matrix[:3].sum() == len(objects) and matrix[:, :3].sum() == kept.sum()
