"""The graph that is exported: from the network's input to detections, of operators that every runtime has.

Legend: B images, K candidates, D detections.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtmdet_fast.inference.detections import DetectSettings
from rtmdet_fast.kernels.dynamic_mask_torch import layers, places
from rtmdet_fast.kernels.nms import batched_nms_padded
from rtmdet_fast.kernels.rotated_iou import _iou
from rtmdet_fast.models.rtmdet.detection_head import flatten_levels
from rtmdet_fast.models.rtmdet.instance_head import KERNEL_SIZE, MASK_STRIDE


class EndToEnd(nn.Module):
    """Normalised images [B, 3, H, W] → dets [B, D, 5] xyxy and score, labels [B, D], in pixels of the network's input.

    Names and shapes are those of mmdeploy's end-to-end models; rotated boxes make dets [B, D, 6]. Detections fall by
    score; after the last, scores are 0 and labels -1. With masks also masks [B, D, H, W] in [0, 1], and mask_logits
    [B, D, H/8, W/8], which they are interpolated from.
    """

    def __init__(self, model: Any, settings: DetectSettings, capacity: int):
        """model: folded. capacity: the K candidates of an image that NMS sees."""
        super().__init__()
        self.model, self.settings, self.capacity = model, settings, capacity

    @property
    def output_names(self) -> list[str]:
        return ["dets", "labels", *(["masks", "mask_logits"] if self.model.has_masks else [])]

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        output, head = self.model(input), self.model.bbox_head
        size = input.shape[2], input.shape[3]
        nms = rotated_nms_padded if self.model.task == "rotated" else batched_nms_padded
        found = head.detect_padded(output, size, self.settings, self.capacity, nms)
        dets = torch.cat((found.boxes, found.scores[..., None]), -1)
        if not self.model.has_masks:
            return dets, found.labels
        priors = head.priors(output)[found.priors]
        kernels = flatten_levels(output.kernels).gather(1, found.priors[..., None].expand(-1, -1, KERNEL_SIZE))
        logits = mask_logits(output.features, kernels, priors[..., :2], priors[..., 2])
        masks = F.interpolate(logits, scale_factor=float(MASK_STRIDE), mode="bilinear", align_corners=False).sigmoid()
        return dets, found.labels, masks, logits


def mask_logits(features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """`dynamic_mask_logits` of as many masks in every image, in plain operators.

    features [B, 8, h, w], kernels [B, D, 169], points [B, D, 2] and strides [B, D] of the priors → [B, D, h, w].
    Coordinates, affine in the pixel's place, are folded into the first layer: no input is copied for each mask.
    """
    (B, _, h, w), D = features.shape, kernels.shape[1]
    scale = 1 / (8 * strides.flatten()[:, None, None])
    first, w2, b2, w3, b3 = layers(kernels.flatten(0, 1), points.flatten(0, 1), scale)
    at = places(h, w, MASK_STRIDE, features.dtype, features.device)
    pixels = torch.cat((features, at[None].expand(B, -1, -1, -1)), 1).flatten(2)
    x1 = (first.reshape(B, D * 8, 11) @ pixels).relu().reshape(B * D, 8, h * w)
    x2 = (w2 @ x1 + b2).relu()
    return (w3 @ x2 + b3).reshape(B, D, h, w)


def rotated_nms_padded(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_keep: int
) -> tuple[Tensor, Tensor]:
    """`batched_nms_padded` of rotated boxes [B, K, 5], in plain operators and the dtype of the boxes.

    IoU is worked out for the pairs of a class whose bounding circles meet.
    """
    order = scores.sort(dim=1, descending=True).indices  # stable in ONNX
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 5))
    scores, labels = scores.gather(1, order), labels.gather(1, order)
    radius = (boxes[..., 2] * boxes[..., 2] + boxes[..., 3] * boxes[..., 3]).sqrt() / 2
    reach = radius[:, :, None] + radius[:, None]
    away = boxes[:, :, None, :2] - boxes[:, None, :, :2]
    alike = (labels[:, :, None] == labels[:, None]) & ((away * away).sum(-1) < reach * reach)
    real = scores > 0
    alike = (alike & real[:, :, None] & real[:, None]).triu(1)
    image, better, worse = alike.nonzero(as_tuple=True)
    iou = _iou(boxes[image, better], boxes[image, worse])
    suppresses = torch.zeros_like(alike, dtype=boxes.dtype)
    suppresses = suppresses.index_put((image, better, worse), (iou > iou_threshold).to(boxes.dtype))
    kept = greedy(suppresses) & real
    place = kept.cumsum(1)
    keep = order.new_full((1, 1), -1).expand(order.shape[0], max_keep + 1)
    keep = keep.scatter(1, torch.where(kept & (place <= max_keep), place - 1, max_keep), order)
    slot = torch.arange(max_keep, device=boxes.device)
    counts = kept.sum(1).clamp(max=max_keep)
    return torch.where(slot < counts[:, None], keep[:, :max_keep], -1), counts


@torch.library.custom_op("rtmdet_fast::greedy", mutates_args=())
def greedy(suppresses: Tensor) -> Tensor:
    """Which of K boxes, the best first, greedy NMS keeps → [B, K] bool.

    suppresses: [B, K, K], 1 where box i is better than box j and would suppress it, else 0. What is kept is the fixed
    point of "no kept box suppresses me", reached after as many rounds as the longest chain of suppressions.
    """
    keep, before = suppresses.new_ones(suppresses.shape[0], 1, suppresses.shape[1]), None
    while before is None or not torch.equal(keep, before):
        before, keep = keep, (keep @ suppresses == 0).to(keep.dtype)
    return keep[:, 0] > 0


@greedy.register_fake
def _(suppresses: Tensor) -> Tensor:
    return suppresses.new_empty(suppresses.shape[:2], dtype=torch.bool)
