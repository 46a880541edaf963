"""What a head finds in one image, and the settings by which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rtmdet_fast.inference.masks import PredictedMasks


class Detections(NamedTuple):
    """Detections of one image, by falling score: boxes [D, 4] xyxy pixels of the network input, scores, labels.

    priors [D]: which of the N priors each comes from. masks: those of the detections, where the task has them.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    priors: Tensor
    masks: PredictedMasks | None = None

    def take(self, index: Tensor) -> Detections:
        """Those that `index` (positions or bool) picks."""
        if index.dtype == torch.bool:  # once: each indexing by bool makes the host wait for the device
            index = index.nonzero()[:, 0]
        return Detections(*(None if field is None else field[index] for field in self))  # type: ignore[arg-type]

    def above(self, thresholds: Sequence[float]) -> Detections:
        """Those that score as much as the threshold of their class, or more."""
        least = torch.tensor(thresholds, dtype=torch.float64, device=self.scores.device)[self.labels]
        return self.take(self.scores.double() >= least)

    def in_image(self, scale: tuple[float, float], shape: tuple[int, int], *, clip: bool) -> Detections:
        """With upright boxes in pixels of the original image, whose (height, width) is `shape`.

        scale: network pixels per image pixel (x, y); `clip` cuts boxes to the image and drops those outside it.
        """
        found = self._replace(boxes=self.boxes / self.boxes.new_tensor([*scale, *scale]))
        if not clip:
            return found
        found = found._replace(boxes=clip_boxes(found.boxes, shape))
        return found.take(have_area(found.boxes))


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] xyxy clipped to an image of (height, width) `size`."""
    x, y = boxes[..., 0::2].clamp(0, size[1]), boxes[..., 1::2].clamp(0, size[0])
    return torch.stack((x, y), -1).flatten(-2)


def have_area(boxes: Tensor) -> Tensor:
    """False [...] for boxes [..., 4] xyxy without an area."""
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


class PaddedDetections(NamedTuple):
    """Detections of B images at sizes that no image decides: D for each, by falling score, then padding.

    boxes [B, D, 4 or 5] in pixels of the network input, scores [B, D] (0 in the padding), labels [B, D] (-1 there),
    priors [B, D] int64 (0 there), counts [B] int64 of what is no padding.
    candidates [B] int64: how many pairs of prior and class passed the score threshold. Where they are more than there
    was room for, detections may be missing.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    priors: Tensor
    counts: Tensor
    candidates: Tensor

    def pack(self, mask_logits: Tensor | None = None) -> Tensor:
        """All of it, and mask_logits [B, D, h, w], as one tensor [B, L] float32: one copy takes it to the host.

        Whole numbers stay exact up to 2^24, to which `candidates` are cut.
        """
        counts = torch.stack([self.counts, self.candidates.clamp(max=2**24)], 1)
        parts = [counts, self.labels, self.priors, self.scores, self.boxes]
        if mask_logits is not None:
            parts.append(mask_logits)
        return torch.cat([part.flatten(1).float() for part in parts], 1)


def unpack(
    packed: Tensor, max_detections: int, box_size: int, mask_shape: tuple[int, int] | None = None
) -> tuple[list[Detections], list[int]]:
    """Detections of each image from what `PaddedDetections.pack` made, on the host; and how many candidates each had.

    box_size: 4, or 5 of rotated boxes; mask_shape: (h, w) of the mask logits.
    """
    counts, candidates = (column.long().tolist() for column in packed[:, :2].unbind(1))
    lengths = [2, *[max_detections] * 3, max_detections * box_size]
    _, labels, priors, scores, boxes, masks = packed.split([*lengths, packed.shape[1] - sum(lengths)], 1)
    found = []
    for i, count in enumerate(counts):
        # copies: what was packed may be written over, and would be kept for as long as a view of it
        box = boxes[i].view(max_detections, box_size)[:count].clone()
        logits = None if mask_shape is None else masks[i].view(max_detections, *mask_shape)[:count].clone()
        predicted = None if logits is None else PredictedMasks(logits, (1.0, 1.0), (0, 0))
        found.append(
            Detections(box, scores[i, :count].clone(), labels[i, :count].long(), priors[i, :count].long(), predicted)
        )
    return found, candidates


@dataclass(frozen=True, kw_only=True)
class DetectSettings:
    """How predictions become detections; scores and IoUs in [0, 1]."""

    score_threshold: float
    iou_threshold: float
    """Of NMS."""
    nms_pre: int
    """Candidates of each level."""
    max_detections: int
