"""COCO's figures, as pycocotools counts them, for all classes and images at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.evaluation.overlaps import MAX_DETECTIONS, Overlaps, coco_overlaps

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = {"all": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}
"""Of objects and detections, in pixels."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of a data set.

    Attributes:
        metrics: the twelve COCO figures, in [0, 1], -1 where there is nothing to measure; of rotated boxes DOTA's mAP
            (VOC07 11 points) at IoU 0.5 as AP50, at 0.75 as AP75, and the mean of 0.5 to 0.95 as AP. A model with
            masks has twelve more, of which the names start with segm_, for its masks
        per_class: name → AP and AP50
        pr_curves: name → (recall [101], precision [101]) at IoU 0.5
        detections: COCO results entries
        skipped: images that could not be read
        overlaps: what the figures were counted from; of a model with masks by its masks
        image_ids: of the images 0, 1, … in `overlaps`
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    pr_curves: dict[str, tuple[np.ndarray, np.ndarray]]
    detections: list[dict[str, Any]] = field(repr=False)
    skipped: int = 0
    overlaps: Overlaps | None = field(default=None, repr=False)
    image_ids: tuple[int, ...] = field(default=(), repr=False)


class Counts(NamedTuple):
    """Of K classes and T thresholds of IoU: precision [K, T, 101] at RECALLS, the best at that recall or more, and
    recall [K, T]; -1 for classes without an object; objects [K].
    """

    precision: np.ndarray
    recall: np.ndarray
    objects: np.ndarray

    def average_precision(self) -> float:
        """The mean over classes, thresholds and recalls; -1 where no class has an object."""
        return _mean(self.precision)


def count(
    overlaps: Overlaps,
    classes: int,
    thresholds: Sequence[float] | np.ndarray = THRESHOLDS,
    *,
    ignored: np.ndarray | None = None,
    outside: np.ndarray | None = None,
    matched: np.ndarray | None = None,
    limit: int | None = None,
) -> Counts:
    """Precision and recall of each class.

    Args:
        overlaps: of M objects and N detections.
        classes: K.
        thresholds: of IoU.
        ignored: [M] bool, objects that need not be found.
        outside: [N] bool, detections that are not wrong where they find nothing.
        matched: what `overlaps.match` gave for the same thresholds and objects, where it is known.
        limit: detections of a class in an image that count, fewer than `overlaps` has them.
    """
    if matched is None:
        matched = overlaps.match(thresholds, ignored)
    out = overlaps.ignored if ignored is None else overlaps.ignored | ignored
    found = matched >= 0
    passed = found & out[matched] if len(out) else found
    true = found & ~passed
    if outside is not None:
        passed = passed | (~found & outside[:, None])
    objects = np.bincount(overlaps.gt_labels[~out], minlength=classes)
    precision = np.full((classes, len(thresholds), len(RECALLS)), -1.0)
    recall = np.full((classes, len(thresholds)), -1.0)
    most = min((x for x in (limit, overlaps.limit) if x is not None), default=None)
    counts = np.ones(len(overlaps.scores), bool) if most is None else overlaps.ranks() < most
    # by class, then by falling score; equal ones by image and by place
    order = np.flatnonzero(counts)
    order = order[np.lexsort((-overlaps.scores[order], overlaps.labels[order]))]
    ends = np.searchsorted(overlaps.labels[order], np.arange(classes + 1))
    for k in np.flatnonzero(objects):
        rows = order[ends[k] : ends[k + 1]]
        precision[k], recall[k] = precision_and_recall(true[rows], ~true[rows] & ~passed[rows], int(objects[k]))
    return Counts(precision, recall, objects)


def precision_and_recall(true: np.ndarray, false: np.ndarray, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision [T, 101] at RECALLS, the best at that recall or more, and recall [T], of a class with `objects`.

    true, false: [n, T] bool, of its detections by falling score; those that are neither do not count.
    """
    tp, fp = (np.cumsum(hits, 0, dtype=np.float64) for hits in (true, false))
    envelope = np.maximum.accumulate((tp / (fp + tp + np.spacing(1)))[::-1])[::-1]
    envelope = np.concatenate([envelope, np.zeros((1, true.shape[1]))])
    at = np.stack([np.searchsorted(column / objects, RECALLS) for column in tp.T])
    recall = tp[-1] / objects if len(tp) else np.zeros(true.shape[1])
    return envelope[at, np.arange(len(at))[:, None]], recall


def _mean(values: np.ndarray) -> float:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0


def score_detections(
    dataset: CocoDataset,
    detections: list[dict[str, Any]],
    image_ids: Sequence[int] | None = None,
    skipped: int = 0,
    iou_type: str = "bbox",
) -> Evaluation:
    """COCO figures of detections in COCO results form (category ids and pixels of the data set).

    iou_type: "bbox", or "segm" for masks, which a data set made with masks=True has.
    """
    overlaps = coco_overlaps(dataset, detections, image_ids, iou_type)
    ids = sorted(set(dataset.image_ids if image_ids is None else image_ids))
    classes = len(dataset.class_names)
    metrics = dict.fromkeys(METRICS, -1.0)
    for size, (least, most) in AREAS.items():
        ignored, outside = ((a < least) | (a > most) for a in (overlaps.gt_areas, overlaps.det_areas))
        matched = overlaps.match(THRESHOLDS, ignored)
        for limit in (1, 10, MAX_DETECTIONS) if size == "all" else (MAX_DETECTIONS,):
            counts = count(overlaps, classes, ignored=ignored, outside=outside, matched=matched, limit=limit)
            metrics[f"AR{limit if size == 'all' else size}"] = _mean(counts.recall)
        metrics["AP" if size == "all" else f"AP{size}"] = counts.average_precision()
        if size == "all":
            every = counts
    metrics["AP50"], metrics["AP75"] = (_mean(every.precision[:, t]) for t in (0, 5))
    per_class, curves = {}, {}
    for k in sorted(range(classes), key=lambda k: dataset.category_ids[k]):
        if dataset.category_ids[k] < 0:  # which the data set does not know
            continue
        name = dataset.class_names[k]
        per_class[name] = {"AP": _mean(every.precision[k]), "AP50": _mean(every.precision[k, 0])}
        if every.objects[k]:
            curves[name] = (RECALLS.copy(), every.precision[k, 0].copy())
    return Evaluation(metrics, per_class, curves, detections, skipped, overlaps, tuple(ids))
