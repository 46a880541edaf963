"""Turns sampling plans into training samples: mosaic, random resize and crop, HSV, flip, pad, mixup.

In distribution this is the published pipeline (CachedMosaic, RandomResize, RandomCrop, YOLOXHSVRandomAug, RandomFlip,
Pad, CachedMixUp). What differs is the work: no mosaic canvas and no resized canvas are built; every tile is resized
straight into its part of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from rtmdet_fast.data.coco import Sample
from rtmdet_fast.data.masks import Outlines, concatenate
from rtmdet_fast.data.plan import SamplePlan
from rtmdet_fast.data.recipes import AugmentRecipe

MAX_DRAWS = 50  # of another image when a crop holds no box
MAX_PARTNER_DRAWS = 15  # of another mixup partner when one holds no box, as in the reference


@dataclass(slots=True)
class Batch:
    """B training samples; rows from gt_counts[b] on are padding."""

    images: Tensor
    """[B, 3, H, W] uint8 BGR, channels_last in memory."""
    gt_boxes: Tensor
    """[B, M, 4] float32 xyxy pixels, or [B, M, 5] (cx, cy, w, h, radians), padded with 0; M >= 1."""
    gt_labels: Tensor
    """[B, M] int64, padded with -1."""
    gt_counts: Tensor
    """[B] int64."""
    gt_centers: Tensor | None = None
    """[B, M, 2] float32 mean column and row of each mask, padded with 0; None for a data set without masks."""
    gt_masks: Tensor | None = None
    """[B, M, H/4, W/4] uint8, the full-size masks at [2::4, 2::4], padded with 0; None likewise."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A copy on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def resized(self, side: int) -> Batch:
        """With images of `side` x `side` pixels, by the nearest of theirs, and upright boxes to fit; without masks."""
        height, width = self.images.shape[2:]
        if (height, width) == (side, side):
            return self
        factors = self.gt_boxes.new_tensor([side / width, side / height] * 2)
        return Batch(F.interpolate(self.images, (side, side)), self.gt_boxes * factors, self.gt_labels, self.gt_counts)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; the DataLoader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors = (getattr(self, field.name) for field in fields(self))
        return Batch(*(None if tensor is None else function(tensor) for tensor in tensors))  # type: ignore[arg-type]


def collate(samples: list[tuple[Tensor, ...]]) -> Batch:
    """Batches what Augmenter returns."""
    images, boxes, labels, *masks = zip(*samples, strict=True)
    counts = torch.tensor([len(b) for b in boxes])
    most = max(int(counts.max()), 1)  # never a dimension of size 0
    gt_boxes = torch.zeros(len(samples), most, boxes[0].shape[1])
    gt_labels = torch.full((len(samples), most), -1)
    for i, n in enumerate(counts.tolist()):
        gt_boxes[i, :n], gt_labels[i, :n] = boxes[i], labels[i]
    # stacked as they lie in memory, [H, W, 3]: a plain copy, where NCHW would gather single bytes
    stacked = torch.stack([i.permute(1, 2, 0) for i in images]).permute(0, 3, 1, 2)
    padded = []
    for values in masks:  # centres, masks
        padded.append(values[0].new_zeros(len(samples), most, *values[0].shape[1:]))
        for i, n in enumerate(counts.tolist()):
            padded[-1][i, :n] = values[i]
    return Batch(stacked, gt_boxes, gt_labels, counts, *padded)


class _Images(Protocol):
    def __len__(self) -> int: ...

    def load(self, index: int) -> Sample: ...


