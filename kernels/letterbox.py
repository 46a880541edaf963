"""From frames of any size to the network's input: onto a square canvas, then normalisation, in one pass.

Pixel i of the canvas lies at p = (i + .5) size / new - .5 of the frame's `size`, resized to `new`: P pixels and a part
u of the next, along each axis.

Letterbox, as `inference.preprocess.letterbox` (OpenCV's INTER_LINEAR, in fixed point): the frame resized to fit, the
rest of the canvas `pad`. With v = round(2048 u), and indices clamped to the frame,

    row(y) = (2048 - v_x) frame[y, P_x] + v_x frame[y, P_x + 1]
    canvas = ((2048 - v_y) row(P_y) + v_y row(P_y + 1)) / 2^22                (by shifts of 4 bits, 16, then 2, rounded)

Squash, as `inference.preprocess.squash` (Pillow's BILINEAR): to the whole canvas. A pixel is the mean of the frame's
pixels j at weights max(0, 1 - |j - P - u| / f), f = max(size / new, 1): within a row first, rounded to a byte, then of
the rows. Where f > 1 this is an average over 2 f pixels a side, where OpenCV takes 2.

    out = (canvas - mean) / std

The frame's size is read from a tensor, and the grid depends on the canvas alone: one CUDA graph serves every size. p is
computed in integers, exactly for every size, as float64 is slow on most GPUs; only the fit to the canvas needs it, once
a program, to round as Python does. Bytes at 640 px in fp16: 2.5 MB written, and of the frame what is seen. Loads, of
single bytes: 12 a pixel, 4.9 M; in a squash 12 ceil(f_y) ceil(f_x).
"""

# Triton's tensors are no types of Python's
# mypy: disable-error-code="assignment,misc,operator"
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rtmdet_fast.kernels._dispatch import cdiv, tl, triton, triton_op, unwatched, use_triton, wrap_triton

TUNING = {"block": 128, "warps": 1}  # pixels of a row of the canvas for a program: 4 a thread, and 640 is 5 x 128


def letterbox_normalize(
    frames: Tensor, sizes: Tensor, out_size: int, *,
    mean: Sequence[float], std: Sequence[float], pad: int = 114, squash: bool = False, rgb: bool = False,
    dtype: torch.dtype = torch.float32, channels_last: bool = True,
) -> Tensor:  # fmt: skip
    """The normalised canvases [B, 3, S, S] of B frames, S being `out_size`.

    Args:
        frames: [B, capacity] uint8; row b starts with the bytes of a frame [height, width, 3] BGR, and what follows
            them does not matter.
        sizes: [B, 2] int32, height and width of each frame in pixels. They are read where the kernel runs, so that the
            caller checks that 3 · height · width <= capacity: pixels beyond it are taken for 0. A frame with a side of
            0 becomes padding.
        out_size: side of the canvas in pixels.
        mean: of the three channels of the result, in grey levels 0..255.
        std: likewise.
        pad: grey level of the padding, on the right and at the bottom.
        squash: resize to the whole canvas as Pillow does, in place of the letterbox.
        rgb: whether the result's channels are R, G, B, and not B, G, R.
        dtype: float32, float16 or bfloat16.
        channels_last: memory format of the result, or else contiguous.

    Raises ValueError or TypeError, naming the argument, if shapes, dtypes or devices do not fit.
    """
    mean, std = [float(v) for v in mean], [float(v) for v in std]
    _check(frames, sizes, out_size, mean, std, pad, dtype)
    if not use_triton(frames):
        return letterbox_normalize_reference(
            frames, sizes, out_size, mean=mean, std=std, pad=pad, squash=squash, rgb=rgb, dtype=dtype,
            channels_last=channels_last,
        )  # fmt: skip
    op = _letterbox.undispatched if unwatched(frames) else _letterbox
    return op(frames, sizes, out_size, mean, std, pad, squash, rgb, dtype, channels_last)


def letterbox_scales(sizes: Tensor, out_size: int, squash: bool = False) -> Tensor:
    """Canvas pixels per pixel of the frame, (x, y) of each [B, 2] float32, for sizes [B, 2] (height, width).

    As `inference.preprocess` returns them: the two differ where the resized side is rounded to whole pixels.
    """
    return (_fitted(sizes, out_size, squash) / sizes.clamp(min=1)).flip(1)


