"""RTMDet-Ins (section 3.4 of the paper): the detection head with a mask for every box.

Each prior predicts the weights of a small network of its own, which turns shared mask features into its mask.

Legend: B images, N priors, M ground truths, K positives or detections of all images, D detections of each.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtmdet_fast.distributed import loss_normaliser
from rtmdet_fast.inference.detections import Detections, DetectSettings, PaddedDetections
from rtmdet_fast.inference.masks import PredictedMasks
from rtmdet_fast.kernels.dynamic_mask import dynamic_mask_dice_loss, dynamic_mask_logits
from rtmdet_fast.kernels.dynamic_mask_torch import layers, places
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtmdet.detection_head import (
    STRIDES,
    Assignment,
    DetectionHead,
    flatten_levels,
    positives,
    predictors,
    towers,
)
from rtmdet_fast.models.rtmdet.layers import conv3x3

KERNEL_SIZE = 169  # 10·8 + 8·8 + 8 weights and 8 + 8 + 1 biases of three 1×1 convolutions
MASK_CHANNELS = 8
MASK_STRIDE = 8
# Up-sampled logit i, which lies at 4i + 2, is trained on pixel 4i + 2, whose centre lies at 4i + 2.5. The published
# implementation leaves this half a pixel in its masks: without it a model on small images has 0.01 more mask AP.
MASK_OFFSET = 0.5


class InstanceOutput(NamedTuple):
    """HeadOutput, and per level kernels [B, 169, H, W], and mask features [B, 8, H, W] of stride 8."""

    logits: tuple[Tensor, ...]
    distances: tuple[Tensor, ...]
    kernels: tuple[Tensor, ...]
    features: Tensor


class MaskFeatures(nn.Module):
    """The mask features of all levels together: up-sampled to stride 8, fused, four 3×3 convolutions, projected."""

    def __init__(self, channels: int, *, separable: bool = False):
        super().__init__()
        self.fusion_conv = nn.Conv2d(len(STRIDES) * channels, channels, 1)
        self.stacked_convs = nn.Sequential(*(conv3x3(channels, channels, separable=separable) for _ in range(4)))
        self.projection = nn.Conv2d(channels, MASK_CHANNELS, 1)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        size = features[0].shape[-2:]
        levels = [features[0], *(F.interpolate(level, size=size, mode="bilinear") for level in features[1:])]
        return self.projection(self.stacked_convs(self.fusion_conv(torch.cat(levels, 1))))


class InstanceHead(DetectionHead):
    """Boxes come from the tower of the classes; the kernels have a tower of their own on each level.

    Distances are relu(x)·stride in every size; `exponential` is without effect.
    """

    test_settings: ClassVar = DetectSettings(score_threshold=0.05, iou_threshold=0.6, nms_pre=1000, max_detections=100)
    has_masks: ClassVar = True

    def __init__(self, channels: int, num_classes: int, *, exponential: bool = False, separable: bool = False):
        super().__init__(channels, num_classes, separable=separable)
        self.reg_convs = self.cls_convs
        self.kernel_convs = towers(channels, separable=separable, shared=False)
        self.rtm_kernel = predictors(channels, KERNEL_SIZE)
        self.mask_head = MaskFeatures(channels, separable=separable)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial weights of the published recipe."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("rtm_reg") and name.endswith("bias"):
                nn.init.ones_(parameter)  # a first distance of one stride, where relu passes the gradient on
            elif name in ("mask_head.fusion_conv.bias", "mask_head.projection.bias"):
                nn.init.zeros_(parameter)

    def forward(self, features: tuple[Tensor, ...]) -> InstanceOutput:  # type: ignore[override]
        logits, distances, kernels = [], [], []
        for level, x in enumerate(features):
            tower = self.cls_convs[level](x)
            logits.append(self.rtm_cls[level](tower))
            distances.append(self.rtm_reg[level](tower).float().relu() * STRIDES[level])
            kernels.append(self.rtm_kernel[level](self.kernel_convs[level](x)))
        return InstanceOutput(tuple(logits), tuple(distances), tuple(kernels), self.mask_head(features))

    def loss(self, output: InstanceOutput, targets: Targets) -> dict[str, Tensor]:  # type: ignore[override]
        """`loss_cls`, `loss_bbox`, and `loss_mask` (Dice, weight 2) averaged over the positives of all processes."""
        logits, boxes, priors = self.decode(output)  # type: ignore[arg-type]
        assignment = self.assign(logits, boxes, priors, targets)
        losses = self.box_losses(logits, boxes, targets, assignment)
        return {**losses, "loss_mask": self.mask_loss(output, priors, targets, assignment)}

    @staticmethod
    def mask_loss(output: InstanceOutput, priors: Tensor, targets: Targets, assignment: Assignment) -> Tensor:
        """Twice the mean Dice loss of the positives, against `targets.masks`."""
        if targets.masks is None:
            raise ValueError("targets: masks are needed to train instance segmentation")
        image, prior, found = positives(assignment.gt, targets.room)
        features, kernels, points, strides, _ = _instances(output, priors, image, prior)
        dice = dynamic_mask_dice_loss(
            features,
            kernels,
            points,
            strides,
            image.where(found, -1),
            targets.masks,
            assignment.gt[image, prior].clamp(min=0),
            feature_stride=MASK_STRIDE,
        )
        return 2 * dice.sum() / loss_normaliser(found.sum().to(dice.dtype))

    @torch.no_grad()
    def detect(  # type: ignore[override]
        self, output: InstanceOutput, input_size: tuple[int, int], settings: DetectSettings
    ) -> list[Detections]:
        """Detections with `masks`, which are the published implementation's on the network's input until `to_image`."""
        found = super().detect(output, input_size, settings)  # type: ignore[arg-type]
        counts = [len(detections.priors) for detections in found]
        prior = torch.cat([detections.priors for detections in found])
        image = torch.cat([torch.full_like(detections.priors, i) for i, detections in enumerate(found)])
        instances = _instances(output, self.priors(output), image, prior)
        logits = dynamic_mask_logits(*instances, feature_stride=MASK_STRIDE)
        return [
            detections._replace(masks=PredictedMasks(part, (1.0, 1.0), input_size, MASK_STRIDE))
            for detections, part in zip(found, logits.split(counts), strict=True)
        ]

    def padded_mask_logits(self, output: InstanceOutput, found: PaddedDetections) -> Tensor:
        """The mask logits [B, D, H, W] of padded detections; what those of the padding are does not matter."""
        B, D = found.priors.shape
        image = torch.arange(B, device=found.priors.device)[:, None].expand(B, D).flatten()
        instances = _instances(output, self.priors(output), image, found.priors.flatten())
        return dynamic_mask_logits(*instances, feature_stride=MASK_STRIDE).unflatten(0, (B, D))

    def mask_logits(self, output: InstanceOutput, found: PaddedDetections) -> Tensor:
        """`dynamic_mask_logits` [B, D, H, W] of as many masks in every image, in plain operators.

        Coordinates, affine in the pixel's place, are folded into the first layer: no input is copied for each mask.
        """
        features, priors = output.features, self.priors(output)[found.priors]
        (B, _, h, w), D = features.shape, found.priors.shape[1]
        kernels = flatten_levels(output.kernels).gather(1, found.priors[..., None].expand(-1, -1, KERNEL_SIZE))
        scale = 1 / (8 * priors[..., 2].flatten()[:, None, None])
        first, w2, b2, w3, b3 = layers(kernels.flatten(0, 1), priors[..., :2].flatten(0, 1), scale)
        at = places(h, w, MASK_STRIDE, features.dtype, features.device)
        pixels = torch.cat((features, at[None].expand(B, -1, -1, -1)), 1).flatten(2)
        x1 = (first.reshape(B, D * 8, 11) @ pixels).relu().reshape(B * D, 8, h * w)
        x2 = (w2 @ x1 + b2).relu()
        return (w3 @ x2 + b3).reshape(B, D, h, w)

    @classmethod
    def to_image(
        cls, found: Detections, scale: tuple[float, float], shape: tuple[int, int], *, clip: bool
    ) -> Detections:
        assert found.masks is not None
        masks = PredictedMasks(found.masks.logits, scale, shape, MASK_STRIDE, MASK_OFFSET)
        return super().to_image(found._replace(masks=masks), scale, shape, clip=clip)


def _instances(
    output: InstanceOutput, priors: Tensor, image: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What makes the masks of the K pairs `image`, `prior` [K]: features, kernels, points, strides, images."""
    kernels = flatten_levels(output.kernels)[image, prior]
    return output.features, kernels, priors[prior, :2], priors[prior, 2], image
