"""Losses of RTMDet. All are computed in float32 or better, whatever the model runs in.

Legend: B images, N priors, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quality_focal_loss(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    """Quality focal loss (arXiv:2006.04388, equation 3, beta 2), summed.

    logits [B, N, C]; labels [B, N] int64, -1 is background; quality [B, N] in [0, 1], the target score at the label.
    """
    # Against a target of 0 the loss is sigmoid(x)^2 softplus(x): one dense pass without building the targets;
    # the few positives then exchange their one element.
    background = logits.sigmoid().square() * F.softplus(logits)
    index = labels.clamp(min=0)[..., None]
    positive = labels >= 0
    logit = logits.gather(-1, index)[..., 0]
    at_label = (logit.sigmoid() - quality).square() * F.binary_cross_entropy_with_logits(
        logit, quality, reduction="none"
    )
    exchanged = at_label - background.gather(-1, index)[..., 0]
    return background.sum() + torch.where(positive, exchanged, 0.0).sum()


def giou_loss(boxes: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """1 - generalised IoU (arXiv:1902.09630) of aligned xyxy boxes [..., 4] in pixels → [...]."""

    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    target_width, target_height = (target[..., 2:] - target[..., :2]).unbind(-1)
    inner = torch.minimum(boxes[..., 2:], target[..., 2:]) - torch.maximum(boxes[..., :2], target[..., :2])
    outer = torch.maximum(boxes[..., 2:], target[..., 2:]) - torch.minimum(boxes[..., :2], target[..., :2])
    inner_width, inner_height = inner.clamp(min=0).unbind(-1)
    outer_width, outer_height = outer.clamp(min=0).unbind(-1)
    overlap = inner_width * inner_height
    union = (width * height + target_width * target_height - overlap).clamp(min=eps)
    hull = (outer_width * outer_height).clamp(min=eps)
    return 1 - overlap / union + (hull - union) / hull