def letterbox_normalize_reference(
    frames: Tensor, sizes: Tensor, out_size: int, *,
    mean: Sequence[float], std: Sequence[float], pad: int = 114, squash: bool = False, rgb: bool = False,
    dtype: torch.dtype = torch.float32, channels_last: bool = True,
) -> Tensor:  # fmt: skip
    """`letterbox_normalize` in PyTorch. The letterbox never waits for the device; the squash reads its sizes."""
    images, capacity = frames.shape
    height, width = sizes.long().unbind(1)
    new_height, new_width = _fitted(sizes, out_size, squash).unbind(1)
    channel = torch.arange(3, device=frames.device)
    channel = 2 - channel if rgb else channel

    def pixels(rows: Tensor, columns: Tensor) -> Tensor:
        """int32 [B, S, S, 3] of rows and columns [B, S]."""
        at = rows[:, :, None] * width[:, None, None] + columns[:, None, :]
        at = (3 * at[..., None] + channel).flatten(1)
        found = frames.gather(1, at.clamp(0, capacity - 1)).int()
        return torch.where(at < capacity, found, 0).view(images, out_size, out_size, 3)

    resize = _pillow if squash else _opencv
    canvas = resize(pixels, (height, new_height), (width, new_width), out_size)
    at = torch.arange(out_size, device=frames.device)
    y_inside = (at < new_height[:, None]) & (height > 0)[:, None]
    x_inside = (at < new_width[:, None]) & (width > 0)[:, None]
    inside = (y_inside[:, :, None] & x_inside[:, None, :])[..., None]
    canvas = torch.where(inside, canvas, pad).float()
    out = torch.stack([(canvas[..., i] - mean[i]) / std[i] for i in range(3)], 1)
    return out.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _fitted(sizes: Tensor, out_size: int, squash: bool) -> Tensor:
    """[B, 2] int64: the frames' heights and widths on the canvas, at least 1."""
    if squash:
        return torch.full_like(sizes, out_size, dtype=torch.int64)
    sides = sizes.double()  # as Python computes them; a number by a tensor would be rounded twice
    ratio = sides.new_full((1, 1), out_size) / sides.amax(1, keepdim=True).clamp(min=1)
    return (sides * ratio + 0.5).long().clamp(min=1)


Pixels = Callable[[Tensor, Tensor], Tensor]
Sides = tuple[Tensor, Tensor]  # [B] of the frames, and on the canvas


def _places(sides: Sides, out_size: int) -> tuple[Tensor, Tensor]:
    """P int64 and u float32, [B, S] each."""
    size, new = (side[:, None] for side in sides)
    place = (2 * torch.arange(out_size, device=size.device) + 1) * size - new  # in units of 2 new to the pixel
    whole = place.div(2 * new, rounding_mode="floor")
    return whole, ((place - whole * 2 * new).double() / (2 * new)).float()


def _opencv(pixels: Pixels, heights: Sides, widths: Sides, out_size: int) -> Tensor:
    """The resized frames as int32 [B, S, S, 3]; beyond their sides on the canvas there is nothing sensible."""

    def taps(sides: Sides) -> tuple[Tensor, Tensor, Tensor]:
        """The first and the second pixel, and the weight of the second, of 2048; each [B, S]."""
        whole, part = _places(sides, out_size)
        last = sides[0][:, None] - 1
        return whole.clamp(min=0), (whole + 1).minimum(last), (part * 2048 + 0.5).int()

    (y0, y1, y_weight), (x0, x1, x_weight) = taps(heights), taps(widths)
    x_weight, y_weight = x_weight[:, None, :, None], y_weight[:, :, None, None]
    top, bottom = (pixels(y, x0) * (2048 - x_weight) + pixels(y, x1) * x_weight for y in (y0, y1))
    return (((2048 - y_weight) * (top >> 4) >> 16) + (y_weight * (bottom >> 4) >> 16) + 2) >> 2


def _pillow(pixels: Pixels, heights: Sides, widths: Sides, out_size: int) -> Tensor:
    """As `_opencv`, float32."""

    def taps(sides: Sides) -> list[tuple[Tensor, Tensor]]:
        """The pixels that are averaged and their weights, [B, S] each."""
        whole, part = _places(sides, out_size)
        size, new = (side[:, None] for side in sides)
        support = (size / new).clamp(min=1)
        reach = int(support.ceil().max())
        found = []
        for k in range(1 - reach, 1 + reach):
            weight = (1 - (k - part).abs() / support).clamp(min=0)
            found.append((whole + k, torch.where((whole + k >= 0) & (whole + k < size), weight, 0)))
        norm = torch.stack([weight for _, weight in found]).sum(0)
        return [(at, weight / norm) for at, weight in found]

    columns = taps(widths)
    canvas = torch.zeros((), device=heights[0].device)
    for rows, y_weight in taps(heights):
        row = torch.stack([pixels(rows, at) * weight[:, None, :, None] for at, weight in columns]).sum(0)
        canvas = canvas + (row + 0.5).floor() * y_weight[:, :, None, None]  # bytes, as between Pillow's two passes
    return (canvas + 0.5).floor()


