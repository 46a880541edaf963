"""Which score to ask for: F1 of each class by score threshold, its best one, and what is taken for what above it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rtmdet_fast.evaluation.errors import FOUND_IOU
from rtmdet_fast.evaluation.overlaps import Overlaps

GRID = np.arange(101) / 100
"""The thresholds that are looked at."""
LEAST, MOST = 0.05, 0.95
"""Of a best threshold: beyond them it would be one of very few detections."""
FEW_OBJECTS = 10
"""Of a class with fewer, the best threshold is that of all classes together: its own would be chance."""


@dataclass(frozen=True, eq=False)
class ScoreCurves:
    """By score threshold, at GRID, and by class: true and false positives [K, 101], objects [K].

    best: [K] index of GRID, and best_of_all of all classes together
    """

    true: np.ndarray
    false: np.ndarray
    objects: np.ndarray
    best: np.ndarray
    best_of_all: int

    @property
    def f1(self) -> np.ndarray:
        """[K, 101]; 0 where nothing is right, NaN for classes without an object."""
        return _f1(self.true, self.false, self.objects[:, None])

    @property
    def f1_of_all(self) -> np.ndarray:
        """[101], of all classes together."""
        return _f1(self.true.sum(0), self.false.sum(0), self.objects.sum())

    def thresholds(self) -> np.ndarray:
        """[K], the best score threshold of each class."""
        return GRID[self.best]


def _f1(true: np.ndarray, false: np.ndarray, objects: np.ndarray) -> np.ndarray:
    return np.where(objects > 0, 2 * true / np.maximum(true + false + objects, 1), np.nan)


def score_curves(overlaps: Overlaps, classes: int, matched: np.ndarray | None = None) -> ScoreCurves:
    """F1 at an IoU of 0.5 of each class; `matched` [N] is what `overlaps.match` gave for it, where it is known."""
    o = overlaps
    if matched is None:
        matched = o.match([FOUND_IOU])[:, 0]
    found = matched >= 0
    passed = found & o.ignored[matched] if len(o.ignored) else found
    counts = ~passed if o.limit is None else ~passed & (o.ranks() < o.limit)
    at = np.searchsorted(GRID, o.scores, side="right") - 1  # the last threshold that each passes
    counts &= at >= 0
    true, false = (np.zeros((classes, len(GRID)), np.int64) for _ in range(2))
    for hits, which in ((true, counts & found), (false, counts & ~found)):
        np.add.at(hits, (o.labels[which], at[which]), 1)
    true, false = (np.cumsum(hits[:, ::-1], 1)[:, ::-1] for hits in (true, false))
    objects = np.bincount(o.gt_labels[~o.ignored], minlength=classes)
    of_all = _best(_f1(true.sum(0), false.sum(0), objects.sum()))
    own = [_best(f1) for f1 in _f1(true, false, objects[:, None])]
    best = np.where(objects >= FEW_OBJECTS, own, of_all)
    return ScoreCurves(true, false, objects, best, of_all)


def _best(f1: np.ndarray) -> int:
    """The middle of the first run of the greatest F1, between LEAST and MOST."""
    allowed = np.flatnonzero((GRID >= LEAST) & (GRID <= MOST))
    values = np.nan_to_num(f1[allowed])
    first = int(values.argmax())
    if values[first] == 0:
        return int(np.searchsorted(GRID, 0.3))  # nothing to choose by
    last = first + int(np.append(values[first:] < values[first], True).argmax()) - 1
    return int(allowed[(first + last) // 2])


def confusion_matrix(overlaps: Overlaps, kept: np.ndarray, matched: np.ndarray, classes: int) -> np.ndarray:
    """Objects by class (rows) and what they were taken for (columns), [K + 1, K + 1]; the last stand for background.

    Detections that found their object at an IoU of 0.5 come first. Of the others, by falling score, each is taken for
    the object, not found by any, that it overlaps most, by 0.5 or more; what is left found background, and objects that
    are left were taken for background.

    Args:
        overlaps: of N detections.
        kept: [N] bool, the detections that there are, as above a threshold.
        matched: [N], what `overlaps.match` gave for 0.5.
        classes: K.
    """
    o = overlaps
    found = kept & (matched >= 0)
    right = found.copy()
    right[found] = ~o.ignored[matched[found]]
    here = kept if o.limit is None else kept & (o.ranks() < o.limit)
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    np.add.at(matrix, (o.gt_labels[matched[right]], o.labels[right]), 1)
    wrong = here & ~found
    free = ~o.ignored
    free[matched[right]] = False
    pairs = np.flatnonzero(wrong[o.dets] & free[o.gts] & (o.ious >= FOUND_IOU))
    pairs = pairs[np.lexsort((-o.ious[pairs], -o.scores[o.dets[pairs]]))]
    for det, gt in zip(o.dets[pairs].tolist(), o.gts[pairs].tolist(), strict=True):
        if wrong[det] and free[gt]:
            wrong[det] = free[gt] = False
            matrix[o.gt_labels[gt], o.labels[det]] += 1
    np.add.at(matrix[classes], o.labels[wrong], 1)
    np.add.at(matrix[:, classes], o.gt_labels[free], 1)
    return matrix
