"""Depth-wise convolution, batch normalisation and SiLU, with an optional residual added after the SiLU."""
from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.kernels.bn_silu import bn_silu_reference, check_batch_norm, check_residual, silu_add


def dwconv_bn_silu(
    x: Tensor, conv_weight: Tensor, bn_weight: Tensor, bn_bias: Tensor, running_mean: Tensor,
    running_var: Tensor, *, stride: int = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    residual: Tensor | None = None, process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """silu(batch_norm(conv(x))) + residual for `x` [B, C, H, W] and `conv_weight` [C, 1, K, K].

    K is 3, 5 or 7, the padding K // 2, the stride 1 or 2, so that the result is [B, C, ceil(H / stride),
    ceil(W / stride)]. Batch normalisation, `residual` and `process_group` are as in `bn_silu`.
    """
    check_batch_norm(x, bn_weight, bn_bias, running_mean, running_var, prefix="bn_")
    _check_conv(x, conv_weight, stride)
    out_shape = (x.shape[0], x.shape[1], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
    check_residual(residual, out_shape, x)
    return dwconv_bn_silu_reference(
        x, conv_weight, bn_weight, bn_bias, running_mean, running_var, stride=stride, training=training,
        momentum=momentum, eps=eps, residual=residual, process_group=process_group)


def dwconv_bn_silu_reference(
    x: Tensor, conv_weight: Tensor, bn_weight: Tensor, bn_bias: Tensor, running_mean: Tensor,
    running_var: Tensor, *, stride: int = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    residual: Tensor | None = None, process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    channels, padding = x.shape[1], conv_weight.shape[2] // 2
    if training:
        z = F.conv2d(x, conv_weight, None, stride, padding, groups=channels)
        return bn_silu_reference(
            z, bn_weight, bn_bias, running_mean, running_var, training=True, momentum=momentum, eps=eps,
            residual=residual, process_group=process_group)
    wide = torch.promote_types(conv_weight.dtype, torch.float32)
    scale = bn_weight.to(wide) * torch.rsqrt(running_var.to(wide) + eps)
    shift = bn_bias - running_mean * scale
    folded = (conv_weight * scale[:, None, None, None]).to(conv_weight.dtype)
    return silu_add(F.conv2d(x, folded, shift.to(folded.dtype), stride, padding, groups=channels), residual)


def _check_conv(x: Tensor, conv_weight: Tensor, stride: int) -> None:
    size = conv_weight.shape[-1]
    if size not in (3, 5, 7) or conv_weight.shape != (x.shape[1], 1, size, size):
        raise ValueError(f"conv_weight: expected shape ({x.shape[1]}, 1, K, K) with K 3, 5 or 7, "
                         f"got {tuple(conv_weight.shape)}")
    if conv_weight.device != x.device:
        raise ValueError(f"conv_weight: on {conv_weight.device}, but x is on {x.device}")
    if conv_weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"conv_weight: {conv_weight.dtype}, but x is {x.dtype}")
    if stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride}")
