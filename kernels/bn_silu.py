"""Batch normalisation, SiLU and an optional residual that is added after the SiLU, forward and backward.

    xhat = (x - mean) / sqrt(var + eps);  u = weight xhat + bias;  y = u sigmoid(u) + residual
    du = dy sigmoid(u) (1 + u (1 - sigmoid(u)));  dbias = sum(du);  dweight = sum(du xhat)
    dx = weight / sqrt(var + eps) (du - dbias / n - xhat dweight / n)      (without a batch's statistics: first term)

Bytes. Training reads x twice and writes y forward (statistics, then normalisation) and reads dy and x twice and
writes dx backward (sums, then dx): 3 + 5 passes over data of x's size, and nothing but x is kept for the backward
pass, as u is recomputed. Eager PyTorch makes 5 + 8 and keeps x and u.

Statistics. A program sums x - s and (x - s)^2 in fp32, with s the mean of its channel's first tile. The mean that it
finds lies within sqrt(N / n) standard deviations of s (N values, n of them in the tile), so at most a factor N / n
(64 for full tiles) is lost to cancellation however large the mean; Chan, Golub and LeVeque's formula (1983) merges
programs, and processes under SyncBN. Float atomics appear nowhere: a result is the same bit for bit in every run.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.kernels._dispatch import cdiv, tl, triton, triton_op, unwatched, use_triton, wrap_triton


def bn_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """silu(batch_norm(x)) + residual for `x` [B, C, H, W] and per-channel parameters [C].

    In training the batch's statistics normalise, and `running_mean` and `running_var` (unbiased) are updated in
    place; with a `process_group` they are the statistics of all its processes' batches together (SyncBN). The
    result has the dtype of `x` and, where `x` is dense, its memory format. float64 always takes the reference.
    Raises ValueError or TypeError, naming the argument, if shapes, dtypes or devices do not fit.
    """
    check_batch_norm(x, weight, bias, running_mean, running_var)
    check_residual(residual, x.shape, x)
    if not takes_triton(x):
        return bn_silu_reference(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            process_group=process_group,
        )
    if not training:
        op = _inference.undispatched if unwatched(x) else _inference
        return op(x, weight, bias, running_mean, running_var, residual, eps)
    check_count(x.numel() // x.shape[1], x.shape, process_group)
    y, stats = _training(x, weight, bias, residual, eps, group_name(process_group))
    update_running_stats(running_mean, running_var, stats, momentum)
    return y


def bn_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    if training and process_group is not None:
        y = _sync_batch_norm(x, weight, bias, running_mean, running_var, momentum, eps, group_name(process_group))
    else:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return silu_add(y, residual)


def silu_add(y: Tensor, residual: Tensor | None) -> Tensor:
    """silu(y) + residual; overwrites `y` where autograd does not need it."""
    # under autograd an in-place SiLU clones its input first, so it only pays without a graph; a trace is to look the
    # same in every grad mode
    y = F.silu(y, inplace=not ((torch.is_grad_enabled() and y.requires_grad) or torch.jit.is_tracing()))
    return y if residual is None else y.add_(residual)


def all_reduce(x: Tensor, group: str) -> Tensor:
    """Sum of `x` over the processes of the group of that name; traceable."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group))


