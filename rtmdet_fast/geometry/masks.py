"""Masks as pixels: a region of its image, COCO's run lengths, polygons around it."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np


class Region(NamedTuple):
    """A mask within its image: pixels [h, w] bool, the first of which lies at (x, y); all others are outside it."""

    x: int
    y: int
    pixels: np.ndarray


def encode(region: Region, shape: tuple[int, int]) -> dict[str, Any]:
    """COCO's compressed run-length encoding of a mask in an image of (height, width), its counts as a str."""
    from pycocotools import mask

    height, width = shape
    x, y, pixels = region
    # Runs go down the columns: where one begins or ends, along each column between two pixels of background.
    columns = np.pad(pixels.T, ((0, 0), (1, 1)))
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    ends = (column + x) * height + row + y
    # A run that goes on at the top of the next column is one run.
    joined = np.flatnonzero(ends[1:] == ends[:-1])
    ends = np.delete(ends, np.concatenate([joined, joined + 1]))
    counts = np.diff(ends[ends < height * width], prepend=0, append=height * width)
    rle = mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def cropped_rle(rle: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    """A COCO run-length encoding, compressed or not, in an image of another size: cut, or filled up with background."""
    from pycocotools import mask

    if isinstance(rle["counts"], list):
        rle = mask.frPyObjects(rle, *rle["size"])
    with warnings.catch_warnings():  # of pycocotools' decode under NumPy 2
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        pixels = mask.decode(rle)
    return encode(Region(0, 0, pixels[:height, :width].astype(bool)), (height, width))


def outline(region: Region) -> list[list[float]]:
    """COCO polygons of a mask. They cannot have holes: a mask with one is cut in two through it."""
    import cv2

    x, y, pixels = region
    if not pixels.any():
        return []
    mask = pixels.astype(np.uint8)
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for contour, (*_, parent) in zip(contours, hierarchy[0], strict=True):
        if parent >= 0:
            cut = int(contour[:, 0, 0].min() + contour[:, 0, 0].max() + 1) // 2
            return outline(Region(x, y, pixels[:, :cut])) + outline(Region(x + cut, y, pixels[:, cut:]))
    # cv2 walks through pixel centres; in a mask four times as large these lie 1/8 px from the edge.
    large = cv2.resize(mask, None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    simplified = [cv2.approxPolyDP(contour, 2.0, True)[:, 0] for contour in contours]
    return [((p + 0.5) / 4 + (x, y)).round(2).ravel().tolist() for p in simplified if len(p) >= 3]
