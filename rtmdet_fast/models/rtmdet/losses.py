"""The loss of RTMDet's boxes; that of its scores is `rtmdet_fast.kernels.quality_focal_loss`."""

from __future__ import annotations

import torch
from torch import Tensor


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
