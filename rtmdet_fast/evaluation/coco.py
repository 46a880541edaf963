"""COCO's figures, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.errors import UserError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


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
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    pr_curves: dict[str, tuple[np.ndarray, np.ndarray]]
    detections: list[dict[str, Any]] = field(repr=False)
    skipped: int = 0


def score_detections(
    dataset: CocoDataset,
    detections: list[dict[str, Any]],
    image_ids: list[int] | None = None,
    skipped: int = 0,
    iou_type: str = "bbox",
) -> Evaluation:
    """COCO figures of detections in COCO results form (category ids and pixels of the data set).

    iou_type: "bbox", or "segm" for masks, which a data set made with masks=True has.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = dataset.to_coco()
        if iou_type == "segm":
            for d in detections:  # pycocotools takes masks of different sizes for disjoint
                image = truth.imgs.get(d["image_id"])
                if image and d["segmentation"]["size"] != [image["height"], image["width"]]:
                    height, width = d["segmentation"]["size"]
                    raise UserError(
                        f"{dataset.annotation_path}: image {d['image_id']} has {image['width']}x{image['height']} "
                        f"pixels, and a detection's mask {width}x{height}; correct one of them"
                    )
        if detections:
            found = truth.loadRes([dict(d) for d in detections])  # it writes into what it is given
        else:  # loadRes cannot take an empty list
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        scorer = COCOeval(truth, found, iou_type)
        if image_ids is not None:
            scorer.params.imgIds = sorted(image_ids)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    metrics = {name: float(value) for name, value in zip(METRICS, scorer.stats, strict=True)}
    # precision: [IoU thresholds, recalls, classes, areas, limits]; all areas, 100 detections
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    names = [dataset.class_names[dataset.category_ids.index(i)] for i in scorer.params.catIds]
    per_class, curves = {}, {}
    for k, name in enumerate(names):
        values = precision[:, :, k]
        measured = values[values > -1]
        per_class[name] = {
            "AP": float(measured.mean()) if measured.size else -1.0,
            "AP50": float(values[0].mean()) if measured.size else -1.0,
        }
        if measured.size:
            curves[name] = (scorer.params.recThrs.copy(), values[0].copy())
    return Evaluation(metrics, per_class, curves, detections, skipped)