@dataclass(slots=True)
class _Labelled:
    """An image [H, W, 3] uint8 with its boxes [n, 4] float32 xyxy pixels, labels [n] int64 and perhaps masks."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: Outlines | None


@dataclass(slots=True)
class _Part:
    """A rectangle of a tile and the rectangle of the output it is resized into, both (x0, y0, x1, y1) pixels."""

    tile: _Labelled
    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]


class Augmenter(Dataset[tuple[Tensor, ...]]):
    """Executes plans: `augmenter[plan]` is image [3, S, S] uint8 (a view, not to be written to), boxes, labels.

    Where the dataset has masks, their centres of mass [n, 2] and masks [n, S/4, S/4] (see Batch) follow, boxes that a
    crop cuts are those of what is left of their mask, and objects of which nothing is left are gone.

    Decoded images and augmented images are kept as long as the plans' caches hold them, so that memory is bounded as
    in the reference; one that is missing (after a resume, in another worker) is made again, identically.
    """

    def __init__(self, dataset: _Images, recipe: AugmentRecipe) -> None:
        self.dataset, self.recipe = dataset, recipe
        self._tiles: dict[int, _Labelled] = {}  # by dataset index
        self._augmented: dict[int, _Labelled] = {}  # by plan seed
        self._masked = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, plan: SamplePlan) -> tuple[Tensor, ...]:
        result = self._mixup(plan, self._augment(plan))
        keep = {p.seed for p in plan.mixup_cache}
        self._augmented = {seed: made for seed, made in self._augmented.items() if seed in keep}
        cached = set(plan.mosaic_cache)
        self._tiles = {index: tile for index, tile in self._tiles.items() if index in cached}
        image = torch.from_numpy(result.image).permute(2, 0, 1)
        truth: tuple[np.ndarray, ...] = (result.boxes, result.labels)
        if result.masks is not None:
            rendered = result.masks.render(*result.image.shape[:2])
            # as in the reference, objects of a pixel or less are none
            seen = (rendered.areas > 0) & (result.boxes[:, 2:] - result.boxes[:, :2] > 1).all(1)
            truth = tuple(values[seen] for values in (*truth, rendered.centers, rendered.masks))
        return image, *map(torch.from_numpy, truth)

    def _augment(self, plan: SamplePlan) -> _Labelled:
        """All but mixup."""
        if plan.seed in self._augmented:
            return self._augmented[plan.seed]
        recipe, size = self.recipe, self.recipe.image_size
        rng = np.random.default_rng((plan.seed, 0))
        index = plan.index
        for _ in range(MAX_DRAWS):
            parts, width, height = self._compose(index, plan.mosaic_cache, rng)
            boxes, labels, masks = _project(parts, self._masked)
            if len(boxes) or recipe.negative_crops:
                break
            index = int(rng.integers(len(self.dataset)))  # the reference, too, takes another image

        image = np.full((size, size, 3), recipe.pad_value, np.uint8)
        for part in parts:
            x0, y0, x1, y1 = part.source
            u0, v0, u1, v1 = part.target
            target = image[v0:v1, u0:u1]
            cv2.resize(part.tile.image[y0:y1, x0:x1], (u1 - u0, v1 - v0), dst=target, interpolation=cv2.INTER_LINEAR)
        region = image[:height, :width]  # the padding keeps its colour, and stays at the right and the bottom
        _shift_hsv(region, recipe.hsv_gains, rng)
        if rng.random() < recipe.flip_prob:
            region[:] = cv2.flip(region, 1)
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
            masks = masks and masks.flipped(width)
        made = self._augmented[plan.seed] = _Labelled(image, boxes, labels, masks)
        return made

    def _compose(self, index: int, cache: tuple[int, ...], rng: np.random.Generator) -> tuple[list[_Part], int, int]:
        """Mosaic, resize and crop as geometry: the parts that are seen, and the size of what they are parts of."""
        size = self.recipe.image_size
        ratio = rng.uniform(*self.recipe.resize_range)
        if len(cache) > 4:
            side = 2 * size
            x, y = (int(rng.uniform(*self.recipe.mosaic_center_range) * size) for _ in range(2))
            # The cache's last is the plan's own image. As in the reference the others are drawn from before it.
            tiles = [self._tile(i) for i in (index, *(cache[k] for k in rng.integers(len(cache) - 1, size=3)))]
            # the tiles meet at (x, y): top left, top right, bottom left, bottom right
            corners = [
                (x if i % 2 else x - t.image.shape[1], y if i // 2 else y - t.image.shape[0])
                for i, t in enumerate(tiles)
            ]
            canvas_w = canvas_h = side
            target_w = target_h = int(side * ratio)
        else:
            sample = self._load(index)
            tiles, corners = [_Labelled(sample.image, sample.boxes, sample.labels, sample.masks)], [(0, 0)]
            canvas_h, canvas_w = sample.image.shape[:2]
            scale = int((2 * size if cache else size) * ratio) / max(canvas_h, canvas_w)
            target_w, target_h = (max(int(side * scale + 0.5), 1) for side in (canvas_w, canvas_h))
        left, seen_w, width = _crop(canvas_w, target_w, size, rng)
        top, seen_h, height = _crop(canvas_h, target_h, size, rng)
        parts = []
        for tile, (x, y) in zip(tiles, corners, strict=True):
            tile_h, tile_w = tile.image.shape[:2]
            # whole pixels on both sides, and neighbours share their edge: what is drawn and what the boxes say agree
            x0, x1 = max(x, left), min(x + tile_w, left + seen_w)
            y0, y1 = max(y, top), min(y + tile_h, top + seen_h)
            u0, u1 = (round((v - left) * width / seen_w) for v in (x0, x1))
            v0, v1 = (round((v - top) * height / seen_h) for v in (y0, y1))
            if x0 < x1 and y0 < y1 and u0 < u1 and v0 < v1:
                parts.append(_Part(tile, (x0 - x, y0 - y, x1 - x, y1 - y), (u0, v0, u1, v1)))
        return parts, width, height

    def _load(self, index: int) -> Sample:
        sample = self.dataset.load(index)
        self._masked = sample.masks is not None
        return sample

    def _tile(self, index: int) -> _Labelled:
        """The image resized to fit `image_size`, as the mosaic pastes it."""
        if index not in self._tiles:
            sample = self._load(index)
            h, w = sample.image.shape[:2]
            new_w, new_h = (max(side * self.recipe.image_size // max(h, w), 1) for side in (w, h))
            image, boxes, masks = sample.image, sample.boxes, sample.masks
            if (new_w, new_h) != (w, h):
                image = cv2.resize(image, (new_w, new_h), interpolation=cv2.INTER_LINEAR)
                boxes = boxes * np.array([new_w / w, new_h / h] * 2, np.float32)
                masks = masks and masks.resized((new_w / w, new_h / h))
            self._tiles[index] = _Labelled(image, boxes, sample.labels, masks)
        return self._tiles[index]

    def _mixup(self, plan: SamplePlan, own: _Labelled) -> _Labelled:
        """Averages `own` with another image of the cache; the boxes of both are kept."""
        rng = np.random.default_rng((plan.seed, 1))  # not _augment's, which has drawn nothing where its result was kept
        cache, size = plan.mixup_cache, self.recipe.image_size
        if len(cache) <= 1 or rng.random() > self.recipe.mixup_prob:
            return own
        for _ in range(MAX_PARTNER_DRAWS):
            partner = self._augment(cache[int(rng.integers(len(cache) - 1))])  # not with itself
            if len(partner.boxes):
                break
        else:
            return own
        image, boxes, masks = partner.image, partner.boxes, partner.masks
        if rng.random() < 0.5:  # whatever flip_prob is, as in the reference
            image = cv2.flip(image, 1)
            boxes = np.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], 1)
            masks = masks and masks.flipped(size)
        # the offset turns OpenCV's rounding of halves into the reference's rounding down
        mixed = cv2.addWeighted(own.image, 0.5, image, 0.5, -0.25)
        return _Labelled(
            mixed,
            np.concatenate([own.boxes, boxes]),
            np.concatenate([own.labels, partner.labels]),
            concatenate([own.masks, masks]) if own.masks is not None and masks is not None else None,
        )


def _crop(length: int, target: int, limit: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """Along one axis: resize `length` pixels to `target`, then crop to `limit` at random.

    Returns start and extent of what stays, in pixels before the resize, and its extent after it. Cropping first, in
    whole source pixels, moves the crop by less than one of them and changes the scale by less than half of one.
    """
    target = max(target, 1)
    if target <= limit:
        return 0, length, target
    seen = min(max(round(length * limit / target), 1), length)
    return int(rng.integers(length - seen + 1)), seen, limit


def _project(parts: list[_Part], masked: bool) -> tuple[np.ndarray, np.ndarray, Outlines | None]:
    """The tiles' boxes in output pixels, clipped to what is seen of their tile; those with nothing left are dropped.

    With masks, a box that was clipped shrinks to what is left of its mask.
    """
    boxes, labels, outlines = [np.zeros((0, 4), np.float32)], [np.zeros(0, np.int64)], []
    cut = [np.zeros(0, bool)]
    for part in parts:
        x0, y0, x1, y1 = part.source
        u0, v0, u1, v1 = part.target
        scale = np.array([(u1 - u0) / (x1 - x0), (v1 - v0) / (y1 - y0)] * 2, np.float32)
        projected = (part.tile.boxes - np.array([x0, y0, x0, y0], np.float32)) * scale
        projected += np.array([u0, v0, u0, v0], np.float32)
        seen = np.clip(projected, (u0, v0, u0, v0), (u1, v1, u1, v1), dtype=np.float32)
        kept = np.asarray((seen[:, 2:] > seen[:, :2]).all(1))
        boxes.append(seen[kept])
        labels.append(part.tile.labels[kept])
        if part.tile.masks is not None:
            cut.append((seen != projected).any(1)[kept])
            sx, sy = (u1 - u0) / (x1 - x0), (v1 - v0) / (y1 - y0)
            masks = part.tile.masks.take(kept).resized((sx, sy), (u0 - x0 * sx, v0 - y0 * sy))
            outlines.append(masks.seen_through(part.target))
    if not masked:
        return np.concatenate(boxes), np.concatenate(labels), None
    return _shrunk(np.concatenate(boxes), np.concatenate(labels), concatenate(outlines), np.concatenate(cut))


def _shrunk(
    boxes: np.ndarray, labels: np.ndarray, masks: Outlines, cut: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Outlines]:
    """The objects, whose boxes are fitted to their masks where `cut`; those with nothing left are dropped."""
    extents = masks.take(cut).render(0, 0, pixels=False).extents
    boxes[cut, :2] = np.maximum(boxes[cut, :2], extents[:, :2])
    boxes[cut, 2:] = np.minimum(boxes[cut, 2:], extents[:, 2:])
    kept = np.asarray((boxes[:, 2:] > boxes[:, :2]).all(1))
    return boxes[kept], labels[kept], masks.take(kept)


def _shift_hsv(image: np.ndarray, gains: tuple[int, int, int], rng: np.random.Generator) -> None:
    """Shifts hue, saturation and value, each with probability one half, in place."""
    shift = (rng.uniform(-1, 1, 3) * gains * rng.integers(2, size=3)).astype(int)
    hue, saturation, value = shift.tolist()
    if not shift.any():
        return
    # Saturating uint8 addition does all three: the conversion back takes hues of 180 and more around the circle.
    # A hue below 0 is reached with red and blue exchanged, where hues run the other way.
    to_hsv, to_bgr = (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR) if hue >= 0 else (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
    hsv = cv2.cvtColor(image, to_hsv)
    cv2.add(hsv, np.array([abs(hue), saturation, value, 0.0]), dst=hsv)
    cv2.cvtColor(hsv, to_bgr, dst=image)
