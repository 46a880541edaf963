"""Class-aware NMS: a batch in one call on CUDA, one image by mmcv's call signature on a CPU."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benches.harness import Case, Contender, few_differ, own
from rtmdet_fast.kernels.nms import batched_nms_padded, batched_nms_padded_reference
from rtmdet_fast.ops import batched_nms

DENSE = 6000  # boxes up to which N x N matrices are affordable


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        detector = partial(_case, device, 32, classes=80, threshold=0.65)
        return [
            detector(1000, keep=300),
            detector(5000, keep=300),
            detector(5000, keep=5000, headline=False),
            detector(30000, keep=300, headline=False),
            _case(device, 8, 2000, classes=15, threshold=0.1, keep=2000, rotated=True, headline=False),
        ]
    detector = partial(_case, device, 1, classes=80, threshold=0.65)
    return [
        _case(device, 1, 2000, classes=15, threshold=0.1, rotated=True, clustered=False),
        detector(5000),
        detector(30000),
        detector(5000, clustered=False),
        detector(30000, clustered=False),
        *(detector(boxes, headline=False) for boxes in (10, 100, 300, 1000)),
    ]


def _case(
    device: torch.device,
    batch: int,
    boxes: int,
    *,
    classes: int,
    threshold: float,
    keep: int | None = None,
    rotated: bool = False,
    clustered: bool = True,
    headline: bool = True,
) -> Case:
    limit = boxes if keep is None else keep
    kind = "nms_rotated" if rotated else "nms"

    def padded(op: Any) -> Any:
        return lambda *inputs: op(*inputs, threshold, limit)

    def listed(op: Any) -> Any:  # mmcv's and torchvision's forms
        return lambda *inputs: [op(*image)[:limit] for image in zip(*inputs, strict=True)]

    def mmcv_form(op: Any) -> Any:
        return listed(lambda b, s, labels: op(b, s, labels, {"type": kind, "iou_threshold": threshold})[1])

    def mmcv() -> Any:
        from mmcv.ops import batched_nms  # type: ignore[import-not-found]

        return mmcv_form(batched_nms)

    def torchvision() -> Any:
        from torchvision.ops import batched_nms  # type: ignore[import-not-found]

        return listed(lambda b, s, labels: batched_nms(b, s, labels, threshold))

    if device.type == "cuda":
        ours = own(device, padded(batched_nms_padded), padded(batched_nms_padded_reference), result=_unpadded)
    else:
        ours = own(device, mmcv_form(batched_nms), mmcv_form(batched_nms))
    peers = [Contender(name="mmcv, per image", build=mmcv)]
    if not rotated:
        peers.append(Contender(name="torchvision, per image", build=torchvision))
        if boxes <= DENSE and device.type == "cuda":
            peers.append(Contender(name="eager, per image", build=lambda: listed(partial(eager, threshold))))
    name = f"{boxes} {'rotated ' * rotated}boxes, {classes} classes, {'clustered' if clustered else 'scattered'}"
    kept = "" if limit == boxes else f", best {limit}"
    return Case(
        op="nms",
        name=f"{batch} image{'s' * (batch > 1)}, {name}{kept}",
        shapes={"boxes": [batch, boxes, 5 if rotated else 4], "classes": classes, "iou_threshold": threshold},
        inputs=partial(detections, batch, boxes, classes, rotated, clustered, device),
        expected=lambda b, s, labels: _unpadded(batched_nms_padded_reference(b.double(), s, labels, threshold, limit)),
        compare=_compare,
        contenders=[*ours, *peers],
        headline=headline,
    )


def detections(
    batch: int, boxes: int, classes: int, rotated: bool, clustered: bool, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes on 1024 px: some 25 around every object, most with its class; or independent of each other."""
    g = torch.Generator(device).manual_seed(seed)
    rand = partial(torch.rand, generator=g, device=device)
    objects = max(boxes // 25, 1) if clustered else boxes
    center, side = rand(batch, objects, 2) * 1024, 8 * 16 ** rand(batch, objects, 2)
    angle = rand(batch, objects, 1) * math.pi
    label = torch.randint(classes, (batch, objects), generator=g, device=device)
    if clustered:
        pick = torch.randint(objects, (batch, boxes), generator=g, device=device)
        jitter = torch.randn(batch, boxes, 5, generator=g, device=device)
        center, side, angle = (torch.take_along_dim(x, pick[..., None], 1) for x in (center, side, angle))
        center = center + 0.1 * side * jitter[..., :2]
        side = side * (0.15 * jitter[..., 2:4]).exp()
        angle = angle + 0.1 * jitter[..., 4:]
        other = torch.randint(classes, (batch, boxes), generator=g, device=device)
        label = torch.where(rand(batch, boxes) < 0.8, label.gather(1, pick), other)
    shape = [center, side, angle] if rotated else [center - side / 2, center + side / 2]
    return torch.cat(shape, -1), rand(batch, boxes), label


def eager(threshold: float, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Greedy NMS of [N, 4] from the N x N matrix: what survives the survivors, until nothing changes."""
    order = scores.argsort(descending=True, stable=True)
    box, label = boxes[order], labels[order]
    side = (torch.min(box[:, None, 2:], box[:, 2:]) - torch.max(box[:, None, :2], box[:, :2])).clamp(min=0)
    overlap, area = side[..., 0] * side[..., 1], (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    suppresses = (overlap > threshold * (area[:, None] + area - overlap)) & (label[:, None] == label)
    suppresses = suppresses.triu(1)
    keep = torch.ones_like(scores, dtype=torch.bool)
    while True:
        survives = ~(suppresses & keep[:, None]).any(0)
        if torch.equal(survives, keep):
            return order[keep]
        keep = survives


def _unpadded(output: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [keep[:count] for keep, count in zip(output[0], output[1].tolist(), strict=True)]


def _compare(result: list[Tensor], expected: list[Tensor]) -> str:
    different = 0
    for got, want in zip(result, expected, strict=True):
        both = torch.cat([got.unique(), want]).unique(return_counts=True)[1]
        different += int((both == 1).sum()) + len(got) - len(got.unique())
    return few_differ(different, sum(map(len, expected)), "kept boxes")
