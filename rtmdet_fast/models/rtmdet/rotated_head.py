"""The head of rotated RTMDet (arXiv:2212.07784, section 3.5): one more 1×1 convolution, for the angle.

Rotated boxes are (cx, cy, w, h, angle) in pixels and radians; the angle turns x towards y (clockwise on a screen).
Legend: B images, N priors (all levels, stride 8 first), C classes, D detections.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rtmdet_fast.class_names import DOTA_CLASSES
from rtmdet_fast.inference.detections import Detections, DetectSettings
from rtmdet_fast.kernels.rotated_iou import rotated_iou_loss
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtmdet.detection_head import (
    STRIDES,
    Assignment,
    DetectionHead,
    flatten_levels,
    positives,
    predictors,
)

# exp(16) strides are 8.9 million and more: further up float32 overflows, and the gradient of what overflowed is NaN.
MAX_EXPONENT = 16.0
# The published assigner's least side of a box, in pixels; an untrained head predicts many of negative size.
MIN_SIDE = 1e-3


class RotatedOutput(NamedTuple):
    """What the convolutions give, per level: class logits [B, C, H, W], distances [B, 4, H, W], angles [B, 1, H, W].

    Distances are those of the prior point to the left, top, right and bottom side in the frame of the box, in pixels;
    angles are radians of any number of turns.
    """

    logits: tuple[Tensor, ...]
    distances: tuple[Tensor, ...]
    angles: tuple[Tensor, ...]


def distances_to_rotated_boxes(priors: Tensor, distances: Tensor, angles: Tensor) -> Tensor:
    """Distances [B, N, 4] and angles [B, N, 1] at the prior points → boxes [B, N, 5], angle in [-π/2, π/2).

    Their sides stand as predicted: w may be below h, and either below 0.
    """
    left, top, right, bottom = distances.unbind(-1)
    angle = angles[..., 0]
    cos, sin = angle.cos(), angle.sin()
    along, across = (right - left) / 2, (bottom - top) / 2
    return torch.stack(
        (
            priors[:, 0] + along * cos - across * sin,
            priors[:, 1] + along * sin + across * cos,
            left + right,
            top + bottom,
            half_turn(angle),
        ),
        -1,
    )


def half_turn(angle: Tensor) -> Tensor:
    """The angle in [-π/2, π/2) that differs from `angle` by whole half turns, after which a box is the same box."""
    return (angle + math.pi / 2) % math.pi - math.pi / 2


def regularize(boxes: Tensor) -> Tensor:
    """The same boxes [..., 5] in the form le90: w >= h, angle in [-π/2, π/2)."""
    cx, cy, w, h, angle = boxes.unbind(-1)
    angle = half_turn(torch.where(w < h, angle + math.pi / 2, angle))
    # a remainder rounded up to a whole half turn
    angle = torch.where(angle < math.pi / 2, angle, -math.pi / 2)
    return torch.stack((cx, cy, torch.maximum(w, h), torch.minimum(w, h), angle), -1)


def rescale(boxes: Tensor, scale: tuple[float, float]) -> Tensor:
    """Rotated boxes [..., 5] in an image resized by `scale` (x, y).

    Where x and y differ, which makes parallelograms of boxes, each side keeps its own new length, and w its direction.
    """
    cx, cy, w, h, angle = boxes.unbind(-1)
    sx, sy = scale
    cos, sin = angle.cos(), angle.sin()
    return torch.stack(
        (
            cx * sx,
            cy * sy,
            w * torch.hypot(sx * cos, sy * sin),
            h * torch.hypot(sx * sin, sy * cos),
            torch.atan2(sy * sin, sx * cos),
        ),
        -1,
    )


class RotatedHead(DetectionHead):
    """The detection head with one more 1×1 convolution per level on the regression branch, for the angle."""

    test_settings: ClassVar = DetectSettings(score_threshold=0.05, iou_threshold=0.1, nms_pre=2000, max_detections=2000)
    published_classes: ClassVar = DOTA_CLASSES
    in_windows: ClassVar = True
    image_size: ClassVar = 1024

    def __init__(self, channels: int, num_classes: int, *, exponential: bool = False, separable: bool = False):
        super().__init__(channels, num_classes, exponential=exponential, separable=separable)
        self.rtm_ang = predictors(channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial weights of the published recipe, but with distances of one stride at first, also in tiny and s.

        m and l start so, as exp(0) is 1. Published tiny and s start at 0: three of four predictions have a negative
        side, rotated IoU has no gradient there, and hardly any ground truth finds a prediction to start from.
        """
        super().reset_parameters()
        if not self.exponential:
            for name, parameter in self.rtm_reg.named_parameters():
                if name.endswith("bias"):
                    nn.init.ones_(parameter)

    def forward(self, features: tuple[Tensor, ...]) -> RotatedOutput:  # type: ignore[override]
        logits, distances, angles = [], [], []
        for level, x in enumerate(features):
            logits.append(self.rtm_cls[level](self.cls_convs[level](x)))
            x = self.reg_convs[level](x)
            # in float32 from here on: float16 ends at 65504, which is in reach of pixels, and has no hundredths at 100
            distance = self.rtm_reg[level](x).float()
            if self.exponential:
                distance = distance.clamp(max=MAX_EXPONENT).exp()
            distances.append(distance * STRIDES[level])
            angles.append(self.rtm_ang[level](x).float())
        return RotatedOutput(tuple(logits), tuple(distances), tuple(angles))

    def decode(self, output: RotatedOutput) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Logits [B, N, C], boxes [B, N, 5] in pixels of the network input, and priors [N, 4]."""
        priors = self.priors(output)
        boxes = distances_to_rotated_boxes(priors, flatten_levels(output.distances), flatten_levels(output.angles))
        return flatten_levels(output.logits), boxes, priors

    def assign(self, logits: Tensor, boxes: Tensor, priors: Tensor, targets: Targets) -> Assignment:
        """Assignment on rotated IoU, with predicted sides of at least 1e-3 px as published."""
        boxes = torch.cat((boxes[..., :2], boxes[..., 2:4].clamp(min=MIN_SIDE), boxes[..., 4:]), -1)
        return super().assign(logits, boxes, priors, targets)

    def box_loss(self, boxes: Tensor, targets: Targets, assignment: Assignment) -> Tensor:
        """Sum over the positives of quality * (1 - rotated IoU).

        IoU is that of the boxes as point sets, so that the form of the ground truth (le90 or not) does not matter.
        """
        if not targets.boxes.shape[1] or (targets.room is None and boxes.is_cuda):
            # Counting the positives would make the host wait for the device.
            return super().box_loss(boxes, targets, assignment)
        image, prior, _ = positives(assignment.gt, targets.room)  # the quality of others is 0
        matched = targets.boxes[image, assignment.gt[image, prior].clamp(min=0)]
        return rotated_iou_loss(boxes[image, prior], matched, reduction="sum", weight=assignment.quality[image, prior])

    @staticmethod
    def aligned_loss(boxes: Tensor, matched: Tensor) -> Tensor:
        """1 - rotated IoU [B, N] of aligned boxes [B, N, 5]."""
        return rotated_iou_loss(boxes.flatten(0, 1), matched.flatten(0, 1), reduction="none").view(boxes.shape[:2])

    @staticmethod
    def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes as they are: a rotated box may reach over the edge of the image."""
        return boxes

    @staticmethod
    def is_solid(boxes: Tensor) -> Tensor:
        """False [...] for boxes [..., 5] without an area."""
        return (boxes[..., 2:4] > 0).all(-1)

    @classmethod
    def to_image(
        cls, found: Detections, scale: tuple[float, float], shape: tuple[int, int], *, clip: bool
    ) -> Detections:
        """Detections in pixels of the original image, le90; nothing is clipped.

        scale: network pixels per image pixel (x, y).
        """
        return found._replace(boxes=regularize(rescale(found.boxes, (1 / scale[0], 1 / scale[1]))))
