"""A detector's form for inference: plain convolutions with a bias, which every runtime knows."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def fold_batch_norm(conv: nn.Conv2d, bn: Any) -> nn.Conv2d:
    """One convolution that does what `conv` and then `bn` in eval mode do; its weights are worked out in float64.

    bn: any module with weight, bias, running_mean, running_var and eps.
    """
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    shift = bn.bias.double() - bn.running_mean.double() * scale
    if conv.bias is not None:
        shift += conv.bias.double() * scale
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        device="meta",
    )
    folded.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(conv.weight), False)
    folded.bias = nn.Parameter(shift.to(conv.weight), False)
    return folded


@torch.no_grad()
def folded_copy(module: M) -> M:
    """A copy in eval mode without gradients, in which every module with a method `folded` is what that returns.

    So a convolution that layers share, each with a BatchNorm of its own, becomes one for each. Weights are in the
    memory format channels_last, in which convolutions run fastest on CPUs and in half precision.
    """
    copy = deepcopy(module).eval().requires_grad_(False)
    for parent in list(copy.modules()):
        for name, child in parent.named_children():
            if (fold := getattr(child, "folded", None)) is not None:
                setattr(parent, name, fold())
    return copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
