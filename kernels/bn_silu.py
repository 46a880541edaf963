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

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.kernels import batch_norm as bn
from rtmdet_fast.kernels._dispatch import cdiv, tl, triton, triton_op, unwatched, wrap_triton
from rtmdet_fast.kernels.batch_norm import load_du, load_parameters, tile_offsets, unfolded


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
    if not bn.takes_triton(x):
        options: dict[str, Any] = dict(momentum=momentum, eps=eps, residual=residual, process_group=process_group)
        return bn_silu_reference(x, *parameters, training=training, **options)
    if not training:
        op = _inference.undispatched if unwatched(x) else _inference
        return op(x, *parameters, residual, eps)
    bn.check_count(x.numel() // x.shape[1], x.shape, process_group)
    y, stats = _training(x, weight, bias, residual, eps, bn.group_name(process_group))
    bn.update_running_stats(running_mean, running_var, stats, momentum)
    return y


def bn_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    residual: Tensor | None = None, process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """`bn_silu` in PyTorch."""
    if training and process_group is not None:
        y = sync_batch_norm(x, weight, bias, running_mean, running_var, momentum, eps, bn.group_name(process_group))
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


@triton.jit(do_not_specialize=["image_tiles", "tiles", "program_tiles"])
def _moments_kernel(
    x_ptr, partial_ptr, channels, pixels, image_tiles, tiles, program_tiles,
    CHANNELS_LAST: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial moments [parts, 3, C]: mean, sum of squared deviations and count, each of `program_tiles` tiles."""
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    part = tl.program_id(0)
    tile = part * program_tiles
    _, offsets, valid = tile_offsets(tile, channels, pixels, image_tiles, CHANNELS_LAST, BLOCK)
    x = tl.load(x_ptr + offsets, mask=valid, other=0).to(tl.float32)
    shift = tl.expand_dims(tl.sum(x, AXIS) / tl.maximum(tl.sum(valid.to(tl.float32), AXIS), 1), AXIS)
    n = tl.zeros_like(x)
    s1 = tl.zeros_like(x)
    s2 = tl.zeros_like(x)
    end = tl.minimum(tile + program_tiles, tiles)
    while tile < end:
        _, offsets, valid = tile_offsets(tile, channels, pixels, image_tiles, CHANNELS_LAST, BLOCK)
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
    at = partial_ptr + part.to(tl.int64) * 3 * channels + c
    tl.store(at, mean, mask=c < channels)
    tl.store(at + channels, tl.where(m2 < 0, 0, m2), mask=c < channels)  # a NaN stays
    tl.store(at + 2 * channels, count, mask=c < channels)


@triton.jit(do_not_specialize=["image_tiles"])
def _dx_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, means_ptr, dx_ptr, channels, pixels, image_tiles, eps,
    CHANNELS_LAST: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of dx, from the means [2, C] of du and du xhat (zeros where the statistics were given)."""
    c, offsets, valid = tile_offsets(tl.program_id(0), channels, pixels, image_tiles, CHANNELS_LAST, BLOCK)
    inside, c = c < channels, unfolded(c, channels, FOLD)
    parameters = load_parameters((weight_ptr, bias_ptr, mean_ptr, var_ptr), c, channels, eps)
    mean_du = tl.load(means_ptr + c, mask=inside, other=0)
    mean_du_xhat = tl.load(means_ptr + channels // FOLD + c, mask=inside, other=0)
    du, xhat = load_du(dy_ptr, x_ptr, offsets, valid, parameters)
    dx = (du - mean_du - xhat * mean_du_xhat) * (parameters[0] * parameters[3])
    tl.store(dx_ptr + offsets, dx, mask=valid)


@triton_op("rtmdet_fast::bn_silu_inference")
def _inference(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, residual: Tensor | None, eps: float
) -> Tensor:
    return bn.normalise(x, (weight, bias, mean, var), residual, eps)


@_inference.register_fake  # the body's choice of blocks would restrict the sizes of an exported program
def _(x, weight, bias, mean, var, residual, eps):
    return torch.empty_like(x, memory_format=bn.memory_format(x))


@triton_op("rtmdet_fast::bn_silu_training")
def _training(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    x = x.contiguous(memory_format=bn.memory_format(x))
    (tiles, channel_blocks), sizes, constexprs = bn.tiling(x)
    each = bn.program_tiles(tiles, channel_blocks)
    partial = torch.empty(cdiv(tiles, each), 3, sizes[0], dtype=torch.float32, device=x.device)
    wrap_triton(_moments_kernel)[partial.shape[0], channel_blocks](x, partial, *sizes, tiles, each, **constexprs)
    stats = bn.merge_partial_moments(partial, group, constexprs["FOLD"])
    return bn.normalise(x, (weight, bias, stats[0], stats[3]), residual, eps), stats


@triton_op("rtmdet_fast::bn_silu_backward")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: Tensor | None,
    eps: float, group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    format = bn.memory_format(x)
    x, dy = x.contiguous(memory_format=format), dy.contiguous(memory_format=format)
    parameters: bn.Parameters = weight.contiguous(), bias.contiguous(), mean.contiguous(), var.contiguous()
    du_sums = bn.gradient_sums(dy, x, parameters, eps)
    dx = torch.empty_like(x, memory_format=format)
    grid, sizes, constexprs = bn.tiling(x)
    du_means = bn.gradient_means(du_sums, count, group)
    wrap_triton(_dx_kernel)[grid](dy, x, *parameters, du_means, dx, *sizes, eps, **constexprs)
    return dx, du_sums


def _inference_context(ctx, inputs, output):
    x, weight, bias, mean, var, residual, eps = inputs
    bn.save_for_backward(ctx, (x, weight, bias, mean, var, None), (weight, bias, residual), eps, "")


def _inference_backward(ctx, dy):
    return bn.gradients(ctx, dy, ctx.saved_tensors, _backward)


def _training_context(ctx, inputs, output):
    x, weight, bias, residual, eps, group = inputs
    ctx.mark_non_differentiable(output[1])
    bn.save_for_backward(ctx, (x, weight, bias, output[1]), (weight, bias, residual), eps, group)


def _training_backward(ctx, dy, _):
    return bn.gradients(ctx, dy, bn.with_statistics(ctx.saved_tensors), _backward)


_inference.register_autograd(_inference_backward, setup_context=_inference_context)
_training.register_autograd(_training_backward, setup_context=_training_context)
