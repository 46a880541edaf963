"""Overlapping windows over an image too large for the network."""

from __future__ import annotations

import math

import numpy as np

from rtmdet_fast.errors import UserError

PAD = 114  # grey, as beside letterboxed images


def window_starts(length: int, size: int, overlap: int) -> list[int]:
    """Where windows of `size` start along `length` pixels, neighbours sharing at least `overlap`.

    The last one is moved back to end at the edge; a single one where `length` is `size` or less.
    """
    if not 0 <= overlap < size:
        raise UserError(f"windows of {size} pixels cannot overlap by {overlap}: take an overlap of 0 to {size - 1}")
    if length <= size:
        return [0]
    step = size - overlap
    count = math.ceil((length - size) / step) + 1
    return [min(step * i, length - size) for i in range(count)]


def windows(width: int, height: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """The (x, y) of the windows over an image, row by row."""
    columns = window_starts(width, size, overlap)
    return [(x, y) for y in window_starts(height, size, overlap) for x in columns]


def crop(image: np.ndarray, x: int, y: int, size: int) -> np.ndarray:
    """[size, size, 3], the window of `image` at (x, y), padded at right and bottom where the image ends."""
    part = image[y : y + size, x : x + size]
    if part.shape[:2] == (size, size):
        return np.ascontiguousarray(part)
    patch = np.full((size, size, 3), PAD, np.uint8)
    patch[: part.shape[0], : part.shape[1]] = part
    return patch
