"""Assignment of a whole batch, against mmdet's assigners called image by image as its heads do."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.harness import Case, Contender, Parity, few_differ, own
from rtmdet_fast.kernels import assign_torch
from rtmdet_fast.kernels.assign import atss_assign, dynamic_soft_label_assign, dynamic_soft_label_assign_reference

CLASSES, SIZE, STRIDES = 80, 640, (8, 16, 32)


def cases(device: torch.device) -> list[Case]:
    batch = 32 if device.type == "cuda" else 4
    return [
        _case(device, batch, 100),
        _case(device, batch, 300, headline=device.type == "cpu"),
        _case(device, batch, 10, headline=False),
        _atss(device, batch, 100),
    ]


def _case(device: torch.device, batch: int, gts: int, headline: bool = True) -> Case:
    peers = [Contender(name="mmdet, per image", build=_mmdet, result=_mmdet_result)]
    if device.type == "cuda" or gts <= 100:  # on a CPU enough to see that it takes about as long as mmdet's
        peers.append(Contender(name="eager, per image", build=lambda: eager))
    return Case(
        op="assign",
        name=f"{batch} images, 8400 priors, {CLASSES} classes, {gts} ground truths each",
        shapes={"boxes": [batch, 8400, 4], "logits": [batch, 8400, CLASSES], "gt_boxes": [batch, gts, 4]},
        inputs=partial(scene, batch, gts, device),
        expected=_expected,
        compare=_compare,
        contenders=[
            *own(device, dynamic_soft_label_assign, dynamic_soft_label_assign_reference, result=lambda out: out[:2]),
            *peers,
        ],
        headline=headline,
    )


def _atss(device: torch.device, batch: int, gts: int) -> Case:
    """ATSS, which takes no logits and reads the boxes only of what it has matched."""

    def ours(boxes: Tensor, logits: Tensor, *problem: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return atss_assign(boxes, *problem, strides=STRIDES)

    def reference(boxes: Tensor, logits: Tensor, *problem: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return assign_torch.atss(boxes, *problem, list(map(float, STRIDES)), 9, 8.0)

    def expected(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return reference(*(x.double() if x.is_floating_point() else x for x in inputs))[:2]

    return Case(
        op="assign",
        name=f"ATSS: {batch} images, 8400 priors, {gts} ground truths each",
        shapes={"boxes": [batch, 8400, 4], "gt_boxes": [batch, gts, 4]},
        inputs=partial(scene, batch, gts, device),
        expected=expected,
        compare=_compare,
        contenders=[
            *own(device, ours, reference, result=lambda out: out[:2]),
            Contender(name="mmdet, per image", build=_mmdet_atss, result=lambda gt: (gt, None)),
        ],
        headline=False,
    )


def scene(batch: int, gts: int, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """Boxes of 8 to 256 px all over the image, and predictions half of which lie near a ground truth."""
    g = torch.Generator(device).manual_seed(seed)
    rand = partial(torch.rand, generator=g, device=device)
    randn = partial(torch.randn, generator=g, device=device)
    grids = [torch.arange(s // 2, SIZE, s, device=device).float() for s in STRIDES]
    priors = torch.cat(
        [torch.stack([grid.repeat(len(grid)), grid.repeat_interleave(len(grid))], 1).repeat(1, 2) for grid in grids]
    )
    priors[:, 2:] = torch.cat([torch.full((len(grid) ** 2, 2), SIZE / len(grid), device=device) for grid in grids])
    N = len(priors)
    center, half = rand(batch, gts, 2) * SIZE, 4 * 32 ** rand(batch, gts, 2)
    gt_boxes = torch.cat([center - half, center + half], -1).clamp(0, SIZE)
    gt_labels = torch.randint(CLASSES, (batch, gts), generator=g, device=device)
    near = ((priors[:, None, :2] > gt_boxes[:, None, :, :2]) & (priors[:, None, :2] < gt_boxes[:, None, :, 2:])).all(-1)
    target = (near * rand(batch, N, gts)).argmax(-1)
    reach = priors[:, 2:] * 4 * randn(batch, N, 2).mul(0.5).exp()
    guess = torch.cat([priors[:, :2] - reach, priors[:, :2] + reach], -1)
    hit = torch.take_along_dim(gt_boxes, target[..., None], 1)
    hit = hit + 0.15 * (hit[..., 2:] - hit[..., :2]).repeat(1, 1, 2) * randn(batch, N, 4)
    boxes = torch.where((near.any(-1) & (rand(batch, N) < 0.5))[..., None], hit, guess)
    logits = 2 * randn(batch, N, CLASSES) - 4
    counts = torch.full((batch,), gts, device=device)
    return boxes, logits, priors, gt_boxes, gt_labels, counts


def eager(
    boxes: Tensor, logits: Tensor, priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """The assigner as published, written plainly: image by image, class costs [n, M, C], a loop over ground truths."""
    gts, ious = [], []
    for box, logit, gt, label, count in zip(boxes, logits, gt_boxes, gt_labels, counts.tolist(), strict=True):
        gt, label = gt[:count], label[:count]
        point, stride = priors[:, None, :2], priors[:, 2]
        inside = ((point > gt[:, :2]) & (point < gt[:, 2:])).all(-1)
        candidate = inside.any(1).nonzero()[:, 0]
        box, logit = box[candidate], logit[candidate]
        side = (torch.min(box[:, None, 2:], gt[:, 2:]) - torch.max(box[:, None, :2], gt[:, :2])).clamp(min=0)
        area = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (box, gt)]
        overlap = side[..., 0] * side[..., 1]
        iou = overlap / (area[0][:, None] + area[1] - overlap).clamp(min=1e-6)
        distance = (point[candidate] - (gt[:, :2] + gt[:, 2:]) / 2).norm(dim=-1) / stride[candidate, None]
        soft = F.one_hot(label, logit.shape[1]) * iou[..., None]
        logit = logit[:, None].expand_as(soft)
        loss = F.binary_cross_entropy_with_logits(logit, soft, reduction="none")
        cost = (loss * (soft - logit.sigmoid()).abs() ** 2).sum(-1) - 3 * (iou + 1e-7).log() + 10 ** (distance - 3)
        ks = iou.topk(min(13, len(iou)), dim=0).values.sum(0).int().clamp(min=1).tolist()
        won = torch.zeros_like(cost, dtype=torch.bool)
        for j, k in enumerate(ks):
            won[cost[:, j].topk(k, largest=False).indices, j] = True
        many = won.sum(1) > 1
        won[many] = F.one_hot(cost[many].argmin(1), len(gt)).bool()
        taken = won.any(1)
        assigned = gt.new_full((len(priors),), -1, dtype=torch.int64)
        assigned[candidate[taken]] = won[taken].int().argmax(1)
        assigned_iou = gt.new_zeros(len(priors))
        assigned_iou[candidate[taken]] = iou[won]
        gts.append(assigned)
        ious.append(assigned_iou)
    return torch.stack(gts), torch.stack(ious)


def _mmdet() -> Any:
    from mmdet.models.task_modules.assigners import DynamicSoftLabelAssigner  # type: ignore[import-not-found]
    from mmengine.structures import InstanceData  # type: ignore[import-not-found]

    assigner = DynamicSoftLabelAssigner(topk=13)

    def run(boxes: Tensor, logits: Tensor, priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, counts: Tensor):
        return [
            assigner.assign(
                InstanceData(bboxes=boxes[i], scores=logits[i], priors=priors),
                InstanceData(bboxes=gt_boxes[i], labels=gt_labels[i]),
            )
            for i in range(len(boxes))
        ]

    return run


def _mmdet_atss() -> Any:
    from mmdet.models.task_modules.assigners import ATSSAssigner  # type: ignore[import-not-found]
    from mmengine.structures import InstanceData  # type: ignore[import-not-found]

    assigner = ATSSAssigner(topk=9)

    def run(boxes: Tensor, logits: Tensor, priors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, counts: Tensor):
        anchors = torch.cat([priors[:, :2] - 4 * priors[:, 2:], priors[:, :2] + 4 * priors[:, 2:]], 1)
        of_levels = [(SIZE // stride) ** 2 for stride in STRIDES]
        found = [
            assigner.assign(InstanceData(priors=anchors), of_levels, InstanceData(bboxes=gt, labels=label))
            for gt, label in zip(gt_boxes, gt_labels, strict=True)
        ]
        return torch.stack([result.gt_inds - 1 for result in found])

    return run


def _mmdet_result(results: list[Any]) -> tuple[Tensor, Tensor]:
    gt = torch.stack([result.gt_inds - 1 for result in results])
    iou = torch.stack([result.max_overlaps for result in results])
    return gt, iou.where(gt >= 0, 0)  # mmdet marks the background in its own way


def _expected(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    gt, iou, _ = dynamic_soft_label_assign_reference(*double)
    return gt, iou


def _compare(result: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor]) -> str:
    same = result[0] == expected[0]
    told = few_differ(int((~same).sum()), int((expected[0] >= 0).sum()), "matches")
    if result[1] is None:  # mmdet's is the anchors'
        return told
    error = (result[1] - expected[1])[same].abs().max().item()
    if not error < 1e-4:
        raise Parity(f"IoU differs by {error:.1e}")
    return f"{told}, IoU within {error:.0e}"
