"""The Triton side of `deformable_attention`.

Counts, for the decoder of RT-DETR at 640 px in fp16 (300 queries, 8 heads, 12 points, 32 channels), an image; no GPU
was at hand, nothing of this path is measured.
- Forward: 2,400 rows (a head of a query) of 48 taps of 64 bytes, 7.4 MB, which the L2 cache serves, as `value`, 4.3 MB,
  fits into it. On an H200 (datasheet: 50 MB of L2, 4.8 TB/s of memory) 0.9 us for reading it once; 3.7 M FMAs are
  0.1 us. Bound by memory and, at batch 1, by its latency: hence the 16 taps of 4 points are on their way at once, and
  the fewer rows there are, the more threads share one.
- In plain PyTorch the same is a softmax, four kernels for the locations, by level a grid, a sampling and two copies,
  then a product and a sum: a dozen launches of some microseconds each.
- Backward reads the same taps once more, takes their products with the upstream row, and adds 7.4 MB of gradients with
  float atomics, in an order that changes from run to run. Where PyTorch is told to use deterministic algorithms the
  reference runs, on the GPU too: it sorts.
Kept for the backward pass are the inputs and the result, whose product with the upstream gradient the softmax needs;
the softmax is taken again.

A tile is BLOCK = (rows, channels). What belongs to a point is a number a row, [R], which all threads of a row compute,
so that nothing changes layout. Heads, channels and points are the model's, thus constants. Levels come as numbers,
65536 height + width each: as constants, an image of another size would compile the kernels again, and a tensor would be
copied to the GPU each time.
"""

# Triton's tuples cannot be unpacked into others, and its tensors are no types of Python's:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,operator,var-annotated"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtmdet_fast.kernels._dispatch import cdiv, tl, triton, triton_op, wrap_triton

# Read at each launch.
TUNING: dict[str, Any] = {
    "bytes": (16, 8, 4),  # that a thread loads of a tap: the most with which there are ...
    "warps": 2048,  # ... as many of them
    "forward": {"UNROLL": 4, "num_warps": 1},  # points at a time
    "backward": {"UNROLL": 2, "num_warps": 1},
}
MOST_LEVELS = 5  # the kernels' arguments
MOST_PIXELS = 2**15 - 1  # of a side of a level, two of which are one number


