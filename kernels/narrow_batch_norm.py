"""Batch normalisation of a few channels in training on a CPU, in channels_last: what PyTorch's own is slow at.

Its vectors go through the channels of one pixel. 12 of them fill none of 16 lanes, so that all is done by scalars and
one after another, which costs digits too. Here several pixels side by side are one with as many times the channels, as
a row of ROW numbers. With SiLU, forward and backward, 131,072 pixels of 12 channels take 6.6 ms in place of 18.8, and
are off by 4e-7 in place of 8e-6 (benches/bench_bn_silu.py, two threads of an Intel Xeon). Statistics of the parts of a
row are merged by Chan, Golub and LeVeque's formula (1983). A forward pass reads x twice for its statistics and once
more for y; a backward pass reads dy and x twice, and what it writes of dx once more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.kernels import batch_norm as bn
from rtmdet_fast.kernels._dispatch import plain

LANES = 16
"""Channels that PyTorch is fast at are a multiple of it, with AVX2 as with AVX-512 (measured with both) ..."""
MOST_CHANNELS = 48
"""... or so many that few stand over."""
LEAST = 2**17
"""Elements of x below which the handful of further operations takes as long as they spare."""
ROW = 768
"""Numbers at least, where the pixels allow it: of 256, 768 and 2048 the fastest at most shapes tried."""


def is_narrow(x: Tensor, weight: Tensor) -> bool:
    """Whether `narrow_batch_norm` is faster than PyTorch's own for `x` [B, C, H, W], and nothing traces it."""
    C = x.shape[1]
    return (
        C % LANES != 0
        and C <= MOST_CHANNELS
        and x.numel() >= LEAST
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and bn.memory_format(x) == torch.channels_last
        and _pixels_of_row(x) > 1
        and plain(x)
    )


def narrow_batch_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, momentum: float, eps: float
) -> Tensor:
    """Batch norm of `x` [B, C, H, W] by its own statistics, in training; moves the running statistics [C] in place."""
    y, mean, var = _NarrowBatchNorm.apply(x, weight, bias, eps)
    count = x.numel() // x.shape[1]
    bn.update_running_stats(running_mean, running_var, torch.stack((mean, var * (count / (count - 1)))), momentum)
    return y


class _NarrowBatchNorm(torch.autograd.Function):
    """y, and mean and variance (biased) [C], which have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        C, times = x.shape[1], _pixels_of_row(x)
        rows = _rows(x, times)
        means, variances = (s.view(times, C) for s in torch.batch_norm_update_stats(_as_image(rows), None, None, 0.0))
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        inverse = torch.rsqrt(var + eps)
        scale = weight * inverse
        y = torch.addcmul((bias - scale * mean).repeat(times), rows, scale.repeat(times))
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return _as_batch(y, x.shape), mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        if dy is None:
            return None, None, None, None
        if torch.is_grad_enabled():  # the gradient shall have one itself
            y = F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps)
            inputs = [t for t, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None
        C, times, count = x.shape[1], _pixels_of_row(x), x.numel() // x.shape[1]
        rows, dy_rows = _rows(x, times), _rows(dy, times)
        statistics = mean.repeat(times), inverse.repeat(times)
        _, dweights, dbiases = torch.ops.aten.native_batch_norm_backward(
            _as_image(dy_rows), _as_image(rows), None, None, None, *statistics, True, ctx.eps, [False, True, True]
        )
        dweight, dbias = dweights.view(times, C).sum(0), dbiases.view(times, C).sum(0)
        dx = None
        if ctx.needs_input_grad[0]:
            # dx = scale (dy - dbias / n - (x - mean) inverse dweight / n), which is linear in x and in dy
            scale = weight * inverse
            of_x = -scale * inverse * dweight / count
            constant = -scale * dbias / count - of_x * mean
            dx = torch.addcmul(constant.repeat(times), rows, of_x.repeat(times)).addcmul_(dy_rows, scale.repeat(times))
            dx = _as_batch(dx, x.shape)
        return dx, dweight, dbias, None


def _pixels_of_row(x: Tensor) -> int:
    """A power of two that divides all pixels of `x` [B, C, H, W]."""
    C, times = x.shape[1], 1
    pixels = x.numel() // C
    while C * times < ROW and pixels % (2 * times) == 0:
        times *= 2
    return times


def _rows(x: Tensor, times: int) -> Tensor:
    """[pixels / times, times C] of `x` [B, C, H, W], a view where it is in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, times * x.shape[1])


def _as_image(rows: Tensor) -> Tensor:
    """[1, times C, pixels / times, 1] in channels_last, of rows."""
    return rows.t()[None, :, :, None]


def _as_batch(rows: Tensor, shape: torch.Size) -> Tensor:
    B, C, H, W = shape
    return rows.view(B, H, W, C).permute(0, 3, 1, 2)
