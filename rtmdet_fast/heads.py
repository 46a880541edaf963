"""Heads of RTMDet: from neck features to logits and boxes, to losses, and to detections.

Legend: B images, N priors (all levels, stride 8 first), C classes, M ground truths, D detections.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rtmdet_fast.kernels.assign import dynamic_soft_label_assign
from rtmdet_fast.kernels.nms import batched_nms_padded
from rtmdet_fast.layers import conv3x3
from rtmdet_fast.losses import giou_loss, quality_focal_loss

STRIDES = (8, 16, 32)


class HeadOutput(NamedTuple):
    """What the convolutions give, per level: class logits [B, C, H, W] and box distances [B, 4, H, W] in pixels."""

    logits: tuple[Tensor, ...]
    distances: tuple[Tensor, ...]


class Targets(NamedTuple):
    """Ground truth of a batch, padded: boxes [B, M, 4] xyxy pixels, labels [B, M] int64, counts [B] int64."""

    boxes: Tensor
    labels: Tensor
    counts: Tensor


class Detections(NamedTuple):
    """Detections of one image, by falling score: boxes [D, 4] xyxy pixels of the network input, scores, labels."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def grid_priors(sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Priors [N, 4] (x, y, stride, stride) in pixels of feature maps of the given (height, width), offset 0."""
    levels = []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        y, x = torch.meshgrid(
            torch.arange(height, device=device) * stride, torch.arange(width, device=device) * stride, indexing="ij"
        )
        levels.append(torch.stack((x, y, torch.full_like(x, stride), torch.full_like(x, stride)), -1).view(-1, 4))
    return torch.cat(levels).float()


