"""Heads of RTMDet: from neck features to logits and boxes, to losses, and to detections.

Legend: B images, N priors (all levels, stride 8 first), C classes, M ground truths, D detections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rtmdet_fast.class_names import COCO_CLASSES
from rtmdet_fast.distributed import loss_normaliser
from rtmdet_fast.inference.detections import Detections, DetectSettings, PaddedDetections, clip_boxes, have_area
from rtmdet_fast.kernels._dispatch import unwatched
from rtmdet_fast.kernels.assign import atss_assign, dynamic_soft_label_assign, simota_assign, task_aligned_assign
from rtmdet_fast.kernels.nms import batched_nms_padded
from rtmdet_fast.kernels.quality_focal_loss import quality_focal_loss
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtmdet.layers import conv3x3
from rtmdet_fast.models.rtmdet.losses import giou_loss

STRIDES = (8, 16, 32)
ASSIGNERS = ("soft_label", "simota", "task_aligned", "atss")
"""Who matches priors with ground truths in training: the published one, and those that its paper compares it with."""


class HeadOutput(NamedTuple):
    """What the convolutions give, per level: class logits [B, C, H, W] and box distances [B, 4, H, W] in pixels."""

    logits: tuple[Tensor, ...]
    distances: tuple[Tensor, ...]


class Assignment(NamedTuple):
    """What each prior is to predict, all [B, N]: ground truth index and label (-1 background), and how well in [0, 1].

    The quality is their IoU, of TaskAligned its normalised metric; it is the target of the score, and weighs the box.
    """

    gt: Tensor
    quality: Tensor
    labels: Tensor


def grid_priors(sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Priors [N, 4] (x, y, stride, stride) in pixels of feature maps of the given (height, width), offset 0."""
    levels = []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        y, x = torch.meshgrid(
            torch.arange(height, device=device) * stride, torch.arange(width, device=device) * stride, indexing="ij"
        )
        levels.append(torch.stack((x, y, torch.full_like(x, stride), torch.full_like(x, stride)), -1).view(-1, 4))
    return torch.cat(levels).float()


@cache  # a captured graph reads them where they lie, for as long as it lives
@torch.inference_mode(False)
def _kept_priors(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """`grid_priors`, made once; not to be written to."""
    return grid_priors(sizes, device)


def flatten_levels(levels: tuple[Tensor, ...]) -> Tensor:
    """Feature maps [B, K, H, W] per level → [B, N, K]."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)


def positives(gt: Tensor, room: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Image and prior [K] of the priors whose `gt` [B, N] is not negative, in their order, and whether they are [K].

    Where there are fewer of them than `room`, other priors follow, each once; where there are more, the last are left
    out. Without room K is their number, for which the host waits.
    """
    positive = (gt >= 0).flatten()
    rank, index = positive.cumsum(0), torch.arange(positive.numel(), device=gt.device)
    count = rank[-1]
    place = torch.where(positive, rank - 1, count + index - rank)
    index = torch.empty_like(index).scatter_(0, place, index)[: int(count) if room is None else room]
    found = torch.arange(len(index), device=gt.device) < count
    return index // gt.shape[1], index % gt.shape[1], found


def distances_to_boxes(priors: Tensor, distances: Tensor) -> Tensor:
    """Distances [B, N, 4] to left, top, right, bottom of the prior points → xyxy pixels [B, N, 4]."""
    points = priors[:, :2]
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), -1)


def normalised_alignment(gt: Tensor, iou: Tensor, metric: Tensor, truths: int) -> Tensor:
    """TOOD's soft label (arXiv:2108.07755, section 3.2.2) [B, N], 0 for background.

    The metric, scaled so that its greatest value of a ground truth is the greatest IoU of that one.

    gt, iou, metric [B, N]: as `task_aligned_assign` returns them, for ground truths 0 to `truths` - 1.
    """
    index, nothing = gt.clamp(min=0), iou.new_zeros(len(gt), max(truths, 1))
    most, best = (nothing.scatter_reduce(1, index, value, "amax").gather(1, index) for value in (metric, iou))
    # a metric below the least float, with which nothing is divided
    return torch.where(gt < 0, 0, metric / most.clamp(min=torch.finfo(metric.dtype).tiny) * best)


def towers(channels: int, *, separable: bool = False, shared: bool = True) -> nn.ModuleList:
    """Two 3×3 convolutions for each level; `shared` ones (dense only) have one weight and BatchNorms of their own."""
    levels = [[conv3x3(channels, channels, separable=separable) for _ in range(2)] for _ in STRIDES]
    if shared and not separable:
        for level in levels[1:]:
            for layer, first in zip(level, levels[0], strict=True):
                layer.conv = first.conv
    return nn.ModuleList(nn.Sequential(*level) for level in levels)


