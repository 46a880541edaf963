"""The Triton side of `dynamic_mask`.

Counts, for an instance and a pixel of the features; no GPU was at hand, nothing of this path is measured.
- A logit is 152 FMAs, against 16 (fp16) or 32 bytes of features, which all instances of the image share and the L2
  cache serves, and 4 bytes out. On an H200 (datasheet: 33.5 T fp32 FMA/s, 4.8 TB/s) these are 4.5 ps and 0.8 ps:
  bound by arithmetic. As grouped convolutions the same is some 60 floats through memory (the repeated input, and each
  layer's and each ReLU's input and output), 50 ps.
- Hence a program holds the 169 parameters of its instance in registers and walks over the pixels of a tile: of 226
  instructions a pixel 152 are FMAs (fp32, sm_90).
- The loss needs neighbours' logits. Each program computes its tile and a halo of a row above and below (a tenth more),
  leaves them in a buffer [K, H, W], and after a barrier, which orders a program's global memory too, reads each pixel's
  3 x 3 from there, that is from L1. Recomputing them in registers would be 152 FMAs each.
- Backward, 16 outputs have a share in a logit: 16 sigmoids more, rather than a buffer of [K, 2H, 2W].
- Gradients of the parameters are 169 sums over pixels. With 169 sums in registers nothing else fits, so two launches
  keep 88 and 81 of them, and load the parameters again for each 64 pixels of a warp (232 and 168 loads): 520 FMAs.
  Gradients of the features are sums over instances, thus tiles of another shape: 280 FMAs, and 296 loads for each
  128 pixels of a warp. A multiprocessor loads for one warp a clock and multiplies for four: loads bound the former.
Each launch has at most two buffers [K, H, W], or 169 partial sums a tile. There are no atomics: results are the same to
the bit from run to run.

Kernels take no tuples, for the sake of `torch.compile` (2.13): it loses tensors that a launch passes in one, and copies
a kernel's source without the class of a NamedTuple. Hence a signature has a group on each line, and jit functions take
plain tuples:

    instances  features, kernels, points, strides, index (of the image): pointers; how many images there are
    grid       width, pixels (height width), input pixels per pixel
    prior      x, y in input pixels, 1 / (8 stride)
"""

# Triton's tuples cannot be unpacked into others, and its tensors are no types of Python's:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"
from __future__ import annotations

import torch
from torch import Tensor

from rtmdet_fast.kernels import _dispatch
from rtmdet_fast.kernels._dispatch import CLONES_WHAT_IS_READ, cdiv, memory_barrier, tl, triton, triton_op, wrap_triton
from rtmdet_fast.kernels.batch_norm import sigmoid

# Read at each launch. Tiles and blocks in pixels; a program walks over its tile block by block.
TUNING = {
    # Of logits and losses at least a row: repays loading 169 parameters. Of the gradients of the parameters: the sums
    # over the lanes at the end cost as much as two of 16 steps.
    "tile": {"logits": 2048, "dkernels": 1024},
    # A thread has one pixel at a time. With two, loads want neighbours and arithmetic does not, and all 18 tensors of a
    # step change layout through shared memory.
    "logits": {"BLOCK": 128, "num_warps": 4},
    "dkernels": {"BLOCK": 64, "num_warps": 1},  # two pixels a thread share the load of a parameter
    "dfeatures": {"BLOCK": 128, "num_warps": 1},  # four; it is the tile too
    # The instances of an image in groups, to fill a GPU also where the batch is small; each has a buffer of its own.
    "groups": {"programs": 2048, "most": 8},
}
# where an instance's parameters start
_W1, _W2, _W3 = tl.constexpr(0), tl.constexpr(80), tl.constexpr(144)
_B1, _B2, _B3 = tl.constexpr(152), tl.constexpr(160), tl.constexpr(168)


@triton.jit
def _load_parameters(ptr):
    """The 169 parameters of an instance, as scalars in fp32."""
    w = ()
    for i in tl.static_range(169):
        w = w + (tl.load(ptr + i).to(tl.float32),)
    return w


@triton.jit
def _load_prior(instances, k):
    """Prior of instance k, its image (0 where out of range), whether that is in range."""
    _features_ptr, _kernels_ptr, points_ptr, strides_ptr, index_ptr, images = instances
    image = tl.load(index_ptr + k)
    valid = (image >= 0) & (image < images)
    scale = 1 / (8 * tl.load(strides_ptr + k))
    prior = tl.load(points_ptr + 2 * k), tl.load(points_ptr + 2 * k + 1), scale
    return prior, tl.where(valid, image, 0), valid


