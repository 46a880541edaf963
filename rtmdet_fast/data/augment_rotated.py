"""Turns sampling plans into training samples with rotated boxes: resize, flip, rotation, pad.

In distribution this is the published pipeline (Resize, RandomFlip, RandomRotate, Pad). Where an image is rotated, it is
resized, flipped and rotated by one interpolation.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rtmdet_fast.data.plan import SamplePlan
from rtmdet_fast.data.recipes import RotatedRecipe
from rtmdet_fast.geometry.rotated import regularize


class RotatedAugmenter(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Executes plans: `augmenter[plan]` is image [3, S, S] uint8, boxes [n, 5] float32 (le90), labels [n] int64.

    Each sample is a function of the plan's index and seed. Boxes whose centre leaves the image are dropped, and an
    image may be left without any, as in the reference.
    """

    def __init__(self, dataset: Any, recipe: RotatedRecipe) -> None:
        """dataset: `load(index)` gives samples with boxes [n, 5] (cx, cy, w, h, radians)."""
        self.dataset, self.recipe = dataset, recipe

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, plan: SamplePlan) -> tuple[Tensor, Tensor, Tensor]:
        recipe, size = self.recipe, self.recipe.image_size
        rng = np.random.default_rng(plan.seed)
        sample = self.dataset.load(plan.index)
        flip_x, flip_y = self._flips(rng)
        turn = self._turn(rng, sample.labels)

        h, w = sample.image.shape[:2]
        ratio = size / max(h, w)
        width, height = (max(int(side * ratio + 0.5), 1) for side in (w, h))  # as the letterbox of the tests has it
        to_canvas = _flip(flip_x, flip_y, width, height) @ np.diag([width / w, height / h, 1.0])
        canvas = np.full((size, size, 3), recipe.pad_value, np.uint8)
        region = canvas[:height, :width]
        if turn:
            to_canvas = _rotation(turn, width / 2, height / 2) @ to_canvas
            # pixel i covers i .. i + 1, and cv2 counts from its middle
            matrix = _translation(-0.5, -0.5) @ to_canvas @ _translation(0.5, 0.5)
            region[:] = cv2.warpAffine(
                sample.image, matrix[:2], (width, height), borderValue=(recipe.border_value,) * 3
            )
        else:
            image = cv2.resize(sample.image, (width, height)) if (width, height) != (w, h) else sample.image
            if flip_x or flip_y:
                image = cv2.flip(image, -1 if flip_x and flip_y else int(flip_x))
            region[:] = image

        boxes = transform_boxes(sample.boxes, to_canvas)
        x, y = boxes[:, 0], boxes[:, 1]
        inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
        image = torch.from_numpy(canvas).permute(2, 0, 1)
        return image, torch.from_numpy(boxes[inside]), torch.from_numpy(sample.labels[inside])

    def _flips(self, rng: np.random.Generator) -> tuple[bool, bool]:
        """Whether to flip left to right and upside down."""
        if rng.random() >= self.recipe.flip_prob:
            return False, False
        return ((True, False), (False, True), (True, True))[int(rng.integers(3))]

    def _turn(self, rng: np.random.Generator, labels: np.ndarray) -> float:
        """The angle to rotate by in radians, from x towards y; 0 for none."""
        if rng.random() >= self.recipe.rotate_prob:
            return 0.0
        if np.isin(labels, self.recipe.upright_labels).any():
            return float(rng.choice((-math.pi, -math.pi / 2, math.pi / 2, math.pi)))
        return float(rng.uniform(-math.pi, math.pi))


def transform_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rotated boxes [n, 5] after an affine map [3, 3] of homogeneous pixel coordinates, float32 and le90.

    Each side keeps its own new length and w its direction: where the map is not a similarity (x and y resized to whole
    pixels) the box becomes a parallelogram by less than these say.
    """
    boxes = boxes.astype(np.float64)
    cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    linear = matrix[:2, :2]
    along, across = np.stack([cos, sin], 1) @ linear.T, np.stack([-sin, cos], 1) @ linear.T
    made = np.column_stack(
        [
            boxes[:, :2] @ linear.T + matrix[:2, 2],
            boxes[:, 2] * np.hypot(along[:, 0], along[:, 1]),
            boxes[:, 3] * np.hypot(across[:, 0], across[:, 1]),
            np.arctan2(along[:, 1], along[:, 0]),
        ]
    )
    return regularize(made).astype(np.float32)


def _translation(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def _flip(flip_x: bool, flip_y: bool, width: int, height: int) -> np.ndarray:
    return np.array([[1 - 2 * flip_x, 0, width * flip_x], [0, 1 - 2 * flip_y, height * flip_y], [0, 0, 1]], np.float64)


def _rotation(angle: float, x: float, y: float) -> np.ndarray:
    """About (x, y), from x towards y."""
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return _translation(x, y) @ turn @ _translation(-x, -y)
