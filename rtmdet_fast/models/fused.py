"""Batch norms as the models of every family run them: with SiLU by one kernel, and over processes (SyncBN)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from rtmdet_fast.kernels.bn_silu import bn_silu, sync_batch_norm
from rtmdet_fast.kernels.dwconv_bn_silu import dwconv_bn_silu


def fused_bn_silu(
    x: Tensor,
    bn: nn.modules.batchnorm._BatchNorm,
    conv: nn.Conv2d | None = None,
    *,
    residual: Tensor | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """`bn` in its own mode, SiLU and the residual in one kernel; after the depth-wise `conv` where one is given.

    Counts the batch as `bn` would. `bn` has weight, bias, running statistics and a momentum.
    """
    parameters, momentum = _counted(bn)
    fused = partial(bn_silu, x)
    if conv is not None:
        fused = partial(dwconv_bn_silu, x, conv.weight, stride=conv.stride[0])
    return fused(
        *parameters,
        training=bn.training,
        momentum=momentum,
        eps=bn.eps,
        residual=residual,
        process_group=process_group,
    )


def batch_norm(
    x: Tensor, bn: nn.modules.batchnorm._BatchNorm, process_group: torch.distributed.ProcessGroup | None
) -> Tensor:
    """`bn` of `x` [B, C, H, W] in its own mode; in training by the statistics of the whole group where there is one."""
    if process_group is None or not bn.training:
        return bn(x)
    parameters, momentum = _counted(bn)
    return sync_batch_norm(x, *parameters, momentum, bn.eps, process_group.group_name)


def _counted(bn: nn.modules.batchnorm._BatchNorm) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], float]:
    """Weight, bias and running statistics of `bn`, and its momentum; in training it counts the batch."""
    assert bn.running_mean is not None and bn.running_var is not None and bn.momentum is not None
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    return (bn.weight, bn.bias, bn.running_mean, bn.running_var), bn.momentum
