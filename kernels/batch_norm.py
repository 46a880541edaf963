"""The parts of batch normalisation that `bn_silu` and `dwconv_bn_silu` share; formulas and reasons stand in `bn_silu`.

Kernels see x as [images, C, pixels], or as [1, pixels, C] of all images' pixels in channels_last, in tiles of BLOCK
(channels, pixels). Where C is no multiple of a tile's channels, FOLD pixels side by side are one with FOLD C channels:
24 channels become 8 x 24 = 3 x 64, and no lane idles, nor is a load narrower than 16 bytes. The four tensors [C]
weight, bias, mean and var go through the host's functions as one tuple.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rtmdet_fast.kernels import _dispatch
from rtmdet_fast.kernels._dispatch import (
    TritonOp,
    cdiv,
    counters,
    is_last,
    tl,
    triton,
    unwatched,
    use_triton,
    wrap_triton,
)

Parameters = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, bias, mean, var

TUNING = {
    "tile": 2048,  # elements: 16 for each thread of 4 warps, which covers the memory's latency
    "channels_last": 64,  # channels of a tile in channels_last, 128 bytes of fp16 a pixel
    "least_channels_last": 16,  # where neither C nor FOLD C is a multiple: 32 bytes, a sector of the memory
    "small_image": 1024,  # pixels up to which a tile of one channel would stay half empty ...
    "small_image_channels": 4,  # ... so that it takes this many
    "programs": 2048,  # of a kernel that sums: they keep any GPU busy
    "program_tiles": 64,  # at most, for the factor that cancellation may cost
    # rows of partial results that a program merges at once, of a tile's: more take more registers than the sums before
    "merged": 4,
    "group": 8,  # times as many parts are a group, which one program merges; the last of those merges the groups
    # elements of x below which PyTorch's own batch_norm and silu train, as then launches are all that counts and both
    # take as many: 2^16 in fp16 are read in 0.1 us. Not measured.
    "least_training": 2**16,
    "merge_parts": 1024,  # partial moments that `_merge_kernel` takes at once: few programs, of many threads
    "merge_channels": 8,
    "merge_warps": 16,
}


def takes_triton(x: Tensor) -> bool:
    return use_triton(x) and x.dtype != torch.float64 and x.numel() > 0


def is_small(x: Tensor) -> bool:
    """Whether PyTorch's own kernels train on `x`: not where RTMDET_FAST_KERNELS insists on Triton."""
    return _dispatch.BACKEND == "auto" and x.numel() < TUNING["least_training"]


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which the kernels read `x`: its own where it is dense."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def check_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, prefix: str = ""
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions [B, C, H, W], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    names = (f"{prefix}weight", f"{prefix}bias", "running_mean", "running_var")
    for name, tensor in zip(names, (weight, bias, running_mean, running_var), strict=True):
        expected = f"shape ({x.shape[1]},) for x with {x.shape[1]} channels"
        _check_tensor(name, tensor, (x.shape[1],), expected, x)


def check_residual(residual: Tensor | None, shape: torch.Size | tuple[int, ...], x: Tensor) -> None:
    if residual is not None:
        _check_tensor("residual", residual, shape, f"the output's shape {tuple(shape)}", x)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], expected: str, x: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: on {tensor.device}, but x is on {x.device}")


def check_count(count: int, shape: torch.Size | tuple[int, ...], process_group: dist.ProcessGroup | None) -> None:
    if count == 1 and process_group is None:
        raise ValueError(f"x: expected more than 1 value per channel in training, got shape {tuple(shape)}")


def group_name(process_group: dist.ProcessGroup | None) -> str:
    return "" if process_group is None else process_group.group_name


def all_reduce(x: Tensor, group: str) -> Tensor:
    """Sum of `x` over the processes of the group of that name; traceable."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group))


def with_running_stats(op: TritonOp, x: Tensor, *rest: Any, running: tuple[Tensor, Tensor]) -> Any:
    """`op` of `x`, `rest` and the running statistics, which it updates; nothing of it has a gradient."""
    with torch.no_grad():
        x = x.detach()
        if not unwatched(x):
            return op(x, *rest, *running)
        return op.undispatched(x, *rest, *running)


@contextmanager
def contiguous_running_stats(mean: Tensor, var: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both as kernels write them; copied back where they are no plain vectors."""
    dense = mean.is_contiguous() and var.is_contiguous()
    running = (mean, var) if dense else (mean.contiguous(), var.contiguous())
    yield running
    if not dense:
        mean.copy_(running[0])
        var.copy_(running[1])


