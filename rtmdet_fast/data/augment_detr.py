"""Turns sampling plans into RT-DETR's training samples: distorted colours, zoom-out, crop, flip, resize to a square.

In distribution this is the published pipeline (RandomPhotometricDistort, RandomZoomOut, RandomIoUCrop,
SanitizeBoundingBoxes, RandomHorizontalFlip, Resize) on Pillow's images, and in pixels to a grey level. What differs is
the work: zoom-out and crop only choose a window, which may reach beyond the image; what of the image lies in it is
distorted, and resized once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from rtmdet_fast.data.plan import SamplePlan
from rtmdet_fast.data.recipes import DetrRecipe

Window = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of an image, beyond which it is black."""


class DetrAugmenter(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Executes plans: `augmenter[plan]` is image [3, S, S] uint8 BGR, boxes [n, 4] float32 xyxy pixels, labels [n].

    Each sample is a function of the plan's index, seed and stage: in stage 2 an image is only flipped and resized. An
    image may be left without boxes, as in the reference.
    """

    def __init__(self, dataset: Any, recipe: DetrRecipe) -> None:
        """dataset: `load(index)` gives samples with boxes [n, 4] xyxy."""
        self.dataset, self.recipe = dataset, recipe

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, plan: SamplePlan) -> tuple[Tensor, Tensor, Tensor]:
        recipe = self.recipe
        rng = np.random.default_rng(plan.seed)
        sample = self.dataset.load(plan.index)
        height, width = sample.image.shape[:2]
        distortion, window = Distortion(), (0, 0, width, height)
        if not plan.stage2:
            distortion = draw_distortion(recipe, rng)
            if rng.random() < recipe.zoom_out_prob:
                window = draw_zoom_out(recipe, width, height, rng)
            if rng.random() < recipe.crop_prob:
                window = draw_crop(recipe, window, sample.boxes, rng)
        flipped = rng.random() < recipe.flip_prob

        boxes, kept = project(sample.boxes, window, recipe.image_size, recipe.min_box_size)
        x0, y0, x1, y1 = window
        seen = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        part = distort(sample.image, distortion, seen)
        canvas = resize_into(part, (seen[0] - x0, seen[1] - y0), (x1 - x0, y1 - y0), recipe.image_size)
        if flipped:
            canvas = cv2.flip(canvas, 1)
            boxes[:, [0, 2]] = recipe.image_size - boxes[:, [2, 0]]
        image = torch.from_numpy(canvas).permute(2, 0, 1)
        return image, torch.from_numpy(boxes), torch.from_numpy(sample.labels[kept])


@dataclass(frozen=True, slots=True, kw_only=True)
class Distortion:
    """Changes of colour, None for those that are not made."""

    brightness: float | None = None
    contrast: float | None = None
    contrast_first: bool = True
    """Right after brightness, or else after hue."""
    saturation: float | None = None
    hue: float | None = None
    permutation: tuple[int, ...] | None = None
    """Which of R, G, B becomes R, G, B."""


def draw_distortion(recipe: DetrRecipe, rng: np.random.Generator) -> Distortion:
    """Each change with probability `distort_prob`, independently."""

    def drawn(limits: tuple[float, float]) -> float | None:
        return float(rng.uniform(*limits)) if rng.random() < recipe.distort_prob else None

    return Distortion(
        brightness=drawn(recipe.brightness_range),
        contrast=drawn(recipe.contrast_range),
        saturation=drawn(recipe.saturation_range),
        hue=drawn(recipe.hue_range),
        contrast_first=bool(rng.random() < 0.5),
        permutation=tuple(rng.permutation(3).tolist()) if rng.random() < recipe.distort_prob else None,
    )


def draw_zoom_out(recipe: DetrRecipe, width: int, height: int, rng: np.random.Generator) -> Window:
    """A canvas of the image's aspect ratio with the image in it."""
    ratio = rng.uniform(*recipe.zoom_out_range)
    canvas_w, canvas_h = int(width * ratio), int(height * ratio)
    left, top = int((canvas_w - width) * rng.random()), int((canvas_h - height) * rng.random())
    return -left, -top, canvas_w - left, canvas_h - top


def draw_crop(recipe: DetrRecipe, window: Window, boxes: np.ndarray, rng: np.random.Generator) -> Window:
    """A part of `window` that holds the centre of some of `boxes` [n, 4], and overlaps such a box by an IoU drawn."""
    if not len(boxes):  # none would ever do
        return window
    x0, y0, x1, y1 = window
    center_x, center_y = (boxes[:, :2] + boxes[:, 2:]).T / 2
    while (least := recipe.crop_ious[int(rng.integers(len(recipe.crop_ious)))]) < 1:
        # all trials at once; the first that does is taken
        draws = rng.random((4, recipe.crop_trials))
        scale_w, scale_h = recipe.crop_range[0] + (recipe.crop_range[1] - recipe.crop_range[0]) * draws[:2]
        w, h = ((x1 - x0) * scale_w).astype(int), ((y1 - y0) * scale_h).astype(int)
        left, top = x0 + ((x1 - x0 - w) * draws[2]).astype(int), y0 + ((y1 - y0 - h) * draws[3]).astype(int)
        lowest, highest = recipe.crop_aspect_range
        fits = (w > 0) & (h > 0) & (w >= lowest * h) & (w <= highest * h)
        crops = np.stack([left, top, left + w, top + h], 1)[:, None]  # [trials, 1, 4]
        inside = (crops[..., 0] < center_x) & (center_x < crops[..., 2])
        inside &= (crops[..., 1] < center_y) & (center_y < crops[..., 3])
        fits &= (inside & (_iou(crops, boxes) >= least)).any(1)
        if fits.any():
            return tuple(crops[int(fits.argmax()), 0].tolist())
    return window


def project(boxes: np.ndarray, window: Window, size: int, min_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [n, 4] as they lie in `window` once that is resized to a square of `size` pixels: those kept, and which.

    Dropped are boxes whose centre is not within the window, and those of which less than `min_size` pixels are left in
    width or height, in the window or in the square.
    """
    x0, y0, x1, y1 = window
    extent = np.array([x1 - x0, y1 - y0] * 2, np.float32)
    moved = boxes - np.array([x0, y0, x0, y0], np.float32)
    center = (moved[:, :2] + moved[:, 2:]) / 2
    kept = np.asarray(((center > 0) & (center < extent[:2])).all(1))
    clipped = np.clip(moved, 0, extent)
    resized = np.clip(clipped * (size / extent), 0, size, dtype=np.float32)
    for stage in (clipped, resized):
        kept &= (stage[:, 2:] - stage[:, :2] >= min_size).all(1)
    return resized[kept], kept


def distort(image: np.ndarray, distortion: Distortion, part: Window) -> np.ndarray:
    """`part` of the image [H, W, 3] BGR, its colours distorted as Pillow would, to a grey level."""
    x0, y0, x1, y1 = part
    seen = slice(y0, y1), slice(x0, x1)
    if distortion.contrast is None:  # which alone asks for the whole image
        image, seen = image[seen], (slice(None), slice(None))
    if distortion.brightness is not None:
        image = _blend(image, 0, distortion.brightness)
    if distortion.contrast is not None and distortion.contrast_first:
        image = _blend(image[seen], _mean(image), distortion.contrast)
    if distortion.saturation is not None:
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
        # the offset turns OpenCV's rounding into Pillow's rounding down
        image = cv2.addWeighted(image, distortion.saturation, grey, 1 - distortion.saturation, -0.499)
    if distortion.hue is not None:
        image = _shift_hue(image, distortion.hue)
    if distortion.contrast is not None and not distortion.contrast_first:
        image = _blend(image[seen], _mean(image), distortion.contrast)
    if distortion.permutation is not None:
        source = [2 - distortion.permutation[2 - i] for i in range(3)]  # from RGB to BGR
        permuted = np.empty_like(image, order="C")
        cv2.mixChannels([image], [permuted], [v for pair in zip(source, range(3), strict=True) for v in pair])
        image = permuted
    return image


def resize_into(part: np.ndarray, corner: tuple[int, int], canvas: tuple[int, int], size: int) -> np.ndarray:
    """[size, size, 3]: a black canvas (width, height) with `part` [h, w, 3] at `corner` (x, y), resized by Pillow.

    Of the canvas no more is made than what `part` and the pixels beside it take. Where nothing shrinks or is black,
    OpenCV computes the same to a grey level. Of a part Pillow rounds `box` to float32, which moves one value in a
    million by two levels, the others by one at most.
    """
    h, w = part.shape[:2]
    if (w, h) == canvas:
        if w <= size and h <= size:
            return cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)
        return np.array(Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR))
    (u0, u1, a0, a1), (v0, v1, b0, b1) = (
        _reach(start, length, extent, size) for start, length, extent in zip(corner, (w, h), canvas, strict=True)
    )
    source = np.zeros((b1 - b0, a1 - a0, 3), np.uint8)
    source[corner[1] - b0 : corner[1] - b0 + h, corner[0] - a0 : corner[0] - a0 + w] = part
    scale_x, scale_y = canvas[0] / size, canvas[1] / size
    box = (
        u0 * scale_x - a0,
        v0 * scale_y - b0,
        min(u1 * scale_x - a0, a1 - a0),  # which rounding might pass
        min(v1 * scale_y - b0, b1 - b0),
    )
    drawn = np.asarray(Image.fromarray(source).resize((u1 - u0, v1 - v0), Image.Resampling.BILINEAR, box=box))
    result = np.zeros((size, size, 3), np.uint8)
    result[v0:v1, u0:u1] = drawn
    return result


def _reach(start: int, length: int, extent: int, size: int) -> tuple[int, int, int, int]:
    """Along one axis of a canvas, black but for `length` pixels from `start` on, whose `extent` is resized to `size`.

    Returns first and last + 1 of the result's pixels that are not black, then of the canvas's pixels that these are
    averages of: in doubt some more.
    """
    scale = extent / size
    support = max(scale, 1.0)
    first = max(math.floor((start - support) / scale - 0.5), 0)
    last = min(math.ceil((start + length + support) / scale + 0.5), size)
    lower = max(math.floor((first + 0.5) * scale - support) - 1, 0)
    upper = min(math.ceil((last - 0.5) * scale + support) + 1, extent)
    return first, last, lower, upper


def _blend(image: np.ndarray, grey: int, factor: float) -> np.ndarray:
    """grey + factor (image - grey), rounded down and clipped to a byte."""
    values = grey + np.float32(factor) * (np.arange(256, dtype=np.float32) - grey)
    return cv2.LUT(image, values.clip(0, 255).astype(np.uint8))


def _mean(image: np.ndarray) -> int:
    return int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))[0] + 0.5)


def _shift_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Through Pillow's HSV of three bytes: that of OpenCV rounds otherwise, by up to 6 grey levels."""
    shift = int(turns * 255)
    hsv = Image.fromarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)).convert("HSV")
    table = [*((np.arange(256) + shift) % 256).tolist(), *range(256), *range(256)]
    return cv2.cvtColor(np.asarray(hsv.point(table).convert("RGB")), cv2.COLOR_RGB2BGR)


def _iou(crops: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """[trials, n] of crops [trials, 1, 4] and boxes [n, 4]; 0 for an empty crop."""
    corner = np.minimum(crops[..., 2:], boxes[:, 2:]) - np.maximum(crops[..., :2], boxes[:, :2])
    overlap = corner.clip(0).prod(-1)
    area = (crops[..., 2:] - crops[..., :2]).prod(-1)
    return overlap / (area + (boxes[:, 2:] - boxes[:, :2]).prod(-1) - overlap)
