"""What a head finds in one image, and the settings by which."""

from __future__ import annotations

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


@dataclass(frozen=True, kw_only=True)
class DetectSettings:
    """How predictions become detections; scores and IoUs in [0, 1]."""

    score_threshold: float
    iou_threshold: float
    """Of NMS."""
    nms_pre: int
    """Candidates of each level."""
    max_detections: int
