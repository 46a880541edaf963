"""Depth-wise K x K convolution, batch normalisation, SiLU and a residual added after it, forward and backward.

    z = conv(x);  y = bn_silu(z) + residual;  dz is what bn_silu calls dx                      (P = K // 2, stride S)
    dx[i, j] = sum_kl w[k, l] dz[(i + P - k) / S, (j + P - l) / S]
    dw[k, l] = sum_oq dz[o, q] x[S o + k - P, S q + l - P]

Bytes. Inference reads x and writes y, the affine being folded into w. Training forward is conv (reads x, writes z and
the moments of its tiles) and normalisation (reads z, writes y). Backward is the two sums of bn_silu (reads dy, z) and
one kernel for dx and dw (reads dy, z, x, writes dx): six passes, because dz is not stored but computed from dy and z
where it is used. Kept for the backward pass: x and z.

Arithmetic, 5 x 5 in fp16 on an H200 (datasheet: 4.8 TB/s, 132 multiprocessors, 33.5 T fp32 FMA/s). An element is 4
bytes, thus 0.83 ps of bandwidth, and 25 FMAs, thus 0.75 ps: near balance, and every instruction beside the FMAs
counts. A load instruction serves 32 lanes a clock and multiprocessor (8.4 T lanes/s), whatever it finds in L1: 25
loads of 2 bytes an output would be 3.0 ps. Hence the kernels
- slide down rows: a row is loaded once and added to the K rows of the output that need it, whose sums stay in
  registers: 5 loads, 0.6 ps. A program slides over up to 40 rows, as the K - 1 rows above are loaded and multiplied
  again;
- give each thread two or four neighbouring columns: the 6 columns that two need are 3 loads an element (channels_last,
  odd widths), or as aligned pairs 1.5 loads of 4 bytes (contiguous format, even widths): 0.2 ps;
- load rows some steps before they are needed: one row of a warp is 128 bytes, too few to cover the memory's latency;
- give a row one address. STRIDE, which leads from a column to the next, is known to the compiler, so that the distances
  stand in the loads; the columns of a group have one mask where the width is a multiple of them.
`python -m benches.machine_code` tells what they compile to; docs/kernels.md has the table.
"""

# Triton's tuples and tensors are no types of Python's
# mypy: disable-error-code="assignment,misc,operator,var-annotated"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.kernels import batch_norm as bn
from rtmdet_fast.kernels._dispatch import (
    CLONES_WHAT_IS_READ,
    cdiv,
    is_aligned,
    multiprocessors,
    tl,
    triton,
    triton_op,
    unwatched,
    wrap_triton,
)
from rtmdet_fast.kernels.batch_norm import load_parameters, merge_moments, silu_backward
from rtmdet_fast.kernels.bn_silu import bn_silu_reference

TUNING: dict[str, Any] = {
    # where sums are taken, a block has a power of two of channels and of groups of columns: so many groups, or (in
    # channels_last) such shares of the channels that it may have, whichever idles the fewest lanes
    "groups": (32, 16, 8, 4),
    "shares": (1, 2, 4),
    "sector": 32,  # bytes of the memory: of a block that takes fewer side by side ...
    "narrow": 1.25,  # ... a lane counts as so many, as L2 brings twice what it uses
    "rows": 40,  # that a program slides over at most: the halo of K - 1 rows is loaded and multiplied again
    "least_rows": 8,  # fewer only for more programs, until all that are `resident` on a multiprocessor have one
    # columns of a group; rows on their way while one is used; by K, programs a multiprocessor has registers for,
    # whatever dtype and width (test_lowering); lanes of a block, or its channels (in channels_last at most) and groups
    "inference": {
        "contiguous": dict(columns=4, prefetch=4, resident={3: 5, 5: 4}, lanes=128),
        "narrow": dict(columns=4, prefetch=4, resident={3: 5, 5: 3}, lanes=128),
        "wide": dict(columns=4, prefetch=4, resident={3: 4, 5: 3}, lanes=256),
    },
    "training": {
        "contiguous": dict(columns=2, prefetch=4, resident={3: 7, 5: 4}, block=(32, 4)),
        "narrow": dict(columns=2, prefetch=4, resident={3: 7, 5: 4}, block=(32, 4)),
        "wide": dict(columns=2, prefetch=4, resident={3: 5, 5: 3}, block=(64, 4)),
    },
    # stride 2, K = 7: more columns and weights
    "few": dict(columns=2, prefetch={3: 3, 5: 3, 7: 4}, resident={3: 6, 5: 3, 7: 3}, block=(32, 4), lanes=128),
    # dz in a pass of its own, two passes more: the thread that needs it then does not compute it, see above
    "store_dz": False,
    # of dy, z and x together one row on its way: a second would change registers, which waits for it
    "backward": dict(prefetch=1, resident={3: 5, 5: 3, 7: 2}, block=(32, 4)),
}