def _check(
    frames: Tensor, sizes: Tensor, out_size: int, mean: Sequence[float], std: Sequence[float], pad: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames: expected uint8, got {frames.dtype}")
    if frames.dim() != 2 or 0 in frames.shape or frames.shape[1] >= 2**31:
        raise ValueError(f"frames: expected shape [B, capacity] of less than 2 GiB each, got {list(frames.shape)}")
    if not frames.is_contiguous():
        raise ValueError(f"frames: expected contiguous bytes, got strides {list(frames.stride())}")
    if sizes.dtype != torch.int32:
        raise TypeError(f"sizes: expected int32, got {sizes.dtype}")
    if sizes.shape != (frames.shape[0], 2) or not sizes.is_contiguous():
        raise ValueError(f"sizes: expected contiguous shape [{frames.shape[0]}, 2], got {list(sizes.shape)}")
    if sizes.device != frames.device:
        raise ValueError(f"sizes: on {sizes.device}, but frames is on {frames.device}")
    if not 1 <= out_size <= 16384:
        raise ValueError(f"out_size: expected 1..16384 pixels, got {out_size}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name}: expected 3 numbers, got {len(values)}")
    if 0 in std:
        raise ValueError(f"std: expected no 0, got {list(std)}")
    if not 0 <= pad <= 255:
        raise ValueError(f"pad: expected a grey level 0..255, got {pad}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")


@triton.jit
def _load(frame, y, x, inside):
    """The three bytes of a pixel as int32; `frame` is pointer, capacity and width."""
    at = 3 * (y * frame[2] + x)
    values = ()
    for c in tl.static_range(3):
        inside_buffer = inside & (at + c >= 0) & (at + c < frame[1])
        values += (tl.load(frame[0] + at + c, mask=inside_buffer, other=0).to(tl.int32),)
    return values


@triton.jit
def _place(i, size, new):
    """P int32 and u fp32 of pixel i of the canvas. No integer passes 2 size or 3 new^2."""
    halves = (2 * i + 1) * (size // new)
    rest = (2 * i + 1) * (size % new) + (1 + halves % 2) * new  # of 2 new; a pixel too much, as // rounds towards 0
    more = rest // (2 * new)
    return halves // 2 + more - 1, (rest - more * 2 * new).to(tl.float32) / (2 * new)


@triton.jit
def _opencv_pixel(frame, y_sides, x_sides, y, x, inside):
    """The three channels of letterboxed pixels, int32; sides are the frame's and the canvas's."""
    y0, y_part = _place(y, y_sides[0], y_sides[1])
    x0, x_part = _place(x, x_sides[0], x_sides[1])
    y_weight, x_weight = (y_part * 2048 + 0.5).to(tl.int32), (x_part * 2048 + 0.5).to(tl.int32)
    y1, x1 = tl.minimum(y0 + 1, y_sides[0] - 1), tl.minimum(x0 + 1, x_sides[0] - 1)
    y0, x0 = tl.maximum(y0, 0), tl.maximum(x0, 0)
    top_left, top_right = _load(frame, y0, x0, inside), _load(frame, y0, x1, inside)
    bottom_left, bottom_right = _load(frame, y1, x0, inside), _load(frame, y1, x1, inside)
    values = ()
    for c in tl.static_range(3):
        top = top_left[c] * (2048 - x_weight) + top_right[c] * x_weight
        bottom = bottom_left[c] * (2048 - x_weight) + bottom_right[c] * x_weight
        values += ((((2048 - y_weight) * (top >> 4) >> 16) + (y_weight * (bottom >> 4) >> 16) + 2) >> 2,)
    return values


@triton.jit
def _support(size, new):
    return tl.maximum(size.to(tl.float32) / new.to(tl.float32), 1.0)


@triton.jit
def _pillow_weight(k, at, part, size, support):
    return tl.where((at >= 0) & (at < size), tl.maximum(1 - tl.abs(k - part) / support, 0.0), 0.0)


@triton.jit
def _pillow_pixel(frame, y_sides, x_sides, y, x, inside):
    """As `_opencv_pixel`, of the squashed frame, fp32."""
    y_place, y_part = _place(y, y_sides[0], y_sides[1])
    x_place, x_part = _place(x, x_sides[0], x_sides[1])
    y_support, x_support = _support(y_sides[0], y_sides[1]), _support(x_sides[0], x_sides[1])
    y_reach, x_reach = tl.ceil(y_support).to(tl.int32), tl.ceil(x_support).to(tl.int32)
    zeros = tl.zeros(inside.shape, tl.float32)
    total0, total1, total2, total_weight = zeros, zeros, zeros, zeros
    ky = 1 - y_reach
    while ky <= y_reach:
        y_weight = _pillow_weight(ky, y_place + ky, y_part, y_sides[0], y_support)
        row0, row1, row2, row_weight = zeros, zeros, zeros, zeros
        kx = 1 - x_reach
        while kx <= x_reach:
            x_weight = _pillow_weight(kx, x_place + kx, x_part, x_sides[0], x_support)
            values = _load(frame, y_place + ky, x_place + kx, inside & (x_weight * y_weight > 0))
            row0 += x_weight * values[0].to(tl.float32)
            row1 += x_weight * values[1].to(tl.float32)
            row2 += x_weight * values[2].to(tl.float32)
            row_weight += x_weight
            kx += 1
        # bytes again, as between Pillow's two passes
        total0 += y_weight * tl.floor(row0 / row_weight + 0.5)
        total1 += y_weight * tl.floor(row1 / row_weight + 0.5)
        total2 += y_weight * tl.floor(row2 / row_weight + 0.5)
        total_weight += y_weight
        ky += 1
    return (
        tl.floor(total0 / total_weight + 0.5),
        tl.floor(total1 / total_weight + 0.5),
        tl.floor(total2 / total_weight + 0.5),
    )


@triton.jit(do_not_specialize=["capacity", "pad"])  # out_size decides how wide the stores are
def _letterbox_kernel(
    frames_ptr, sizes_ptr, out_ptr, capacity, out_size, pad,
    MEAN: tl.constexpr, STD: tl.constexpr, SQUASH: tl.constexpr, RGB: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of row y of an image; out is [B, S, S, 3] in memory if CHANNELS_LAST, else [B, 3, S, S]."""
    y = tl.program_id(0)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(2).to(tl.int64)
    height = tl.load(sizes_ptr + 2 * image)
    width = tl.load(sizes_ptr + 2 * image + 1)
    new_height = tl.cast(out_size, tl.int32)  # 1 is Triton's constant
    new_width = new_height
    if not SQUASH:
        ratio = new_height.to(tl.float64) / tl.maximum(tl.maximum(height, width), 1)
        new_height, new_width = _rounded(height * ratio), _rounded(width * ratio)
    inside = (y < new_height) & (x < new_width) & (height > 0) & (width > 0)
    frame, y_sides, x_sides = (frames_ptr + image * capacity, capacity, width), (height, new_height), (width, new_width)
    if SQUASH:
        values = _pillow_pixel(frame, y_sides, x_sides, y, x, inside)
    else:
        values = _opencv_pixel(frame, y_sides, x_sides, y, x, inside)
    at = (image * out_size + y) * out_size + x
    for c in tl.static_range(3):
        value = tl.where(inside, values[2 - c if RGB else c].to(tl.float32), pad)
        c_at = 3 * at + c if CHANNELS_LAST else at + (2 * image + c) * out_size * out_size
        tl.store(out_ptr + c_at, (value - MEAN[c]) / STD[c], mask=x < out_size)


@triton.jit
def _rounded(side):
    """int(side + .5) as Python rounds it, and not as one fma with the product that `side` is; at least 1."""
    whole = tl.floor(side)
    return tl.maximum(tl.where(side >= whole + 0.5, whole + 1, whole), 1).to(tl.int32)


@triton_op("rtmdet_fast::letterbox_normalize")
def _letterbox(
    frames: Tensor, sizes: Tensor, out_size: int, mean: list[float], std: list[float], pad: int, squash: bool,
    rgb: bool, dtype: torch.dtype, channels_last: bool,
) -> Tensor:  # fmt: skip
    images, capacity = frames.shape
    shape = (images, out_size, out_size, 3) if channels_last else (images, 3, out_size, out_size)
    out = torch.empty(shape, dtype=dtype, device=frames.device)
    constexprs: dict[str, Any] = dict(
        MEAN=tuple(mean), STD=tuple(std), SQUASH=squash, RGB=rgb, CHANNELS_LAST=channels_last, BLOCK=TUNING["block"]
    )
    grid = out_size, cdiv(out_size, TUNING["block"]), images
    wrap_triton(_letterbox_kernel)[grid](
        frames, sizes, out, capacity, out_size, pad, **constexprs, num_warps=TUNING["warps"]
    )
    return out.permute(0, 3, 1, 2) if channels_last else out
