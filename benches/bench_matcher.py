"""Hungarian matching of all layers of a batch, against the published matcher, called layer by layer as published.

Both end in scipy's solver on the host; what differs is how the costs come about and get there.
"""

from __future__ import annotations

from functools import partial

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benches.harness import Case, Contender, few_differ
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr.boxes import cxcywh_to_xyxy
from rtmdet_fast.models.rtdetr.matcher import match

QUERIES, CLASSES, SETS = 300, 80, 4  # three decoder layers, as r18 has, and the encoder


def cases(device: torch.device) -> list[Case]:
    return [_case(device, 16), _case(device, 4, headline=False)]


def _case(device: torch.device, batch: int, headline: bool = True) -> Case:
    return Case(
        op="matcher",
        name=f"{batch} images, 10 to 30 ground truths each, {QUERIES} queries, {CLASSES} classes, {SETS} sets",
        shapes={"logits": [SETS, batch, QUERIES, CLASSES], "boxes": [SETS, batch, QUERIES, 4]},
        inputs=partial(scene, batch, device),
        expected=_expected,
        compare=_compare,
        contenders=[
            Contender(name="reference", build=lambda: match),
            Contender(name="published, per layer", build=lambda: published),
        ],
        headline=headline,
    )


def scene(batch: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Targets]:
    """Boxes all over the image, and predictions half of which lie near a ground truth and lean to its class."""
    g = torch.Generator(device).manual_seed(seed)
    rand = partial(torch.rand, generator=g, device=device)
    randn = partial(torch.randn, generator=g, device=device)
    counts = torch.randint(10, 31, (batch,), generator=g, device=device)
    gts = int(counts.max())
    gt_boxes = torch.cat([0.1 + 0.8 * rand(batch, gts, 2), 0.02 * 20 ** rand(batch, gts, 2)], -1)
    labels = torch.randint(CLASSES, (batch, gts), generator=g, device=device)
    target = (rand(SETS, batch, QUERIES) * counts[:, None]).long()
    near = rand(SETS, batch, QUERIES) < 0.5
    hit = gt_boxes.expand(SETS, -1, -1, -1).gather(2, target[..., None].expand(-1, -1, -1, 4))
    hit = hit * (1 + 0.1 * randn(*hit.shape))
    guess = torch.cat([rand(*near.shape, 2), 0.02 * 20 ** rand(*near.shape, 2)], -1)
    logits = 2 * randn(*near.shape, CLASSES) - 4
    label = labels.expand(SETS, -1, -1).gather(2, target)
    logits.scatter_add_(3, label[..., None], 4.0 * near[..., None])
    return logits, hit.where(near[..., None], guess), Targets(gt_boxes, labels, counts)


def published(logits: Tensor, boxes: Tensor, targets: Targets) -> list[list[tuple[Tensor, Tensor]]]:
    """The matcher as published, written plainly: of every layer (query, ground truth) of each image.

    Costs are of all queries and ground truths of the batch, [B·Q, sum of counts], of which each image uses its own.
    """
    sizes = targets.counts.tolist()
    gt_labels = torch.cat([labels[:n] for labels, n in zip(targets.labels, sizes, strict=True)])
    gt_boxes = torch.cat([box[:n] for box, n in zip(targets.boxes, sizes, strict=True)])
    matches = []
    for layer_logits, layer_boxes in zip(logits, boxes, strict=True):
        probability = layer_logits.flatten(0, 1).sigmoid()[:, gt_labels]
        box = layer_boxes.flatten(0, 1)
        negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
        positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
        l1 = torch.cdist(box, gt_boxes, p=1)
        cost = 5 * l1 + 2 * (positive - negative) - 2 * pairwise_giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(gt_boxes))
        cost = cost.view(len(sizes), QUERIES, -1).cpu()
        pairs = [linear_sum_assignment(block[i]) for i, block in enumerate(cost.split(sizes, -1))]
        matches.append([(torch.as_tensor(query), torch.as_tensor(target)) for query, target in pairs])
    return matches


def pairwise_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """GIoU [N, M] of xyxy boxes [N, 4] and [M, 4]."""
    area, other_area = ((x[:, 2:] - x[:, :2]).prod(1) for x in (boxes, others))
    inner = (torch.min(boxes[:, None, 2:], others[:, 2:]) - torch.max(boxes[:, None, :2], others[:, :2])).clamp(min=0)
    outer = (torch.max(boxes[:, None, 2:], others[:, 2:]) - torch.min(boxes[:, None, :2], others[:, :2])).clamp(min=0)
    overlap, hull = inner.prod(2), outer.prod(2)
    union = area[:, None] + other_area - overlap
    return overlap / union - (hull - union) / hull


def _expected(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """By the published one in float64, as ours gives it."""
    out = torch.full((SETS, *targets.labels.shape), -1)
    double = targets._replace(boxes=targets.boxes.double())
    for layer, of_layer in zip(out, published(logits.double(), boxes.double(), double), strict=True):
        for image, (query, target) in zip(layer, of_layer, strict=True):
            image[target] = query
    return out


def _compare(result: Tensor | list[list[tuple[Tensor, Tensor]]], expected: Tensor) -> str:
    if isinstance(result, Tensor):
        found = result.cpu()
    else:
        found = torch.full_like(expected, -1)
        for layer, of_layer in zip(found, result, strict=True):
            for image, (query, target) in zip(layer, of_layer, strict=True):
                image[target] = query
    return few_differ(int((found != expected).sum()), int((expected >= 0).sum()), "matches")
