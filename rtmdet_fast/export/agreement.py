"""How far an exported file agrees with the model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rtmdet_fast.export.graph import Graph, WithoutNMS

Run = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Network input [B, 3, H, W] float32 → outputs by name."""


class Tolerance(NamedTuple):
    """By how much what an exported file detects may differ from what its model does.

    pixels, side: a box, by pixels of the network's input and by a share of its longer side
    score: of a detection
    masks: 1 - IoU of all masks together
    unmatched: share of the detections that may be others
    clear: of all detections only those with this share of the best score of their image, or more, are compared
    """

    pixels: float
    side: float
    score: float
    masks: float
    unmatched: float
    clear: float


EXACT = Tolerance(pixels=0.05, side=0, score=1e-4, masks=0.01, unmatched=0.01, clear=0)
"""Scores that differ by rounding and IoUs at the threshold make a detection another one."""
INT8 = Tolerance(pixels=2, side=0.25, score=0.2, masks=0.2, unmatched=0.3, clear=0.5)
"""Files that cost 0.01 AP or less were seen to leave 10 in 100 unmatched at most."""


class Agreement(NamedTuple):
    """How far an exported file agrees with its model: detections compared, greatest differences, those unmatched.

    box_error: in pixels of the network's input; mask_error: 1 - IoU of all masks together.
    """

    detections: int
    box_error: float
    score_error: float
    mask_error: float
    unmatched: int

    def is_within(self, tolerance: Tolerance) -> bool:
        return self.unmatched <= max(tolerance.unmatched * self.detections, 1) and self.mask_error <= tolerance.masks


class Found(NamedTuple):
    """Of one image: dets [D, 5 or 6], labels [D], mask logits [D, h, w] where there are masks."""

    dets: Tensor
    labels: Tensor
    masks: Tensor | None

    def take(self, index: Tensor) -> Found:
        return Found(self.dets[index], self.labels[index], None if self.masks is None else self.masks[index])


@torch.no_grad()
def compare(graph: Graph, run: Run, batches: Iterable[Tensor], tolerance: Tolerance) -> Agreement:
    """What the file's `run` gives beside the graph, for normalised images [B, 3, H, W].

    A detection is matched by one of its label within the tolerance, without NMS a box by that of its place.
    """
    total = unmatched = common = either = 0
    box_error = score_error = 0.0
    device = next(graph.parameters()).device
    for images in batches:
        outputs = dict(zip(graph.output_names, (output.cpu() for output in graph(images.to(device))), strict=True))
        others = {name: torch.from_numpy(output) for name, output in run(images.contiguous().numpy()).items()}
        if isinstance(graph, WithoutNMS):
            clear = outputs["scores"] >= tolerance.clear * outputs["scores"].amax((1, 2), keepdim=True)
            clear = clear.any(2)
            room = room_of(outputs["boxes"], tolerance)[clear]
            boxes, scores = ((outputs[name] - others[name]).abs().amax(2)[clear] for name in graph.output_names)
            total += boxes.numel()
            unmatched += int((~(boxes <= room) | ~(scores <= tolerance.score)).sum())
            box_error, score_error = max(box_error, float(boxes.max())), max(score_error, float(scores.max()))
            continue
        for ours, theirs in zip(found_in(outputs), found_in(others), strict=True):
            best = torch.cat((ours.dets, theirs.dets))[:, -1:].amax().item() if len(ours.dets) + len(theirs.dets) else 0
            for one, other in ((ours, theirs), (theirs, ours)):
                one = one.take(one.dets[:, -1] >= tolerance.clear * best)
                total += len(one.dets) if other is theirs else 0
                matched, place = matches(one, other, tolerance)
                unmatched += int((~matched).sum())
                if not matched.any():
                    continue
                one, other = one.take(matched), other.take(place[matched])
                away = (one.dets - other.dets).abs()
                box_error = max(box_error, float(away[:, :4].max()))
                score_error = max(score_error, float(away[:, -1].max()))
                if one.masks is not None and other.masks is not None:
                    common += int(((one.masks > 0) & (other.masks > 0)).sum())
                    either += int(((one.masks > 0) | (other.masks > 0)).sum())
    return Agreement(total, box_error, score_error, 1 - common / either if either else 0.0, unmatched)


def found_in(outputs: dict[str, Tensor]) -> list[Found]:
    masks: Sequence[Tensor | None] = outputs.get("mask_logits", [None] * len(outputs["dets"]))  # type: ignore[assignment]
    return [
        Found(dets, labels, logits).take(labels >= 0)
        for dets, labels, logits in zip(outputs["dets"], outputs["labels"], masks, strict=True)
    ]


def room_of(boxes: Tensor, tolerance: Tolerance) -> Tensor:
    """By how many pixels each of the boxes [..., 4 or 5] may be another [...]."""
    sides = boxes[..., 2:4] if boxes.shape[-1] == 5 else boxes[..., 2:] - boxes[..., :2]
    return (tolerance.side * sides.amax(-1)).clamp(min=tolerance.pixels)


def matches(ours: Found, theirs: Found, tolerance: Tolerance) -> tuple[Tensor, Tensor]:
    """Which of ours [D] have their like among theirs, and which that is [D]."""
    if not len(theirs.dets):
        return torch.zeros(len(ours.dets), dtype=torch.bool), torch.zeros(len(ours.dets), dtype=torch.int64)
    away = (ours.dets[:, None, :4] - theirs.dets[None, :, :4]).abs().amax(2)
    room = room_of(ours.dets[:, :-1], tolerance)[:, None]
    near = (away <= room) & ((ours.dets[:, None, -1] - theirs.dets[None, :, -1]).abs() <= tolerance.score)
    away = away.masked_fill(~near | (ours.labels[:, None] != theirs.labels[None]), torch.inf)
    nearest = away.min(1)
    return nearest.values.isfinite(), nearest.indices
