"""From an image to the network's input, as the published checkpoints expect it: onto a square, then normalisation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MEAN = (103.53, 116.28, 123.675)  # BGR, of pixels in 0..255
STD = (57.375, 57.12, 58.395)


def letterbox(image: np.ndarray, size: int, pad_value: int = 114) -> tuple[np.ndarray, tuple[float, float]]:
    """Resizes `image` to fit a square and pads it on the right and at the bottom.

    Args:
        image: [H, W, 3] uint8.
        size: side of the square in pixels.
        pad_value: grey level of the padding.

    Returns:
        The canvas [size, size, 3] uint8, and the scale (x, y): canvas pixels per pixel of `image`. The two differ
        where the resized side is rounded to whole pixels.
    """
    import cv2  # here: models and losses run where OpenCV is not installed

    h, w = image.shape[:2]
    ratio = size / max(h, w)
    new_w, new_h = max(int(w * ratio + 0.5), 1), max(int(h * ratio + 0.5), 1)
    if (new_w, new_h) != (w, h):
        image = cv2.resize(image, (new_w, new_h), interpolation=cv2.INTER_LINEAR)
    canvas = np.full((size, size, 3), pad_value, np.uint8)
    canvas[:new_h, :new_w] = image
    return canvas, (new_w / w, new_h / h)


def squash(image: np.ndarray, size: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Resizes `image` to a square whatever its aspect ratio, as RT-DETR's checkpoints expect it.

    By Pillow, as for these: OpenCV's bilinear interpolation takes no average where it shrinks, and differs by up to
    half of the range of a byte.

    Args:
        image: [H, W, 3] uint8.
        size: side of the square in pixels.

    Returns:
        The canvas [size, size, 3] uint8, and the scale (x, y): canvas pixels per pixel of `image`.
    """
    from PIL import Image  # here: models and losses run without loading it

    h, w = image.shape[:2]
    canvas = np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
    return canvas, (size / w, size / h)


def normalize(images: Tensor) -> Tensor:
    """[B, 3, H, W] uint8 BGR to float32 of zero mean and unit variance per channel, in the memory format given.

    float64 where that is PyTorch's default dtype.
    """
    mean, std = _per_channel(MEAN, images.device), _per_channel(STD, images.device)
    result = images.to(torch.promote_types(torch.float32, mean.dtype), copy=True)
    last = not result.is_contiguous() and result.is_contiguous(memory_format=torch.channels_last)
    if not last or result.device.type != "cpu":
        return result.sub_(mean).div_(std)
    # whole rows of pixels: of three numbers in a row PyTorch takes one at a time
    width = images.shape[3]
    rows = result.permute(0, 2, 3, 1).flatten(2)
    rows.sub_(mean.flatten().repeat(width)).div_(std.flatten().repeat(width))
    return result


def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """[3, 1, 1], filled on the device: a copy from the host would make the host wait for all work queued before it."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])
