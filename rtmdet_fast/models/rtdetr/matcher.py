"""Hungarian matching of queries and ground truths, of every layer of a batch at once.

Legend: K sets of predictions (decoder layers, the encoder), B images, Q queries, M ground truths, C classes.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rtmdet_fast.errors import ImageError
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr.boxes import iou_and_giou


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """The query [K, B, M] int64 of each ground truth; -1 for padding, and where there are more of them than queries.

    Args:
        logits: [K, B, Q, C].
        boxes: [K, B, Q, 4] cxcywh in units of the image.
        targets: with boxes likewise.

    Raises:
        ImageError: predictions for images with objects are not finite.
    """
    return solve(matching_costs(logits.float(), boxes.float(), targets.boxes.float(), targets.labels), targets.counts)


def matching_costs(logits: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Tensor:
    """Costs [K, B, M, Q] of all pairs of an image: 5 · L1 + 2 · focal cost - 2 · GIoU (section 4.1 of DETR's paper).

    logits [K, B, Q, C], boxes [K, B, Q, 4] cxcywh; gt_boxes [B, M, 4] cxcywh, gt_labels [B, M] int64.
    """
    # only logits of classes that are there: [K, B, M, Q]
    index = gt_labels.clamp(min=0)[:, :, None].expand(len(logits), -1, -1, logits.shape[2])
    p = logits.transpose(2, 3).gather(2, index).sigmoid()
    background = 0.75 * p.square() * -(1 - p + 1e-8).log()
    focal = 0.25 * (1 - p).square() * -(p + 1e-8).log() - background
    boxes, gt_boxes = boxes[:, :, None], gt_boxes[:, :, None]
    l1 = sum((x - y).abs() for x, y in zip(boxes.unbind(-1), gt_boxes.unbind(-1), strict=True))
    return 5 * l1 + 2 * focal - 2 * iou_and_giou(boxes, gt_boxes)[1]


@torch.compiler.disable
def solve(costs: Tensor, counts: Tensor) -> Tensor:
    """The matches [K, B, M] of least total cost; see `match`. costs [K, B, M, Q], counts [B] of ground truths.

    The host waits for the device once, for its one copy of everything, and solves each image of each set on its own.
    """
    packed = torch.cat((costs.flatten(), counts.to(costs.dtype))).cpu().numpy()
    costs_here, counts_here = packed[: costs.numel()].reshape(costs.shape), packed[costs.numel() :].astype(np.int64)
    if counts_here.max(initial=0) > costs.shape[3]:
        warnings.warn(
            f"an image has more objects than the model has queries ({costs.shape[3]}): those too many are not learnt",
            stacklevel=3,
        )
    not_finite = [i for i, count in enumerate(counts_here) if not (costs_here[:, i, :count] > -np.inf).all()]
    if not_finite:  # of all images where the weights are, or where batch norms mix what one image makes
        places = f"image{'s' * (len(not_finite) > 1)} {', '.join(map(str, not_finite))}"
        raise ImageError(
            f"predictions for {places} of the batch are not finite: look at what it shows and at its boxes, "
            "or train with a lower learning rate or without AMP",
            not_finite,
        )
    matches = np.full(costs.shape[:3], -1, np.int64)
    for k, image in np.ndindex(*costs.shape[:2]):
        cost = costs_here[k, image, : counts_here[image]]
        target, query = linear_sum_assignment(cost)
        matches[k, image, target] = query
    return torch.from_numpy(matches).to(costs.device)