class _AllReduce(torch.autograd.Function):
    """Its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return all_reduce(grad, ctx.group), None


def _sync_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    group: str,
) -> Tensor:
    # the mean first and then the squared deviations from it: a large mean does not cancel the variance
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = _AllReduce.apply(wide.new_full((), x.numel() // x.shape[1]), group)
    mean = _AllReduce.apply(wide.sum((0, 2, 3)), group) / count
    centred = wide - mean[:, None, None]
    m2 = _AllReduce.apply(centred.square().sum((0, 2, 3)), group)
    var = m2 / count
    update_running_stats(running_mean, running_var, torch.stack((mean, m2 / (count - 1))).detach(), momentum)
    y = centred * (torch.rsqrt(var + eps) * weight)[:, None, None] + bias[:, None, None]
    return y.to(x.dtype)


def update_running_stats(running_mean: Tensor, running_var: Tensor, stats: Tensor, momentum: float) -> None:
    """Moves the running statistics towards the first (mean) and the last (unbiased variance) row of `stats`."""
    # outside the op, which thus mutates nothing and can have a gradient and be functionalised
    with torch.no_grad():
        running_mean.lerp_(stats[0].to(running_mean.dtype), momentum)
        running_var.lerp_(stats[-1].to(running_var.dtype), momentum)


def takes_triton(x: Tensor) -> bool:
    return use_triton(x) and x.dtype != torch.float64 and x.numel() > 0


def group_name(process_group: dist.ProcessGroup | None) -> str:
    return "" if process_group is None else process_group.group_name


def check_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    prefix: str = "",
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions [B, C, H, W], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    for name, tensor in (
        (f"{prefix}weight", weight),
        (f"{prefix}bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if tensor.shape != (x.shape[1],):
            raise ValueError(
                f"{name}: expected shape ({x.shape[1]},) for x with {x.shape[1]} channels, got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, but x is on {x.device}")


def check_residual(residual: Tensor | None, shape: torch.Size | tuple[int, ...], x: Tensor) -> None:
    if residual is None:
        return
    if residual.shape != shape:
        raise ValueError(f"residual: expected the output's shape {tuple(shape)}, got {tuple(residual.shape)}")
    if not residual.is_floating_point():
        raise TypeError(f"residual: expected a floating-point tensor, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual: on {residual.device}, but x is on {x.device}")


def check_count(count: int, shape: torch.Size | tuple[int, ...], process_group: dist.ProcessGroup | None) -> None:
    if count == 1 and process_group is None:
        raise ValueError(f"x: expected more than 1 value per channel in training, got shape {tuple(shape)}")


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
def _tile(
    item,
    channel_block,
    channels,
    space,
    chunks,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Channels, offsets and mask of the `item`-th tile of x, seen as [images, C, S] or [images, S, C]."""
    c = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    s = (item % chunks).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    base = (item // chunks).to(tl.int64) * channels * space
    if CHANNELS_LAST:
        c, s = c[None, :], s[:, None]
        offsets = base + (s * channels + c)
    else:
        c, s = c[:, None], s[None, :]
        offsets = base + (c.to(tl.int64) * space + s)
    return c, offsets, (c < channels) & (s < space)


@triton.jit
def batch_norm_parameters(weight_ptr, bias_ptr, mean_ptr, var_ptr, c, inside, eps):
    """Weight, bias, mean and 1 / sqrt(var + eps) of channels `c` in fp32; zeros outside."""
    weight = tl.load(weight_ptr + c, mask=inside, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=inside, other=0).to(tl.float32)
    mean = tl.load(mean_ptr + c, mask=inside, other=0).to(tl.float32)
    var = tl.load(var_ptr + c, mask=inside, other=0).to(tl.float32)
    return weight, bias, mean, tl.rsqrt(var + tl.cast(eps, tl.float32))


@triton.jit
def _moments_kernel(
    x_ptr,
    partial_ptr,
    channels,
    space,
    chunks,
    items,
    items_each,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    part, block = tl.program_id(0), tl.program_id(1)
    item = part * items_each
    _, offsets, inside = _tile(item, block, channels, space, chunks, CHANNELS_LAST, BLOCK_C, BLOCK_S)
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(tl.float32)
    shift = tl.expand_dims(tl.sum(x, AXIS) / tl.maximum(tl.sum(inside.to(tl.float32), AXIS), 1), AXIS)
    n = tl.zeros_like(x)
    s1 = tl.zeros_like(x)
    s2 = tl.zeros_like(x)
    end = tl.minimum(item + items_each, items)
    while item < end:
        _, offsets, inside = _tile(item, block, channels, space, chunks, CHANNELS_LAST, BLOCK_C, BLOCK_S)
        x = tl.load(x_ptr + offsets, mask=inside, other=0).to(tl.float32)
        d = tl.where(inside, x - shift, 0)
        n += inside.to(tl.float32)
        s1 += d
        s2 += d * d
        item += 1
    count = tl.maximum(tl.sum(n, AXIS), 1)
    total = tl.sum(s1, AXIS)
    mean = tl.sum(shift, AXIS) + total / count
    m2 = tl.sum(s2, AXIS) - total * total / count
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    at = partial_ptr + part.to(tl.int64) * 3 * channels + c
    tl.store(at, mean, mask=c < channels)
    tl.store(at + channels, tl.where(m2 < 0, 0, m2), mask=c < channels)  # a NaN stays
    tl.store(at + 2 * channels, count, mask=c < channels)


@triton.jit
def _merge_kernel(partial_ptr, stats_ptr, channels, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Moments [parts, 3, C] -> [5, C]: mean, sum of squared deviations, count, variance, unbiased variance."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (c < channels)[None, :]
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    n = tl.zeros([BLOCK_C], tl.float32)
    start = 0
    while start < parts:
        p = start + tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
        at = partial_ptr + p * 3 * channels + c[None, :]
        here = inside & (p < parts)
        mean_, m2_, n_ = merge_moments(
            tl.load(at, mask=here, other=0),
            tl.load(at + channels, mask=here, other=0),
            tl.load(at + 2 * channels, mask=here, other=0),
            0,
        )
        deviation = mean_ - mean
        total = tl.maximum(n + n_, 1)
        mean += deviation * (n_ / total)
        m2 += m2_ + deviation * deviation * (n * n_ / total)
        n = total
        start += BLOCK_P
    at = stats_ptr + c
    tl.store(at, mean, mask=c < channels)
    tl.store(at + channels, m2, mask=c < channels)
    tl.store(at + 2 * channels, n, mask=c < channels)
    tl.store(at + 3 * channels, m2 / n, mask=c < channels)
    tl.store(at + 4 * channels, m2 / tl.maximum(n - 1, 1), mask=c < channels)


@triton.jit
def _apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    residual_ptr,
    y_ptr,
    channels,
    space,
    chunks,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    c, offsets, inside = _tile(
        tl.program_id(0), tl.program_id(1), channels, space, chunks, CHANNELS_LAST, BLOCK_C, BLOCK_S
    )
    weight, bias, mean, invstd = batch_norm_parameters(weight_ptr, bias_ptr, mean_ptr, var_ptr, c, c < channels, eps)
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(tl.float32)
    u = (x - mean) * (weight * invstd) + bias
    y = u * sigmoid(u)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + offsets, y, mask=inside)


@triton.jit
def _sums_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    partial_ptr,
    channels,
    space,
    chunks,
    items,
    items_each,
    eps,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Partial sums [parts, 2, C] of du and of du xhat."""
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    part, block = tl.program_id(0), tl.program_id(1)
    item = part * items_each
    end = tl.minimum(item + items_each, items)
    c, offsets, inside = _tile(item, block, channels, space, chunks, CHANNELS_LAST, BLOCK_C, BLOCK_S)
    weight, bias, mean, invstd = batch_norm_parameters(weight_ptr, bias_ptr, mean_ptr, var_ptr, c, c < channels, eps)
    s1 = tl.zeros(offsets.shape, tl.float32)
    s2 = tl.zeros(offsets.shape, tl.float32)
    while item < end:
        _, offsets, inside = _tile(item, block, channels, space, chunks, CHANNELS_LAST, BLOCK_C, BLOCK_S)
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0).to(tl.float32)  # outside: du = 0
        xhat = (tl.load(x_ptr + offsets, mask=inside, other=0).to(tl.float32) - mean) * invstd
        du = silu_backward(dy, xhat * weight + bias)
        s1 += du
        s2 += du * xhat
        item += 1
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    at = partial_ptr + part.to(tl.int64) * 2 * channels + c
    tl.store(at, tl.sum(s1, AXIS), mask=c < channels)
    tl.store(at + channels, tl.sum(s2, AXIS), mask=c < channels)


@triton.jit
def _dx_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    means_ptr,
    dx_ptr,
    channels,
    space,
    chunks,
    eps,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx, from the means [2, C] of du and du xhat (zeros where the statistics were given)."""
    c, offsets, inside = _tile(
        tl.program_id(0), tl.program_id(1), channels, space, chunks, CHANNELS_LAST, BLOCK_C, BLOCK_S
    )
    weight, bias, mean, invstd = batch_norm_parameters(weight_ptr, bias_ptr, mean_ptr, var_ptr, c, c < channels, eps)
    mean_du = tl.load(means_ptr + c, mask=c < channels, other=0)
    mean_du_xhat = tl.load(means_ptr + channels + c, mask=c < channels, other=0)
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0).to(tl.float32)
    xhat = (tl.load(x_ptr + offsets, mask=inside, other=0).to(tl.float32) - mean) * invstd
    du = silu_backward(dy, xhat * weight + bias)
    tl.store(dx_ptr + offsets, (du - mean_du - xhat * mean_du_xhat) * (weight * invstd), mask=inside)


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which the kernels read `x`: its own where it is dense."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _tiling(x: Tensor, last: bool) -> tuple[int, int, int, int, int]:
    """Block of channels, block of space, space (pixels in a row of memory), chunks of it and tiles altogether."""
    images, channels, height, width = x.shape
    images, space = (1, images * height * width) if last else (images, height * width)
    block_c = (32 if channels <= 32 else 64) if last else (4 if space <= 1024 else 1)
    block_s = 2048 // block_c
    chunks = cdiv(space, block_s)
    return block_c, block_s, space, chunks, images * chunks


def _items_each(items: int, channel_blocks: int) -> int:
    # some 2,000 programs keep any GPU busy; at most 64 tiles each (cancellation, see above)
    return min(64, cdiv(items * channel_blocks, 2048))


def merge_partial_moments(partial: Tensor, group: str) -> Tensor:
    """Moments [parts, 3, C] of this process and then of all -> [5, C], see `_merge_kernel`."""
    channels = partial.shape[2]
    stats = partial.new_empty(5, channels)
    grid = (cdiv(channels, 8),)
    wrap_triton(_merge_kernel)[grid](partial, stats, channels, partial.shape[0], BLOCK_P=256, BLOCK_C=8)
    if group:
        size = dist.distributed_c10d._resolve_process_group(group).size()  # type: ignore[arg-type]
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(stats[:3], size, group)
        return merge_partial_moments(torch.ops._c10d_functional.wait_tensor(gathered).view(size, 3, channels), "")
    return stats


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, residual: Tensor | None, eps: float
) -> Tensor:
    format = memory_format(x)
    x, last = x.contiguous(memory_format=format), format == torch.channels_last
    weight, bias, mean, var = weight.contiguous(), bias.contiguous(), mean.contiguous(), var.contiguous()
    y = torch.empty_like(x, memory_format=format)
    block_c, block_s, space, chunks, items = _tiling(x, last)
    wrap_triton(_apply_kernel)[items, cdiv(x.shape[1], block_c)](
        x,
        weight,
        bias,
        mean,
        var,
        x if residual is None else residual.contiguous(memory_format=format),
        y,
        x.shape[1],
        space,
        chunks,
        eps,
        HAS_RESIDUAL=residual is not None,
        CHANNELS_LAST=last,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
    )
    return y


