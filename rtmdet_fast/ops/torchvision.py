"""`nms` and `batched_nms` with the signatures of `torchvision.ops`, and its answers: only the import line changes.

| given | answer |
|---|---|
| boxes without area, or with NaN or infinite coordinates | kept; they suppress nothing |
| scores of −inf, +inf, NaN | take part, in the order −inf < … < +inf < NaN |
| `iou_threshold` outside [0, 1] | taken: below 0 boxes far apart suppress each other too |
| `batched_nms` of an empty tensor of any shape | no indices; the other arguments are not looked at |
| `idxs` | any numbers; up to 1,000 boxes (on a GPU 25,000) a class moves its boxes by idx × (greatest coordinate \
+ 1), so that coordinates below 0, or one that is not finite, let classes meet, or not meet themselves |
| quantized tensors | taken as what they stand for |
| wrong shapes, dtypes or devices | RuntimeError |

Beyond the original: boxes and scores in half precision on a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rtmdet_fast.kernels.greedy_nms import greedy_nms, kept_within, move_apart

__all__ = ["batched_nms", "nms"]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Boxes [N, 4] xyxy, scores [N] -> keep [K] int64 by falling score."""
    boxes, scores = _checked(boxes, scores)
    return greedy_nms(boxes, scores, _threshold(boxes, iou_threshold), stable=True)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Boxes [N, 4] xyxy, scores [N], idxs [N] -> keep [K] int64 by falling score; NMS within equal `idxs`."""
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    boxes, scores = _checked(boxes, scores)
    threshold = _threshold(boxes, iou_threshold)
    if boxes.numel() <= (100_000 if boxes.is_cuda else 4_000):
        moved, groups = move_apart(boxes, idxs, threshold)
        return greedy_nms(moved, scores, threshold, groups, stable=True)
    keep = kept_within(boxes, scores, idxs, threshold, stable=True).nonzero()[:, 0]
    return keep[scores[keep].sort(descending=True).indices]


def _checked(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise RuntimeError(f"boxes have shape {tuple(boxes.shape)}: expected [N, 4]")
    if scores.shape != boxes.shape[:1]:
        raise RuntimeError(f"scores have shape {tuple(scores.shape)}: expected [{len(boxes)}] as boxes have")
    if scores.dtype != boxes.dtype or scores.device != boxes.device:
        raise RuntimeError(f"boxes are {boxes.dtype} on {boxes.device}, scores {scores.dtype} on {scores.device}")
    if boxes.is_quantized:
        boxes, scores = boxes.dequantize(), scores.dequantize()
    if not boxes.is_floating_point():
        raise RuntimeError(f"boxes are {boxes.dtype}: expected a floating dtype")
    return boxes.detach(), scores.detach()


def _threshold(boxes: Tensor, iou_threshold: float) -> float:
    """The original compares an IoU in float32 with a threshold in float64: with the float32 that is not above it."""
    if boxes.dtype != torch.float32 or boxes.is_cuda:
        return iou_threshold
    near = np.float32(iou_threshold)
    return float(np.nextafter(near, np.float32(-np.inf)) if float(near) > iou_threshold else near)
