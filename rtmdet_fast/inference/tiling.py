"""Images too large for the network: overlapping windows over them, and the detections of all windows made one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtmdet_fast.geometry.windows import crop, windows
from rtmdet_fast.kernels.nms import batched_nms_padded


def predict_tiled(
    detect: Callable[[list[np.ndarray]], Sequence[Any]],
    image: np.ndarray,
    *,
    patch_size: int,
    overlap: int,
    batch_size: int,
    iou_threshold: float,
    max_detections: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections on an image of any size, from overlapping windows.

    Args:
        detect: of a list of BGR patches [patch_size, patch_size, 3] uint8, makes for each (boxes, scores, labels, …) in
            pixels of the patch: [n, 4] xyxy or [n, 5] (cx, cy, w, h, radians), [n], [n].
        image: [H, W, 3] uint8 BGR.
        overlap: of neighbouring windows, in pixels: objects up to this size are whole in one of them.
        batch_size: patches per call of `detect`.
        iou_threshold: of the non-maximum suppression over all windows, class by class.
        max_detections: that it leaves.
        device: on which it runs; that of what `detect` makes where not given.

    Returns:
        boxes [D, 4 or 5] in pixels of `image`, scores [D], labels [D], best score first; on that device.
    """
    height, width = image.shape[:2]
    places = windows(width, height, patch_size, overlap)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(places), batch_size):
        patches = [crop(image, x, y, patch_size) for x, y in places[start : start + batch_size]]
        found += [(d[0], d[1], d[2]) for d in detect(patches)]
    return merge(found, places, iou_threshold, max_detections, (height, width), device)


def merge(
    found: Sequence[tuple[Tensor, Tensor, Tensor]],
    places: Sequence[tuple[int, int]],
    iou_threshold: float,
    max_detections: int,
    shape: tuple[int, int],
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The detections (boxes, scores, labels) of windows at `places` (x, y) as those of the image of `shape` (H, W).

    Class-aware NMS over all of them in one call; boxes whose centre lies beyond the image, in the padding, are dropped.
    """
    boxes = torch.cat([_moved(b, x, y) for (b, _, _), (x, y) in zip(found, places, strict=True)])
    scores, labels = torch.cat([s for _, s, _ in found]), torch.cat([c for _, _, c in found])
    boxes, scores, labels = (field.to(device) for field in (boxes, scores, labels))
    centres = boxes[:, :2] if boxes.shape[1] == 5 else (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = (centres >= 0).all(1) & (centres[:, 0] <= shape[1]) & (centres[:, 1] <= shape[0])
    boxes, scores, labels = boxes[inside], scores[inside], labels[inside]
    keep, count = batched_nms_padded(
        boxes[None], scores[None], labels[None], iou_threshold, min(max_detections, len(boxes))
    )
    kept = keep[0, : int(count)]
    return boxes[kept], scores[kept], labels[kept]


def _moved(boxes: Tensor, x: int, y: int) -> Tensor:
    shift = (x, y, x, y) if boxes.shape[1] == 4 else (x, y, 0, 0, 0)
    return boxes.float() + torch.tensor(shift, device=boxes.device)
