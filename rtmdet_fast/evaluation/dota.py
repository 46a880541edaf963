"""DOTA's mAP of rotated detections, for all IoU thresholds at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rtmdet_fast.evaluation.overlaps import Overlaps, rotated_overlaps

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))

Array = np.ndarray


@dataclass(frozen=True)
class RotatedEvaluation:
    """Average precision in [0, 1], -1 where there is nothing to measure.

    metrics: mAP50, mAP75 and mAP (the mean over IoU 0.5, 0.55 … 0.95) by the 11 points of VOC 2007, as DOTA counts, and
        the same with `_area`, the area under the curve
    per_class: name → AP50, AP75, AP and the same with `_area`; `gts`, without difficult ones, and `detections`
    pr_curves: name → (recall [101], precision [101]) at IoU 0.5, where precision is the best at that recall or more
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    pr_curves: dict[str, tuple[Array, Array]]


def rotated_map(
    ground_truth: Sequence[tuple[Array, Array, Array]],
    detections: Sequence[tuple[Array, Array, Array]],
    class_names: Sequence[str],
) -> RotatedEvaluation:
    """mAP as DOTA's evaluation computes it.

    Args:
        ground_truth: for each image boxes [m, 5] (cx, cy, w, h, radians), labels [m], difficult [m].
        detections: for each image boxes [n, 5], scores [n], labels [n]; all that are to count, in any order.
        class_names: of the labels 0, 1, …

    Each detection goes to the ground truth of its class with the greatest IoU. At or above the threshold the best
    scored one there is right and the others are wrong, while those at a difficult ground truth count neither way;
    below it they are wrong. Classes without ground truth have no part in the means. The 11 recalls are compared as
    fractions: in floating point 3 of 10 found need not be a recall of 0.3.
    """
    return dota_figures(rotated_overlaps(ground_truth, detections), class_names)


def dota_figures(overlaps: Overlaps, class_names: Sequence[str]) -> RotatedEvaluation:
    """mAP as `rotated_map` has it, of overlaps that are known."""
    gt_labels, difficult, scores, labels = overlaps.gt_labels, overlaps.ignored, overlaps.scores, overlaps.labels
    best_iou, best_gt = _best_matches(overlaps)
    order = np.argsort(-scores, kind="stable")
    per_class: dict[str, dict[str, float]] = {}
    curves: dict[str, tuple[Array, Array]] = {}
    for label, name in enumerate(class_names):
        rows = order[labels[order] == label]
        gts = int(((gt_labels == label) & ~difficult).sum())
        figures = {}
        if gts:
            found = [_true_false(best_iou[rows] >= t, best_gt[rows], difficult) for t in THRESHOLDS]
            eleven = np.array([_average_11(*counts, gts) for counts in found])
            area = np.array([_average_area(*counts, gts) for counts in found])
            figures = _named(eleven) | {f"{key}_area": value for key, value in _named(area).items()}
            curves[name] = _curve(*found[0], gts)
        per_class[name] = {**figures, "gts": gts, "detections": len(rows)}
    keys = [f"{key}{kind}" for kind in ("", "_area") for key in ("mAP50", "mAP75", "mAP")]
    measured = [figures for figures in per_class.values() if figures["gts"]]
    metrics = {key: float(np.mean([f[key[1:]] for f in measured])) if measured else -1.0 for key in keys}
    nothing = {key[1:]: -1.0 for key in keys}
    return RotatedEvaluation(metrics, {name: {**nothing, **figures} for name, figures in per_class.items()}, curves)


def _named(values: Array) -> dict[str, float]:
    at = dict(zip(THRESHOLDS, values.tolist(), strict=True))
    return {"AP50": at[0.5], "AP75": at[0.75], "AP": float(values.mean())}


def _best_matches(overlaps: Overlaps) -> tuple[Array, Array]:
    """For each detection the greatest IoU with a ground truth of its class, and which one, of equals the first."""
    best_iou, best_gt = np.zeros(len(overlaps.scores)), np.zeros(len(overlaps.scores), np.int64)
    same = overlaps.labels[overlaps.dets] == overlaps.gt_labels[overlaps.gts]
    dets, gts, ious = overlaps.dets[same], overlaps.gts[same], overlaps.ious[same]
    order = np.lexsort((-ious, dets))  # which keeps the order of the ground truth
    dets, first = np.unique(dets[order], return_index=True)
    best_iou[dets], best_gt[dets] = ious[order][first], gts[order][first]
    return best_iou, best_gt


def _true_false(matched: Array, gt: Array, difficult: Array) -> tuple[Array, Array]:
    """Cumulated numbers of true and false positives along detections [n] by falling score."""
    rows = np.flatnonzero(matched)
    taken, first = np.unique(gt[rows], return_index=True)
    true = np.zeros(len(matched), bool)
    true[rows[first[~difficult[taken]]]] = True
    ignored = np.zeros(len(matched), bool)
    ignored[rows] = difficult[gt[rows]]
    return np.cumsum(true), np.cumsum(~true & ~ignored)


def _precision(true: Array, false: Array) -> Array:
    """The best precision from each detection on: the envelope of the curve, with a 0 after its end."""
    precision = true / np.maximum(true + false, 1)
    return np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)


def _average_11(true: Array, false: Array, gts: int) -> float:
    # the first detection with a recall of k / 10 or more
    at = [np.searchsorted(10 * true, k * gts) for k in range(11)]
    return float(_precision(true, false)[at].mean())


def _average_area(true: Array, false: Array, gts: int) -> float:
    return float((_precision(true, false)[:-1] * np.diff(true, prepend=0)).sum() / gts)


def _curve(true: Array, false: Array, gts: int) -> tuple[Array, Array]:
    at = np.searchsorted(100 * true, np.arange(101) * gts)
    return np.linspace(0, 1, 101), _precision(true, false)[at]
