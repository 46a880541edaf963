"""Validation images with their truth and what was found, drawn side by side; of the worst, what went wrong."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.errors import UserError
from rtmdet_fast.evaluation.analysis import Analysis
from rtmdet_fast.evaluation.coco import Evaluation
from rtmdet_fast.evaluation.errors import PASSED, RIGHT
from rtmdet_fast.geometry.masks import Region
from rtmdet_fast.inference.drawing import draw_detections
from rtmdet_fast.pages.page import PICTURE_SIDE, picture, pictures, resized

# pycocotools is imported where it is used: the package imports without it.

WORST, SAMPLES = 12, 12
"""Images that are shown, of the worst and of others."""
NO_THRESHOLD = 0.3
"""Where there is none to choose by."""
RIGHT_COLOR, WRONG_COLOR, PASSED_COLOR = (88, 160, 30), (40, 60, 235), (140, 140, 140)  # BGR


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is drawn on an image.

    boxes: [n, 4] xyxy or [n, 5] rotated, pixels; labels: [n]; scores: [n], or None for the truth
    masks: [n] COCO's run lengths in the image's size, or None
    colors: [n] BGR, or None for those of the classes
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    masks: Sequence[dict[str, Any]] | None = None
    colors: Sequence[tuple[int, int, int]] | None = None

    def on(self, image: np.ndarray, class_names: Sequence[str], scale: float) -> np.ndarray:
        """The image, `scale` times as large, with all of it."""
        boxes = np.array(self.boxes, np.float32)
        boxes[..., :4] *= scale
        masks = None if self.masks is None else _Runs(self.masks, image.shape[:2])
        return draw_detections(image, boxes, self.labels, self.scores, class_names, masks=masks, colors=self.colors)


class _Runs:
    """Masks of run lengths, in an image of another (height, width)."""

    def __init__(self, masks: Sequence[dict[str, Any]], shape: tuple[int, int]):
        self._masks, self._shape = masks, shape

    def region(self, i: int) -> Region:
        import cv2
        from pycocotools import mask

        with warnings.catch_warnings():  # of pycocotools' decode under NumPy 2
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            pixels = mask.decode(self._masks[i])
        height, width = self._shape
        return Region(0, 0, cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA).astype(bool))


@dataclass(frozen=True, eq=False)
class ReportSample:
    """An image [H, W, 3] uint8 BGR with its truth and what was found; `note` tells what went wrong."""

    name: str
    image: np.ndarray
    truth: Drawn
    found: Drawn
    note: str = ""

    def html(self, class_names: Sequence[str]) -> str:
        """Both pictures, side by side."""
        scale = PICTURE_SIDE / max(self.image.shape[:2])
        image = resized(self.image, scale)
        truth, found = (drawn.on(image, class_names, scale) for drawn in (self.truth, self.found))
        told = f"truth: {len(self.truth.labels)}", f"prediction: {len(self.found.labels)}"
        return pictures(self.name, picture(truth, told[0]), picture(found, told[1]), note=self.note)


def report_samples(
    dataset: CocoDataset, evaluation: Evaluation, analysis: Analysis | None
) -> tuple[list[ReportSample], list[ReportSample]]:
    """The worst images of an evaluation, and others, evenly spaced, with what was found above the best thresholds."""
    images = len(evaluation.image_ids)
    even = np.linspace(0, images - 1, min(SAMPLES, images)).astype(int).tolist() if images else []
    if analysis is None or evaluation.overlaps is None:
        return [], _samples(dataset, evaluation, np.full(len(dataset.class_names), NO_THRESHOLD), even)
    worst = analysis.worst_images(evaluation.overlaps, WORST)
    others = [i for i in even if i not in worst]
    return (
        _samples(dataset, evaluation, analysis.thresholds, worst, analysis),
        _samples(dataset, evaluation, analysis.thresholds, others),
    )


def _samples(
    dataset: CocoDataset,
    evaluation: Evaluation,
    thresholds: np.ndarray,
    images: Sequence[int],
    analysis: Analysis | None = None,
) -> list[ReportSample]:
    """Images of an evaluation as the report shows them; those that cannot be read are left out.

    Args:
        dataset: that was evaluated on.
        evaluation: of it, with overlaps.
        thresholds: [K], the least score of each class of the data set.
        images: which, by their number in the evaluation.
        analysis: of the evaluation, where what is right is to be told from what is wrong by colours.
    """
    o = evaluation.overlaps
    if o is None or not len(images):
        return []
    chosen = {evaluation.image_ids[i]: i for i in images}
    entries: dict[int, list[dict[str, Any]]] = {i: [] for i in images}
    labels = {category: label for label, category in enumerate(dataset.category_ids) if category >= 0}
    for entry in evaluation.detections:
        if entry["image_id"] in chosen and entry["category_id"] in labels:
            entries[chosen[entry["image_id"]]].append(entry)
    truth = dataset.to_coco() if dataset.has_masks else None
    index_of = {ident: index for index, ident in enumerate(dataset.image_ids)}
    samples = []
    for i in images:
        ident = evaluation.image_ids[i]
        try:
            loaded = dataset.load(index_of[ident])
        except UserError:  # gone since
            continue
        gts, dets = np.flatnonzero(o.gt_images == i), np.flatnonzero(o.det_images == i)
        objects = np.flatnonzero(~o.ignored[gts])
        gts = gts[objects]
        of_image = sorted(entries[i], key=lambda entry: -entry["score"])  # as the overlaps have them
        kept = np.flatnonzero(o.scores[dets] >= thresholds[o.labels[dets]])
        shown = [of_image[k] for k in kept]
        masks = gt_masks = None
        if truth is not None:
            annotations = truth.imgToAnns.get(ident, [])
            gt_masks = [truth.annToRLE(annotations[k]) for k in objects]
            masks = [entry["segmentation"] for entry in shown]
        colors = gt_colors = None
        if analysis is not None:
            colors = [_color(kind) for kind in analysis.kept_errors.kinds[dets[kept]]]
            gt_colors = [RIGHT_COLOR if found else WRONG_COLOR for found in analysis.kept_errors.found[gts]]
        boxes = np.array([_box(entry, o.gt_boxes.shape[1]) for entry in shown]).reshape(-1, o.gt_boxes.shape[1])
        samples.append(
            ReportSample(
                Path(loaded.path).name,
                loaded.image,
                Drawn(o.gt_boxes[gts], o.gt_labels[gts], None, gt_masks, gt_colors),
                Drawn(boxes, o.labels[dets[kept]], o.scores[dets[kept]], masks, colors),
                "" if analysis is None else analysis.told(o, i),
            )
        )
    return samples


def _color(kind: int) -> tuple[int, int, int]:
    return {RIGHT: RIGHT_COLOR, PASSED: PASSED_COLOR}.get(int(kind), WRONG_COLOR)


def _box(entry: dict[str, Any], size: int) -> list[float]:
    if size == 5:
        return entry["rbox"]
    x, y, width, height = entry["bbox"]
    return [x, y, x + width, y + height]
