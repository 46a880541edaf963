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

Launches. Two forward and two backward, and one counts the batch: programs count how many of them have stored their
partial sums, and the last of a group merges them, always in the same order (`_dispatch.is_last`); the last of these
merges the groups, and forward moves the running statistics. Eager PyTorch has five launches too. The merging takes
fewer registers than the sums before it, so that it costs no program its place on a multiprocessor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.kernels import batch_norm as bn
from rtmdet_fast.kernels._dispatch import tl, triton, triton_op, unwatched, wrap_triton
from rtmdet_fast.kernels.batch_norm import (
    comes_last_of_all,
    comes_last_of_group,
    merge_parts,
    store_moments,
    store_statistics,
    tile_offsets,
)
from rtmdet_fast.kernels.narrow_batch_norm import is_narrow, narrow_batch_norm


def bn_silu(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    residual: Tensor | None = None, process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """silu(batch_norm(x)) + residual for `x` [B, C, H, W] and per-channel parameters [C].

    In training the batch's statistics normalise, and `running_mean` and `running_var` (unbiased) are updated in
    place; with a `process_group` they are the statistics of all its processes' batches together (SyncBN). The
    result has the dtype of `x` and, where `x` is dense, its memory format. float64 always takes the reference.
    Raises ValueError or TypeError, naming the argument, if shapes, dtypes or devices do not fit.
    """
    parameters = weight, bias, running_mean, running_var
    bn.check_batch_norm(x, *parameters)
    bn.check_residual(residual, x.shape, x)
    if not bn.takes_triton(x) or (training and process_group is None and bn.is_small(x)):
        options: dict[str, Any] = dict(momentum=momentum, eps=eps, residual=residual, process_group=process_group)
        return bn_silu_reference(x, *parameters, training=training, **options)
    if not training:
        op = _inference.undispatched if unwatched(x) else _inference
        return op(x, *parameters, residual, eps)
    bn.check_count(x.numel() // x.shape[1], x.shape, process_group)
    group = bn.group_name(process_group)
    stats = bn.with_running_stats(_statistics, x, momentum, group, running=(running_mean, running_var))
    return _training(x, weight, bias, residual, stats, eps, group)


def bn_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    residual: Tensor | None = None, process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """`bn_silu` in PyTorch."""
    if training and process_group is not None:
        y = sync_batch_norm(x, weight, bias, running_mean, running_var, momentum, eps, bn.group_name(process_group))
    elif training and is_narrow(x, weight):
        y = narrow_batch_norm(x, running_mean, running_var, weight, bias, momentum, eps)
    else:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return silu_add(y, residual)


def silu_add(y: Tensor, residual: Tensor | None) -> Tensor:
    """silu(y) + residual; overwrites `y` where autograd does not need it."""
    # under autograd an in-place SiLU clones its input first, so it only pays without a graph; a trace is to look the
    # same in every grad mode
    y = F.silu(y, inplace=not ((torch.is_grad_enabled() and y.requires_grad) or torch.jit.is_tracing()))
    return y if residual is None else y.add_(residual)


class _AllReduce(torch.autograd.Function):
    """Its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return bn.all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return bn.all_reduce(grad, ctx.group), None


def sync_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float, group: str,
) -> Tensor:  # fmt: skip
    """Batch norm of `x` [B, C, H, W] by the statistics of the batches of all processes of `group` (a name), in PyTorch.

    Updates the running statistics [C] in place. Computes in fp32 at least; the result has the dtype of `x`. Every
    process of the group has to take part, forward and backward.
    """
    # the mean first and then the squared deviations from it: a large mean does not cancel the variance
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = _AllReduce.apply(wide.new_full((), x.numel() // x.shape[1]), group)
    mean = _AllReduce.apply(wide.sum((0, 2, 3)), group) / count
    centred = wide - mean[:, None, None]
    m2 = _AllReduce.apply(centred.square().sum((0, 2, 3)), group)
    var = m2 / count
    bn.update_running_stats(running_mean, running_var, torch.stack((mean, m2 / (count - 1))).detach(), momentum)
    y = centred * (torch.rsqrt(var + eps) * weight)[:, None, None] + bias[:, None, None]
    return y.to(x.dtype)


@triton.jit(do_not_specialize=["pixels", "image_tiles", "tiles", "program_tiles", "group_parts"])
def _moments_kernel(
    x_ptr, partial_ptr, stats_ptr, running_mean_ptr, running_var_ptr, counter_ptr,
    channels, pixels, image_tiles, tiles, program_tiles, group_parts, momentum,
    CHANNELS_LAST: tl.constexpr, FOLD: tl.constexpr, TIMES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """Statistics [5, C], see `store_statistics`.

    A program takes the moments of `program_tiles` tiles, the last of a group of programs merges theirs [parts + groups,
    3, C], and the last of these those of the groups. Whichever is last merges in the same order.
    """
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    part = tl.program_id(0)
    tile = part * program_tiles
    _, offsets, valid = tile_offsets(tile, channels, pixels, image_tiles, CHANNELS_LAST, TIMES, BLOCK)
    x = tl.load(x_ptr + offsets, mask=valid, other=0).to(tl.float32)
    shift = tl.expand_dims(tl.sum(x, AXIS) / tl.maximum(tl.sum(valid.to(tl.float32), AXIS), 1), AXIS)
    n = tl.zeros_like(x)
    s1 = tl.zeros_like(x)
    s2 = tl.zeros_like(x)
    end = tl.minimum(tile + program_tiles, tiles)
    while tile < end:
        _, offsets, valid = tile_offsets(tile, channels, pixels, image_tiles, CHANNELS_LAST, TIMES, BLOCK)
        x = tl.load(x_ptr + offsets, mask=valid, other=0).to(tl.float32)
        d = tl.where(valid, x - shift, 0)
        n += valid.to(tl.float32)
        s1 += d
        s2 += d * d
        tile += 1
    count = tl.maximum(tl.sum(n, AXIS), 1)
    total = tl.sum(s1, AXIS)
    mean = tl.sum(shift, AXIS) + total / count
    m2 = tl.sum(s2, AXIS) - total * total / count
    c = tl.program_id(1) * BLOCK[0] + tl.arange(0, BLOCK[0])
    store_moments(partial_ptr, part, c, channels, mean, tl.where(m2 < 0, 0, m2), count)  # a NaN stays

    last, group, first, end = comes_last_of_group(counter_ptr, group_parts, AMD)
    if last:
        groups = tl.cdiv(tl.num_programs(0), group_parts)
        partial2_ptr = partial_ptr + tl.num_programs(0).to(tl.int64) * 3 * channels
        mean, m2, count = merge_parts(partial_ptr, first, end, c, channels, 1, BLOCK_P)
        store_moments(partial2_ptr, group, c, channels, mean, m2, count)
        if comes_last_of_all(counter_ptr, groups, FOLD, AMD):
            each = channels // FOLD
            start = tl.program_id(1) * (BLOCK[0] if FOLD == 1 else 0)
            stop = tl.minimum(start + BLOCK[0], each) if FOLD == 1 else each
            while start < stop:
                c = start + tl.arange(0, BLOCK[0])
                mean, m2, count = merge_parts(partial2_ptr, group * 0, groups * FOLD, c, each, FOLD, BLOCK_P)
                store_statistics(stats_ptr, running_mean_ptr, running_var_ptr, c, each, mean, m2, count, momentum)
                start += BLOCK[0]


@triton_op("rtmdet_fast::bn_silu_inference")
def _inference(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, residual: Tensor | None, eps: float
) -> Tensor:
    return bn.normalise(x, (weight, bias, mean, var), residual, eps)


@_inference.register_fake  # the body's choice of blocks would restrict the sizes of an exported program
def _(x, weight, bias, mean, var, residual, eps):
    return torch.empty_like(x, memory_format=bn.memory_format(x))


@triton_op("rtmdet_fast::bn_silu_statistics", mutates=("running_mean", "running_var"))
def _statistics(x: Tensor, momentum: float, group: str, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """Of the batches of all processes [5, C]; moves the running statistics towards them."""
    x = x.contiguous(memory_format=bn.memory_format(x))
    grid, sizes, rows, counter, constexprs = bn.summing(x)
    partial = torch.empty(rows, 3, sizes[0], dtype=torch.float32, device=x.device)
    stats = torch.empty(5, x.shape[1], dtype=torch.float32, device=x.device)
    with bn.contiguous_running_stats(running_mean, running_var) as running:
        at_once = (None, None) if group else running
        wrap_triton(_moments_kernel)[grid](x, partial, stats, *at_once, counter, *sizes, momentum, **constexprs)
        if group:
            stats = bn.statistics_of_parts(bn.gather_moments(stats, group), *running, momentum)
    return stats


@triton_op("rtmdet_fast::bn_silu_training")
def _training(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stats: Tensor, eps: float, group: str
) -> Tensor:
    return bn.normalise(x, (weight, bias, stats[0], stats[3]), residual, eps)


@triton_op("rtmdet_fast::bn_silu_backward")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: Tensor | None,
    eps: float, group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    format = bn.memory_format(x)
    x, dy = x.contiguous(memory_format=format), dy.contiguous(memory_format=format)
    parameters: bn.Parameters = weight.contiguous(), bias.contiguous(), mean.contiguous(), var.contiguous()
    sums, means = bn.gradient_sums(dy, x, parameters, count, eps, group)
    return bn.input_gradient(dy, x, parameters, means, eps), sums


def _inference_context(ctx, inputs, output):
    x, weight, bias, mean, var, residual, eps = inputs
    bn.save_for_backward(ctx, (x, weight, bias, mean, var, None), (weight, bias, residual), eps, "")


def _inference_backward(ctx, dy):
    return bn.gradients(ctx, dy, ctx.saved_tensors, _backward)


def _training_context(ctx, inputs, output):
    x, weight, bias, residual, stats, eps, group = inputs
    bn.save_for_backward(ctx, (x, weight, bias, stats), (weight, bias, residual), eps, group)


def _training_backward(ctx, dy):
    return bn.gradients(ctx, dy, bn.with_statistics(ctx.saved_tensors), _backward)


_inference.register_autograd(_inference_backward, setup_context=_inference_context)
_training.register_autograd(_training_backward, setup_context=_training_context)
