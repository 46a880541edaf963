"""Pairwise rotated IoU of boxes that are spread over an image, so that almost all pairs are disjoint."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benches.harness import Absent, Case, Contender, Parity, compiled, own
from rtmdet_fast.kernels.rotated_iou import box_iou_rotated, box_iou_rotated_reference

TOLERANCE = 1e-4  # absolute; ours is tested to 1e-5


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        return [_case(device, 8, 8400, 500), _case(device, 1, 1000, 1000, headline=False)]
    return [_case(device, 1, 1000, 1000)]


def _case(device: torch.device, batch: int, n: int, m: int, headline: bool = True) -> Case:
    def eager(boxes1: Tensor, boxes2: Tensor) -> Tensor:
        shape = (batch, n, m, 5)
        return box_iou_rotated_reference(
            boxes1[:, :, None].expand(shape).flatten(0, 2), boxes2[:, None].expand(shape).flatten(0, 2), aligned=True
        ).view(shape[:3])

    contenders = [
        *own(device, box_iou_rotated, box_iou_rotated_reference),
        Contender(name="eager, no culling", build=lambda: eager, graph=True),
        Contender(name="torch.compile, no culling", build=compiled(device, eager), graph=True),
        Contender(name="mmcv, per image", build=_mmcv),
        Contender(name="torchvision, per image", build=_torchvision),
    ]
    return Case(
        op="rotated_iou",
        name=f"{batch} image{'s' * (batch > 1)}, {n} x {m} boxes over 1024 px",
        shapes={"boxes1": [batch, n, 5], "boxes2": [batch, m, 5]},
        inputs=partial(spread_boxes, batch, n, m, device),
        expected=lambda one, two: torch.stack(
            [box_iou_rotated_reference(a, b) for a, b in zip(one.double(), two.double(), strict=True)]
        ),
        compare=_compare,
        contenders=contenders,
        headline=headline,
    )


def spread_boxes(batch: int, n: int, m: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Boxes of 8 to 100 px at random places of 1024 px, at every angle."""
    g = torch.Generator(device).manual_seed(seed)
    rand = partial(torch.rand, generator=g, device=device)

    def boxes(count: int) -> Tensor:
        parts = [rand(batch, count, 2) * 1024, 8 * 12.5 ** rand(batch, count, 2), rand(batch, count, 1) * math.pi]
        return torch.cat(parts, -1)

    return boxes(n), boxes(m)


def _mmcv() -> Any:
    from mmcv.ops import box_iou_rotated  # type: ignore[import-not-found]

    return lambda one, two: torch.stack([box_iou_rotated(a, b) for a, b in zip(one, two, strict=True)])


def _torchvision() -> Any:
    from torchvision.ops import box_iou  # type: ignore[import-not-found]

    if "fmt" not in inspect.signature(box_iou).parameters:
        raise Absent("torchvision has rotated IoU from 0.27 on")

    def run(one: Tensor, two: Tensor) -> Tensor:
        degrees = one.new_tensor([1, 1, 1, 1, -180 / math.pi])  # counter-clockwise
        pairs = zip(one * degrees, two * degrees, strict=True)
        return torch.stack([box_iou(a, b, fmt="cxcywhr") for a, b in pairs])

    return run


def _compare(result: Tensor, expected: Tensor) -> str:
    if result.shape != expected.shape:
        raise Parity(f"shape {tuple(result.shape)} instead of {tuple(expected.shape)}")
    error = (result - expected).abs().max().item()
    if not error < TOLERANCE:
        raise Parity(f"IoU differs by {error:.1e}, allowed {TOLERANCE:.0e}")
    return f"IoU within {error:.0e}"
