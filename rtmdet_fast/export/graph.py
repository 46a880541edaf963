"""The graph that is exported: from the network's input to detections, of operators that every runtime has.

Legend: B images, K candidates, D detections.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from rtmdet_fast.inference.detections import DetectSettings
from rtmdet_fast.kernels.deformable_attention_torch import deformable_attention_grid_sample
from rtmdet_fast.kernels.nms import batched_nms_padded
from rtmdet_fast.kernels.rotated_iou import _iou
from rtmdet_fast.models.detector import Detector


class Graph(nn.Module):
    """What is exported of a model, which is folded: normalised images [B, 3, H, W] → the outputs by `output_names`."""

    output_names: list[str]

    def __init__(self, model: Detector):
        super().__init__()
        self.model = model


class WithoutNMS(Graph):
    """boxes [B, N, 4 or 5] in pixels of the network's input, scores [B, N, C], for clients with NMS of their own."""

    output_names = ["boxes", "scores"]  # noqa: RUF012 - which nothing changes

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.boxes_and_scores(self.model(input), (input.shape[2], input.shape[3]))


class EndToEnd(Graph):
    """Normalised images [B, 3, H, W] → dets [B, D, 5] xyxy and score, labels [B, D], in pixels of the network's input.

    Names and shapes are those of mmdeploy's end-to-end models; rotated boxes make dets [B, D, 6]. Detections fall by
    score; after the last, scores are 0 and labels -1. With masks also masks [B, D, H, W] in [0, 1], and mask_logits
    [B, D, H/8, W/8], which they are interpolated from.
    """

    def __init__(self, model: Detector, settings: DetectSettings, capacity: int, *, full_masks: bool = True):
        """capacity: the K candidates of an image that NMS sees. full_masks: whether `masks` are among the outputs."""
        super().__init__(model)
        self.settings, self.capacity, self.full_masks = settings, capacity, full_masks
        self.output_names = ["dets", "labels"]
        if model.has_masks:
            self.output_names += ["masks", "mask_logits"] if full_masks else ["mask_logits"]

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        output, size = self.model(input), (input.shape[2], input.shape[3])
        nms = rotated_nms_padded if self.model.task == "rotated" else batched_nms_padded
        found = self.model.detect_padded(output, size, self.settings, self.capacity, nms)
        dets = torch.cat((found.boxes, found.scores[..., None]), -1)
        if not self.model.has_masks:
            return dets, found.labels
        logits = self.model.mask_logits(output, found)
        if not self.full_masks:
            return dets, found.labels, logits
        masks = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).sigmoid()
        return dets, found.labels, masks, logits


def trace(graph: Graph, image_size: int | None, batch_size: int | None) -> ExportedProgram:
    """The graph as torch.export sees it, with deformable attention in standard operators.

    image_size: side in pixels of the square input, None for any multiples of 32. batch_size: None for any.
    """
    side = 128 if image_size is None else image_size
    example = torch.zeros(batch_size or 2, 3, side, side, device=next(graph.parameters()).device)
    dynamic: dict[int, Any] = {}
    if batch_size is None:
        dynamic[0] = torch.export.Dim("batch", min=1)
    if image_size is None:
        # the least sides must be below, the greatest above what is traced
        dynamic |= {axis: 32 * torch.export.Dim(name, min=1, max=512) for axis, name in ((2, "h"), (3, "w"))}
    program = torch.export.export(graph, (example,), dynamic_shapes={"input": dynamic})
    attention = torch.ops.rtmdet_fast.deformable_attention_reference.default
    if any(node.target is attention for node in program.graph.nodes):
        program = program.run_decompositions({attention: _deformable_attention})
    return program


def _deformable_attention(
    value: Tensor, locations: Tensor, weights: Tensor, sizes: list[int], points: list[int], method: str, clamp: bool
) -> tuple[Tensor, ...]:
    levels = list(zip(sizes[::2], sizes[1::2], strict=True))
    out = deformable_attention_grid_sample(
        value, levels, locations, weights, points, method=method, published_clamp=clamp
    )
    return out, *(value.new_empty(0) for _ in range(3))  # what only backward would read


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