def predictors(channels: int, outputs: int) -> nn.ModuleList:
    """One 1×1 convolution for each level."""
    return nn.ModuleList(nn.Conv2d(channels, outputs, 1) for _ in STRIDES)


class DetectionHead(nn.Module):
    """Two 3×3 convolutions per branch, shared over the levels with a BatchNorm of their own for each level.

    `exponential` decodes distances as exp(x)·stride (m, l, x) instead of x·stride. `separable` (nano) builds
    depth-wise separable towers, which are not shared.
    """

    test_settings: ClassVar = DetectSettings(
        score_threshold=0.001, iou_threshold=0.65, nms_pre=30000, max_detections=300
    )
    """The published ones."""
    published_classes: ClassVar = COCO_CLASSES
    has_masks: ClassVar = False
    in_windows: ClassVar = False
    """Whether `predict` cuts images larger than those of training into windows."""
    image_size: ClassVar[int | None] = None
    """Side of the network input in pixels that the task calls for; None where the model's size does."""
    assigner = "soft_label"
    """One of ASSIGNERS."""

    def __init__(self, channels: int, num_classes: int, *, exponential: bool = False, separable: bool = False):
        super().__init__()
        self.num_classes = num_classes
        self.exponential = exponential
        self.cls_convs, self.reg_convs = (towers(channels, separable=separable) for _ in range(2))
        self.rtm_cls, self.rtm_reg = predictors(channels, num_classes), predictors(channels, 4)
        self.reset_parameters()

    @property
    def most_matches(self) -> int:
        """Priors that the assigner gives a ground truth, at most: its topk, of ATSS on each level."""
        return {"soft_label": 13, "simota": 10, "task_aligned": 13, "atss": 9 * len(STRIDES)}[self.assigner]

    def reset_parameters(self) -> None:
        """The initial weights of the published recipe."""
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

    @staticmethod
    def priors(output: Any) -> Tensor:
        """The priors [N, 4] of a head's output."""
        first = output.logits[0]
        sizes = tuple((level.shape[2], level.shape[3]) for level in output.logits)
        return (_kept_priors if unwatched(first) else grid_priors)(sizes, first.device)

    def decode(self, output: HeadOutput) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, N, C], boxes [B, N, 4] xyxy pixels of the network input, and priors [N, 4]."""
        priors = self.priors(output)
        boxes = distances_to_boxes(priors, flatten_levels(output.distances))
        return flatten_levels(output.logits), boxes, priors

    def loss(self, output: HeadOutput, targets: Targets) -> dict[str, Tensor]:
        """`loss_cls` (quality focal, weight 1) and `loss_bbox` (GIoU weighted by the soft label, weight 2).

        Both are divided by the sum of the matched IoUs of the whole distributed batch, at least 1 (`loss_normaliser`;
        published is a bound of 1 on the mean over the processes).
        """
        logits, boxes, priors = self.decode(output)
        assignment = self.assign(logits, boxes, priors, targets)
        return self.box_losses(logits, boxes, targets, assignment)

    def assign(self, logits: Tensor, boxes: Tensor, priors: Tensor, targets: Targets) -> Assignment:
        """Assignment of what `decode` returns, by `assigner`.

        Dynamic soft labels (section 3.3) take distances from the targets' centres, if there are any.
        """
        boxes, logits = boxes.detach(), logits.detach()
        truths = targets.boxes, targets.labels, targets.counts
        if self.assigner == "soft_label":
            return Assignment(*dynamic_soft_label_assign(boxes, logits, priors, *truths, targets.centers))
        if self.assigner == "atss":
            return Assignment(*atss_assign(boxes, priors, *truths, strides=STRIDES))
        scores = logits.to(boxes.dtype).sigmoid()
        if self.assigner == "simota":
            return Assignment(*simota_assign(boxes, scores, priors, *truths))
        gt, iou, labels, metric = task_aligned_assign(boxes, scores, priors, *truths)
        return Assignment(gt, normalised_alignment(gt, iou, metric, targets.boxes.shape[1]), labels)

    def box_losses(self, logits: Tensor, boxes: Tensor, targets: Targets, assignment: Assignment) -> dict[str, Tensor]:
        """`loss_cls` and `loss_bbox`."""
        normaliser = loss_normaliser(assignment.quality.sum())
        return {
            "loss_cls": quality_focal_loss(logits, assignment.labels, assignment.quality) / normaliser,
            "loss_bbox": 2 * self.box_loss(boxes, targets, assignment) / normaliser,
        }

    def box_loss(self, boxes: Tensor, targets: Targets, assignment: Assignment) -> Tensor:
        """Sum over the positives of quality * `aligned_loss`."""
        positive = assignment.gt >= 0
        # Background keeps its place with weight 0 and its own box as target: dense work costs less than the
        # synchronisation that picking the positives needs.
        matched = boxes.detach()
        if targets.boxes.shape[1]:
            index = assignment.gt.clamp(min=0)[..., None].expand(-1, -1, boxes.shape[-1])
            matched = torch.where(positive[..., None], targets.boxes.to(boxes.dtype).gather(1, index), matched)
        return torch.where(positive, self.aligned_loss(boxes, matched) * assignment.quality, 0.0).sum()

    @staticmethod
    def aligned_loss(boxes: Tensor, matched: Tensor) -> Tensor:
        """Loss [B, N] of aligned boxes [B, N, 4] xyxy."""
        return giou_loss(boxes, matched)

    @torch.no_grad()
    def detect(
        self,
        output: HeadOutput,
        input_size: tuple[int, int],
        settings: DetectSettings,
    ) -> list[Detections]:
        """Detections of each image: threshold, the first `nms_pre` of each level, class-aware NMS.

        `input_size` is the (height, width) of the network input, to which boxes are clipped.
        """
        logits, boxes, _ = self.decode(output)
        boxes = self.clip(boxes, input_size)
        scores = logits.float().sigmoid()
        lengths = [level.shape[2] * level.shape[3] for level in output.logits]
        candidates = [
            self._candidates(image_boxes, image_scores, lengths, settings)
            for image_boxes, image_scores in zip(boxes, scores, strict=True)
        ]
        if not any(len(c.scores) for c in candidates):
            return candidates
        boxes, scores, labels = (
            # NMS drops rows whose score is not finite: the padding.
            nn.utils.rnn.pad_sequence([c[:3][i] for c in candidates], batch_first=True, padding_value=padding)
            for i, padding in enumerate((0, -math.inf, 0))
        )
        keep, kept = batched_nms_padded(boxes, scores, labels, settings.iou_threshold, settings.max_detections)
        return [
            candidate.take(indices[:count])
            for candidate, indices, count in zip(candidates, keep, kept.tolist(), strict=True)
        ]

    @torch.no_grad()
    def detect_padded(
        self,
        output: HeadOutput,
        input_size: tuple[int, int],
        settings: DetectSettings,
        capacity: int,
        nms: Callable[..., tuple[Tensor, Tensor]] = batched_nms_padded,
    ) -> PaddedDetections:
        """As `detect`, with outputs of a fixed size, and without a step at which the host waits for the device.

        The best `capacity` candidates of all levels take part. What comes out is what `detect` finds, to the bit, where
        no image has more of them and `settings.nms_pre` is not below `capacity`.
        """
        logits, boxes, _ = self.decode(output)
        classes = logits.shape[2]
        flat = logits.float().sigmoid().flatten(1)
        candidates = (flat > settings.score_threshold).sum(1)
        # Small inputs have fewer pairs. In order of the priors, as `detect` has them: NMS settles equal scores by it.
        index = nn.functional.pad(flat, (0, capacity)).topk(capacity).indices.sort().values
        index = index.clamp(max=flat.shape[1] - 1)
        score, prior, label = flat.gather(1, index), index // classes, index % classes
        box = self.clip(boxes, input_size).gather(1, prior[..., None].expand(-1, -1, boxes.shape[2]))
        first = torch.cat([index[:, :1] >= 0, index[:, 1:] != index[:, :-1]], 1)
        score = score.where((score > settings.score_threshold) & self.is_solid(box) & first, -math.inf)
        keep, counts = nms(box, score, label, settings.iou_threshold, settings.max_detections)
        kept, place = keep >= 0, keep.clamp(min=0)
        return PaddedDetections(
            box.gather(1, place[..., None].expand(-1, -1, box.shape[2])).where(kept[..., None], 0.0),
            score.gather(1, place).where(kept, 0.0),
            label.gather(1, place).where(kept, -1),
            prior.gather(1, place).where(kept, 0),
            counts,
            candidates,
        )

    clip = staticmethod(clip_boxes)
    is_solid = staticmethod(have_area)

    @classmethod
    def to_image(
        cls, found: Detections, scale: tuple[float, float], shape: tuple[int, int], *, clip: bool
    ) -> Detections:
        """`Detections.in_image` of what the task finds."""
        return found.in_image(scale, shape, clip=clip)

    def _candidates(self, boxes: Tensor, scores: Tensor, lengths: list[int], settings: DetectSettings) -> Detections:
        """The (prior, class) pairs of one image above the threshold, `nms_pre` per level, without empty boxes."""
        picked = []
        start = 0
        for length in lengths:
            level = scores[start : start + length]
            prior, label = (level > settings.score_threshold).nonzero(as_tuple=True)
            score = level[prior, label]
            if len(score) > settings.nms_pre:
                score, order = score.topk(settings.nms_pre)
                prior, label = prior[order], label[order]
            picked.append((prior + start, score, label))
            start += length
        prior, score, label = (torch.cat(parts) for parts in zip(*picked, strict=True))
        box = boxes[prior]
        return Detections(box, score, label, prior).take(self.is_solid(box))