@triton.jit
def _load_inputs(features_ptr, p, valid, prior, grid):
    """(x, y relative to the prior, 8 features) at the pixels `p` of an image."""
    px, py, scale = prior
    width, pixels, feature_stride = grid
    x = ((px - (p % width * feature_stride).to(tl.float32)) * scale,)
    x = x + ((py - (p // width * feature_stride).to(tl.float32)) * scale,)
    for c in tl.static_range(8):
        x = x + (tl.load(features_ptr + c * pixels + p, mask=valid, other=0).to(tl.float32),)
    return x


@triton.jit
def _parameter(w, INDEX: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """From the tuple `w` or, if not IN_REGISTERS, from memory at `w`."""
    return w[INDEX] if IN_REGISTERS else tl.load(w + INDEX).to(tl.float32)


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _layer(w, x, W: tl.constexpr, B: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """relu(weights x + bias), 8 tensors; the weights start at W, the biases at B."""
    y = ()
    for o in tl.static_range(8):
        v = _parameter(w, B + o, IN_REGISTERS) + _parameter(w, W + len(x) * o, IN_REGISTERS) * x[0]
        for i in tl.static_range(1, len(x)):
            v += _parameter(w, W + len(x) * o + i, IN_REGISTERS) * x[i]
        y = y + (_relu(v),)
    return y


@triton.jit
def _layer_backward(w, x, d, W: tl.constexpr):
    """Gradients, 8 tensors, of what the ReLU that gave `x` takes, from those `d` of what the layer after it gives."""
    dx = ()
    for i in tl.static_range(8):
        v = _parameter(w, W + i, False) * d[0]
        for o in tl.static_range(1, len(d)):
            v += _parameter(w, W + 8 * o + i, False) * d[o]
        dx = dx + (tl.where(x[i] <= 0, 0.0, v),)
    return dx


@triton.jit
def _store_logits(instances, grid, logits_ptr, k, start, end, BLOCK: tl.constexpr):
    """Logits of instance k at its pixels start..end - 1, NaN for an image out of range."""
    _width, pixels, _feature_stride = grid
    prior, image, valid = _load_prior(instances, k)
    features_ptr = instances[0] + image * 8 * pixels
    logits_ptr += k * pixels
    w = _load_parameters(instances[1] + k * 169)
    p = start + tl.arange(0, BLOCK)
    while start < end:
        x = _load_inputs(features_ptr, p, p < end, prior, grid)
        x2 = _layer(w, _layer(w, x, _W1, _B1, True), _W2, _B2, True)
        z = w[_B3] + w[_W3] * x2[0]
        for i in tl.static_range(1, 8):
            z += w[_W3 + i] * x2[i]
        tl.store(logits_ptr + p, tl.where(valid, z, float("nan")), mask=p < end)
        p += BLOCK
        start += BLOCK


@triton.jit(do_not_specialize=["images", "height", "width", "rows", "tiles"])
def _logits_kernel(
    features_ptr, kernels_ptr, points_ptr, strides_ptr, index_ptr,
    logits_ptr,
    images, height, width, feature_stride,
    rows, tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile: `rows` rows of the logits of one instance -> [K, H, W]."""
    k = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * rows
    instances = features_ptr, kernels_ptr, points_ptr, strides_ptr, index_ptr, images
    grid = width, height * width, feature_stride
    _store_logits(instances, grid, logits_ptr, k, row * width, tl.minimum(row + rows, height) * width, BLOCK)


@triton.jit
def _interpolate(above, centre, below, R: tl.constexpr):
    """Value at output row (column) 2i + R, R -1..2, from the logits of rows (columns) i - 1, i and i + 1."""
    first, second = above if R < 1 else centre, centre if R < 1 else below
    return 0.75 * first + 0.25 * second if R % 2 == 1 else 0.25 * first + 0.75 * second


@triton.jit
def _interpolation_weight(i, size, R: tl.constexpr):
    """How much of output row (column) 2i + R comes from row i of `size`; at the border an output is one row's."""
    has_neighbour = i > 0 if R < 1 else i < size - 1
    return tl.where(has_neighbour, 0.25, 0.0) if R == -1 or R == 2 else tl.where(has_neighbour, 0.75, 1.0)


@triton.jit(do_not_specialize=["images", "masks", "height", "width", "rows", "tiles"])
def _dice_kernel(
    features_ptr, kernels_ptr, points_ptr, strides_ptr, index_ptr,
    gt_masks_ptr, gt_index_ptr,
    logits_ptr, out_ptr,
    dloss_ptr, sums_ptr,
    images, masks, height, width, feature_stride,
    rows, tiles,
    BACKWARD: tl.constexpr, AMD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile: `rows` rows of one instance -> `out`: sums [K, tiles, 3] of p t, p^2 and t^2; backward dlogits [K, H, W].

    Of padding, image -1, the sums are 0 and the gradients of the logits what they were.

    First the logits of the tile and of its halo, the row above and below, into `logits` [K, H, W]: what neighbouring
    programs write to the same place is equal. Then, at each pixel, its neighbours' logits from there and the four
    outputs it lies nearest to; backward, all sixteen it has a share in.
    """
    k = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    first_row = tile * rows
    last_row = tl.minimum(first_row + rows, height)  # exclusive, as `end` is
    image, gt = tl.load(index_ptr + k), tl.load(gt_index_ptr + k)
    if image == -1:
        last_row = first_row
    pixels = height * width
    instances = features_ptr, kernels_ptr, points_ptr, strides_ptr, index_ptr, images
    halo_start, halo_end = tl.maximum(first_row - 1, 0) * width, tl.minimum(last_row + 1, height) * width
    if image == -1:
        halo_end = halo_start
    _store_logits(instances, (width, pixels, feature_stride), logits_ptr, k, halo_start, halo_end, BLOCK)
    memory_barrier(AMD)  # other threads of this program read them

    valid_gt = (image >= 0) & (image < images) & (gt >= 0) & (gt < masks)
    gt_masks_ptr += tl.where(valid_gt, image * masks + gt, 0) * 4 * pixels
    logits_ptr += k * pixels
    if BACKWARD:
        inter, total = tl.load(sums_ptr + 2 * k), tl.load(sums_ptr + 2 * k + 1)
        dpt = 2 * tl.load(dloss_ptr + k) / total  # d loss / dp = dpp p - dpt t
        dpp = 2 * dpt * (inter / total)
    zeros = tl.zeros([BLOCK], tl.float32)
    pt, pp, tt = zeros, zeros, zeros
    start = first_row * width
    end = last_row * width
    while start < end:
        p = start + tl.arange(0, BLOCK)
        valid = p < end
        i, j = p // width, p % width
        row_offsets = tl.maximum(i - 1, 0) * width, i * width, tl.minimum(i + 1, height - 1) * width
        z = ()  # 3 x 3, column by column
        for dj in tl.static_range(-1, 2):
            column = tl.minimum(tl.maximum(j + dj, 0), width - 1)
            for di in tl.static_range(3):
                z = z + (tl.load(logits_ptr + row_offsets[di] + column, mask=valid, other=0),)
        dz = zeros
        for r in tl.static_range(-1 if BACKWARD else 0, 3 if BACKWARD else 2):
            left = _interpolate(z[0], z[1], z[2], r)
            centre = _interpolate(z[3], z[4], z[5], r)
            right = _interpolate(z[6], z[7], z[8], r)
            y = 2 * i + r
            for c in tl.static_range(-1 if BACKWARD else 0, 3 if BACKWARD else 2):
                x = 2 * j + c
                valid_t = valid & (y >= 0) & (y < 2 * height) & (x >= 0) & (x < 2 * width) & valid_gt
                t = tl.load(gt_masks_ptr + y.to(tl.int64) * 2 * width + x, mask=valid_t, other=0) != 0
                prob = sigmoid(_interpolate(left, centre, right, c))
                if BACKWARD:
                    dp = dpp * prob - tl.where(t, dpt, 0.0)
                    weight = _interpolation_weight(i, height, r) * _interpolation_weight(j, width, c)
                    dz += weight * dp * prob * (1 - prob)
                else:
                    prob = tl.where(valid, prob, 0.0)
                    pt += tl.where(t, prob, 0.0)
                    pp += prob * prob
                    tt += t.to(tl.float32)
        if BACKWARD:
            tl.store(out_ptr + k * pixels + p, dz, mask=valid)
        start += BLOCK
    if not BACKWARD:
        out_ptr += (k * tiles + tile) * 3
        tl.store(out_ptr, tl.where(valid_gt | (image == -1), tl.sum(pt, 0), float("nan")))
        tl.store(out_ptr + 1, tl.sum(pp, 0))
        tl.store(out_ptr + 2, tl.sum(tt, 0))


@triton.jit
def _split_pairs(x):
    """The even and the odd elements of each tensor, one after the other: a thread holds two neighbours."""
    halves = ()
    for i in tl.static_range(len(x)):
        even, odd = tl.split(tl.reshape(x[i], [x[i].shape[0] // 2, 2]))
        halves = halves + (even, odd)
    return halves


@triton.jit(do_not_specialize=["images", "width", "tile_pixels", "tiles"])
def _dkernels_kernel(
    features_ptr, kernels_ptr, points_ptr, strides_ptr, index_ptr,
    dlogits_ptr, partial_ptr,
    images, width, pixels, feature_stride,
    tile_pixels, tiles,
    FIRST_LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile: `tile_pixels` pixels of one instance -> their part of the gradients of its parameters, [K, tiles, 169].

    Those of the first layer or those of the others: 169 sums leave too few registers for the rest.
    """
    SUMS: tl.constexpr = 88 if FIRST_LAYER else 81
    k = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    grid = width, pixels, feature_stride
    prior, image, valid_image = _load_prior((features_ptr, kernels_ptr, points_ptr, strides_ptr, index_ptr, images), k)
    features_ptr += image * 8 * pixels
    dlogits_ptr += k * pixels
    w = kernels_ptr + k * 169
    sums = ()
    for _i in tl.static_range(SUMS):
        sums = sums + (tl.zeros([BLOCK // 2], tl.float32),)
    start = tile * tile_pixels
    end = tl.minimum(start + tile_pixels, tl.where(valid_image, pixels, 0))
    while start < end:
        p = start + tl.arange(0, BLOCK)
        valid = p < end
        x = _load_inputs(features_ptr, p, valid, prior, grid)
        dlogit = tl.load(dlogits_ptr + p, mask=valid, other=0)
        # w, which the compiler cannot know: parameters kept from pass to pass, or from step to step, would spill
        forward, backward = w + (start >> 30), w + (start >> 31)
        x1 = _layer(forward, x, _W1, _B1, False)
        x2 = _layer(forward, x1, _W2, _B2, False)
        d2 = _layer_backward(forward, x2, (dlogit,), _W3)
        updated = ()
        if FIRST_LAYER:
            d1 = _layer_backward(backward, x1, d2, _W2)
            d1, x = _split_pairs(d1), _split_pairs(x)
            for o in tl.static_range(8):
                updated = updated + (sums[11 * o] + d1[2 * o] + d1[2 * o + 1],)
                for i in tl.static_range(10):
                    updated = updated + (sums[11 * o + 1 + i] + d1[2 * o] * x[2 * i] + d1[2 * o + 1] * x[2 * i + 1],)
        else:
            d2, d3, x2, x1 = _split_pairs(d2), _split_pairs((dlogit,)), _split_pairs(x2), _split_pairs(x1)
            for o in tl.static_range(8):
                updated = updated + (sums[10 * o] + d2[2 * o] + d2[2 * o + 1],)
                updated = updated + (sums[10 * o + 1] + d3[0] * x2[2 * o] + d3[1] * x2[2 * o + 1],)
                for i in tl.static_range(8):
                    updated = updated + (sums[10 * o + 2 + i] + d2[2 * o] * x1[2 * i] + d2[2 * o + 1] * x1[2 * i + 1],)
            updated = updated + (sums[80] + d3[0] + d3[1],)
        sums = updated
        start += BLOCK
    partial_ptr += (k * tiles + tile) * 169
    for o in tl.static_range(8):
        if FIRST_LAYER:
            tl.store(partial_ptr + _B1 + o, tl.sum(sums[11 * o], 0))
            for i in tl.static_range(10):
                tl.store(partial_ptr + _W1 + 10 * o + i, tl.sum(sums[11 * o + 1 + i], 0))
        else:
            tl.store(partial_ptr + _B2 + o, tl.sum(sums[10 * o], 0))
            tl.store(partial_ptr + _W3 + o, tl.sum(sums[10 * o + 1], 0))
            for i in tl.static_range(8):
                tl.store(partial_ptr + _W2 + 8 * o + i, tl.sum(sums[10 * o + 2 + i], 0))
    if not FIRST_LAYER:
        tl.store(partial_ptr + _B3, tl.sum(sums[80], 0))


@triton.jit(do_not_specialize=["images", "width", "tiles", "groups"])
def _dfeatures_kernel(
    features_ptr, kernels_ptr, points_ptr, strides_ptr,
    dlogits_ptr, order_ptr, start_ptr,
    partial_ptr,
    images, width, pixels, feature_stride,
    tiles, groups,
    WIDTH_MULTIPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile: BLOCK pixels of one image, over every groups-th of its instances -> [groups, B, 8, H, W].

    The instances of image b are order[start[b]] to order[start[b + 1] - 1].
    """
    # so Triton knows, and a thread's four pixels share their y: 168 registers instead of 195 on sm_90
    width = width // WIDTH_MULTIPLE * WIDTH_MULTIPLE
    image = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    valid = p < pixels
    features_ptr += image * 8 * pixels
    features = ()
    sums = ()
    for c in tl.static_range(8):
        features = features + (tl.load(features_ptr + c * pixels + p, mask=valid, other=0).to(tl.float32),)
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
    x = (p % width * feature_stride).to(tl.float32)
    y = (p // width * feature_stride).to(tl.float32)
    position = tl.load(start_ptr + image) + tl.program_id(1)
    end = tl.load(start_ptr + image + 1)
    while position < end:
        k = tl.load(order_ptr + position)
        scale = 1 / (8 * tl.load(strides_ptr + k))
        dx = (tl.load(points_ptr + 2 * k) - x) * scale
        dy = (tl.load(points_ptr + 2 * k + 1) - y) * scale
        dlogit = tl.load(dlogits_ptr + k * pixels + p, mask=valid, other=0)
        w = kernels_ptr + k * 169
        backward = w + (position >> 62)  # w: see _dkernels_kernel
        x1 = _layer(w, (dx, dy) + features, _W1, _B1, False)
        d2 = _layer_backward(backward, _layer(w, x1, _W2, _B2, False), (dlogit,), _W3)
        d1 = _layer_backward(backward, x1, d2, _W2)
        updated = ()
        for c in tl.static_range(8):
            v = sums[c]
            for o in tl.static_range(8):
                v += _parameter(backward, 10 * o + 2 + c, False) * d1[o]
            updated = updated + (v,)
        sums = updated
        position += groups
    partial_ptr += (tl.program_id(1) * images + image) * 8 * pixels
    for c in tl.static_range(8):
        tl.store(partial_ptr + c * pixels + p, sums[c], mask=valid)


def _contiguous(*instances: Tensor) -> tuple[Tensor, ...]:
    """As the kernels take them."""
    features, kernels, points, strides, image_index = instances
    return tuple(x.contiguous() for x in (features, kernels, points.float(), strides.float(), image_index))


def _logits_buffer(features: Tensor, kernels: Tensor) -> Tensor:
    """[K, H, W] fp32."""
    return features.new_empty((len(kernels), *features.shape[2:]), dtype=torch.float32)


def _row_tiles(H: int, W: int) -> tuple[int, int]:
    """Rows of a tile of logits, and how many tiles an instance has."""
    rows = cdiv(H, min(H, cdiv(H * W, TUNING["tile"]["logits"])))
    return rows, cdiv(H, rows)


@triton_op("rtmdet_fast::dynamic_mask_logits", opaque=CLONES_WHAT_IS_READ)
def logits(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor, feature_stride: int
) -> Tensor:
    """Logits [K, H, W]."""
    instances = _contiguous(features, kernels, points, strides, image_index)
    (B, _, H, W), (rows, tiles) = features.shape, _row_tiles(*features.shape[2:])
    out = _logits_buffer(features, kernels)
    if len(kernels):
        wrap_triton(_logits_kernel)[(len(kernels) * tiles,)](
            *instances, out, B, H, W, feature_stride, rows, tiles, **TUNING["logits"]
        )
    return out


@triton_op("rtmdet_fast::dynamic_mask_logits_backward", opaque=CLONES_WHAT_IS_READ)
def logits_backward(
    dlogits: Tensor,
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor, feature_stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of features and kernels."""
    instances = _contiguous(features, kernels, points, strides, image_index)
    return _gradients(dlogits.contiguous(), instances, feature_stride)


@triton_op("rtmdet_fast::dynamic_mask_dice", opaque=CLONES_WHAT_IS_READ)
def dice(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor,
    gt_masks: Tensor, gt_index: Tensor, feature_stride: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses [K], and what the backward pass needs of each instance: [K, 2] with sum(p t) and the denominator."""
    partial = features.new_empty((len(kernels), _row_tiles(*features.shape[2:])[1], 3), dtype=torch.float32)
    if len(kernels):
        instances = _contiguous(features, kernels, points, strides, image_index)
        _launch_dice(instances, gt_masks, gt_index, feature_stride, partial)
    inter, squares, inside = partial.sum(1).unbind(1)
    total = squares + inside + 2 * eps
    loss = torch.where(image_index == -1, 0, 1 - 2 * inter / total)
    return loss, torch.stack([inter, total], 1)


@triton_op("rtmdet_fast::dynamic_mask_dice_backward", opaque=CLONES_WHAT_IS_READ)
def dice_backward(
    dloss: Tensor, sums: Tensor,
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor,
    gt_masks: Tensor, gt_index: Tensor, feature_stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of features and kernels."""
    instances = _contiguous(features, kernels, points, strides, image_index)
    dlogits = _logits_buffer(features, kernels)
    if len(kernels):
        upstream = dloss.contiguous(), sums.contiguous()
        _launch_dice(instances, gt_masks, gt_index, feature_stride, dlogits, upstream)
    return _gradients(dlogits, instances, feature_stride)


def _launch_dice(
    instances: tuple[Tensor, ...], gt_masks: Tensor, gt_index: Tensor, feature_stride: int,
    out: Tensor, upstream: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Partial sums into `out`, or gradients of the logits, from those of the losses and their sums."""
    features, kernels = instances[:2]
    (B, _, H, W), M = features.shape, gt_masks.shape[1]
    gt_masks = gt_masks.contiguous()
    if gt_masks.dtype == torch.bool:
        gt_masks = gt_masks.view(torch.uint8)
    rows, tiles = _row_tiles(H, W)
    wrap_triton(_dice_kernel)[(len(kernels) * tiles,)](
        *instances,
        gt_masks, gt_index.contiguous(),
        _logits_buffer(features, kernels), out,
        *(upstream or (out, out)),
        B, M, H, W, feature_stride,
        rows, tiles,
        BACKWARD=upstream is not None, AMD=_dispatch.IS_AMD, **TUNING["logits"],
    )  # fmt: skip


def _gradients(dlogits: Tensor, instances: tuple[Tensor, ...], feature_stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of features and kernels from those of the logits, without atomics: partial sums, added in order."""
    features, kernels, points, strides, image_index = instances
    (B, _, H, W), (K, parameters) = features.shape, kernels.shape
    if K == 0:
        return features.new_zeros(features.shape), kernels.new_empty(kernels.shape)
    sizes = B, W, H * W, feature_stride
    tile = TUNING["tile"]["dkernels"]
    tiles = cdiv(H * W, tile)
    dkernels = features.new_empty((K, tiles, parameters), dtype=torch.float32)
    for first_layer in (True, False):
        wrap_triton(_dkernels_kernel)[(K * tiles,)](
            *instances,
            dlogits, dkernels,
            *sizes,
            tile, tiles,
            FIRST_LAYER=first_layer, **TUNING["dkernels"],
        )  # fmt: skip
    order = image_index.argsort(stable=True)
    images = torch.arange(B + 1, device=image_index.device)
    start = torch.searchsorted(image_index[order], images)  # an index out of range is in no image
    tiles = cdiv(H * W, TUNING["dfeatures"]["BLOCK"])
    groups = max(1, min(TUNING["groups"]["most"], TUNING["groups"]["programs"] // (B * tiles)))
    dfeatures = features.new_empty((groups, B, 8, H, W), dtype=torch.float32)
    wrap_triton(_dfeatures_kernel)[(B * tiles, groups)](
        features, kernels, points, strides,
        dlogits, order, start,
        dfeatures,
        *sizes,
        tiles, groups,
        WIDTH_MULTIPLE=4 if W % 4 == 0 else 1, **TUNING["dfeatures"],
    )  # fmt: skip
    return dfeatures.sum(0).to(features.dtype), dkernels.sum(1).to(kernels.dtype)


@logits.register_fake
def _(features, kernels, points, strides, image_index, feature_stride):
    return _logits_buffer(features, kernels)


@dice.register_fake
def _(features, kernels, points, strides, image_index, gt_masks, gt_index, feature_stride, eps):
    count = len(kernels)
    return features.new_empty(count, dtype=torch.float32), features.new_empty((count, 2), dtype=torch.float32)


@logits_backward.register_fake
def _(dlogits, features, kernels, points, strides, image_index, feature_stride):
    return features.new_empty(features.shape), kernels.new_empty(kernels.shape)


@dice_backward.register_fake
def _(dloss, sums, features, kernels, points, strides, image_index, gt_masks, gt_index, feature_stride):
    return features.new_empty(features.shape), kernels.new_empty(kernels.shape)
