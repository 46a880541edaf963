"""Bilinear samples of feature maps, as sums over few pixels: what RoI pooling and deformable convolution share.

Pixels are rows [N H W, C]; a sample is four of them and their weights, and `torch.nn.functional.embedding_bag` adds up
the samples of a bin without holding them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rtmdet_fast.compat.mmcv_ext._common import exact


def images(rois: Tensor, count: int) -> Tensor:
    """The first column of `rois` as indices of `count` images; a wrong one raises RuntimeError on a CPU."""
    image = rois[:, 0].long()
    if not image.is_cuda and ((image < 0) | (image >= count)).any():
        raise RuntimeError(f"rois name an image that is not there: the features have {count}")
    return image


def rows(features: Tensor) -> Tensor:
    """Features [N, C, H, W] -> [N H W, C], half precision in float32."""
    return exact(features).movedim(1, -1).flatten(0, -2)


def corners(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Samples at y, x of any shape S -> indices [S, 4] int64 into the pixels of a map, weights [S, 4].

    RoIAlign's rule: up to a pixel outside of the map counts as its border, what is farther out weighs nothing.
    """
    weightless = (y < -1) | (y > height) | (x < -1) | (x > width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    y0, x0 = y.floor(), x.floor()
    ly, lx = y - y0, x - x0
    row, column = y0.long(), x0.long()
    below, right = (row + 1).clamp(max=height - 1), (column + 1).clamp(max=width - 1)
    index = torch.stack([row * width + column, row * width + right, below * width + column, below * width + right], -1)
    weight = torch.stack([(1 - ly) * (1 - lx), (1 - ly) * lx, ly * (1 - lx), ly * lx], -1)
    return index, weight.masked_fill(weightless[..., None], 0)


def weighted_sums(pixels: Tensor, index: Tensor, weight: Tensor, starts: Tensor | None = None) -> Tensor:
    """Rows [P, C], index and weight [B, m] -> sums [B, C]; or [M], with the `starts` [B] of each sum's part."""
    return F.embedding_bag(index, pixels, starts, mode="sum", per_sample_weights=weight.to(pixels.dtype))


def spread(grad: Tensor, plane: Tensor, y: Tensor, x: Tensor, into: Tensor) -> None:
    """Adds gradients [S] of samples at y, x [S] to the maps `plane` [S] (number n C + c) of `into` [N, C, H, W]."""
    height, width = into.shape[2:]
    index, weight = corners(y, x, height, width)
    index += plane[..., None] * (height * width)
    sums = torch.zeros(into.numel(), dtype=weight.dtype, device=into.device)
    sums.index_add_(0, index.flatten(), (grad[..., None] * weight).flatten())
    into += sums.view(into.shape).to(into.dtype)


def first_maxima(values: Tensor, bag: Tensor, bags: int, least: float) -> tuple[Tensor, Tensor]:
    """The greatest of values [T, C] above `least` in each bag, and where it first is -> [bags, C], [bags, C] int64.

    Of a bag without one, `least` and -1. `bag` [T] is sorted.
    """
    count, channels = values.shape
    index = bag[:, None].expand(-1, channels)
    best = values.new_full((bags, channels), least).scatter_reduce_(0, index, values, "amax")
    place = torch.arange(count, device=values.device)[:, None].expand(-1, channels)
    place = place.where((values == best[bag]) & (values > least), count)
    first = torch.full_like(best, count, dtype=torch.int64).scatter_reduce_(0, index, place, "amin")
    return best, first.where(first < count, -1)
