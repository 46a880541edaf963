"""Losses of RT-DETR: of every decoder layer, of the encoder's choice of queries, and of the denoising queries.

Legend: L decoder layers, K sets of predictions, B images, Q queries, N denoising queries, M ground truths, P pairs of a
query and a ground truth, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.distributed import loss_normaliser
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr.boxes import iou_and_giou
from rtmdet_fast.models.rtdetr.decoder import DecoderOutput
from rtmdet_fast.models.rtdetr.denoising import Denoising
from rtmdet_fast.models.rtdetr.matcher import match


def detr_losses(
    output: DecoderOutput,
    denoising: Denoising | None,
    targets: Targets,
    *,
    version: int = 1,
    precision: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The weighted losses by their published names; they are to be summed.

    `loss_vfl`, `loss_bbox` and `loss_giou` are of the last decoder layer. Those of layer i before it end in `_aux_i`,
    those of the encoder in `_aux_(L-1)` (version 1) or `_enc_0` (version 2), of the denoising queries in `_dn_i`.

    Args:
        output: of the decoder.
        denoising: the denoising queries that it was given.
        targets: with boxes cxcywh in units of the image.
        version: 1 or 2.
        precision: to compute in, at least; a lower one leaves it to the outputs (as published: under float16 the sums
            overflow).
    """
    layers, N = len(output.logits), 0 if denoising is None else denoising.labels.shape[1]
    dtype = torch.promote_types(output.logits.dtype, precision)
    all_logits, all_boxes, encoder_logits, encoder_boxes = (
        x.to(dtype) for x in (output.logits, output.boxes, output.encoder_logits, output.encoder_boxes)
    )
    count = loss_normaliser(targets.counts.sum().to(dtype))
    logits = torch.cat((all_logits[:, :, N:], encoder_logits[None]))
    boxes = torch.cat((all_boxes[:, :, N:], encoder_boxes[None]))
    losses = pair_losses(logits, boxes, match(logits, boxes, targets), targets.labels, targets.boxes, count)
    names = [*(f"_aux_{i}" for i in range(layers - 1)), "", f"_aux_{layers - 1}" if version == 1 else "_enc_0"]
    if denoising is not None:
        groups = denoising.positives.shape[1]
        denoising_losses = pair_losses(
            all_logits[:, :, :N],
            all_boxes[:, :, :N],
            denoising.positives.flatten(1).expand(layers, -1, -1),
            targets.labels.repeat(1, groups),
            targets.boxes.repeat(1, groups, 1),
            count * groups,
        )
        losses = torch.cat((losses, denoising_losses), 1)
        names += [f"_dn_{i}" for i in range(layers)]
    weighted = zip(("vfl", "bbox", "giou"), (1, 5, 2), losses, strict=True)
    return {
        f"loss_{kind}{name}": loss
        for kind, weight, of_sets in weighted
        for name, loss in zip(names, (weight * of_sets).unbind(), strict=True)
    }


def pair_losses(
    logits: Tensor, boxes: Tensor, queries: Tensor, gt_labels: Tensor, gt_boxes: Tensor, count: Tensor
) -> Tensor:
    """Varifocal, L1 and GIoU loss [3, K], summed and divided by `count`.

    Args:
        logits: [K, B, Q, C].
        boxes: [K, B, Q, 4] cxcywh.
        queries: [K, B, P] int64, of the pairs; -1 is padding.
        gt_labels: [B, P] int64, of the pairs.
        gt_boxes: [B, P, 4] cxcywh, of the pairs.
        count: scalar.
    """
    paired, query = queries >= 0, queries.clamp(min=0)
    box = boxes.gather(2, query[..., None].expand(-1, -1, -1, 4))
    # Padding keeps its place with its own box as target: picking the pairs would wait for their number.
    target = torch.where(paired[..., None], gt_boxes.to(box.dtype), box.detach())
    iou, giou = iou_and_giou(box, target)
    losses = (
        varifocal_loss(logits, query * logits.shape[3] + gt_labels.clamp(min=0), iou.detach(), paired),
        (box - target).abs().sum((1, 2, 3)),
        torch.where(paired, 1 - giou, 0).sum((1, 2)),
    )
    return torch.stack(losses) / count


def varifocal_loss(logits: Tensor, index: Tensor, quality: Tensor, paired: Tensor) -> Tensor:
    """Varifocal loss (arXiv:2008.13367, equation 2, alpha 0.75, gamma 2) [K], summed over a set's queries and classes.

    logits [K, B, Q, C]; index [K, B, P], where in Q·C those with a target are; quality [K, B, P], their target score;
    paired [K, B, P], False for padding.
    """
    # Against a target of 0 the loss is one dense pass without building the targets; the few others then exchange
    # their one element.
    background = 0.75 * logits.detach().sigmoid().square() * F.softplus(logits)
    logit = logits.flatten(2).gather(2, index)
    at_label = quality * F.binary_cross_entropy_with_logits(logit, quality, reduction="none")
    exchanged = at_label - background.flatten(2).gather(2, index)
    return background.sum((1, 2, 3)) + torch.where(paired, exchanged, 0).sum((1, 2))
