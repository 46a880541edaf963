"""What stands behind the figures of an evaluation: scores to ask for, errors, the objects and images they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rtmdet_fast.evaluation.coco import THRESHOLDS, Evaluation, count
from rtmdet_fast.evaluation.errors import KINDS, Errors, Gains, find_errors, gains
from rtmdet_fast.evaluation.overlaps import Overlaps, rotated_pairs
from rtmdet_fast.evaluation.thresholds import ScoreCurves, confusion_matrix, score_curves

SIDES = (0, 16, 32, 64, 128, 256, np.inf)
"""Between which objects are counted by size: the root of their area, in pixels of the image."""
CROWDS = (1, 3, 6, 11, 21, 51, np.inf)
"""Between which images are counted by their objects, the next one's least excluded."""
NEIGHBOURS = (0.0, 0.1, 0.3, 0.5, np.inf)
"""Between which objects are counted by their greatest IoU with another."""


@dataclass(frozen=True)
class Part:
    """Figures of a part of the objects, in [0, 1]; -1 where there is nothing to measure."""

    name: str
    objects: int
    ap: float
    ap50: float
    found: float
    """Share that is found at IoU 0.5 by detections above their class's threshold."""


@dataclass(frozen=True, eq=False)
class Analysis:
    """Of the classes of a data set, in its order.

    curves: F1 by score threshold
    thresholds: [K] of each class, above which `kept` [N] detections are looked at
    confusion: [K + 1, K + 1], see `confusion_matrix`
    errors: of all detections; gains: what fixing them would
    kept_errors: of the detections above the thresholds
    by_size, by_crowd, by_neighbour: of parts of the objects
    """

    class_names: tuple[str, ...]
    curves: ScoreCurves
    thresholds: np.ndarray
    kept: np.ndarray
    confusion: np.ndarray
    errors: Errors
    gains: Gains
    kept_errors: Errors
    by_size: list[Part]
    by_crowd: list[Part]
    by_neighbour: list[Part]

    def as_json(self) -> dict[str, Any]:
        """The figures, for JSON: by class and by kind of error."""
        f1 = self.curves.f1
        at = [(k, name, int(self.curves.best[k])) for k, name in enumerate(self.class_names) if self.curves.objects[k]]
        return {
            "score_thresholds": {
                name: {
                    "threshold": float(self.thresholds[k]),
                    "F1": float(f1[k, i]),
                    "objects": int(self.curves.objects[k]),
                }
                for k, name, i in at
            },
            "errors": self.errors.counts(),
            "errors_above_thresholds": self.kept_errors.counts(),
            "dAP": self.gains.by_kind
            | {"false positives": self.gains.false_positives, "false negatives": self.gains.false_negatives},
            "by_size": [vars(part) for part in self.by_size],
            "by_objects_in_image": [vars(part) for part in self.by_crowd],
            "by_overlap_with_another": [vars(part) for part in self.by_neighbour],
        }

    def worst_images(self, overlaps: Overlaps, most: int) -> list[int]:
        """The images with the most errors above the thresholds, of equals those with fewer objects; none without."""
        wrong = overlaps.det_images[self.kept_errors.kinds >= 0]
        missed = overlaps.gt_images[self.kept_errors.missed]
        errors = np.bincount(np.concatenate([wrong, missed]), minlength=overlaps.image_count)
        objects = np.bincount(overlaps.gt_images, minlength=overlaps.image_count)
        order = np.lexsort((objects, -errors))
        return [int(i) for i in order[:most] if errors[i]]

    def told(self, overlaps: Overlaps, image: int) -> str:
        """What went wrong in an image above the thresholds, in words."""
        e, names = self.kept_errors, self.class_names
        said: dict[str, int] = {}
        for gt in np.flatnonzero((overlaps.gt_images == image) & e.missed):
            _add(said, f"missed {names[overlaps.gt_labels[gt]]}")
        for det in np.flatnonzero((overlaps.det_images == image) & (e.kinds >= 0)):
            name, kind = names[overlaps.labels[det]], KINDS[e.kinds[det]]
            _add(
                said,
                {
                    "class": f"{names[overlaps.gt_labels[e.about[det]]]} taken for {name}",
                    "location": f"{name} badly placed",
                    "both": f"{name} badly placed on another class",
                    "duplicate": f"{name} twice",
                    "background": f"{name} where nothing is",
                }[kind],
            )
        ranked = sorted(said.items(), key=lambda item: -item[1])
        parts = [f"{number} x {what}" if number > 1 else what for what, number in ranked[:6]]
        return ", ".join(parts) + (f" and {len(ranked) - 6} more" if len(ranked) > 6 else "")


def _add(said: dict[str, int], what: str) -> None:
    said[what] = said.get(what, 0) + 1