@triton.jit
def _rows(rows, image_rows, pixels, HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [R] of this program, whether there are such, channels [1, D], and the rows' first pixels in `value` [R, D].

    A row is a head of a query.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK[0] + tl.arange(0, BLOCK[0])
    channel = tl.arange(0, BLOCK[1])[None, :]
    first = (row // image_rows * pixels * HEADS + row % HEADS) * CHANNELS
    return row, row < rows, channel, first[:, None] + channel


@triton.jit
def _softmax(logits_ptr, row, valid, POINTS: tl.constexpr, BLOCK: tl.constexpr):
    """Greatest logit [R] of each row, and the sum of exp(logit - greatest)."""
    most = tl.where(valid, float("-inf"), 0.0)
    p = 0
    while p < POINTS:
        most = tl.maximum(most, tl.load(logits_ptr + row * POINTS + p, mask=valid, other=0).to(tl.float32))
        p += 1
    total = tl.where(valid, 0.0, 1.0)
    p = 0
    while p < POINTS:
        total += tl.exp(tl.load(logits_ptr + row * POINTS + p, mask=valid, other=0).to(tl.float32) - most)
        p += 1
    # the same numbers, where the threads of a row hold them: else whatever follows from them would change layout
    return tl.max(tl.broadcast_to(most[:, None], BLOCK), 1), tl.max(tl.broadcast_to(total[:, None], BLOCK), 1)


@triton.jit
def _level(levels, p, LEVEL_POINTS: tl.constexpr):
    """Height and width of the level of point p, its first pixel, and 1 / its number of points."""
    level, start, scale = levels[0], 0, 1.0 / LEVEL_POINTS[0]
    next_start, next_p = 0, 0
    for i in tl.static_range(1, len(LEVEL_POINTS)):
        next_start += (levels[i - 1] >> 16) * (levels[i - 1] & 65535)
        next_p += LEVEL_POINTS[i - 1]
        after = p >= next_p
        level = tl.where(after, levels[i], level)
        start = tl.where(after, next_start, start)
        scale = tl.where(after, 1.0 / LEVEL_POINTS[i], scale)
    return level >> 16, level & 65535, start, scale


@triton.jit
def _before(place, size):
    """place [R] in pixels of an axis -> the pixel before it, and how far behind that it is.

    The pixel is -2 where that or the next is not on the axis by far: what no integer holds is undefined.
    """
    before = tl.floor(place)
    pixel = tl.where((before >= -1) & (before < size), before, -2.0).to(tl.int32)
    return pixel, place - before


@triton.jit
def _nearest(place, bound):
    """place [R] in pixels of an axis -> the pixel that the discrete method takes, of those below `bound`."""
    return tl.minimum(tl.maximum(place + 0.5, 0.0), bound - 1).to(tl.int32)


@triton.jit
def _taps(x, y, level, valid, DISCRETE: tl.constexpr, PUBLISHED_CLAMP: tl.constexpr):
    """Taps of a point at x, y [R] in [0, 1]: pixel of `value`, whether there is one, coefficient.

    If bilinear, the coefficient's derivatives by x and y as well.
    """
    height, width, start, _scale = level
    x, y = x * width, y * height
    taps = ()
    if DISCRETE:
        column = _nearest(x, tl.minimum(width, height) if PUBLISHED_CLAMP else width)
        taps = ((start + _nearest(y, height) * width + column, valid, 1.0),)
    else:
        column, fx = _before(x - 0.5, width)
        row, fy = _before(y - 0.5, height)
        for i in tl.static_range(2):
            cy = fy if i == 1 else 1 - fy
            dy = tl.cast(height if i == 1 else -height, tl.float32)
            for j in tl.static_range(2):
                cx = fx if j == 1 else 1 - fx
                dx = tl.cast(width if j == 1 else -width, tl.float32)
                inside = valid & (row + i >= 0) & (row + i < height) & (column + j >= 0) & (column + j < width)
                pixel = start + (row + i) * width + (column + j)
                taps = taps + ((pixel, inside, cy * cx, cy * dx, dy * cx),)
    return taps


@triton.jit(do_not_specialize=["rows", "image_rows", "pixels", "level0", "level1", "level2", "level3", "level4"])
def _forward_kernel(
    value_ptr, references_ptr, offsets_ptr, logits_ptr, out_ptr,
    rows, image_rows, pixels,
    level0, level1, level2, level3, level4,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, POINTS: tl.constexpr, LEVEL_POINTS: tl.constexpr,
    BOXES: tl.constexpr, DISCRETE: tl.constexpr, PUBLISHED_CLAMP: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Rows of the result [rows, channels]."""
    levels = level0, level1, level2, level3, level4
    row, valid, channel, first = _rows(rows, image_rows, pixels, HEADS, CHANNELS, BLOCK)
    if BOXES:
        most, total = _softmax(logits_ptr, row, valid, POINTS, BLOCK)
        box = references_ptr + row // HEADS * 4  # not in a function: torch.compile would take it for written
        cx, cy = tl.load(box, mask=valid, other=0).to(tl.float32), tl.load(box + 1, mask=valid, other=0).to(tl.float32)
        half_w = 0.5 * tl.load(box + 2, mask=valid, other=0).to(tl.float32)
        half_h = 0.5 * tl.load(box + 3, mask=valid, other=0).to(tl.float32)
    out = tl.zeros(BLOCK, tl.float32)
    p = 0
    while p < POINTS:
        for _unrolled in tl.static_range(UNROLL):
            mask = valid & (p < POINTS)
            at = row * POINTS + p
            level = _level(levels, p, LEVEL_POINTS)
            x = tl.load(offsets_ptr + 2 * at, mask=mask, other=0).to(tl.float32)
            y = tl.load(offsets_ptr + 2 * at + 1, mask=mask, other=0).to(tl.float32)
            weight = tl.load(logits_ptr + at, mask=mask, other=float("-inf") if BOXES else 0.0).to(tl.float32)
            if BOXES:
                x, y = cx + x * (half_w * level[3]), cy + y * (half_h * level[3])
                weight = tl.exp(weight - most) / total
            taps = _taps(x, y, level, mask, DISCRETE, PUBLISHED_CLAMP)
            for t in tl.static_range(len(taps)):
                at_tap = value_ptr + first + taps[t][0].to(tl.int64)[:, None] * (HEADS * CHANNELS)
                v = tl.load(at_tap, mask=taps[t][1][:, None] & (channel < CHANNELS), other=0).to(tl.float32)
                out += (weight * taps[t][2])[:, None] * v
            p += 1
    tl.store(out_ptr + row[:, None] * CHANNELS + channel, out, mask=valid[:, None] & (channel < CHANNELS))


@triton.jit(do_not_specialize=["rows", "image_rows", "pixels", "level0", "level1", "level2", "level3", "level4"])
def _backward_kernel(
    dout_ptr, out_ptr, value_ptr, references_ptr, offsets_ptr, logits_ptr,
    dvalue_ptr, dreferences_ptr, doffsets_ptr, dlogits_ptr,
    rows, image_rows, pixels,
    level0, level1, level2, level3, level4,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, POINTS: tl.constexpr, LEVEL_POINTS: tl.constexpr,
    BOXES: tl.constexpr, DISCRETE: tl.constexpr, PUBLISHED_CLAMP: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Adds to dvalue, and writes what each row adds to dreferences [rows, 4], doffsets and dlogits."""
    levels = level0, level1, level2, level3, level4
    row, valid, channel, first = _rows(rows, image_rows, pixels, HEADS, CHANNELS, BLOCK)
    at_row, row_mask = row[:, None] * CHANNELS + channel, valid[:, None] & (channel < CHANNELS)
    dout = tl.load(dout_ptr + at_row, mask=row_mask, other=0).to(tl.float32)
    if BOXES:
        most, total = _softmax(logits_ptr, row, valid, POINTS, BLOCK)
        box = references_ptr + row // HEADS * 4  # not in a function: torch.compile would take it for written
        cx, cy = tl.load(box, mask=valid, other=0).to(tl.float32), tl.load(box + 1, mask=valid, other=0).to(tl.float32)
        half_w = 0.5 * tl.load(box + 2, mask=valid, other=0).to(tl.float32)
        half_h = 0.5 * tl.load(box + 3, mask=valid, other=0).to(tl.float32)
        dmean = tl.sum(dout * tl.load(out_ptr + at_row, mask=row_mask, other=0).to(tl.float32), 1)
        zeros = tl.zeros_like(row).to(tl.float32)
        dcx, dcy, dw, dh = zeros, zeros, zeros, zeros
    p = 0
    while p < POINTS:
        for _unrolled in tl.static_range(UNROLL):
            mask = valid & (p < POINTS)
            at = row * POINTS + p
            level = _level(levels, p, LEVEL_POINTS)
            offset_x = tl.load(offsets_ptr + 2 * at, mask=mask, other=0).to(tl.float32)
            offset_y = tl.load(offsets_ptr + 2 * at + 1, mask=mask, other=0).to(tl.float32)
            weight = tl.load(logits_ptr + at, mask=mask, other=float("-inf") if BOXES else 0.0).to(tl.float32)
            x, y = offset_x, offset_y
            if BOXES:
                x, y = cx + x * (half_w * level[3]), cy + y * (half_h * level[3])
                weight = tl.exp(weight - most) / total
            zeros = tl.zeros_like(weight)
            dweight, dx, dy = zeros, zeros, zeros
            taps = _taps(x, y, level, mask, DISCRETE, PUBLISHED_CLAMP)
            for t in tl.static_range(len(taps)):
                at_tap = first + taps[t][0].to(tl.int64)[:, None] * (HEADS * CHANNELS)
                tap_mask = taps[t][1][:, None] & (channel < CHANNELS)
                v = tl.load(value_ptr + at_tap, mask=tap_mask, other=0).to(tl.float32)
                product = tl.sum(v * dout, 1)
                dweight += taps[t][2] * product
                if not DISCRETE:
                    dx += taps[t][3] * product
                    dy += taps[t][4] * product
                dv = (weight * taps[t][2])[:, None] * dout
                tl.atomic_add(dvalue_ptr + at_tap, dv, mask=tap_mask, sem="relaxed")
            if not DISCRETE:
                dx, dy = weight * dx, weight * dy
                if BOXES:
                    dcx += dx
                    dcy += dy
                    dw += dx * offset_x * (0.5 * level[3])
                    dh += dy * offset_y * (0.5 * level[3])
                    dx, dy = dx * (half_w * level[3]), dy * (half_h * level[3])
                tl.store(doffsets_ptr + 2 * at, dx, mask=mask)
                tl.store(doffsets_ptr + 2 * at + 1, dy, mask=mask)
            if BOXES:
                dweight = weight * (dweight - dmean)
            tl.store(dlogits_ptr + at, dweight, mask=mask)
            p += 1
    if BOXES and not DISCRETE:
        box = dreferences_ptr + row * 4
        tl.store(box, dcx, mask=valid)
        tl.store(box + 1, dcy, mask=valid)
        tl.store(box + 2, dw, mask=valid)
        tl.store(box + 3, dh, mask=valid)


def fits(sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether the kernels take levels of these sizes."""
    return len(sizes) <= MOST_LEVELS and max(map(max, sizes)) <= MOST_PIXELS


def _launch(
    kernel: Any, tensors: Sequence[Tensor], value: Tensor, queries: int, sizes: Sequence[int], points: Sequence[int],
    boxes: bool, method: str, published_clamp: bool, tuning: dict[str, int],
) -> None:  # fmt: skip
    B, S, H, D = value.shape
    rows, channels = B * queries * H, 1 << (D - 1).bit_length()
    row_bytes = channels * value.element_size()
    *more, least = TUNING["bytes"]
    each = next((n for n in more if rows * row_bytes >= 32 * n * TUNING["warps"]), least)
    block = max(1, 32 * tuning["num_warps"] * each // row_bytes), channels
    levels = [65536 * height + width for height, width in zip(sizes[::2], sizes[1::2], strict=True)]
    wrap_triton(kernel)[(cdiv(rows, block[0]),)](
        *tensors,
        rows, queries * H, S,
        *levels, *[0] * (MOST_LEVELS - len(levels)),
        HEADS=H, CHANNELS=D, POINTS=sum(points), LEVEL_POINTS=tuple(points),
        BOXES=boxes, DISCRETE=method == "discrete", PUBLISHED_CLAMP=published_clamp,
        BLOCK=block, **tuning,
    )  # fmt: skip


@triton_op("rtmdet_fast::deformable_attention")
def attention(
    value: Tensor, references: Tensor | None, offsets: Tensor, logits: Tensor, sizes: Sequence[int],
    points: Sequence[int], method: str, published_clamp: bool,
) -> Tensor:  # fmt: skip
    """[B, Q, H D]; sizes are height and width of each level, one after the other.

    Without `references`, `offsets` are locations and `logits` weights.
    """
    (B, _, H, D), Q = value.shape, logits.shape[1]
    value, offsets, logits = value.contiguous(), offsets.contiguous(), logits.contiguous()
    out = value.new_empty(B, Q, H * D)
    if out.numel():
        tensors = value, offsets if references is None else references.contiguous(), offsets, logits, out
        settings = references is not None, method, published_clamp, TUNING["forward"]
        _launch(_forward_kernel, tensors, value, Q, sizes, points, *settings)
    return out


@triton_op("rtmdet_fast::deformable_attention_backward")
def attention_backward(
    dout: Tensor, out: Tensor, value: Tensor, references: Tensor | None, offsets: Tensor, logits: Tensor,
    sizes: Sequence[int], points: Sequence[int], method: str, published_clamp: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of value, references, offsets and logits; those that there are not are empty."""
    (B, _, H, _), Q, located = value.shape, logits.shape[1], method != "discrete"
    value, offsets, logits, dout = value.contiguous(), offsets.contiguous(), logits.contiguous(), dout.contiguous()
    boxes = offsets if references is None else references.contiguous()
    dvalue = value.new_zeros(value.shape, dtype=torch.float32)
    dreferences = logits.new_empty((B if located and references is not None else 0, Q, H, 4), dtype=torch.float32)
    doffsets = torch.empty_like(offsets if located else offsets[:0])
    dlogits = torch.empty_like(logits)
    if out.numel():
        tensors = dout, out, value, boxes, offsets, logits, dvalue, dreferences, doffsets, dlogits
        settings = references is not None, method, published_clamp, TUNING["backward"]
        _launch(_backward_kernel, tensors, value, Q, sizes, points, *settings)
    return dvalue.to(value.dtype), dreferences.sum(2).to(boxes.dtype), doffsets, dlogits


def _save(ctx, inputs, output):
    *tensors, ctx.sizes, ctx.points, ctx.method, ctx.published_clamp = inputs
    ctx.save_for_backward(output, *tensors)


def _backward(ctx, dout):
    settings = ctx.sizes, ctx.points, ctx.method, ctx.published_clamp
    dvalue, dreferences, doffsets, dlogits = attention_backward(dout, *ctx.saved_tensors, *settings)
    located = ctx.method != "discrete"
    has_boxes = located and ctx.saved_tensors[2] is not None
    return dvalue, dreferences if has_boxes else None, doffsets if located else None, dlogits, None, None, None, None


attention.register_autograd(_backward, setup_context=_save)
