"""Denoising queries (arXiv:2203.01305, with DINO's negatives): ground truths, disturbed, which the decoder restores.

Legend: B images, M ground truths, G groups, N = 2·M·G denoising queries, Q other queries, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh


class Denoising(NamedTuple):
    """Denoising queries, which the decoder takes before the others: group by group, positives before negatives.

    labels: [B, N] int64, their class; C is padding
    boxes_unact: [B, N, 4], the logits of their boxes cxcywh
    attn_mask: [N + Q, N + Q] bool, True where the query of the row may not look at that of the column
    positives: [B, G, M] int64, the query that is to restore each ground truth; -1 for padding
    """

    labels: Tensor
    boxes_unact: Tensor
    attn_mask: Tensor
    positives: Tensor


class Noise(NamedTuple):
    """What is drawn at random; None where the published implementation draws nothing.

    replace: [B, N] in [0, 1), labels are replaced below half of `label_noise_ratio`
    labels: [B, N] integers, by these
    signs: [B, N, 4] 0 or 1, whether an edge moves to the left or right (up or down)
    sizes: [B, N, 4] in [0, 1), how far, in halves of the box; negatives move one more
    """

    replace: Tensor | None
    labels: Tensor | None
    signs: Tensor | None
    sizes: Tensor | None


def denoising_queries(
    targets: Targets,
    num_classes: int,
    num_queries: int,
    *,
    num_denoising: int = 100,
    label_noise_ratio: float = 0.5,
    box_noise_scale: float = 1.0,
    dummy: bool = True,
    noise: Noise | None = None,
) -> Denoising | None:
    """The denoising queries of a batch. The host waits for nothing: the width M of the targets decides how many.

    Args:
        targets: with boxes cxcywh in units of the image, padded to the most boxes of the batch.
        num_classes: C.
        num_queries: Q.
        num_denoising: of each kind, positives and negatives, as many groups as go into it, and one at least.
        label_noise_ratio: twice the share of labels that are drawn anew.
        box_noise_scale: an edge of a positive moves up to this many halves of the box, one of a negative up to twice.
        dummy: where no image has a box, make a pair of padding, so that every parameter has a gradient and no process
            waits for another's (as version 2 does; version 1, whose published behaviour is False, makes None).
        noise: in place of random draws.
    """
    batch, width = targets.labels.shape
    device = targets.boxes.device
    padding = torch.arange(width, device=device) >= targets.counts[:, None]
    labels = targets.labels.masked_fill(padding, num_classes)
    boxes = targets.boxes.masked_fill(padding[..., None], 0)
    if width == 0 and not dummy:
        return None
    if width == 0:
        labels = labels.new_full((batch, 1), num_classes)
        boxes = boxes.new_tensor([0.5, 0.5, 0.1, 0.1]).expand(batch, 1, 4)
    half = labels.shape[1]  # of a group
    groups = max(1, num_denoising // half) if width else 1
    labels, boxes = labels.repeat(1, 2 * groups), boxes.repeat(1, 2 * groups, 1)
    index = torch.arange(labels.shape[1], device=device)

    if noise is None:
        noise = draw_noise(labels, num_classes, label_noise_ratio, box_noise_scale)
    if noise.replace is not None and noise.labels is not None:
        replaced = (noise.replace < label_noise_ratio / 2) & (labels != num_classes)
        labels = torch.where(replaced, noise.labels.to(labels.dtype), labels)
    if noise.signs is not None and noise.sizes is not None:
        negative = index[:, None] // half % 2
        shift = (
            (2 * noise.signs - 1) * (noise.sizes + negative) * (boxes[..., 2:].repeat(1, 1, 2) / 2 * box_noise_scale)
        )
        boxes = xyxy_to_cxcywh((cxcywh_to_xyxy(boxes) + shift).clamp(0, 1))

    group = pad(index // (2 * half), (0, num_queries), value=-1)
    attn_mask = (group[:, None] != group) & (group >= 0)
    first = torch.arange(groups, device=device)[:, None] * 2 * half  # of each group
    positives = (first + torch.arange(width, device=device)).where(~padding[:, None], -1)
    return Denoising(labels, inverse_sigmoid(boxes), attn_mask, positives)


def draw_noise(labels: Tensor, num_classes: int, label_noise_ratio: float, box_noise_scale: float) -> Noise:
    """Noise for labels [B, N], drawn on their device in the published order."""
    shape, device = labels.shape, labels.device
    replace = new_labels = signs = sizes = None
    if label_noise_ratio > 0:
        replace = torch.rand(shape, device=device)
        new_labels = torch.randint(num_classes, shape, dtype=torch.int32, device=device)
    if box_noise_scale > 0:
        signs = torch.randint(2, (*shape, 4), device=device)
        sizes = torch.rand((*shape, 4), device=device)
    return Noise(replace, new_labels, signs, sizes)
