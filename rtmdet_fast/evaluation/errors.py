"""What is wrong with each detection, and what fixing each kind of error would gain, as TIDE counts it.

Bolya, Foley, Hays and Hoffman, "TIDE: A General Toolbox for Identifying Object Detection Errors", arXiv:2008.08115. Of
a detection that found nothing, by its greatest IoU with an object of its own class and with one of another:

| kind | |
|---|---|
| location | 0.1 to 0.5 with its own class |
| class | 0.5 or more with another class |
| duplicate | 0.5 or more with its own class, an object that a better scored detection found |
| background | 0.1 or less with everything |
| both | the rest: 0.1 to 0.5 with another class |
| missed | objects that nothing found, and that no error of class or location is about |

As in the published code, the kinds are tried in the order of this table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rtmdet_fast.evaluation.coco import precision_and_recall
from rtmdet_fast.evaluation.overlaps import LEAST_IOU, Overlaps

FOUND_IOU = 0.5
KINDS = ("class", "location", "both", "duplicate", "background", "missed")
RIGHT, PASSED = -1, -2
"""In place of a kind: a detection that found its object, and one that does not count, as in a crowd."""


@dataclass(frozen=True, eq=False)
class Errors:
    """Of N detections and M objects.

    kinds: [N], index of KINDS, RIGHT or PASSED
    about: [N], the object that was found, or that an error of class, location or a duplicate is about; -1 for none
    found: [M] bool
    missed: [M] bool, as TIDE has it
    """

    kinds: np.ndarray
    about: np.ndarray
    found: np.ndarray
    missed: np.ndarray

    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        found = {kind: int((self.kinds == i).sum()) for i, kind in enumerate(KINDS)}
        return found | {"missed": int(self.missed.sum())}


def find_errors(overlaps: Overlaps, kept: np.ndarray | None = None, matched: np.ndarray | None = None) -> Errors:
    """What is wrong at an IoU of 0.5.

    Args:
        overlaps: of N detections.
        kept: [N] bool, the detections that there are, as above a threshold; of each class the best of an image.
        matched: [N], what `overlaps.match` gave for 0.5, where it is known.
    """
    o = overlaps
    if matched is None:
        matched = o.match([FOUND_IOU])[:, 0]
    here = np.ones(len(o.scores), bool) if kept is None else kept.copy()
    if o.limit is not None:
        here &= o.ranks() < o.limit
    kinds = np.full(len(o.scores), PASSED)
    about = np.where(here, matched, -1)
    right = here & (matched >= 0)
    right[right] = ~o.ignored[matched[right]]
    kinds[right] = RIGHT
    found = np.zeros(len(o.gt_labels), bool)
    found[matched[right]] = True
    wrong = here & (matched < 0)
    counted = ~o.ignored[o.gts]
    own = o.labels[o.dets] == o.gt_labels[o.gts]
    own_iou, own_gt = _greatest(o, counted & own)
    other_iou, other_gt = _greatest(o, counted & ~own)
    located = wrong & (own_iou >= LEAST_IOU) & (own_iou <= FOUND_IOU)
    classed = wrong & ~located & (other_iou >= FOUND_IOU)
    twice = wrong & ~located & ~classed & (own_iou >= FOUND_IOU)
    background = wrong & ~located & ~classed & ~twice & (np.maximum(own_iou, other_iou) <= LEAST_IOU)
    both = wrong & ~located & ~classed & ~twice & ~background
    for kind, which in zip(KINDS, (classed, located, both, twice, background), strict=False):
        kinds[which] = KINDS.index(kind)
    about[located | twice], about[classed] = own_gt[located | twice], other_gt[classed]
    missed = ~found & ~o.ignored
    missed[about[located | classed]] = False
    return Errors(kinds, about, found, missed)


def _greatest(o: Overlaps, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each detection the greatest IoU among the pairs, 0 for none, and the object, of equals the first."""
    iou, gt = np.zeros(len(o.scores)), np.full(len(o.scores), -1)
    dets, gts, ious = o.dets[pairs], o.gts[pairs], o.ious[pairs]
    order = np.lexsort((-ious, dets))
    dets, first = np.unique(dets[order], return_index=True)
    iou[dets], gt[dets] = ious[order][first], gts[order][first]
    return iou, gt


@dataclass(frozen=True)
class Gains:
    """AP at IoU 0.5, and how much higher it would be without the errors of each kind, of KINDS; all in [0, 1].

    false_positives: gained where all that is wrong were scored below all that is right
    false_negatives: gained where nothing were to be found beyond what is
    """

    ap50: float
    by_kind: dict[str, float]
    false_positives: float
    false_negatives: float


def gains(overlaps: Overlaps, errors: Errors, classes: int) -> Gains:
    """What fixing each kind of error alone would gain in AP50 (dAP in the paper); classes without objects do not count.

    An error of class or location is fixed by correcting the best scored one about each object that was not found, and
    leaving out the others; errors of both kinds, duplicates and background by leaving them out; missed objects by
    looking for them no longer.
    """
    o, e = overlaps, errors
    objects = np.bincount(o.gt_labels[~o.ignored], minlength=classes)
    counts = e.kinds != PASSED
    right = e.kinds == RIGHT

    def ap(labels: np.ndarray, scores: np.ndarray, true: np.ndarray, there: np.ndarray, objects: np.ndarray) -> float:
        rows = np.flatnonzero(there)
        rows = rows[np.lexsort((-scores[rows], labels[rows]))]
        ends = np.searchsorted(labels[rows], np.arange(classes + 1))
        figures = []
        for k in np.flatnonzero(measured):
            of_class = true[rows[ends[k] : ends[k + 1]], None]
            left = int(objects[k])
            figures.append(precision_and_recall(of_class, ~of_class, left)[0].mean() if left else 0.0)
        return float(np.mean(figures))

    measured = objects > 0
    if not measured.any():
        return Gains(-1.0, dict.fromkeys(KINDS, 0.0), 0.0, 0.0)
    base = ap(o.labels, o.scores, right, counts, objects)
    # of all errors of class and location about an object, detections fall by score within their image
    correctable = np.isin(e.kinds, (KINDS.index("class"), KINDS.index("location")))
    correctable[correctable] = ~e.found[e.about[correctable]]
    rows = np.flatnonzero(correctable)
    best = np.zeros(len(o.scores), bool)
    best[rows[np.unique(e.about[rows], return_index=True)[1]]] = True
    by_kind = {}
    for i, kind in enumerate(KINDS[:-1]):
        these = e.kinds == i
        fixed = these & best
        labels = o.labels.copy()
        labels[fixed] = o.gt_labels[e.about[fixed]]
        by_kind[kind] = ap(labels, o.scores, right | fixed, counts & (fixed | ~these), objects)
    fewer = objects - np.bincount(o.gt_labels[e.missed], minlength=classes)
    by_kind["missed"] = ap(o.labels, o.scores, right, counts, fewer)
    only = objects - np.bincount(o.gt_labels[~e.found & ~o.ignored], minlength=classes)
    return Gains(
        base,
        {kind: max(value - base, 0.0) for kind, value in by_kind.items()},
        max(ap(o.labels, right.astype(np.float64), right, counts, objects) - base, 0.0),
        max(ap(o.labels, o.scores, right, counts, only) - base, 0.0),
    )