def update_running_stats(running_mean: Tensor, running_var: Tensor, stats: Tensor, momentum: float) -> None:
    """Moves the running statistics towards the first (mean) and the last (unbiased variance) row of `stats`."""
    # outside the op, which thus mutates nothing and can have a gradient and be functionalised
    with torch.no_grad():
        running_mean.lerp_(stats[0].to(running_mean.dtype), momentum)
        running_var.lerp_(stats[-1].to(running_var.dtype), momentum)


@triton.jit
def sigmoid(u):
    # 1 / a as rsqrt(a)^2, for a >= 1: half the instructions of a division, which guards against small a
    root = tl.rsqrt(1 + tl.exp2(u * -1.4426950408889634))
    return root * root


@triton.jit
def silu_backward(dy, u):
    p = sigmoid(u)
    return dy * (p + u * p * (1 - p))


@triton.jit
def merge_moments(mean, m2, n, AXIS: tl.constexpr):
    """Mean, sum of squared deviations and count of sets of numbers, from those of each (Chan et al.)."""
    total = tl.sum(n, AXIS)
    merged = tl.sum(mean * (n / tl.expand_dims(tl.maximum(total, 1), AXIS)), AXIS)
    deviation = mean - tl.expand_dims(merged, AXIS)
    return merged, tl.sum(m2 + n * deviation * deviation, AXIS), total


