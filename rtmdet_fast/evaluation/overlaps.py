"""Which detections overlap which ground truth, of a whole data set, and which are taken for which, as COCO decides it.

Legend: N detections, M objects of the ground truth, P pairs that overlap, T thresholds of IoU.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.errors import UserError
from rtmdet_fast.kernels.rotated_iou import box_iou_rotated_reference

# pycocotools is imported where it is used: the package imports without it.

LEAST_IOU = 0.1
"""Of the pairs that are kept: below it, a detection is one of background (arXiv:2008.08115)."""
MAX_DETECTIONS = 100
"""Of a class in an image, the best ones, which alone COCO counts."""
# Pairs of rotated boxes whose IoU is computed at once, some 100 MB.
CHUNK = 1 << 17

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Detections and ground truth of images 0, 1, …; in each image detections fall by score, equal ones as they came.

    image_count: of the images, also those without either
    det_images, scores, labels, det_areas: [N] int64, float64, int64, float64; areas in pixels
    gt_images, gt_labels, gt_areas: [M] likewise
    gt_boxes: [M, 4] xyxy or [M, 5] rotated, pixels
    ignored: [M] bool: crowds and difficult objects, which need not be found and which any number of detections may find
    dets, gts, ious: [P], the pairs with an IoU of LEAST_IOU or more, of whatever classes, by detection, then by object;
        the IoU with an ignored object of COCO is the share of the detection that lies in it
    limit: detections of a class in an image that count; None for all
    """

    image_count: int
    det_images: Array
    scores: Array
    labels: Array
    det_areas: Array
    gt_images: Array
    gt_labels: Array
    gt_areas: Array
    gt_boxes: Array
    ignored: Array
    dets: Array
    gts: Array
    ious: Array
    limit: int | None = MAX_DETECTIONS

    def ranks(self) -> Array:
        """[N], the place of each detection among those of its class in its image, from 0."""
        order = np.lexsort((self.labels, self.det_images))  # which keeps the order within
        return _places(self.det_images[order], self.labels[order], order)

    def match(self, thresholds: Sequence[float] | Array, ignored: Array | None = None) -> Array:
        """Which object [N, T] each detection is taken for, by each threshold; -1 for none. As COCO decides it.

        The best scored detection chooses first: of its class the free object with the greatest IoU, the later one of
        equal IoUs, and one that is ignored only where there is no other.

        ignored: [M] bool, further objects that need not be found, but that one detection alone may find.
        """
        ignored = self.ignored if ignored is None else ignored | self.ignored
        limits = np.asarray(thresholds, np.float64)
        matched = np.full((len(self.scores), len(limits)), -1)
        same = (self.labels[self.dets] == self.gt_labels[self.gts]) & (self.ious >= limits.min(initial=1.0))
        if self.limit is not None:
            same &= self.ranks()[self.dets] < self.limit
        dets, gts, ious = self.dets[same], self.gts[same], self.ious[same]
        if not len(dets):
            return matched
        # The first detections of all images and classes choose side by side, then the second ones, and so on.
        chooser, starts = np.unique(dets, return_index=True)
        order = np.lexsort((self.labels[chooser], self.det_images[chooser]))
        turn = _places(self.det_images[chooser][order], self.labels[chooser][order], order)
        pairs = np.split(
            np.argsort(np.repeat(turn, np.diff(starts, append=len(dets))), kind="stable"),
            _ends(turn, starts, len(dets)),
        )
        taken = np.zeros((len(self.gt_labels), len(limits)), bool)
        for pair in pairs:
            det, gt, iou = dets[pair], gts[pair], ious[pair][:, None]
            first = np.flatnonzero(np.diff(det, prepend=-1))
            free = (iou >= limits) & ~taken[gt]
            choice = _last_best(np.where(free & ~ignored[gt][:, None], iou, -1.0), first)
            other = _last_best(np.where(free & ignored[gt][:, None], iou, -1.0), first)
            choice = np.where(choice < 0, other, choice)
            row, column = np.nonzero(choice >= 0)
            chosen = gt[choice[row, column]]
            matched[det[first][row], column] = chosen
            once = ~self.ignored[chosen]
            taken[chosen[once], column[once]] = True
        return matched


def _places(images: Array, labels: Array, order: Array) -> Array:
    """Of sorted groups (image, label): the place of each member in its group, at its position before `order`."""
    n = len(order)
    new = np.ones(n, bool)
    new[1:] = (np.diff(images) != 0) | (np.diff(labels) != 0)
    starts = np.flatnonzero(new)
    places = np.empty(n, np.int64)
    places[order] = np.arange(n) - np.repeat(starts, np.diff(starts, append=n))
    return places