def gradient_sums(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """[2, C]: the sums of du and of du xhat, which are dbias and dweight. `dy` is in x's memory format."""
    last = memory_format(x) == torch.channels_last
    block_c, block_s, space, chunks, items = _tiling(x, last)
    channel_blocks = cdiv(x.shape[1], block_c)
    each = _items_each(items, channel_blocks)
    partial = torch.empty(cdiv(items, each), 2, x.shape[1], dtype=torch.float32, device=x.device)
    wrap_triton(_sums_kernel)[partial.shape[0], channel_blocks](
        dy,
        x,
        weight,
        bias,
        mean,
        var,
        partial,
        x.shape[1],
        space,
        chunks,
        items,
        each,
        eps,
        CHANNELS_LAST=last,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
    )
    return partial.sum(0)


def gradient_means(sums: Tensor, count: Tensor | None, group: str) -> Tensor:
    """Means of `sums` over the batch of all processes; zeros where no statistics were taken of a batch."""
    if count is None:
        return torch.zeros_like(sums)
    if group:
        sums = all_reduce(sums, group)
    return sums / count


@triton_op("rtmdet_fast::bn_silu_inference")
def _inference(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, residual: Tensor | None, eps: float
) -> Tensor:
    return normalise(x, weight, bias, mean, var, residual, eps)


@_inference.register_fake  # the body's choice of blocks would restrict the sizes of an exported program
def _(x, weight, bias, mean, var, residual, eps):
    return torch.empty_like(x, memory_format=memory_format(x))


@triton_op("rtmdet_fast::bn_silu_training")
def _training(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    format = memory_format(x)
    x, last = x.contiguous(memory_format=format), format == torch.channels_last
    block_c, block_s, space, chunks, items = _tiling(x, last)
    channel_blocks = cdiv(x.shape[1], block_c)
    each = _items_each(items, channel_blocks)
    partial = torch.empty(cdiv(items, each), 3, x.shape[1], dtype=torch.float32, device=x.device)
    wrap_triton(_moments_kernel)[partial.shape[0], channel_blocks](
        x, partial, x.shape[1], space, chunks, items, each, CHANNELS_LAST=last, BLOCK_C=block_c, BLOCK_S=block_s
    )
    stats = merge_partial_moments(partial, group)
    return normalise(x, weight, bias, stats[0], stats[3], residual, eps), stats


@triton_op("rtmdet_fast::bn_silu_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor]:
    format = memory_format(x)
    x, dy, last = x.contiguous(memory_format=format), dy.contiguous(memory_format=format), format == torch.channels_last
    weight, bias, mean, var = weight.contiguous(), bias.contiguous(), mean.contiguous(), var.contiguous()
    du_sums = gradient_sums(dy, x, weight, bias, mean, var, eps)
    dx = torch.empty_like(x, memory_format=format)
    block_c, block_s, space, chunks, items = _tiling(x, last)
    wrap_triton(_dx_kernel)[items, cdiv(x.shape[1], block_c)](
        dy,
        x,
        weight,
        bias,
        mean,
        var,
        gradient_means(du_sums, count, group),
        dx,
        x.shape[1],
        space,
        chunks,
        eps,
        CHANNELS_LAST=last,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
    )
    return dx, du_sums


def _save(ctx, x, weight, bias, mean, var, count, residual, eps, group):
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.eps, ctx.group = eps, group
    ctx.save_for_backward(x, weight, bias, mean, var, count)


def _gradients(ctx, dy: Tensor):
    """Gradients for x, weight, bias and residual."""
    x, weight, bias, mean, var, count = ctx.saved_tensors
    dx, sums = _backward(dy, x, weight, bias, mean, var, count, ctx.eps, ctx.group)
    dresidual = None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)
    return dx, sums[1].to(weight.dtype), sums[0].to(bias.dtype), dresidual


def _inference_context(ctx, inputs, output):
    x, weight, bias, mean, var, residual, eps = inputs
    _save(ctx, x, weight, bias, mean, var, None, residual, eps, "")


def _inference_backward(ctx, dy):
    dx, dweight, dbias, dresidual = _gradients(ctx, dy)
    return dx, dweight, dbias, None, None, dresidual, None


def _training_context(ctx, inputs, output):
    x, weight, bias, residual, eps, group = inputs
    _, stats = output
    _save(ctx, x, weight, bias, stats[0], stats[3], stats[2], residual, eps, group)


def _training_backward(ctx, dy, _):
    return *_gradients(ctx, dy), None, None


_inference.register_autograd(_inference_backward, setup_context=_inference_context)
_training.register_autograd(_training_backward, setup_context=_training_context)
