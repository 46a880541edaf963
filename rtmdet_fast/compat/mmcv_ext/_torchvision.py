"""Whether torchvision's compiled ops can be had: RoI pooling and deformable convolution take them where they are."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def is_there() -> bool:
    """Imports torchvision; one that was built for another torch, or for CUDA beside a torch without, does not load."""
    try:
        import torchvision  # noqa: F401

        return bool(torch.ops.torchvision.roi_align)
    except (ImportError, AttributeError, RuntimeError, OSError):
        return False


def takes(x: Tensor) -> bool:
    """On a CPU torchvision has no half precision."""
    return is_there() and (x.is_cuda or x.dtype in (torch.float32, torch.float64))


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> Tensor:
    """`torchvision.ops.deform_conv2d`, whose Python asks each size anew."""
    from torchvision import ops

    return ops.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
