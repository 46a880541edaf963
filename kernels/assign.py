"""Dynamic soft label assignment of RTMDet (arXiv:2212.07784), SimOTA (arXiv:2107.08430) and TaskAligned (arXiv:2108.07755)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_soft_label_assign(
    boxes: Tensor, logits: Tensor, priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_counts: Tensor,
    gt_centers: Tensor | None = None, *, topk: int = 13, center_radius: float = 3.0, iou_weight: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Assigns at most one ground truth to every prior, for a whole batch.

    boxes [B, N, 4] xyxy or [B, N, 5] (cx, cy, w, h, radians), logits [B, N, C], priors [N, 4] (x, y, stride, stride),
    gt_boxes [B, M, 4 or 5], gt_labels [B, M], gt_counts [B]: rows from gt_counts[b] on are padding.
    gt_centers [B, M, 2]: where the distance is taken from (mask centroids) instead of the box centres.

    Returns assigned_gt [B, N] int64 (-1 background), assigned_iou [B, N] float32 (float64 for float64 boxes;
    0 background), assigned_labels [B, N] int64 (-1 background).
    """
    with torch.no_grad():
        return dynamic_soft_label_assign_reference(boxes, logits, priors, gt_boxes, gt_labels, gt_counts,
                                                   gt_centers, topk, center_radius, iou_weight)


def dynamic_soft_label_assign_reference(boxes, logits, priors, gt_boxes, gt_labels, gt_counts, gt_centers, topk,
                                        center_radius, iou_weight):
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    boxes, priors, gt_boxes = boxes.to(dtype), priors.to(dtype), gt_boxes.to(dtype)
    (B, N, C), M = logits.shape, gt_boxes.shape[1]
    gt = boxes.new_full((B, N), -1, dtype=torch.int64)
    if N == 0 or M == 0 or B == 0:
        return gt, boxes.new_zeros((B, N)), gt.clone()
    rotated = boxes.shape[-1] == 5
    real = (torch.arange(M, device=boxes.device) < gt_counts[:, None]) & gt_boxes.isfinite().all(-1)
    real &= (gt_labels >= 0) & (gt_labels < C)
    real &= ((gt_boxes[..., 2:4] >= 0) if rotated else (gt_boxes[..., 2:] >= gt_boxes[..., :2])).all(-1)
    gt_boxes = gt_boxes.masked_fill(~real[..., None], 0)
    labels = gt_labels.long().masked_fill(~real, 0)
    p = priors[:, :2]
    if rotated:
        from rtmdet_fast.kernels.rotated_iou import box_iou_rotated_reference
        center = gt_boxes[..., :2]
        d = p - center[:, :, None]
        cos, sin = gt_boxes[..., 4:].cos(), gt_boxes[..., 4:].sin()
        u, v = d[..., 0] * cos + d[..., 1] * sin, d[..., 1] * cos - d[..., 0] * sin
        inside = (u.abs() < gt_boxes[..., 2:3] / 2 - 0.01) & (v.abs() < gt_boxes[..., 3:4] / 2 - 0.01)
        clamped = torch.cat([gt_boxes[..., :2], gt_boxes[..., 2:4].clamp(min=1e-3), gt_boxes[..., 4:]], -1)
        iou = box_iou_rotated_reference(clamped, boxes)
    else:
        center = (gt_boxes[..., :2] + gt_boxes[..., 2:]) / 2
        a, b = gt_boxes[:, :, None], boxes[:, None]
        inside = ((p > a[..., :2]) & (p < a[..., 2:])).all(-1)
        wh = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
        inter = wh.prod(-1)
        iou = inter / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter).clamp(min=1e-6)
    candidate = (inside & real[..., None]).any(1)
    center = center if gt_centers is None else gt_centers.to(dtype)
    iou = iou.masked_fill(~iou.isfinite() | ~candidate[:, None], 0)
    x = logits.to(dtype)
    sigma, softplus = x.sigmoid(), F.softplus(x)
    s = (softplus * sigma * sigma).sum(-1)
    a, b = softplus + 2 * x * sigma, sigma * (2 * softplus + x * sigma)
    xg, ag, bg = (t.mT.gather(1, labels[..., None].expand(-1, -1, N)) for t in (x, a, b))
    distance = (p - center[:, :, None]).square().sum(-1).sqrt() / priors[:, 2]
    cost = s[:, None] + iou * (iou * (ag - xg * iou) - bg) - iou_weight * (iou + 1e-7).log() \
        + 10 ** (distance - center_radius)
    cost = cost.masked_fill(~(candidate[:, None] & real[..., None] & cost.isfinite()), torch.inf)
    k = iou.topk(min(topk, N), -1).values.sum(-1).int().clamp(min=1)
    values, index = cost.topk(min(topk, N), -1, largest=False)
    won = (torch.arange(values.shape[-1], device=k.device) < k[..., None]) & values.isfinite()
    matched = torch.zeros_like(cost, dtype=torch.bool).scatter_(-1, index, won)
    count = matched.sum(1)
    winner = torch.where(count > 1, cost.argmin(1), matched.int().argmax(1))
    positive = count > 0
    gt = torch.where(positive, winner, -1)
    out_iou = torch.where(positive, iou.gather(1, winner[:, None])[:, 0], 0)
    return gt, out_iou, torch.where(positive, labels.gather(1, winner), -1)
