"""SiLU of batch normalisation, with an optional residual that is added after the SiLU."""
from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def bn_silu(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, residual: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """silu(batch_norm(x)) + residual for `x` [B, C, H, W] and per-channel parameters [C].

    In training the batch's statistics normalise and `running_mean`, `running_var` (unbiased) are updated in
    place; with a `process_group` they are the statistics of all its processes' batches together (SyncBN). The
    result has the dtype and the memory format of `x`. Raises ValueError or TypeError naming the argument.
    """
    check_batch_norm(x, weight, bias, running_mean, running_var)
    check_residual(residual, x.shape, x)
    return bn_silu_reference(x, weight, bias, running_mean, running_var, training=training, momentum=momentum,
                             eps=eps, residual=residual, process_group=process_group)


def bn_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, residual: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    if training and process_group is not None:
        y = _sync_batch_norm(x, weight, bias, running_mean, running_var, momentum, eps, process_group)
    else:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return silu_add(y, residual)


def silu_add(y: Tensor, residual: Tensor | None) -> Tensor:
    """silu(y) + residual; overwrites `y` where autograd does not need it."""
    # silu_ under autograd clones its input first, so in-place only pays without a graph
    y = F.silu(y, inplace=not (torch.is_grad_enabled() and y.requires_grad))
    return y if residual is None else y.add_(residual)


def check_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, prefix: str = "",
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions [B, C, H, W], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    for name, tensor in ((f"{prefix}weight", weight), (f"{prefix}bias", bias),
                         ("running_mean", running_mean), ("running_var", running_var)):
        if tensor.shape != (x.shape[1],):
            raise ValueError(f"{name}: expected shape ({x.shape[1]},) for x with {x.shape[1]} channels, "
                             f"got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, but x is on {x.device}")


def check_residual(residual: Tensor | None, shape: torch.Size | tuple[int, ...], x: Tensor) -> None:
    if residual is None:
        return
    if residual.shape != shape:
        raise ValueError(f"residual: expected the output's shape {tuple(shape)}, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual: on {residual.device}, but x is on {x.device}")


class _AllReduce(torch.autograd.Function):
    """Sum over the group; its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def _sync_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float,
    eps: float, group: dist.ProcessGroup,
) -> Tensor:
    # Two passes (the mean, then the squared deviations from it): a large mean does not cancel the variance.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = _AllReduce.apply(wide.new_full((), x.numel() / x.shape[1]), group)
    mean = _AllReduce.apply(wide.sum((0, 2, 3)), group) / count
    centred = wide - mean[:, None, None]
    var = _AllReduce.apply(centred.square().sum((0, 2, 3)), group) / count
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    y = centred * (torch.rsqrt(var + eps) * weight)[:, None, None] + bias[:, None, None]
    return y.to(x.dtype)
