"""Features pooled inside regions: RoIAlign and its rotated kin, RoIPool, PrRoIPool, border and feature alignment.

Legend: N images, C channels, H, W size of their maps, K regions, PH, PW bins of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from rtmdet_fast.compat.mmcv_ext import _torchvision
from rtmdet_fast.compat.mmcv_ext._common import check, exact, fit, gradients
from rtmdet_fast.compat.mmcv_ext._sampling import corners, first_maxima, images, rows, spread, weighted_sums

_PIXELS_AT_ONCE = 2**24  # values that roi_pool and prroi_pool hold at a time


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Input [N, C, H, W], rois [K, 5] (image, xyxy) -> into output [K, C, PH, PW]: `pool_mode` 1 averages, 0 maximises.

    The argmax tensors, of `pool_mode` 0, take the coordinates of the greatest sample.
    """
    check(input, rois=rois)
    size = (aligned_height, aligned_width)
    fit("input N C H W, rois K 5, output K C PH PW", input, rois, output, PH=size[0], PW=size[1])
    arguments = spatial_scale, *size, sampling_ratio, aligned
    boxes = _upright(rois, spatial_scale, aligned)
    image = images(rois, len(input))
    if pool_mode and _torchvision.takes(input):
        output.copy_(torch.ops.torchvision.roi_align(input, rois, *arguments))
    elif pool_mode:
        output.copy_(_averages(input, image, boxes, size, sampling_ratio))
    else:
        bag, y, x, _ = _grid(boxes, size, sampling_ratio)
        index, weight = corners(y, x, *input.shape[2:])
        index += image[bag // math.prod(size), None] * math.prod(input.shape[2:])
        best, first = first_maxima(weighted_sums(rows(input), index, weight), bag, len(rois) * math.prod(size), -10000)
        for into, values in ((argmax_y, y), (argmax_x, x)):
            into.copy_(_bins(torch.cat([values, values.new_full((1,), -1)])[first], size))
        output.copy_(_bins(best, size))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Adds the gradient of the input to grad_input [N, C, H, W]."""
    check(grad_output, rois=rois)
    size = (aligned_height, aligned_width)
    _fit_gradients(grad_output, rois, grad_input, 5, size)
    if not pool_mode:
        fit("grad_output K C PH PW, argmax_y K C PH PW, argmax_x K C PH PW", grad_output, argmax_y, argmax_x)
    shape = grad_input.shape
    if pool_mode and _torchvision.takes(grad_output):
        arguments = (spatial_scale, *size, *shape, sampling_ratio, aligned)
        grad_input += torch.ops.torchvision._roi_align_backward(grad_output, rois, *arguments)
        return
    image = images(rois, len(grad_input))
    if pool_mode:
        boxes = _upright(rois, spatial_scale, aligned)
        average = partial(_averages, image=image, boxes=boxes, size=size, ratio=sampling_ratio)
        grad_input += gradients(average, [torch.zeros_like(grad_input)], grad_output)[0]
    else:
        found = argmax_y != -1
        plane = image[:, None] * shape[1] + torch.arange(shape[1], device=rois.device)
        plane = plane[..., None, None].expand_as(grad_output)
        spread(grad_output[found], plane[found], argmax_y[found], argmax_x[found], grad_input)


def roi_align_rotated_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Input [N, C, H, W], rois [K, 6] (image, cx, cy, w, h, radians) -> averages into output [K, C, PH, PW]."""
    check(input, rois=rois)
    fit("input N C H W, rois K 6, output K C PH PW", input, rois, output, PH=pooled_height, PW=pooled_width)
    boxes = _rotated(rois, spatial_scale, 0.5 if aligned else 0.0, not aligned, clockwise)
    output.copy_(_averages(input, images(rois, len(input)), boxes, (pooled_height, pooled_width), sampling_ratio))


def roi_align_rotated_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Adds the gradient of the input to grad_input [N, C, H, W]."""
    check(grad_output, rois=rois)
    size = (pooled_height, pooled_width)
    _fit_gradients(grad_output, rois, grad_input, 6, size)
    boxes = _rotated(rois, spatial_scale, 0.5 if aligned else 0.0, not aligned, clockwise)
    image = images(rois, len(grad_input))
    average = partial(_averages, image=image, boxes=boxes, size=size, ratio=sampling_ratio)
    grad_input += gradients(average, [torch.zeros_like(grad_input)], grad_output)[0]


def riroi_align_rotated_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    num_samples: int,
    num_orientations: int,
    clockwise: bool,
) -> None:
    """As `roi_align_rotated_forward` of channels that are C x orientations, turned with the region (ReDet, 2021)."""
    check(features, rois=rois)
    size = (pooled_height, pooled_width)
    fit("features N C H W, rois K 6, output K C PH PW", features, rois, output, PH=size[0], PW=size[1])
    output.copy_(_turned(features, rois, size, spatial_scale, num_samples, num_orientations, clockwise))


def riroi_align_rotated_backward(
    top_grad: Tensor,
    rois: Tensor,
    bottom_grad: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    num_samples: int,
    num_orientations: int,
    clockwise: bool,
) -> None:
    """Adds the gradient of the features to bottom_grad [N, C orientations, H, W]."""
    check(top_grad, rois=rois)
    size = (pooled_height, pooled_width)
    _fit_gradients(top_grad, rois, bottom_grad, 6, size)
    arguments = (rois, size, spatial_scale, num_samples, num_orientations, clockwise)
    bottom_grad += gradients(lambda x: _turned(x, *arguments), [torch.zeros_like(bottom_grad)], top_grad)[0]


def rotated_feature_align_forward(
    features: Tensor, best_bboxes: Tensor, output: Tensor, spatial_scale: float, points: int
) -> None:
    """Features [N, C, H, W], a box (cy, cx, w, h, radians) for each pixel [N, H, W, 5] -> into output [N, C, H, W].

    The boxes may have the shape [N H W, 5] as well, which mmrotate's R3Det gives them. To each pixel are added the
    samples at its box's centre and, of 5 `points`, at its corners (R3Det, 2019).
    """
    check(features, best_bboxes=best_bboxes)
    fit("features N C H W, output N C H W", features, output)
    output.copy_(_refined(features, best_bboxes, spatial_scale, points))


def rotated_feature_align_backward(
    top_grad: Tensor, best_bboxes: Tensor, bottom_grad: Tensor, spatial_scale: float, points: int
) -> None:
    """Adds the gradient of the features to bottom_grad [N, C, H, W]."""
    check(top_grad, best_bboxes=best_bboxes)
    fit("top_grad N C H W, bottom_grad N C H W", top_grad, bottom_grad)
    refine = partial(_refined, boxes=best_bboxes, scale=spatial_scale, points=points)
    bottom_grad += gradients(refine, [torch.zeros_like(bottom_grad)], top_grad)[0]


def border_align_forward(input: Tensor, boxes: Tensor, output: Tensor, argmax_idx: Tensor, pool_size: int) -> None:
    """Input [N, 4 C, H, W], boxes [N, M, 4] xyxy -> into output [N, C, M, 4] (BorderDet, 2020).

    The greatest of `pool_size` + 1 samples along the top, left, bottom and right border, each of its own C channels;
    `argmax_idx` takes which.
    """
    check(input, boxes=boxes)
    N, channels, H, W = input.shape
    fit("input N channels H W, boxes N M 4, output N C M 4", input, boxes, output, channels=4 * output.shape[1])
    y, x = _along_borders(boxes, pool_size)  # [N, 4, M, pool_size + 1]
    index, weight = corners(y, x, H, W)
    index += torch.arange(N * 4, device=input.device).view(N, 4, 1, 1, 1) * (H * W)
    pixels = rows(input.reshape(N * 4, channels // 4, H, W))
    values = weighted_sums(pixels, index.view(-1, 4), weight.view(-1, 4)).view(*y.shape, channels // 4)
    best, which = values.max(3)
    output.copy_(best.permute(0, 3, 2, 1))
    argmax_idx.copy_(which.permute(0, 3, 2, 1))


def border_align_backward(
    grad_output: Tensor, boxes: Tensor, argmax_idx: Tensor, grad_input: Tensor, pool_size: int
) -> None:
    """Adds the gradient of the input to grad_input [N, 4 C, H, W]."""
    check(grad_output, boxes=boxes)
    N, C = grad_output.shape[:2]
    pattern = "grad_output N C M 4, argmax_idx N C M 4, boxes N M 4, grad_input N channels H W"
    fit(pattern, grad_output, argmax_idx, boxes, grad_input, channels=4 * C)
    y, x = (along.permute(0, 2, 1, 3)[:, None].expand(-1, C, -1, -1, -1) for along in _along_borders(boxes, pool_size))
    y, x = (along.gather(4, argmax_idx[..., None].long())[..., 0] for along in (y, x))
    image, channel, border = torch.arange(N), torch.arange(C), torch.arange(4)
    plane = (image[:, None, None, None] * 4 + border) * C + channel[:, None, None]
    spread(grad_output, plane.to(y.device).expand_as(y), y, x, grad_input)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Input [N, C, H, W], rois [K, 5] (image, xyxy inclusive) -> the greatest pixel of each bin into [K, C, PH, PW].

    `argmax` takes its place y W + x, -1 of an empty bin. torchvision's op rounds regions to pixels first, mmcv's
    does not.
    """
    check(input, rois=rois)
    size = (pooled_height, pooled_width)
    fit("input N C H W, rois K 5, output K C PH PW", input, rois, output, PH=size[0], PW=size[1])
    H, W = input.shape[2:]
    bins = math.prod(size)
    first, last = exact(rois)[:, 1:3] * spatial_scale, (exact(rois)[:, 3:] + 1) * spatial_scale
    empty = ((last - first) <= 0).any(1)
    ranges = []
    for axis, (bins_along, limit) in enumerate(((pooled_width, W), (pooled_height, H))):
        low, high = first[:, axis, None], last[:, axis, None]
        step, edge = (high - low) / bins_along, torch.arange(bins_along + 1, device=rois.device)
        start, stop = (edge[:-1] * step + low).floor(), (edge[1:] * step + low).ceil()
        start, stop = start.clamp(0, limit).long(), stop.clamp(0, limit).long()
        ranges.append((start, (stop - start).clamp(min=0).masked_fill(empty[:, None], 0)))
    (left, width), (top, height) = ranges
    left, width = (t[:, None].expand(-1, pooled_height, -1).flatten(1) for t in (left, width))
    top, height = (t[..., None].expand(-1, -1, pooled_width).flatten(1) for t in (top, height))
    pixels, image = rows(input), images(rois, len(input))
    least = torch.finfo(torch.float32).min
    area = (height * width).sum(1).cumsum(0) * input.shape[1]
    parts = (area // _PIXELS_AT_ONCE).unique_consecutive(return_counts=True)[1].tolist()
    at = 0
    for part in parts:
        own = slice(at, at + part)
        at += part
        count = (height[own] * width[own]).flatten()
        bag = torch.arange(len(count), device=rois.device).repeat_interleave(count)
        place = torch.arange(len(bag), device=rois.device) - (count.cumsum(0) - count)[bag]
        wide = width[own].flatten()[bag]
        pixel = (top[own].flatten()[bag] + place // wide) * W + left[own].flatten()[bag] + place % wide
        values = pixels[pixel + image[own][bag // bins] * (H * W)]
        best, which = first_maxima(values, bag, len(count), least)
        best = best.masked_fill((count == 0)[:, None], 0)
        output[own] = _bins(best, size)
        argmax[own] = _bins(torch.cat([pixel, pixel.new_full((1,), -1)])[which], size).to(argmax.dtype)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Adds the gradient of the input to grad_input [N, C, H, W]."""
    check(grad_output, rois=rois)
    _fit_gradients(grad_output, rois, grad_input, 5, (pooled_height, pooled_width))
    fit("grad_output K C PH PW, argmax K C PH PW", grad_output, argmax)
    N, C, H, W = grad_input.shape
    plane = images(rois, N)[:, None] * C + torch.arange(C, device=rois.device)
    index = plane[..., None, None] * (H * W) + argmax
    found = argmax >= 0
    grad_input.view(-1).index_add_(0, index[found], grad_output[found])


def prroi_pool_forward(
    input: Tensor, rois: Tensor, output: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float
) -> None:
    """Input [N, C, H, W], rois [K, 5] (image, xyxy) -> the mean of the interpolated map in each bin, an integral."""
    check(input, rois=rois)
    size = (pooled_height, pooled_width)
    fit("input N C H W, rois K 5, output K C PH PW", input, rois, output, PH=size[0], PW=size[1])
    for part, arguments in _by_image(input, rois):
        output[part] = _integrals(*arguments, size, spatial_scale).to(output.dtype)


def prroi_pool_backward(
    grad_output: Tensor, rois: Tensor, grad_input: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float
) -> None:
    """Adds the gradient of the input to grad_input [N, C, H, W]."""
    check(grad_output, rois=rois)
    size = (pooled_height, pooled_width)
    _fit_gradients(grad_output, rois, grad_input, 5, size)
    for part, (features, boxes) in _by_image(grad_input, rois):
        integrate = partial(_integrals, boxes=boxes, size=size, scale=spatial_scale)
        features += gradients(integrate, [torch.zeros_like(features)], grad_output[part])[0]


def prroi_pool_coor_backward(
    output: Tensor,
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    grad_rois: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Adds the gradient of the regions' coordinates to grad_rois [K, 5]."""
    check(grad_output, rois=rois, input=input)
    size = (pooled_height, pooled_width)
    _fit_gradients(grad_output, rois, input, 5, size)
    for part, (features, boxes) in _by_image(input, rois):
        integrate = partial(_integrals, features, size=size, scale=spatial_scale)
        grad_rois[part, 1:] += gradients(integrate, [boxes], grad_output[part])[0]


def _fit_gradients(grad: Tensor, rois: Tensor, grad_input: Tensor, columns: int, size: tuple[int, int]) -> None:
    sizes = dict(columns=columns, PH=size[0], PW=size[1])
    fit("grad_output K C PH PW, rois K columns, input N C H W", grad, rois, grad_input, **sizes)


def _upright(rois: Tensor, scale: float, aligned: bool) -> tuple[Tensor, ...]:
    """Top, left, height, width [K] in pixels of the map; RuntimeError on a CPU if aligned ones are below 0."""
    left, top, right, bottom = (exact(rois)[:, 1:] * scale - (0.5 if aligned else 0.0)).unbind(1)
    return top, left, *_sizes(bottom - top, right - left, aligned)


def _rotated(rois: Tensor, scale: float, shift: float, at_least_1: bool, clockwise: bool) -> tuple[Tensor, ...]:
    """Top, left from the centre, height, width, and centre (y, x) and angle [K]."""
    rois = exact(rois)
    cx, cy = (rois[:, 1:3] * scale - shift).unbind(1)
    width, height = (rois[:, 3:5] * scale).unbind(1)
    height, width = _sizes(height, width, not at_least_1)
    return -height / 2, -width / 2, height, width, cy, cx, -rois[:, 5] if clockwise else rois[:, 5]


def _sizes(height: Tensor, width: Tensor, aligned: bool) -> tuple[Tensor, Tensor]:
    if not aligned:
        return height.clamp(min=1), width.clamp(min=1)
    if not height.is_cuda and not ((height >= 0) & (width >= 0)).all():
        raise RuntimeError("ROIs in ROIAlign cannot have non-negative size!")  # mmcv's words, for "negative"
    return height, width


def _grid(
    boxes: tuple[Tensor, ...], size: tuple[int, int], ratio: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The T samples of the bins: bag [T] (k PH PW + bin), y and x [T], and count and start [K PH PW] of the bags.

    `ratio` x `ratio` a bin, or where it is 0, one a pixel.
    """
    top, left, height, width = boxes[:4]
    bin_height, bin_width = height / size[0], width / size[1]
    if ratio > 0:
        high = wide = torch.full_like(top, ratio, dtype=torch.int64)
    else:
        high, wide = (side.ceil().clamp(min=0).long() for side in (bin_height, bin_width))
    count = (high * wide)[:, None].expand(-1, math.prod(size)).flatten()
    start = count.cumsum(0) - count
    bag = torch.arange(len(count), device=top.device).repeat_interleave(count)
    place = torch.arange(len(bag), device=top.device) - start[bag]
    k = bag // math.prod(size)
    row, column = bag // size[1] % size[0], bag % size[1]
    high, wide, bin_height, bin_width = high[k], wide[k], bin_height[k], bin_width[k]
    y = top[k] + row * bin_height + (place // wide + 0.5) * bin_height / high
    x = left[k] + column * bin_width + (place % wide + 0.5) * bin_width / wide
    if len(boxes) > 4:
        cy, cx, angle = (t[k] for t in boxes[4:])
        cos, sin = angle.cos(), angle.sin()
        y, x = y * cos - x * sin + cy, y * sin + x * cos + cx
    return bag, y, x, (count, start)


def _averages(features: Tensor, image: Tensor, boxes: tuple[Tensor, ...], size: tuple[int, int], ratio: int) -> Tensor:
    bag, y, x, (count, start) = _grid(boxes, size, ratio)
    index, weight = corners(y, x, *features.shape[2:])
    index += image[bag // math.prod(size), None] * math.prod(features.shape[2:])
    sums = weighted_sums(rows(features), index.flatten(), weight.flatten(), start * 4)
    return _bins(sums / count.clamp(min=1)[:, None], size)


def _bins(values: Tensor, size: tuple[int, int]) -> Tensor:
    """[K PH PW, C] -> [K, C, PH, PW]."""
    return values.view(-1, *size, values.shape[1]).movedim(-1, 1)


def _turned(
    features: Tensor, rois: Tensor, size: tuple[int, int], scale: float, ratio: int, orientations: int, clockwise: bool
) -> Tensor:
    pooled = _averages(
        features, images(rois, len(features)), _rotated(rois, scale, 0.0, True, clockwise), size, ratio
    ).unflatten(1, (-1, orientations))
    turn = exact(rois)[:, 5] * orientations / (2 * math.pi)
    whole = turn.floor()
    part = (turn - whole)[:, None, None, None, None]
    channel = torch.arange(orientations, device=rois.device) - whole.long()[:, None]
    nearest, next_one = (
        pooled.take_along_dim((channel + step).remainder(orientations)[:, None, :, None, None], 2) for step in (0, 1)
    )
    return ((1 - part) * nearest + part * next_one).flatten(1, 2)


def _refined(features: Tensor, boxes: Tensor, scale: float, points: int) -> Tensor:
    N, C, H, W = features.shape
    fit("boxes P 5", boxes.flatten(0, -2), P=N * H * W)
    y, x, width, height, angle = exact(boxes).view(N, H, W, 5).unbind(-1)
    y, x = (y * scale)[..., None], (x * scale)[..., None]
    if points > 1:
        along, across = width * scale / 2, height * scale / 2
        cos, sin = angle.cos(), angle.sin()
        signs = y.new_tensor([[0, 1, -1, -1, 1], [0, 1, 1, -1, -1]])
        x = x + signs[0] * (cos * along)[..., None] - signs[1] * (sin * across)[..., None]
        y = y + signs[0] * (sin * along)[..., None] + signs[1] * (cos * across)[..., None]
    index, weight = corners(y, x, H, W)
    index += torch.arange(N, device=features.device).view(-1, 1, 1, 1, 1) * (H * W)
    sums = weighted_sums(rows(features), index.flatten(0, 2).flatten(1), weight.flatten(0, 2).flatten(1))
    return features + sums.view(N, H, W, C).movedim(-1, 1)


def _along_borders(boxes: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Boxes [N, M, 4] -> y and x [N, 4, M, steps + 1] along the top, left, bottom and right border."""
    x1, y1, x2, y2 = exact(boxes).unbind(-1)
    wide, high, none = (x2 - x1) / steps, (y2 - y1) / steps, torch.zeros_like(x1)
    step = torch.arange(steps + 1, device=boxes.device)
    y = torch.stack([y1, y1, y2, y2], 1)[..., None] + torch.stack([none, high, none, -high], 1)[..., None] * step
    x = torch.stack([x1, x1, x2, x2], 1)[..., None] + torch.stack([wide, none, -wide, none], 1)[..., None] * step
    return y, x


def _by_image(features: Tensor, rois: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Parts of the regions and, for each, the map [C, H, W] of its image and the boxes [K, 4]."""
    at_once = max(1, _PIXELS_AT_ONCE // math.prod(features.shape[1:]))
    image = images(rois, len(features))
    for i, one in enumerate(features):
        for part in (image == i).nonzero()[:, 0].split(at_once):
            yield part, (one, rois[part, 1:])


def _integrals(features: Tensor, boxes: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """Features [C, H, W], boxes [K, 4] xyxy -> means over the bins [K, C, PH, PW].

    The interpolated map is a sum of pixels times hats along y and along x: so is its integral.
    """
    boxes = exact(boxes)
    corner, extent = boxes[:, :2] * scale, ((boxes[:, 2:] - boxes[:, :2]) * scale).clamp(min=0)
    hats = []
    for axis, count, length in ((1, size[0], features.shape[1]), (0, size[1], features.shape[2])):
        edge = corner[:, axis, None] + extent[:, axis, None] * torch.arange(count + 1, device=boxes.device) / count
        t = (edge[..., None] - torch.arange(length, device=boxes.device)).clamp(-1, 1)
        below = t - t * t.abs() / 2  # integral of 1 - |t| from 0
        hats.append(below[:, 1:] - below[:, :-1])
    area = extent.prod(1)[:, None, None, None] / math.prod(size)
    sums = torch.einsum("kph,chw,kqw->kcpq", hats[0], exact(features), hats[1])
    return torch.where(area > 0, sums / area.where(area > 0, 1), 0)
