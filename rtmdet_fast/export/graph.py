"""The graph that is exported: from the network's input to detections, of operators that every runtime has.

Legend: B images, K candidates, D detections.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtmdet_fast.inference.detections import DetectSettings
from rtmdet_fast.kernels.nms import batched_nms_padded
from rtmdet_fast.kernels.rotated_iou import _iou
from rtmdet_fast.models.detector import Detector


class EndToEnd(nn.Module):
    """Normalised images [B, 3, H, W] → dets [B, D, 5] xyxy and score, labels [B, D], in pixels of the network's input.

    Names and shapes are those of mmdeploy's end-to-end models; rotated boxes make dets [B, D, 6]. Detections fall by
    score; after the last, scores are 0 and labels -1. With masks also masks [B, D, H, W] in [0, 1], and mask_logits
    [B, D, H/8, W/8], which they are interpolated from.
    """

    def __init__(self, model: Detector, settings: DetectSettings, capacity: int):
        """model: folded. capacity: the K candidates of an image that NMS sees."""
        super().__init__()
        self.model, self.settings, self.capacity = model, settings, capacity

    @property
    def output_names(self) -> list[str]:
        return ["dets", "labels", *(["masks", "mask_logits"] if self.model.has_masks else [])]

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        output, size = self.model(input), (input.shape[2], input.shape[3])
        nms = rotated_nms_padded if self.model.task == "rotated" else batched_nms_padded
        found = self.model.detect_padded(output, size, self.settings, self.capacity, nms)
        dets = torch.cat((found.boxes, found.scores[..., None]), -1)
        if not self.model.has_masks:
            return dets, found.labels
        logits = self.model.mask_logits(output, found)
        masks = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).sigmoid()
        return dets, found.labels, masks, logits


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