def _ends(turn: Array, starts: Array, pairs: int) -> Array:
    """Where, among pairs sorted by turn, each turn but the last ends."""
    return np.cumsum(np.bincount(turn, np.diff(starts, append=pairs)).astype(np.int64))[:-1]


def _last_best(values: Array, first: Array) -> Array:
    """Of groups of rows, each from `first` [g] on: the last row with the greatest value [g, T]; -1 for none."""
    best = np.maximum.reduceat(values, first)
    sizes = np.diff(first, append=len(values))
    rows = np.where((values == np.repeat(best, sizes, 0)) & (values >= 0), np.arange(len(values))[:, None], -1)
    return np.maximum.reduceat(rows, first)


def coco_overlaps(
    dataset: CocoDataset,
    detections: Sequence[dict[str, Any]],
    image_ids: Sequence[int] | None = None,
    iou_type: str = "bbox",
) -> Overlaps:
    """The overlaps of detections in COCO results form; labels index the data set's classes.

    Args:
        dataset: not of training=True; made with masks=True for iou_type "segm".
        detections: with category ids and pixels of the data set; those of other categories are left out.
        image_ids: of the images that count; all where not given. They become the images 0, 1, … in rising order.
        iou_type: "bbox", or "segm" for masks.

    Raises UserError for detections in images that the data set lacks, and for masks of another size than their image.
    """
    from pycocotools import mask

    with contextlib.redirect_stdout(io.StringIO()):
        truth = dataset.to_coco()
    ids = sorted(set(truth.imgs if image_ids is None else image_ids))
    number = {ident: i for i, ident in enumerate(ids)}
    label_of = {category: label for label, category in enumerate(dataset.category_ids) if category >= 0}
    found: list[list[dict[str, Any]]] = [[] for _ in ids]
    for d in detections:
        if d["image_id"] not in truth.imgs:
            raise UserError(f"{dataset.annotation_path}: has no image {d['image_id']}, of which there are detections")
        if d["image_id"] in number and d["category_id"] in label_of:
            found[number[d["image_id"]]].append(d)
    parts: list[tuple[Array, ...]] = []
    det_areas, gt_areas, gt_boxes, crowd, gt_labels = [], [], [], [], []
    scores, labels = [], []
    n = m = 0
    for ident, dets in zip(ids, found, strict=True):
        gts = truth.imgToAnns.get(ident, [])
        image_scores = np.array([d["score"] for d in dets], np.float64)
        order = np.argsort(-image_scores, kind="stable")
        dets = [dets[i] for i in order]
        boxes = np.array([g["bbox"] for g in gts], np.float64).reshape(-1, 4)
        crowds = [int(g["iscrowd"]) for g in gts]
        if iou_type == "segm":
            shapes = [_rle(truth, dataset, d) for d in dets]
            det_areas.append(np.array(mask.area(shapes) if shapes else [], np.float64))
            iou = mask.iou(shapes, [truth.annToRLE(g) for g in gts], crowds) if dets and gts else []
        else:
            det_boxes = np.array([d["bbox"] for d in dets], np.float64).reshape(-1, 4)
            det_areas.append(det_boxes[:, 2] * det_boxes[:, 3])
            iou = mask.iou(det_boxes, boxes, crowds) if dets and gts else []
        iou = np.asarray(iou, np.float64).reshape(len(dets), len(gts))
        i, j = np.nonzero(iou >= LEAST_IOU)
        parts.append((i + n, j + m, iou[i, j]))
        n, m = n + len(dets), m + len(gts)
        scores.append(image_scores[order])
        labels.append(np.array([label_of[d["category_id"]] for d in dets], np.int64))
        gt_labels.append(np.array([label_of[g["category_id"]] for g in gts], np.int64))
        gt_areas.append(np.array([g["area"] for g in gts], np.float64))
        gt_boxes.append(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        crowd.append(np.array(crowds, bool))
    return Overlaps(
        len(ids),
        _image_numbers(scores),
        _joined(scores, np.float64),
        _joined(labels, np.int64),
        _joined(det_areas, np.float64),
        _image_numbers(gt_labels),
        _joined(gt_labels, np.int64),
        _joined(gt_areas, np.float64),
        np.concatenate([np.zeros((0, 4)), *gt_boxes]),
        _joined(crowd, bool),
        _joined([i for i, _, _ in parts], np.int64),
        _joined([j for _, j, _ in parts], np.int64),
        _joined([iou for _, _, iou in parts], np.float64),
    )


def _rle(truth: Any, dataset: CocoDataset, entry: dict[str, Any]) -> Any:
    image, segmentation = truth.imgs[entry["image_id"]], entry["segmentation"]
    if segmentation["size"] != [image["height"], image["width"]]:  # pycocotools takes such masks for disjoint
        height, width = segmentation["size"]
        raise UserError(
            f"{dataset.annotation_path}: image {entry['image_id']} has {image['width']}x{image['height']} "
            f"pixels, and a detection's mask {width}x{height}; correct one of them"
        )
    return truth.annToRLE(entry)


def _joined(parts: Sequence[Array], kind: type) -> Array:
    return np.concatenate([np.zeros(0, kind), *(np.asarray(part, kind).reshape(-1) for part in parts)])


def _image_numbers(parts: Sequence[Array]) -> Array:
    return np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def rotated_overlaps(
    ground_truth: Sequence[tuple[Array, Array, Array]], detections: Sequence[tuple[Array, Array, Array]]
) -> Overlaps:
    """The overlaps of rotated boxes.

    Args:
        ground_truth: for each image boxes [m, 5] (cx, cy, w, h, radians), labels [m], difficult [m].
        detections: for each image boxes [n, 5], scores [n], labels [n], in any order.
    """
    if len(ground_truth) != len(detections):
        raise ValueError(f"ground_truth is of {len(ground_truth)} images, detections of {len(detections)}")
    orders = [np.argsort(-np.asarray(scores, np.float64), kind="stable") for _, scores, _ in detections]
    gt_boxes, boxes = (
        [np.asarray(boxes, np.float64).reshape(-1, 5) for boxes, _, _ in side] for side in (ground_truth, detections)
    )
    boxes = [box[order] for box, order in zip(boxes, orders, strict=True)]
    of_dets, of_gts = (np.concatenate([np.zeros((0, 5)), *side]) for side in (boxes, gt_boxes))
    pairs = rotated_pairs(boxes, gt_boxes)
    scores, labels = (
        _joined([np.asarray(d[k])[order] for d, order in zip(detections, orders, strict=True)], kind)
        for k, kind in ((1, np.float64), (2, np.int64))
    )
    return Overlaps(
        len(detections),
        _image_numbers(boxes),
        scores,
        labels,
        of_dets[:, 2] * of_dets[:, 3],
        _image_numbers(gt_boxes),
        _joined([truth[1] for truth in ground_truth], np.int64),
        of_gts[:, 2] * of_gts[:, 3],
        of_gts,
        _joined([truth[2] for truth in ground_truth], bool),
        *pairs,
        limit=None,
    )


def rotated_pairs(first: Sequence[Array], second: Sequence[Array]) -> tuple[Array, Array, Array]:
    """Of rotated boxes of one image that overlap: their indices [P] and [P] over all images, and IoU [P].

    first, second: boxes [n, 5] and [m, 5] float64 of each image.
    """
    kept: list[tuple[Array, Array, Array]] = []
    pending: list[tuple[Array, ...]] = []  # of both sides the index, and the boxes

    def flush() -> None:
        i, j, a, b = (np.concatenate(column) for column in zip(*pending, strict=True))
        pending.clear()
        for start in range(0, len(i), CHUNK):
            part = slice(start, start + CHUNK)
            boxes = torch.from_numpy(a[part]), torch.from_numpy(b[part])
            iou = box_iou_rotated_reference(*boxes, aligned=True).double().numpy()
            near = iou >= LEAST_IOU
            kept.append((i[part][near], j[part][near], iou[near]))

    first_a = first_b = waiting = 0
    for a, b in zip(first, second, strict=True):
        reach = np.hypot(a[:, 2], a[:, 3])[:, None] / 2 + np.hypot(b[:, 2], b[:, 3]) / 2
        i, j = np.nonzero(np.hypot(a[:, :1] - b[:, 0], a[:, 1:2] - b[:, 1]) < reach)
        if len(i):
            pending.append((first_a + i, first_b + j, a[i], b[j]))
        first_a, first_b, waiting = first_a + len(a), first_b + len(b), waiting + len(i)
        if waiting >= CHUNK:
            flush()
            waiting = 0
    if pending:
        flush()
    kinds = (np.int64, np.int64, np.float64)
    i, j, iou = (_joined([part[k] for part in kept], kind) for k, kind in enumerate(kinds))
    return i, j, iou
