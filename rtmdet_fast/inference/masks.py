"""Masks of detections: kept as the network's small logits until somebody asks for pixels, runs or polygons."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtmdet_fast.geometry.masks import Region, encode, outline

# cv2 and pycocotools are imported where they are used: the package imports without them.


@dataclass(frozen=True, eq=False)
class PredictedMasks:
    """The masks of n detections of one image.

    logits: [n, h, w], a pixel for `stride` × `stride` of the network's input
    scale: pixels of the network's input per pixel of the image (x, y)
    shape: (height, width) of the image; what the network saw beyond it is padding
    offset: pixels of the network's input that the logits lie too far to the left and to the top

    A pixel of the image belongs to a mask where the logit at its centre, by one bilinear interpolation, is above 0.
    (The published implementation interpolates to the network's input, then again to the image.) Masks are made one at
    a time, and no larger than they are: [n, H, W] logits of the image never exist.
    """

    logits: Tensor
    scale: tuple[float, float]
    shape: tuple[int, int]
    stride: int = 8
    offset: float = 0.0

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: Tensor | slice) -> PredictedMasks:
        return replace(self, logits=self.logits[index])

    def cpu(self) -> PredictedMasks:
        return replace(self, logits=self.logits.cpu())

    def resized(self, scale: float, shape: tuple[int, int]) -> PredictedMasks:
        """The same masks in an image of another (height, width), `scale` times as large."""
        return replace(self, scale=(self.scale[0] / scale, self.scale[1] / scale), shape=shape)

    def region(self, i: int) -> Region:
        """The pixels of mask i."""
        logits = self._on_cpu[i]
        rows, columns = (np.flatnonzero((logits > 0).any(axis)) for axis in (1, 0))
        if not len(rows):
            return Region(0, 0, np.zeros((0, 0), bool))
        # Interpolation is positive only beside a positive logit.
        (y, low_y, high_y, weight_y), (x, low_x, high_x, weight_x) = (
            axis.beside(found[0], found[-1]) for axis, found in zip(self._axes, (rows, columns), strict=True)
        )
        lines = logits[low_y] + weight_y[:, None] * (logits[high_y] - logits[low_y])
        return Region(x, y, lines[:, low_x] + weight_x * (lines[:, high_x] - lines[:, low_x]) > 0)

    def to_bool(self) -> Tensor:
        """[n, H, W] bool, on the CPU."""
        masks = torch.zeros((len(self), *self.shape), dtype=torch.bool)
        for i, mask in enumerate(masks.numpy()):
            x, y, pixels = self.region(i)
            mask[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        return masks

    def rles(self) -> list[dict[str, Any]]:
        """COCO's compressed run-length encoding of each mask, ready for JSON: size [H, W] and counts, a str."""
        return [encode(self.region(i), self.shape) for i in range(len(self))]

    def polygons(self) -> list[list[list[float]]]:
        """COCO polygons of each mask, [x, y, x, y, …] each; a mask with holes is cut into pieces without."""
        return [outline(self.region(i)) for i in range(len(self))]

    @cached_property
    def _on_cpu(self) -> np.ndarray:
        return self.logits.detach().float().cpu().numpy()

    @cached_property
    def _axes(self) -> tuple[_Axis, _Axis]:
        h, w = self.logits.shape[1:]
        y, x = (
            ((np.arange(length) + 0.5) * scale - self.offset) / self.stride - 0.5
            for length, scale in zip(self.shape, self.scale[::-1], strict=True)
        )
        return _Axis(y, h), _Axis(x, w)


class _Axis:
    """Where the pixels of an image lie among logits along one axis: at `at`, ascending."""

    def __init__(self, at: np.ndarray, logits: int):
        at = at.clip(0, logits - 1)
        self.at, self.low = at, at.astype(int)
        self.high = np.minimum(self.low + 1, logits - 1)
        self.weight = (at - self.low).astype(np.float32)

    def beside(self, first: int, last: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Of the pixels that the logits from `first` to `last` have a part in: their first, and the interpolation."""
        start, stop = np.searchsorted(self.at, (first - 1, last + 1), side="right")
        part = slice(start, stop)
        return int(start), self.low[part], self.high[part], self.weight[part]
