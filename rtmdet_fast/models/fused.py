"""Batch norm and SiLU as the models of every family run them: by one kernel."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from rtmdet_fast.kernels.bn_silu import bn_silu
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
    assert bn.running_mean is not None and bn.running_var is not None and bn.momentum is not None
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    fused = partial(bn_silu, x)
    if conv is not None:
        fused = partial(dwconv_bn_silu, x, conv.weight, stride=conv.stride[0])
    return fused(
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        training=bn.training,
        momentum=bn.momentum,
        eps=bn.eps,
        residual=residual,
        process_group=process_group,
    )