def analyse(evaluation: Evaluation, class_names: Sequence[str]) -> Analysis | None:
    """The analysis of an evaluation, of the classes of its data set; None where there is no object to find."""
    o = evaluation.overlaps
    if o is None or o.ignored.all():
        return None
    classes = len(class_names)
    matched = o.match(THRESHOLDS)
    at_half = matched[:, 0]
    curves = score_curves(o, classes, at_half)
    thresholds = curves.thresholds()
    kept = o.scores >= thresholds[o.labels]
    errors = find_errors(o, matched=at_half)
    # what is kept are the best of each class, which choose first: the others change nothing for them
    kept_errors = find_errors(o, kept, at_half)
    return Analysis(
        tuple(class_names),
        curves,
        thresholds,
        kept,
        confusion_matrix(o, kept, at_half, classes),
        errors,
        gains(o, errors, classes),
        kept_errors,
        _by_size(o, classes, kept_errors.found),
        _by_crowd(o, classes, kept_errors.found, matched),
        _by_neighbour(o, kept_errors.found),
    )


def _share(found: np.ndarray, which: np.ndarray) -> float:
    return float(found[which].mean()) if which.any() else -1.0


def _by_size(o: Overlaps, classes: int, found: np.ndarray) -> list[Part]:
    parts = []
    gt_sides, det_sides = np.sqrt(np.maximum(o.gt_areas, 0)), np.sqrt(np.maximum(o.det_areas, 0))
    for least, most in pairwise(SIDES):
        inside = (gt_sides >= least) & (gt_sides < most)
        which = inside & ~o.ignored
        outside = (det_sides < least) | (det_sides >= most)
        counts = count(o, classes, ignored=~inside, outside=outside)
        name = f"{least}+" if np.isinf(most) else f"{least}-{most}"
        parts.append(_part(name, which, counts, found))
    return _told(parts)


def _by_crowd(o: Overlaps, classes: int, found: np.ndarray, matched: np.ndarray) -> list[Part]:
    parts = []
    objects = np.bincount(o.gt_images[~o.ignored], minlength=o.image_count)
    for least, after in pairwise(CROWDS):
        images = (objects >= least) & (objects < after)
        inside = images[o.gt_images]
        # what is ignored in whole images changes no choice
        counts = count(o, classes, ignored=~inside, outside=~images[o.det_images], matched=matched)
        name = f"{least}+" if np.isinf(after) else f"{least}-{int(after) - 1}"
        parts.append(_part(name, inside & ~o.ignored, counts, found))
    return _told(parts)


def _part(name: str, which: np.ndarray, counts: Any, found: np.ndarray) -> Part:
    half = counts.precision[:, 0]
    ap50 = float(half[half > -1].mean()) if (half > -1).any() else -1.0
    return Part(name, int(which.sum()), counts.average_precision(), ap50, _share(found, which))


def _told(parts: list[Part]) -> list[Part]:
    """From the first part with objects to the last."""
    known = [i for i, part in enumerate(parts) if part.objects]
    return parts[known[0] : known[-1] + 1] if known else []


def _by_neighbour(o: Overlaps, found: np.ndarray) -> list[Part]:
    overlap = greatest_overlaps(o)
    parts = []
    for least, most in pairwise(NEIGHBOURS):
        which = (overlap >= least) & (overlap < most) & ~o.ignored
        name = f"{least:g}+" if np.isinf(most) else f"{least:g}-{most:g}"
        parts.append(Part(name, int(which.sum()), -1.0, -1.0, _share(found, which)))
    return _told(parts)


def greatest_overlaps(o: Overlaps) -> np.ndarray:
    """[M], the greatest IoU of each object's box with another object's of its image, of whatever class; 0 below 0.1."""
    greatest = np.zeros(len(o.gt_labels))
    there = np.flatnonzero(~o.ignored)
    if not len(there):
        return greatest
    groups = np.split(there, np.flatnonzero(np.diff(o.gt_images[there])) + 1)
    if o.gt_boxes.shape[1] == 5:
        boxes = [o.gt_boxes[group] for group in groups]
        i, j, iou = rotated_pairs(boxes, boxes)
        others = i != j
        np.maximum.at(greatest, there[i[others]], iou[others])
        return greatest
    for group in groups:
        low, high = o.gt_boxes[group, :2], o.gt_boxes[group, 2:]
        area = (high - low).prod(1)
        shared = (np.minimum(high[:, None], high) - np.maximum(low[:, None], low)).clip(0).prod(2)
        iou = shared / np.maximum(area[:, None] + area - shared, 1e-12)
        np.fill_diagonal(iou, 0)
        greatest[group] = iou.max(1)
    return greatest


def best_score_thresholds(evaluation: Evaluation, classes: int) -> tuple[float, ...] | None:
    """The best score threshold of each class of the data set; None where there is nothing to choose by."""
    o = evaluation.overlaps
    if o is None or o.ignored.all():
        return None
    return tuple(score_curves(o, classes).thresholds().tolist())