def flatten_levels(levels: tuple[Tensor, ...]) -> Tensor:
    """Feature maps [B, K, H, W] per level → [B, N, K]."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)


def distances_to_boxes(priors: Tensor, distances: Tensor) -> Tensor:
    """Distances [B, N, 4] to left, top, right, bottom of the prior points → xyxy pixels [B, N, 4]."""
    points = priors[:, :2]
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), -1)


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a scalar over the distributed processes; the value itself without torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


class DetectionHead(nn.Module):
    """Two 3×3 convolutions per branch, shared over the levels with a BatchNorm of their own for each level.

    `exponential` decodes distances as exp(x)·stride (m, l, x) instead of x·stride. `separable` (nano) builds
    depth-wise separable towers, which are not shared.
    """

    def __init__(self, channels: int, num_classes: int, *, exponential: bool = False, separable: bool = False):
        super().__init__()
        self.num_classes = num_classes
        self.exponential = exponential

        def towers() -> nn.ModuleList:
            levels = [[conv3x3(channels, channels, separable=separable) for _ in range(2)] for _ in STRIDES]
            if not separable:
                for level in levels[1:]:
                    for layer, first in zip(level, levels[0], strict=True):
                        layer.conv = first.conv
            return nn.ModuleList(nn.Sequential(*level) for level in levels)

        def predictors(outputs: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(channels, outputs, 1) for _ in STRIDES)

        self.cls_convs, self.reg_convs = towers(), towers()
        self.rtm_cls, self.rtm_reg = predictors(num_classes), predictors(4)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.01)
            elif name.startswith("rtm_"):
                # a first score of 0.01 for every class, a first distance of 0
                nn.init.constant_(parameter, -math.log(99) if name.startswith("rtm_cls") else 0.0)

    def forward(self, features: tuple[Tensor, ...]) -> HeadOutput:
        logits, distances = [], []
        for level, x in enumerate(features):
            logits.append(self.rtm_cls[level](self.cls_convs[level](x)))
            distance = self.rtm_reg[level](self.reg_convs[level](x)).float()
            distances.append((distance.exp() if self.exponential else distance) * STRIDES[level])
        return HeadOutput(tuple(logits), tuple(distances))

    def decode(self, output: HeadOutput) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, N, C], boxes [B, N, 4] xyxy pixels of the network input, and priors [N, 4]."""
        sizes = [(level.shape[2], level.shape[3]) for level in output.logits]
        priors = grid_priors(sizes, output.logits[0].device)
        boxes = distances_to_boxes(priors, flatten_levels(output.distances))
        return flatten_levels(output.logits), boxes, priors

    def loss(self, output: HeadOutput, targets: Targets) -> dict[str, Tensor]:
        """`loss_cls` (quality focal, weight 1) and `loss_bbox` (GIoU weighted by the soft label, weight 2).

        Both are divided by the sum of the matched IoUs of the whole distributed batch, at least 1.
        """
        logits, boxes, priors = self.decode(output)
        logits = logits.float()
        assigned_gt, quality, labels = dynamic_soft_label_assign(
            boxes.detach(), logits.detach(), priors, targets.boxes, targets.labels, targets.counts
        )
        normaliser = mean_over_processes(quality.sum()).clamp(min=1)
        positive = assigned_gt >= 0
        # Background keeps its place with weight 0 and its own box as target: dense work costs less than the
        # synchronisation that picking the positives needs.
        matched = boxes.detach()
        if targets.boxes.shape[1]:
            index = assigned_gt.clamp(min=0)[..., None].expand(-1, -1, 4)
            matched = torch.where(positive[..., None], targets.boxes.to(boxes.dtype).gather(1, index), matched)
        box_loss = torch.where(positive, giou_loss(boxes, matched) * quality, 0.0).sum()
        return {
            "loss_cls": quality_focal_loss(logits, labels, quality) / normaliser,
            "loss_bbox": 2 * box_loss / normaliser,
        }

    @torch.no_grad()
    def detect(
        self,
        output: HeadOutput,
        input_size: tuple[int, int],
        *,
        score_threshold: float,
        iou_threshold: float,
        nms_pre: int,
        max_detections: int,
    ) -> list[Detections]:
        """Detections of each image: threshold, the first `nms_pre` of each level, class-aware NMS.

        `input_size` is the (height, width) of the network input, to which boxes are clipped.
        """
        logits, boxes, _ = self.decode(output)
        limit = boxes.new_tensor([input_size[1], input_size[0]] * 2)
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        scores = logits.float().sigmoid()
        lengths = [level.shape[2] * level.shape[3] for level in output.logits]
        candidates = [
            self._candidates(image_boxes, image_scores, lengths, score_threshold, nms_pre)
            for image_boxes, image_scores in zip(boxes, scores, strict=True)
        ]
        if not any(len(c.scores) for c in candidates):
            return candidates
        boxes, scores, labels = (
            # NMS drops rows whose score is not finite: the padding.
            nn.utils.rnn.pad_sequence([c[i] for c in candidates], batch_first=True, padding_value=padding)
            for i, padding in enumerate((0, -math.inf, 0))
        )
        keep, kept = batched_nms_padded(boxes, scores, labels, iou_threshold, max_detections)
        return [
            Detections(*(field[indices[:count]] for field in candidate))
            for candidate, indices, count in zip(candidates, keep, kept.tolist(), strict=True)
        ]

    @staticmethod
    def _candidates(
        boxes: Tensor, scores: Tensor, lengths: list[int], score_threshold: float, nms_pre: int
    ) -> Detections:
        """The (prior, class) pairs of one image above the threshold, `nms_pre` per level, without empty boxes."""
        picked = []
        start = 0
        for length in lengths:
            level = scores[start : start + length]
            prior, label = (level > score_threshold).nonzero(as_tuple=True)
            score = level[prior, label]
            if len(score) > nms_pre:
                score, order = score.topk(nms_pre)
                prior, label = prior[order], label[order]
            picked.append((prior + start, score, label))
            start += length
        prior, score, label = (torch.cat(parts) for parts in zip(*picked, strict=True))
        box = boxes[prior]
        solid = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
        return Detections(box[solid], score[solid], label[solid])
