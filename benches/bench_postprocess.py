"""From the head's outputs to detections with the published test settings: decoding, threshold, top k, NMS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benches.bench_nms import eager as eager_nms
from benches.harness import Case, Contender, few_differ
from benches.models import mmdet_model, objects, plain
from rtmdet_fast.models.rtmdet.detection_head import (
    DetectionHead,
    HeadOutput,
    distances_to_boxes,
    flatten_levels,
    grid_priors,
)

CLASSES, SIDE = 80, 640
SETTINGS = DetectionHead.test_settings


def cases(device: torch.device) -> list[Case]:
    return [_case(device, 32), _case(device, 1)] if device.type == "cuda" else [_case(device, 1), _case(device, 8)]


def _case(device: torch.device, batch: int) -> Case:
    head = DetectionHead(96, CLASSES)

    def own(*levels: Tensor) -> Any:
        return head.detect(HeadOutput(levels[:3], levels[3:]), (SIDE, SIDE), SETTINGS)

    def mmdet() -> Callable[..., Any]:
        model, config = mmdet_model("tiny", CLASSES, device)
        metas = [dict(img_shape=(SIDE, SIDE), scale_factor=(1.0, 1.0))] * batch

        def run(*levels: Tensor) -> Any:
            with torch.no_grad():
                return model.bbox_head.predict_by_feat(  # type: ignore[operator, union-attr]
                    levels[:3], levels[3:], batch_img_metas=metas, cfg=config.model.test_cfg
                )

        return run

    cuda = device.type == "cuda"
    contenders = [Contender(name="triton" if cuda else "reference", build=lambda: own, result=_rows)]
    if cuda:
        contenders.append(Contender(name="reference", build=lambda: plain(own), result=_rows))
    contenders += [
        Contender(name="eager, per image", build=lambda: eager),
        Contender(name="mmdet", build=mmdet, result=_mmdet_rows),
    ]
    return Case(
        op="postprocess",
        name=f"{batch} image{'s' * (batch > 1)}, {CLASSES} classes, {SIDE} px",
        shapes={"logits": [batch, CLASSES, SIDE // 8, SIDE // 8], "distances": [batch, 4, SIDE // 8, SIDE // 8]},
        inputs=partial(outputs, batch, device),
        expected=lambda *levels: _rows(own(*(level.double() for level in levels))),
        compare=_compare,
        contenders=contenders,
    )


def outputs(batch: int, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """Logits and distances of the three levels, as a trained head gives: 30 objects an image and much background."""
    g = torch.Generator(device).manual_seed(seed)
    randn = partial(torch.randn, generator=g, device=device)
    targets = objects(batch, 30, CLASSES, SIDE, device, seed)
    sides = [SIDE // stride for stride in (8, 16, 32)]
    priors = grid_priors([(side, side) for side in sides], device)
    points = priors[:, :2]
    center = (targets.boxes[..., :2] + targets.boxes[..., 2:]) / 2
    size = (targets.boxes[..., 2:] - targets.boxes[..., :2]).clamp(min=1)
    offset = ((points[:, None] - center[:, None]) / size[:, None]).square().sum(-1)  # [B, N, M], 0 at the centre
    # each object shows on the level that fits its size
    misfit = (size.amax(-1)[:, None] / (priors[:, 2, None] * 6)).log().square()
    strength, target = (6 - 20 * offset - 2 * misfit).max(-1)
    boxes = torch.take_along_dim(targets.boxes, target[..., None], 1)
    label = torch.take_along_dim(targets.labels, target, 1)
    logits = randn(batch, len(priors), CLASSES) - 9
    logits.scatter_add_(2, label[..., None], 4 * strength.clamp(min=0)[..., None] / 2)
    distances = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)
    distances = distances + 0.05 * size.amax(-1).take_along_dim(target, 1)[..., None] * randn(batch, len(priors), 4)
    levels = []
    for tensor in (logits, distances):
        parts = tensor.split([side * side for side in sides], 1)
        levels += [part.transpose(1, 2).unflatten(2, (side, side)) for part, side in zip(parts, sides, strict=True)]
    return tuple(level.contiguous() for level in levels)


@torch.no_grad()
def eager(*levels: Tensor) -> list[Tensor]:
    """Image by image, greedy NMS from matrices of pairs: of all on a GPU, class by class on a CPU. Rows as `_rows`."""
    logits, distances = flatten_levels(levels[:3]), flatten_levels(levels[3:])
    priors = grid_priors([(level.shape[2], level.shape[3]) for level in levels[:3]], logits.device)
    boxes = distances_to_boxes(priors, distances).clamp(0, SIDE)
    found = []
    for box, logit in zip(boxes, logits, strict=True):
        score = logit.sigmoid()
        prior, label = (score > SETTINGS.score_threshold).nonzero(as_tuple=True)
        box, score = box[prior], score[prior, label]
        solid = (box[:, 2:] > box[:, :2]).all(1)
        box, score, label = box[solid], score[solid], label[solid]
        if box.is_cuda:
            keep = eager_nms(SETTINGS.iou_threshold, box, score, label)
        else:
            classes = [(label == c).nonzero()[:, 0] for c in label.unique()]
            kept = [own[eager_nms(SETTINGS.iou_threshold, box[own], score[own], label[own])] for own in classes]
            keep = torch.cat([label.new_empty(0), *kept])
            keep = keep[score[keep].argsort(descending=True)]
        keep = keep[: SETTINGS.max_detections]
        found.append(torch.cat([box[keep], score[keep, None], label[keep, None]], 1))
    return found


def _rows(found: Any) -> list[Tensor]:
    return [torch.cat([image.boxes, image.scores[:, None], image.labels[:, None]], 1) for image in found]


def _mmdet_rows(found: Any) -> list[Tensor]:
    return [torch.cat([image.bboxes, image.scores[:, None], image.labels[:, None]], 1) for image in found]


def _compare(result: list[Tensor], expected: list[Tensor]) -> str:
    """Rows (box, score, label) that have no partner within 0.01 px and 1e-4."""
    different = 0
    for got, want in zip(result, expected, strict=True):
        weight = want.new_tensor([1, 1, 1, 1, 100, 100])
        distance = ((got.to(want.dtype)[:, None] - want) * weight).abs().amax(-1)
        for side in (0, 1):
            different += int((distance.amin(1 - side) > 0.01).sum()) if distance.numel() else distance.shape[side]
    return few_differ(different, sum(map(len, expected)), "detections", tolerance=0.01)
