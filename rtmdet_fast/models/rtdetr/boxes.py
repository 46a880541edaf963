"""Boxes as RT-DETR has them: cxcywh in units of the image, and their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from rtmdet_fast.models.detector import Targets


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] from centre and size to corners."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((center - half, center + half), -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] from corners to centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of x, which is clamped to [0, 1]; of 0 and 1 that of eps and of 1 - eps, ±11.5129."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def relative_targets(targets: Targets, size: tuple[int, int]) -> Targets:
    """The targets with boxes cxcywh in units of the network input, whose (height, width) is `size`."""
    height, width = size
    x0, y0, x1, y1 = targets.boxes.unbind(-1)
    boxes = ((x0 + x1) / (2 * width), (y0 + y1) / (2 * height), (x1 - x0) / width, (y1 - y0) / height)
    return targets._replace(boxes=torch.stack(boxes, -1))


def iou_and_giou(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv:1902.09630) of cxcywh boxes [..., 4], whose leading dimensions broadcast.

    There is no epsilon in the published ones; the floor here, far below the area of a pixel in the largest image, is
    for boxes without any area, of which they make NaN.
    """
    # Coordinate by coordinate: pairs of boxes never become a tensor [..., 4].
    x0, y0, x1, y1 = cxcywh_to_xyxy(boxes).unbind(-1)
    u0, v0, u1, v1 = cxcywh_to_xyxy(others).unbind(-1)
    width, height = torch.minimum(x1, u1) - torch.maximum(x0, u0), torch.minimum(y1, v1) - torch.maximum(y0, v0)
    overlap = width.clamp(min=0) * height.clamp(min=0)
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - overlap
    hull = (torch.maximum(x1, u1) - torch.minimum(x0, u0)) * (torch.maximum(y1, v1) - torch.minimum(y0, v0))
    iou = overlap / union.clamp(min=1e-12)
    return iou, iou - (hull - union) / hull.clamp(min=1e-12)