@triton.jit
def tile_offsets(
    tile, channels, pixels, image_tiles, CHANNELS_LAST: tl.constexpr, TIMES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Channels, offsets and mask of the `tile`-th tile of x in this program's block of channels.

    An image has TIMES as many pixels as `pixels`: so the compiler knows of what they are a multiple.
    """
    pixels *= TIMES
    c = tl.program_id(1) * BLOCK[0] + tl.arange(0, BLOCK[0])
    s = (tile % image_tiles).to(tl.int64) * BLOCK[1] + tl.arange(0, BLOCK[1])
    image = (tile // image_tiles).to(tl.int64) * channels * pixels
    if CHANNELS_LAST:
        c, s = c[None, :], s[:, None]
        offsets = image + (s * channels + c)
    else:
        c, s = c[:, None], s[None, :]
        offsets = image + (c.to(tl.int64) * pixels + s)
    return c, offsets, (c < channels) & (s < pixels)


@triton.jit
def unfolded(c, channels, FOLD: tl.constexpr):
    """Which of the tensor's channels `c` are, of `channels` that FOLD pixels have together."""
    if FOLD > 1:
        each = channels // FOLD
        c -= ((c.to(tl.float32) + 0.5) * (1.0 / each.to(tl.float32))).to(tl.int32) * each  # exact up to 2^20
    return c


@triton.jit
def load_parameters(pointers, c, channels, eps):
    """Weight, bias, mean and 1 / sqrt(var + eps) of channels `c` in fp32; zeros outside."""
    weight = tl.load(pointers[0] + c, mask=c < channels, other=0).to(tl.float32)
    bias = tl.load(pointers[1] + c, mask=c < channels, other=0).to(tl.float32)
    mean = tl.load(pointers[2] + c, mask=c < channels, other=0).to(tl.float32)
    var = tl.load(pointers[3] + c, mask=c < channels, other=0).to(tl.float32)
    return weight, bias, mean, tl.rsqrt(var + tl.cast(eps, tl.float32))


@triton.jit
def load_du(dy_ptr, x_ptr, offsets, valid, parameters):
    """du and xhat of a tile in fp32; du is 0 outside."""
    weight, bias, mean, invstd = parameters
    dy = tl.load(dy_ptr + offsets, mask=valid, other=0).to(tl.float32)
    xhat = (tl.load(x_ptr + offsets, mask=valid, other=0).to(tl.float32) - mean) * invstd
    return silu_backward(dy, xhat * weight + bias), xhat


@triton.jit
def merge_parts(ptr, first, end, c, channels, FOLD: tl.constexpr, BLOCK_P: tl.constexpr):
    """Moments of channels `c` [BLOCK_C] of the parts first to end - 1 of [parts / FOLD, 3, FOLD, channels].

    In this order, BLOCK_P at once.
    """
    mean = tl.zeros(c.shape, tl.float32)
    m2 = tl.zeros(c.shape, tl.float32)
    n = tl.zeros(c.shape, tl.float32)
    while first < end:
        p = first + tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
        at = ptr + (p // FOLD * 3 * FOLD + p % FOLD) * channels + c[None, :]
        valid = (c < channels)[None, :] & (p < end)
        mean_ = tl.load(at, mask=valid, other=0, cache_modifier=".cg")
        m2_ = tl.load(at + FOLD * channels, mask=valid, other=0, cache_modifier=".cg")
        n_ = tl.load(at + 2 * FOLD * channels, mask=valid, other=0, cache_modifier=".cg")
        mean_, m2_, n_ = merge_moments(mean_, m2_, n_, 0)
        deviation = mean_ - mean
        total = tl.maximum(n + n_, 1)
        mean += deviation * (n_ / total)
        m2 += m2_ + deviation * deviation * (n * n_ / total)
        n = total
        first += BLOCK_P
    return mean, m2, n


@triton.jit
def add_parts(ptr, first, end, c, channels, FOLD: tl.constexpr, BLOCK_P: tl.constexpr):
    """As `merge_parts` the two sums of [parts / FOLD, 2, FOLD, channels]."""
    s1 = tl.zeros(c.shape, tl.float32)
    s2 = tl.zeros(c.shape, tl.float32)
    while first < end:
        p = first + tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
        at = ptr + (p // FOLD * 2 * FOLD + p % FOLD) * channels + c[None, :]
        valid = (c < channels)[None, :] & (p < end)
        s1 += tl.sum(tl.load(at, mask=valid, other=0, cache_modifier=".cg"), 0)
        s2 += tl.sum(tl.load(at + FOLD * channels, mask=valid, other=0, cache_modifier=".cg"), 0)
        first += BLOCK_P
    return s1, s2


@triton.jit
def store_moments(ptr, row, c, channels, mean, m2, n):
    """Into row `row` of [parts, 3, channels]."""
    at = ptr + row.to(tl.int64) * 3 * channels + c
    tl.store(at, mean, mask=c < channels)
    tl.store(at + channels, m2, mask=c < channels)
    tl.store(at + 2 * channels, n, mask=c < channels)


@triton.jit
def store_statistics(stats_ptr, running_mean_ptr, running_var_ptr, c, channels, mean, m2, n, momentum):
    """[5, C]: mean, sum of squared deviations, count, variance and unbiased variance; the running statistics follow."""
    variance = m2 / tl.maximum(n - 1, 1)
    store_moments(stats_ptr, tl.program_id(0) * 0, c, channels, mean, m2, n)
    tl.store(stats_ptr + 3 * channels + c, m2 / n, mask=c < channels)
    tl.store(stats_ptr + 4 * channels + c, variance, mask=c < channels)
    if running_mean_ptr is not None:
        momentum = tl.cast(momentum, tl.float32)
        old = tl.load(running_mean_ptr + c, mask=c < channels, other=0)
        tl.store(running_mean_ptr + c, old + momentum * (mean - old), mask=c < channels)
        old = tl.load(running_var_ptr + c, mask=c < channels, other=0)
        tl.store(running_var_ptr + c, old + momentum * (variance - old), mask=c < channels)


@triton.jit
def comes_last_of_group(counter_ptr, group_parts, AMD: tl.constexpr):
    """Whether this program is the last of its `group_parts` parts (of the last group fewer) of its block of channels.

    And the number of the group, the first of its parts, and the one after its last. Counters are one for each block of
    channels, then one for each group of each.
    """
    group = tl.program_id(0) // group_parts
    first = group * group_parts
    end = tl.minimum(first + group_parts, tl.num_programs(0))
    place = tl.num_programs(1) + tl.program_id(1) * tl.cdiv(tl.num_programs(0), group_parts) + group
    return is_last(counter_ptr + place, end - first, AMD), group, first, end


@triton.jit
def comes_last_of_all(counter_ptr, groups, FOLD: tl.constexpr, AMD: tl.constexpr):
    """Whether it is, of those that were last of their group, the last of its block of channels.

    Or, where FOLD spreads a channel over several blocks, the last of all.
    """
    if FOLD == 1:
        return is_last(counter_ptr + tl.program_id(1), groups, AMD)
    else:
        return is_last(counter_ptr, groups * tl.num_programs(1), AMD)


@triton.jit(do_not_specialize=["parts"])
def _merge_kernel(
    partial_ptr, stats_ptr, running_mean_ptr, running_var_ptr, channels, parts, momentum,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of moments [parts, 3, C] -> [5, C], see `store_statistics`. BLOCK_P parts are merged at once."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, m2, n = merge_parts(partial_ptr, tl.program_id(0) * 0, parts, c, channels, 1, BLOCK_P)
    store_statistics(stats_ptr, running_mean_ptr, running_var_ptr, c, channels, mean, m2, n, momentum)


@triton.jit(do_not_specialize=["pixels", "image_tiles"])
def _apply_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, residual_ptr, y_ptr, channels, pixels, image_tiles, eps,
    HAS_RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, FOLD: tl.constexpr, TIMES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of y."""
    c, offsets, valid = tile_offsets(tl.program_id(0), channels, pixels, image_tiles, CHANNELS_LAST, TIMES, BLOCK)
    weight, bias, mean, invstd = load_parameters(
        (weight_ptr, bias_ptr, mean_ptr, var_ptr), unfolded(c, channels, FOLD), channels, eps
    )
    x = tl.load(x_ptr + offsets, mask=valid, other=0).to(tl.float32)
    u = (x - mean) * (weight * invstd) + bias
    y = u * sigmoid(u)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=valid, other=0).to(tl.float32)
    tl.store(y_ptr + offsets, y, mask=valid)


@triton.jit(do_not_specialize=["pixels", "image_tiles", "tiles", "program_tiles", "group_parts"])
def _sums_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, count_ptr, partial_ptr, sums_ptr, counter_ptr,
    channels, pixels, image_tiles, tiles, program_tiles, group_parts, eps,
    CHANNELS_LAST: tl.constexpr, FOLD: tl.constexpr, TIMES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """Sums [4, C] of du and of du xhat, and both divided by the count (0 where there is none).

    A program adds up `program_tiles` tiles, the last of a group of programs their sums [parts + groups, 2, C], and the
    last of these the sums of the groups.
    """
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    part = tl.program_id(0)
    tile = part * program_tiles
    end = tl.minimum(tile + program_tiles, tiles)
    c, offsets, valid = tile_offsets(tile, channels, pixels, image_tiles, CHANNELS_LAST, TIMES, BLOCK)
    parameters = load_parameters((weight_ptr, bias_ptr, mean_ptr, var_ptr), unfolded(c, channels, FOLD), channels, eps)
    s1 = tl.zeros(offsets.shape, tl.float32)
    s2 = tl.zeros(offsets.shape, tl.float32)
    while tile < end:
        _, offsets, valid = tile_offsets(tile, channels, pixels, image_tiles, CHANNELS_LAST, TIMES, BLOCK)
        du, xhat = load_du(dy_ptr, x_ptr, offsets, valid, parameters)
        s1 += du
        s2 += du * xhat
        tile += 1
    c = tl.program_id(1) * BLOCK[0] + tl.arange(0, BLOCK[0])
    at = partial_ptr + part.to(tl.int64) * 2 * channels + c
    tl.store(at, tl.sum(s1, AXIS), mask=c < channels)
    tl.store(at + channels, tl.sum(s2, AXIS), mask=c < channels)

    last, group, first, end = comes_last_of_group(counter_ptr, group_parts, AMD)
    if last:
        groups = tl.cdiv(tl.num_programs(0), group_parts)
        partial2_ptr = partial_ptr + tl.num_programs(0).to(tl.int64) * 2 * channels
        t1, t2 = add_parts(partial_ptr, first, end, c, channels, 1, BLOCK_P)
        tl.store(partial2_ptr + group * 2 * channels + c, t1, mask=c < channels)
        tl.store(partial2_ptr + (group * 2 + 1) * channels + c, t2, mask=c < channels)
        if comes_last_of_all(counter_ptr, groups, FOLD, AMD):
            each = channels // FOLD
            start = tl.program_id(1) * (BLOCK[0] if FOLD == 1 else 0)
            stop = tl.minimum(start + BLOCK[0], each) if FOLD == 1 else each
            while start < stop:
                c = start + tl.arange(0, BLOCK[0])
                t1, t2 = add_parts(partial2_ptr, group * 0, groups * FOLD, c, each, FOLD, BLOCK_P)
                share = tl.zeros_like(t1)
                if count_ptr is not None:
                    share += 1 / tl.load(count_ptr + c, mask=c < each, other=1)
                tl.store(sums_ptr + c, t1, mask=c < each)
                tl.store(sums_ptr + each + c, t2, mask=c < each)
                tl.store(sums_ptr + 2 * each + c, t1 * share, mask=c < each)
                tl.store(sums_ptr + 3 * each + c, t2 * share, mask=c < each)
                start += BLOCK[0]


@triton.jit(do_not_specialize=["pixels", "image_tiles"])
def _dx_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, means_ptr, dx_ptr, channels, pixels, image_tiles, eps,
    CHANNELS_LAST: tl.constexpr, FOLD: tl.constexpr, TIMES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of dx, from the means [2, C] of du and du xhat (zeros where the statistics were given)."""
    c, offsets, valid = tile_offsets(tl.program_id(0), channels, pixels, image_tiles, CHANNELS_LAST, TIMES, BLOCK)
    inside, c = c < channels, unfolded(c, channels, FOLD)
    parameters = load_parameters((weight_ptr, bias_ptr, mean_ptr, var_ptr), c, channels, eps)
    du, xhat = load_du(dy_ptr, x_ptr, offsets, valid, parameters)
    mean_du = tl.load(means_ptr + c, mask=inside, other=0)  # last: earlier, they cost sm_80 its registers
    mean_du_xhat = tl.load(means_ptr + channels // FOLD + c, mask=inside, other=0)
    dx = (du - mean_du - xhat * mean_du_xhat) * (parameters[0] * parameters[3])
    tl.store(dx_ptr + offsets, dx, mask=valid)


def tiling(x: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, Any]]:
    """How x lies in tiles: the grid (tiles, channel blocks), channels, pixels and tiles of an image, and constexprs.

    Of pixels the TIMES-th part.
    """
    (images, channels, height, width), last = x.shape, memory_format(x) == torch.channels_last
    images, pixels, fold = (1, images * height * width, 1) if last else (images, height * width, 1)
    if last:
        block_c = TUNING["channels_last"]
        fold = block_c // math.gcd(block_c, channels)
        while pixels % fold:
            fold //= 2
        pixels, channels = pixels // fold, channels * fold
        while block_c > TUNING["least_channels_last"] and channels % block_c:
            block_c //= 2
        if channels % block_c:
            block_c = TUNING["channels_last"] // (2 if channels <= TUNING["channels_last"] // 2 else 1)
    else:
        block_c = TUNING["small_image_channels"] if pixels <= TUNING["small_image"] else 1
    block_s = TUNING["tile"] // block_c
    image_tiles = cdiv(pixels, block_s)
    # contiguous rows then begin at multiples of 16 bytes; in channels_last eight pixels have one mask, which spares the
    # first kernel a quarter of its instructions. Sizes that differ otherwise are not compiled for anew.
    times = 1 if pixels % 8 else 8
    constexprs = dict(CHANNELS_LAST=last, FOLD=fold, TIMES=times, BLOCK=(block_c, block_s))
    return (images * image_tiles, cdiv(channels, block_c)), (channels, pixels // times, image_tiles), constexprs


def summing(x: Tensor) -> tuple[tuple[int, int], tuple[int, ...], int, Tensor, dict[str, Any]]:
    """What a kernel that sums over x is launched with.

    The grid (parts, channel blocks); channels, pixels and tiles of an image, all tiles, tiles of a part and parts of a
    group; the number of parts and groups; counters; constexprs.
    """
    (tiles, channel_blocks), sizes, constexprs = tiling(x)
    each = min(TUNING["program_tiles"], cdiv(tiles * channel_blocks, TUNING["programs"]))
    block_p = max(constexprs["BLOCK"][1] // TUNING["merged"], 1)
    parts, group_parts = cdiv(tiles, each), TUNING["group"] * block_p
    groups = cdiv(parts, group_parts)
    counter = counters(x, channel_blocks * (1 + groups))
    constexprs = {**constexprs, "BLOCK_P": block_p, "AMD": _dispatch.IS_AMD}
    return (parts, channel_blocks), (*sizes, tiles, each, group_parts), parts + groups, counter, constexprs


def statistics_of_parts(
    partial: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> Tensor:
    """Moments [parts, 3, C] -> [5, C], see `store_statistics`."""
    (parts, _, channels), tuning = partial.shape, TUNING
    stats = torch.empty(5, channels, dtype=torch.float32, device=partial.device)
    blocks = dict(BLOCK_P=tuning["merge_parts"], BLOCK_C=tuning["merge_channels"])
    wrap_triton(_merge_kernel)[(cdiv(channels, tuning["merge_channels"]),)](
        partial, stats, running_mean, running_var, channels, parts, momentum, **blocks,
        num_warps=tuning["merge_warps"],
    )  # fmt: skip
    return stats


def gather_moments(stats: Tensor, group: str) -> Tensor:
    """Moments [processes, 3, C] of all processes, from the statistics [5, C] of this one."""
    size = dist.distributed_c10d._resolve_process_group(group).size()  # type: ignore[arg-type]
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(stats[:3], size, group)
    return torch.ops._c10d_functional.wait_tensor(gathered).view(size, 3, -1)


def normalise(x: Tensor, parameters: Parameters, residual: Tensor | None, eps: float) -> Tensor:
    """silu(batch_norm(x)) + residual with given statistics."""
    format = memory_format(x)
    x = x.contiguous(memory_format=format)
    y = torch.empty_like(x, memory_format=format)
    has_residual = residual is not None
    residual = x if residual is None else residual.contiguous(memory_format=format)
    grid, sizes, constexprs = tiling(x)
    wrap_triton(_apply_kernel)[grid](
        x, *(p.contiguous() for p in parameters), residual, y, *sizes, eps, HAS_RESIDUAL=has_residual, **constexprs
    )
    return y


def gradient_sums(
    dy: Tensor, x: Tensor, parameters: Parameters, count: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    """Sums [2, C] of du and of du xhat, which are dbias and dweight, and their means over the batch of all processes.

    Means are zeros without a `count`, where no statistics were taken of a batch. `dy` is in x's memory format.
    """
    grid, sizes, rows, counter, constexprs = summing(x)
    partial = torch.empty(rows, 2, sizes[0], dtype=torch.float32, device=x.device)
    sums = torch.empty(4, x.shape[1], dtype=torch.float32, device=x.device)
    wrap_triton(_sums_kernel)[grid](dy, x, *parameters, count, partial, sums, counter, *sizes, eps, **constexprs)
    if group and count is not None:
        return sums[:2], all_reduce(sums[:2], group) / count
    return sums[:2], sums[2:]


def input_gradient(dy: Tensor, x: Tensor, parameters: Parameters, means: Tensor, eps: float) -> Tensor:
    """dx, by the means of `gradient_sums`. `dy` is in x's memory format."""
    dx = torch.empty_like(x, memory_format=memory_format(x))
    grid, sizes, constexprs = tiling(x)
    wrap_triton(_dx_kernel)[grid](dy, x, *parameters, means, dx, *sizes, eps, **constexprs)
    return dx


def save_for_backward(
    ctx: Any, tensors: tuple[Tensor | None, ...], outputs_of: tuple[Tensor, Tensor, Tensor | None], *settings: Any
) -> None:
    """Keeps what an op's backward takes after dy, and the dtypes of weight, bias and residual, for `gradients`.

    Of outputs only whole ones: a view of an output, saved, holds the node that holds it, and a forward pass without a
    backward one would never be freed.
    """
    ctx.set_materialize_grads(False)  # of the outputs beside y: zeros of their size, in every backward pass
    ctx.save_for_backward(*tensors)
    ctx.settings, ctx.dtypes = settings, [None if x is None else x.dtype for x in outputs_of]


def gradients(
    ctx: Any, dy: Tensor | None, saved: tuple[Tensor | None, ...], backward: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor | None, ...]:
    """Gradients for x (and a convolution's weight), weight, bias and residual, and None for all other inputs.

    `saved` is what `backward` takes between dy and the settings. In inference the residual follows mean and var.
    """
    if dy is None:  # what came after had no gradient for its input
        return (None,) * len(ctx.needs_input_grad)
    *dx, sums = backward(dy, *saved, *ctx.settings)
    weight, bias, residual = ctx.dtypes
    dresidual = None if residual is None else dy.to(residual)
    statistics = () if saved[-1] is not None else (None, None)
    found = *dx, sums[1].to(weight), sums[0].to(bias), *statistics, dresidual
    return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


def with_statistics(saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Mean, variance and count in place of the statistics that stand last in `saved`."""
    *tensors, stats = saved
    return *tensors, stats[0], stats[3], stats[2]