def dwconv_bn_silu(
    x: Tensor, conv_weight: Tensor, bn_weight: Tensor, bn_bias: Tensor, running_mean: Tensor, running_var: Tensor, *,
    stride: int = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    residual: Tensor | None = None, process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """silu(batch_norm(conv(x))) + residual for `x` [B, C, H, W] and `conv_weight` [C, 1, K, K].

    K is 3, 5 or 7, the padding K // 2, the stride 1 or 2, so that the result is [B, C, ceil(H / stride),
    ceil(W / stride)]. Batch normalisation, `residual` and `process_group` are as in `bn_silu`.
    """
    parameters = bn_weight, bn_bias, running_mean, running_var
    bn.check_batch_norm(x, *parameters, prefix="bn_")
    _check_conv(x, conv_weight, stride)
    out_shape = _out_shape(x, stride)
    bn.check_residual(residual, out_shape, x)
    if not bn.takes_triton(x):
        options: dict[str, Any] = dict(momentum=momentum, eps=eps, residual=residual, process_group=process_group)
        return dwconv_bn_silu_reference(x, conv_weight, *parameters, stride=stride, training=training, **options)
    if torch.is_autocast_enabled(x.device.type):  # as for F.conv2d
        dtype = torch.get_autocast_dtype(x.device.type)
        x, conv_weight = x.to(dtype), conv_weight.to(dtype)
    if not training:
        op = _inference.undispatched if unwatched(x) else _inference
        return op(x, conv_weight, *parameters, residual, stride, eps)
    bn.check_count(out_shape[0] * out_shape[2] * out_shape[3], out_shape, process_group)
    group, running = bn.group_name(process_group), (running_mean, running_var)
    z, stats = bn.with_running_stats(_convolution, x, conv_weight.detach(), stride, momentum, group, running=running)
    return _training(x, conv_weight, bn_weight, bn_bias, residual, z, stats, stride, eps, group)


def dwconv_bn_silu_reference(
    x: Tensor, conv_weight: Tensor, bn_weight: Tensor, bn_bias: Tensor, running_mean: Tensor, running_var: Tensor, *,
    stride: int = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    residual: Tensor | None = None, process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """`dwconv_bn_silu` in PyTorch. The affine is not folded into the weights: folding gains 7 % on a CPU, and costs the
    equality to the bit with what the published implementation computes."""
    z = F.conv2d(x, conv_weight, None, stride, conv_weight.shape[2] // 2, groups=x.shape[1])
    options: dict[str, Any] = dict(momentum=momentum, eps=eps, residual=residual, process_group=process_group)
    return bn_silu_reference(z, bn_weight, bn_bias, running_mean, running_var, training=training, **options)


def _out_shape(x: Tensor, stride: int) -> tuple[int, int, int, int]:
    return x.shape[0], x.shape[1], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1


def _check_conv(x: Tensor, conv_weight: Tensor, stride: int) -> None:
    size = conv_weight.shape[-1] if conv_weight.dim() == 4 else 0
    if size not in (3, 5, 7) or conv_weight.shape != (x.shape[1], 1, size, size):
        raise ValueError(
            f"conv_weight: expected shape ({x.shape[1]}, 1, K, K) with K 3, 5 or 7, got {tuple(conv_weight.shape)}"
        )
    if conv_weight.device != x.device:
        raise ValueError(f"conv_weight: on {conv_weight.device}, but x is on {x.device}")
    if conv_weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"conv_weight: {conv_weight.dtype}, but x is {x.dtype}")
    if stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride}")


@triton.jit
def _tile(row_blocks, column_blocks, groups, CHANNELS_LAST: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Image, row block, channels and groups of columns of this program.

    BLOCK of one number: so many of all pairs of a channel and one of `groups`, in the order in which they lie.
    """
    tile = tl.program_id(0)
    if len(BLOCK) == 1:
        lane = tile % column_blocks * BLOCK[0] + tl.arange(0, BLOCK[0])
        if CHANNELS_LAST:
            group, c = lane // STRIDE, lane % STRIDE
        else:
            group, c = lane % groups, lane // groups
        group, c = group.to(tl.int64), c.to(tl.int64)
    else:
        group = tile % column_blocks * BLOCK[1] + tl.arange(0, BLOCK[1]).to(tl.int64)
        c = tl.program_id(1) * BLOCK[0] + tl.arange(0, BLOCK[0]).to(tl.int64)
        if CHANNELS_LAST:
            group, c = group[:, None], c[None, :]
        else:
            group, c = group[None, :], c[:, None]
    return (tile // column_blocks // row_blocks).to(tl.int64), tile // column_blocks % row_blocks, c, group


@triton.jit
def _columns(
    ptr, place, shape, row, STEP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, STRIDE: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """A pointer to a row of the image, and from it to column STEP group, masks of FIRST..LAST beside that column, and
    what leads to the next row.

    `place` is image, channels and groups of columns, `shape` channels, height and width of all. Columns are STRIDE
    apart, which the compiler knows: a row then has one address, and the distances stand in the loads. The pointer is
    one for all: of such a loop need not move through shared memory, to become what loads take.
    PACK, above 1: as many columns have one mask, the first of them a multiple; and where they lie side by side
    (contiguous) they are one number, which takes so many times fewer loads.
    """
    image, c, group = place
    channels, height, width = shape
    packs = tl.cast(width // PACK, tl.int64)
    width = packs * PACK  # so that the compiler knows of what it is a multiple
    ptr += image * channels * height * width
    masks = ()
    for i in tl.static_range(FIRST // PACK, LAST // PACK + 1):
        at = STEP // PACK * group + i
        masks += ((c < channels) & (at >= 0) & (at < packs),)
    lanes = STEP * group * STRIDE + c if CHANNELS_LAST else (c * height * packs + STEP // PACK * group) * PACK
    next_row = width * STRIDE
    return ptr + row * next_row, lanes, masks, next_row


@triton.jit
def _inside(i, n):
    """0 <= i < n, by one comparison."""
    return tl.cast(i, tl.uint32) < tl.cast(n, tl.uint32)


@triton.jit
def _load(
    ptr, lanes, masks, valid, FIRST: tl.constexpr, LAST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, STRIDE: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Columns FIRST..LAST of a row, see `_columns`."""
    EACH: tl.constexpr = 1 if CHANNELS_LAST else PACK
    values = ()
    for i in tl.static_range(FIRST // EACH, LAST // EACH + 1):
        mask, at = masks[i * EACH // PACK - FIRST // PACK] & valid, lanes + i * EACH * STRIDE
        if EACH > 1:
            mask, at = tl.expand_dims(mask, -1), tl.expand_dims(at, -1) + tl.arange(0, EACH)
        values += (tl.load(ptr + at, mask=mask, other=0),)
    return values


@triton.jit
def _unpack(
    values, DTYPE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Columns FIRST..LAST in fp32 from what `_load` brought."""
    EACH: tl.constexpr = 1 if CHANNELS_LAST else PACK
    columns = ()
    for i in tl.static_range(len(values)):
        if EACH == 1:
            columns += (values[i],)
        elif EACH == 2:
            columns += tl.split(values[i])
        else:
            even, odd = tl.split(tl.reshape(values[i], values[i].shape[:-1] + (2, 2)))  # noqa: RUF005 (Triton unpacks none)
            v0, v2 = tl.split(even)
            v1, v3 = tl.split(odd)
            columns += (v0, v1, v2, v3)
    unpacked = ()
    for i in tl.static_range(FIRST, LAST + 1):
        unpacked += (columns[i - FIRST // EACH * EACH].to(tl.float32),)
    return unpacked


@triton.jit
def _store(
    ptr, lanes, masks, valid, values, DTYPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, STRIDE: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """A group of columns, in fp32."""
    EACH: tl.constexpr = 1 if CHANNELS_LAST else PACK
    for i in tl.static_range(len(values) // EACH):
        mask, at = masks[i * EACH // PACK] & valid, lanes + i * EACH * STRIDE
        if EACH > 1:
            mask, at = tl.expand_dims(mask, -1), tl.expand_dims(at, -1) + tl.arange(0, EACH)
        if EACH == 1:
            v = values[i]
        elif EACH == 2:
            v = tl.join(values[2 * i], values[2 * i + 1])
        else:
            even, odd = tl.join(values[4 * i], values[4 * i + 2]), tl.join(values[4 * i + 1], values[4 * i + 3])
            v = tl.join(even, odd)
            v = tl.reshape(v, v.shape[:-2] + (4,))  # noqa: RUF005
        tl.store(ptr + at, v.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "row_blocks", "column_blocks", "steps"])
def _forward_kernel(
    x_ptr, w_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, residual_ptr, y_ptr, partial_ptr,
    channels, height, width, out_height, out_width, row_blocks, column_blocks, steps, eps,
    K: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr, PREFETCH: tl.constexpr,
    TRAINING: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, STRIDE: tl.constexpr,
    PACK_IN: tl.constexpr, PACK_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of y, or in training of z, with the tile's moments [tiles, 3, C].

    A tile is BLOCK = (channels, groups of COLUMNS columns), or so many pairs of these (see `_tile`) where no sums are
    taken; the program slides down steps - IN_FLIGHT + 1 rows of it.
    """
    P: tl.constexpr = K // 2
    IN_FLIGHT: tl.constexpr = (K + S - 1) // S  # rows of the output that one row of the input adds to, at most
    FIRST: tl.constexpr = -P  # of the columns of the input that a group of the output needs
    LAST: tl.constexpr = S * (COLUMNS - 1) + P
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    X_DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    R_DTYPE: tl.constexpr = residual_ptr.dtype.element_ty
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    groups = tl.cdiv(out_width, COLUMNS)
    image, row_block, c, group = _tile(row_blocks, column_blocks, groups, CHANNELS_LAST, STRIDE, BLOCK)
    place, out_shape = (image, c, group), (channels, out_height, out_width)
    first_out = row_block * (steps - IN_FLIGHT + 1)
    row, out = first_out * S - P, first_out - (IN_FLIGHT - 1)
    x_ptr, x_lanes, x_masks, x_row = _columns(
        x_ptr, place, (channels, height, width), row, COLUMNS * S, FIRST, LAST, CHANNELS_LAST, STRIDE, PACK_IN
    )
    y_ptr, y_lanes, y_masks, y_row = _columns(
        y_ptr, place, out_shape, out, COLUMNS, 0, COLUMNS - 1, CHANNELS_LAST, STRIDE, PACK_OUT
    )
    if HAS_RESIDUAL:
        residual_ptr, _, _, _ = _columns(
            residual_ptr, place, out_shape, out, COLUMNS, 0, COLUMNS - 1, CHANNELS_LAST, STRIDE, PACK_OUT
        )
    zeros = tl.zeros(x_masks[0].shape, tl.float32)
    scale, start = zeros + 1, zeros
    if not TRAINING:
        # The convolution's weight takes the scale, its sum starts at the shift; both times log2(e), so that the sum is
        # what exp2 takes.
        weight, bias, mean, invstd = load_parameters((weight_ptr, bias_ptr, mean_ptr, var_ptr), c, channels, eps)
        weight, bias = weight * 1.4426950408889634, bias * 1.4426950408889634
        scale, start = zeros + weight * invstd, zeros + (bias - mean * (weight * invstd))
    w = ()
    for i in tl.static_range(K * K):
        w += (tl.load(w_ptr + c * K * K + i, mask=c < channels, other=0).to(tl.float32) * scale,)
    fresh = ()
    for _i in tl.static_range(COLUMNS):
        fresh += (start,)
    sums = ()
    for _i in tl.static_range(IN_FLIGHT):
        sums += fresh
    shift, s1, s2 = zeros, zeros, zeros

    prefetched = ()
    for _i in tl.static_range(PREFETCH):
        valid = _inside(row, height)
        prefetched += _load(x_ptr, x_lanes, x_masks, valid, FIRST, LAST, CHANNELS_LAST, STRIDE, PACK_IN)
        row += 1
        x_ptr += x_row
    EACH: tl.constexpr = len(prefetched) // PREFETCH
    rows = tl.minimum(steps - IN_FLIGHT + 1, out_height - first_out)
    end = out + steps
    while out < end:  # not range(): under NumPy 2.4 Triton's interpreter has none of a run-time length
        for _unrolled in tl.static_range(UNROLL):  # so that sums and rows on their way change places without moves
            for phase in tl.static_range(S):
                taps = _unpack(prefetched[:EACH], X_DTYPE, FIRST, LAST, CHANNELS_LAST, PACK_IN)
                # before the store: loads after it would wait for it
                valid = _inside(row, height)
                prefetched = prefetched[EACH:] + _load(
                    x_ptr, x_lanes, x_masks, valid, FIRST, LAST, CHANNELS_LAST, STRIDE, PACK_IN
                )
                row += 1
                x_ptr += x_row
                updated = ()
                for i in tl.static_range(IN_FLIGHT):
                    for k in tl.static_range(COLUMNS):
                        v = sums[COLUMNS * i + k]
                        if K - 1 - S * i - phase >= 0:  # the row of w
                            for j in tl.static_range(K):
                                v = tl.fma(w[(K - 1 - S * i - phase) * K + j], taps[j + S * k], v)
                        updated += (v,)
                sums = updated
                if phase == 0:  # the oldest sums are complete
                    done = sums[:COLUMNS]
                    sums = sums[COLUMNS:] + fresh
                    valid = _inside(out - first_out, rows)
                    if TRAINING:  # moments of what the next kernels will read, relative to the first row
                        rounded = ()
                        for k in tl.static_range(COLUMNS):
                            v = done[k].to(DTYPE).to(tl.float32)
                            if k == 0:
                                shift = tl.where(out == first_out, v, shift)
                            d = tl.where(valid & y_masks[k // PACK_OUT], v - shift, 0)
                            s1 += d
                            s2 = tl.fma(d, d, s2)
                            rounded += (v,)
                    else:
                        rounded = ()
                        for k in tl.static_range(COLUMNS):  # v sigmoid(v) of v in units of ln(2), see `sigmoid`
                            v = done[k]
                            root = tl.rsqrt(tl.exp2(v * -1.0) * 1.4426950408889634 + 1.4426950408889634)
                            rounded += (v * (root * root),)
                        if HAS_RESIDUAL:
                            r = _load(
                                residual_ptr, y_lanes, y_masks, valid, 0, COLUMNS - 1, CHANNELS_LAST, STRIDE, PACK_OUT
                            )
                            r = _unpack(r, R_DTYPE, 0, COLUMNS - 1, CHANNELS_LAST, PACK_OUT)
                            added = ()
                            for k in tl.static_range(COLUMNS):
                                added += (rounded[k] + r[k],)
                            rounded = added
                    _store(y_ptr, y_lanes, y_masks, valid, rounded, DTYPE, CHANNELS_LAST, STRIDE, PACK_OUT)
            out += 1
            y_ptr += y_row
            if HAS_RESIDUAL:
                residual_ptr += y_row
    if TRAINING:
        n = zeros
        for k in tl.static_range(COLUMNS):
            n += y_masks[k // PACK_OUT].to(tl.float32)
        n *= rows
        s1_mean = s1 / tl.maximum(n, 1)
        m2 = s2 - s1 * s1_mean
        mean, m2, n = merge_moments(shift + s1_mean, tl.where(m2 < 0, 0, m2), n, AXIS)  # a NaN stays
        c = tl.program_id(1) * BLOCK[0] + tl.arange(0, BLOCK[0])
        at = partial_ptr + tl.program_id(0).to(tl.int64) * 3 * channels + c
        tl.store(at, mean, mask=c < channels)
        tl.store(at + channels, m2, mask=c < channels)
        tl.store(at + 2 * channels, n, mask=c < channels)


@triton.jit
def _load_backward(
    pointers, steps, lanes, masks, valid, x_at, x_rows, S: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    STORED: tl.constexpr, CHANNELS_LAST: tl.constexpr, STRIDE: tl.constexpr, PACK_IN: tl.constexpr,
    PACK_OUT: tl.constexpr,
):  # fmt: skip
    """A row of dy (and of z, if it is read) and the S rows of x that come with it, and the pointers behind them.

    Of x only rows that the program stores, `x_at` of `x_rows` on, so that every product counts once in dw.
    """
    dy_ptr, z_ptr, x_ptr = pointers
    loaded = _load(dy_ptr, lanes[0], masks[0], valid, FIRST, LAST, CHANNELS_LAST, STRIDE, PACK_OUT)
    if not STORED:
        loaded += _load(z_ptr, lanes[0], masks[0], valid, FIRST, LAST, CHANNELS_LAST, STRIDE, PACK_OUT)
        z_ptr += steps[0]
    for k in tl.static_range(S):
        x_valid = _inside(x_at + k, x_rows)
        loaded += _load(x_ptr, lanes[1], masks[1], x_valid, 0, 1, CHANNELS_LAST, STRIDE, PACK_IN)
        x_ptr += steps[1]
    return loaded, dy_ptr + steps[0], z_ptr, x_ptr


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "row_blocks", "column_blocks", "steps"])
def _backward_kernel(
    dy_ptr, z_ptr, x_ptr, w_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, means_ptr, dx_ptr, dw_ptr,
    channels, height, width, out_height, out_width, row_blocks, column_blocks, steps, eps,
    K: tl.constexpr, S: tl.constexpr, PREFETCH: tl.constexpr, STORED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    STRIDE: tl.constexpr, PACK_IN: tl.constexpr, PACK_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of dx, with the tile's share of dw [tiles, K * K, C]. STORED: `dy_ptr` holds dz, `z_ptr` is not read.

    A tile is BLOCK = (channels, pairs of columns); the program slides down S (steps - IN_FLIGHT + 1) rows of it.
    """
    P: tl.constexpr = K // 2
    IN_FLIGHT: tl.constexpr = (K + S - 1) // S
    STEP: tl.constexpr = 2 // S  # a pair of columns of dx needs those of dz from STEP pair + FIRST to LAST
    FIRST: tl.constexpr = -(P // S)
    LAST: tl.constexpr = (P + 1) // S
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    DY_DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    Z_DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    image, row_block, c, group = _tile(row_blocks, column_blocks, 0, CHANNELS_LAST, STRIDE, BLOCK)
    place, shape, z_shape = (image, c, group), (channels, height, width), (channels, out_height, out_width)
    first_dx = (P // S + row_block * (steps - IN_FLIGHT + 1)) * S - P  # may be -1: its program has the other row only
    end_dx = tl.minimum(first_dx + S * (steps - IN_FLIGHT + 1), height)
    row = P // S + row_block * (steps - IN_FLIGHT + 1) - (IN_FLIGHT - 1)  # of dz: completes rows S row - P on of dx
    end = row + steps
    first_dx = tl.maximum(first_dx, 0)
    rows = end_dx - first_dx
    x_new = S * row - P + K - S  # the first row of x that comes with it
    dy_ptr, z_lanes, z_masks, z_row = _columns(
        dy_ptr, place, z_shape, row, STEP, FIRST, LAST, CHANNELS_LAST, STRIDE, PACK_OUT
    )
    if not STORED:
        z_ptr, _, _, _ = _columns(z_ptr, place, z_shape, row, STEP, FIRST, LAST, CHANNELS_LAST, STRIDE, PACK_OUT)
    x_ptr, x_lanes, x_masks, x_row = _columns(x_ptr, place, shape, x_new, 2, 0, 1, CHANNELS_LAST, STRIDE, PACK_IN)
    dx_ptr, dx_lanes, dx_masks, _ = _columns(dx_ptr, place, shape, S * row - P, 2, 0, 1, CHANNELS_LAST, STRIDE, PACK_IN)
    weight, bias, mean, invstd = load_parameters((weight_ptr, bias_ptr, mean_ptr, var_ptr), c, channels, eps)
    mean_du = tl.load(means_ptr + c, mask=c < channels, other=0)
    mean_du_xhat = tl.load(means_ptr + channels + c, mask=c < channels, other=0)
    zeros = tl.zeros(x_masks[0].shape, tl.float32)
    w, dw = (), ()
    for i in tl.static_range(K * K):
        v = tl.load(w_ptr + c * K * K + i, mask=c < channels, other=0).to(tl.float32)
        w += ((v if STORED else v * (weight * invstd)) + zeros,)
        dw += (zeros,)
    dx, x = (), ()  # of the K rows that the current row of dz adds to
    for _i in tl.static_range(2 * (K - S)):
        dx += (zeros,)
        x += (zeros,)

    prefetched = ()
    for i in tl.static_range(PREFETCH):
        valid = _inside(row + i, out_height)
        loaded, dy_ptr, z_ptr, x_ptr = _load_backward(
            (dy_ptr, z_ptr, x_ptr), (z_row, x_row), (z_lanes, x_lanes), (z_masks, x_masks), valid, x_new - first_dx,
            rows, S, FIRST, LAST, STORED, CHANNELS_LAST, STRIDE, PACK_IN, PACK_OUT,
        )  # fmt: skip
        prefetched += loaded
        x_new += S
    X: tl.constexpr = 2 if CHANNELS_LAST else 2 // PACK_IN  # loads of a row of x
    BOTH: tl.constexpr = len(prefetched) // PREFETCH - S * X  # of dy and z
    Z: tl.constexpr = BOTH if STORED else BOTH // 2
    while row < end:
        dy = _unpack(prefetched[:Z], DY_DTYPE, FIRST, LAST, CHANNELS_LAST, PACK_OUT)
        if not STORED:
            z = _unpack(prefetched[Z:BOTH], Z_DTYPE, FIRST, LAST, CHANNELS_LAST, PACK_OUT)
        for k in tl.static_range(S):
            x += _unpack(prefetched[BOTH + k * X : BOTH + (k + 1) * X], DTYPE, 0, 1, CHANNELS_LAST, PACK_IN)
        valid = _inside(row + PREFETCH, out_height)
        loaded, dy_ptr, z_ptr, x_ptr = _load_backward(
            (dy_ptr, z_ptr, x_ptr), (z_row, x_row), (z_lanes, x_lanes), (z_masks, x_masks), valid, x_new - first_dx,
            rows, S, FIRST, LAST, STORED, CHANNELS_LAST, STRIDE, PACK_IN, PACK_OUT,
        )  # fmt: skip
        prefetched = prefetched[BOTH + S * X :] + loaded
        x_new += S
        for _k in tl.static_range(S):
            dx += (zeros, zeros)

        valid = _inside(row, out_height)
        dz = ()  # without the factor weight * invstd, which w and the sum of dw take
        if STORED:
            dz = dy  # with it, and 0 outside as it was loaded
        else:
            for i in tl.static_range(len(z)):
                xhat = (z[i] - mean) * invstd
                du = silu_backward(dy[i], xhat * weight + bias) - mean_du - xhat * mean_du_xhat
                mask = z_masks[(i + FIRST) // PACK_OUT - FIRST // PACK_OUT]
                dz += (tl.where(mask & valid, du, 0),)
        updated, updated_dw = (), ()
        for i in tl.static_range(K):
            v0, v1 = dx[2 * i], dx[2 * i + 1]
            for j in tl.static_range(K):
                d = dw[i * K + j]
                if (P - j) % S == 0:
                    v0 = tl.fma(w[i * K + j], dz[(P - j) // S - FIRST], v0)
                    d = tl.fma(x[2 * i], dz[(P - j) // S - FIRST], d)
                if (1 + P - j) % S == 0:
                    v1 = tl.fma(w[i * K + j], dz[(1 + P - j) // S - FIRST], v1)
                    d = tl.fma(x[2 * i + 1], dz[(1 + P - j) // S - FIRST], d)
                updated_dw += (d,)
            updated += (v0, v1)
        dw = updated_dw
        for k in tl.static_range(S):
            done = S * row - P + k
            valid = _inside(done - first_dx, rows)
            _store(dx_ptr, dx_lanes, dx_masks, valid, updated[2 * k : 2 * k + 2], DTYPE, CHANNELS_LAST, STRIDE, PACK_IN)
            dx_ptr += x_row
        dx, x = updated[2 * S :], x[2 * S :]
        row += 1
    c = tl.program_id(1) * BLOCK[0] + tl.arange(0, BLOCK[0]).to(tl.int64)
    at = dw_ptr + tl.program_id(0).to(tl.int64) * (K * K) * channels + c
    for i in tl.static_range(K * K):
        v = dw[i] if STORED else dw[i] * (weight * invstd)
        tl.store(at + i * channels, tl.sum(v, AXIS), mask=c < channels)


def _pack(tensors: Sequence[Tensor], columns: int, last: bool) -> int:
    """Columns of a group that have one mask, as widths are multiples of them.

    In contiguous format one load brings them, at most 8 bytes, whose addresses must be multiples too.
    """
    pack = columns
    while pack > 1 and not all(
        x.shape[3] % pack == 0
        and (
            last
            or (pack * x.element_size() <= 8 and x.element_size() == tensors[0].element_size() and is_aligned(x, pack))
        )
        for x in tensors
    ):
        pack //= 2
    return pack


def _blocks(
    x: Tensor, last: bool, columns: int, block: tuple[int, int] | int
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """BLOCK, and how many of such blocks of columns and of channels cover a row of x.

    `block` is channels and groups of columns, of which there are as many and in channels_last no more channels; or a
    number: so many pairs of these as they come.
    """
    channels, groups = x.shape[1], cdiv(x.shape[3], columns)
    if isinstance(block, int):
        return (block,), (cdiv(channels * groups, block), 1)
    lanes = block[0] * block[1]
    shapes = [(lanes // n, n) for n in TUNING["groups"]]
    if last:
        shapes = [(block[0] // n, block[1] * n) for n in TUNING["shares"]]

    def cost(shape: tuple[int, int]) -> tuple[float, int]:
        # lanes first: an idle one takes as long as another; then blocks, whose halo is loaded twice
        run = shape[0] if last else shape[1] * columns
        narrow = run * x.element_size() < TUNING["sector"]
        used = cdiv(channels, shape[0]) * cdiv(groups, shape[1])
        return used * (TUNING["narrow"] if narrow else 1), -run

    best = min(shapes, key=cost)
    return best, (cdiv(groups, best[1]), cdiv(channels, best[0]))


def _slides(
    x: Tensor, rows: int, in_flight: int, blocks: int, resident: int, unroll: int = 1
) -> tuple[int, int]:  # fmt: skip
    """In how many blocks a program's share of `rows` (times a step's rows) lies below each other, and its steps.

    `blocks`: programs beside each other for an image.
    """
    # a program spends in_flight - 1 steps before its first row: let it slide far, once all that can run at once do
    enough = max(1, resident * multiprocessors(x) // (x.shape[0] * blocks))
    row_blocks = max(cdiv(rows, TUNING["rows"]), min(cdiv(rows, TUNING["least_rows"]), enough))
    steps = cdiv(cdiv(rows, row_blocks) + in_flight - 1, unroll) * unroll
    return cdiv(rows, steps - in_flight + 1), steps


def _tiling(
    x: Tensor, last: bool, rows: int, in_flight: int, columns: int, block: tuple[int, int] | int, resident: int,
    unroll: int = 1,
) -> tuple[tuple[int, int], tuple[int, int, int], tuple[int, ...]]:  # fmt: skip
    """How an output of x's images, channels and width lies in tiles: see `_blocks` and `_slides`.

    Grid (tiles, channel blocks); row blocks, column blocks and steps of a program; BLOCK.
    """
    shape, (column_blocks, channel_blocks) = _blocks(x, last, columns, block)
    row_blocks, steps = _slides(x, rows, in_flight, column_blocks * channel_blocks, resident, unroll)
    return (x.shape[0] * row_blocks * column_blocks, channel_blocks), (row_blocks, column_blocks, steps), shape


def _forward(
    x: Tensor, w: Tensor, parameters: bn.Parameters, residual: Tensor | None, stride: int, eps: float, training: bool
) -> tuple[Tensor, Tensor]:
    """y, or in training z and its partial moments [tiles, 3, C]; x is dense."""
    size, format = w.shape[2], bn.memory_format(x)
    last = format == torch.channels_last
    y = torch.empty(_out_shape(x, stride), dtype=x.dtype, device=x.device, memory_format=format)
    residual = residual if residual is None else residual.contiguous(memory_format=format)
    in_flight = cdiv(size, stride)
    plan = _plan(x, size, stride, last, training)
    unroll = in_flight if size < 7 else 1
    # no more rows than a turn of the loop uses: the others would change registers, which waits for them
    prefetch = min(plan["prefetch"], unroll * stride)
    block = plan["block"] if training else plan["lanes"]
    tiling = last, y.shape[2], in_flight, plan["columns"], block, plan["resident"][size], unroll
    grid, tiles, block = _tiling(y, *tiling)
    partial = torch.empty((grid[0], 3, x.shape[1]) if training else 0, dtype=torch.float32, device=x.device)
    pointers = x, w.contiguous(), *(p.contiguous() for p in parameters), x if residual is None else residual, y, partial
    wrap_triton(_forward_kernel)[grid](
        *pointers, *x.shape[1:], *y.shape[2:], *tiles, eps, K=size, S=stride, COLUMNS=plan["columns"], UNROLL=unroll,
        PREFETCH=prefetch, TRAINING=training, HAS_RESIDUAL=residual is not None, CHANNELS_LAST=last,
        STRIDE=x.shape[1] if last else 1,
        PACK_IN=_pack([x], plan["columns"] if stride == 1 else 2, last),
        PACK_OUT=_pack([y] if residual is None else [y, residual], plan["columns"], last), BLOCK=block,
    )  # fmt: skip
    return y, partial


def _plan(x: Tensor, size: int, stride: int, last: bool, training: bool) -> dict[str, Any]:
    """The entries of TUNING for a forward pass."""
    if stride == 2 or size == 7:
        few = TUNING["few"]
        return {**few, "prefetch": few["prefetch"][size]}
    wide = x.element_size() == 2 and x.shape[1] > 32
    return TUNING["training" if training else "inference"][("wide" if wide else "narrow") if last else "contiguous"]


@triton_op("rtmdet_fast::dwconv_bn_silu_inference", opaque=CLONES_WHAT_IS_READ)
def _inference(
    x: Tensor, conv_weight: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, residual: Tensor | None,
    stride: int, eps: float,
) -> Tensor:  # fmt: skip
    x = x.contiguous(memory_format=bn.memory_format(x))
    return _forward(x, conv_weight, (weight, bias, mean, var), residual, stride, eps, training=False)[0]


@_inference.register_fake  # the body asks whether widths are even, which would fix them in an exported program
def _(x, conv_weight, weight, bias, mean, var, residual, stride, eps):
    return x.new_empty(*_out_shape(x, stride)).to(memory_format=bn.memory_format(x))


@triton_op(
    "rtmdet_fast::dwconv_bn_silu_convolution", opaque=CLONES_WHAT_IS_READ, mutates=("running_mean", "running_var")
)
def _convolution(
    x: Tensor, conv_weight: Tensor, stride: int, momentum: float, group: str, running_mean: Tensor, running_var: Tensor
) -> tuple[Tensor, Tensor]:
    """z, and statistics [5, C] of the batches of all processes, towards which it moves the running statistics."""
    x = x.contiguous(memory_format=bn.memory_format(x))
    unused: Any = (running_mean,) * 4
    z, partial = _forward(x, conv_weight, unused, None, stride, 0.0, training=True)
    with bn.contiguous_running_stats(running_mean, running_var) as running:
        if group:
            partial = bn.gather_moments(bn.statistics_of_parts(partial, None, None, momentum), group)
        return z, bn.statistics_of_parts(partial, *running, momentum)


@triton_op("rtmdet_fast::dwconv_bn_silu_training", opaque=CLONES_WHAT_IS_READ)
def _training(
    x: Tensor, conv_weight: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, z: Tensor, stats: Tensor,
    stride: int, eps: float, group: str,
) -> Tensor:  # fmt: skip
    return bn.normalise(z, (weight, bias, stats[0], stats[3]), residual, eps)


@triton_op("rtmdet_fast::dwconv_bn_silu_backward", opaque=CLONES_WHAT_IS_READ)
def _backward(
    dy: Tensor, x: Tensor, z: Tensor | None, conv_weight: Tensor,
    weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: Tensor | None,
    stride: int, eps: float, group: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dconv_weight and the sums [2, C] that are dbias and dweight; z is computed again where there is none."""
    format = bn.memory_format(x)
    x, dy = x.contiguous(memory_format=format), dy.contiguous(memory_format=format)
    conv_weight, last = conv_weight.contiguous(), format == torch.channels_last
    parameters: bn.Parameters = weight.contiguous(), bias.contiguous(), mean.contiguous(), var.contiguous()
    if z is None:
        z, _ = _forward(x, conv_weight, parameters, None, stride, eps, training=True)
    sums, means = bn.gradient_sums(dy, z, parameters, count, eps, group)
    dx = torch.empty_like(x, memory_format=format)
    size, padding = conv_weight.shape[2], conv_weight.shape[2] // 2
    rows = (x.shape[2] - 1 + padding) // stride - padding // stride + 1  # of S rows of dx each
    plan, stored = TUNING["backward"], TUNING["store_dz"]
    if stored:
        dy = bn.input_gradient(dy, z, parameters, means, eps)
    grid, tiles, block = _tiling(x, last, rows, cdiv(size, stride), 2, plan["block"], plan["resident"][size])
    partial = torch.empty(grid[0], size * size, x.shape[1], dtype=torch.float32, device=x.device)
    pack_in = _pack([x], 2, last)
    pack_out = _pack([z, dy, x], 2, last) if stride == 1 else 1
    pointers = dy, z, x, conv_weight, *parameters, means, dx, partial
    wrap_triton(_backward_kernel)[grid](
        *pointers, *x.shape[1:], *z.shape[2:], *tiles, eps, K=size, S=stride,
        PREFETCH=plan["prefetch"], STORED=stored, CHANNELS_LAST=last,
        STRIDE=x.shape[1] if last else 1, PACK_IN=pack_in, PACK_OUT=pack_out, BLOCK=block,
    )  # fmt: skip
    dw = partial.sum(0).t().reshape(conv_weight.shape)
    # as a parameter lies, or autograd copies it into such a tensor
    return dx, dw.to(conv_weight.dtype, memory_format=torch.contiguous_format), sums


@_convolution.register_fake
def _(x, conv_weight, stride, momentum, group, running_mean, running_var):
    z = x.new_empty(*_out_shape(x, stride)).to(memory_format=bn.memory_format(x))
    return z, x.new_empty(5, x.shape[1], dtype=torch.float32)


@_training.register_fake
def _(x, conv_weight, weight, bias, residual, z, stats, stride, eps, group):
    return torch.empty_like(z)


@_backward.register_fake
def _(dy, x, z, conv_weight, weight, bias, mean, var, count, stride, eps, group):
    dx = torch.empty_like(x, memory_format=bn.memory_format(x))
    return dx, conv_weight.new_empty(conv_weight.shape), x.new_empty(2, x.shape[1], dtype=torch.float32)


def _inference_context(ctx, inputs, output):
    x, conv_weight, weight, bias, mean, var, residual, stride, eps = inputs
    tensors = x, None, conv_weight, weight, bias, mean, var, None
    bn.save_for_backward(ctx, tensors, (weight, bias, residual), stride, eps, "")


def _inference_backward(ctx, dy):
    return bn.gradients(ctx, dy, ctx.saved_tensors, _backward)


def _training_context(ctx, inputs, output):
    x, conv_weight, weight, bias, residual, z, stats, *settings = inputs
    bn.save_for_backward(ctx, (x, z, conv_weight, weight, bias, stats), (weight, bias, residual), *settings)


def _training_backward(ctx, dy):
    return bn.gradients(ctx, dy, bn.with_statistics(ctx.saved_tensors), _backward)


_inference.register_autograd(_inference_backward, setup_context=_inference_context)
_training.register_autograd(_training_backward, setup_context=_training_context)
