"""What the ops do alike: refuse what mmcv refuses, and take gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check(reference: Tensor, **others: Tensor) -> None:
    """Raises RuntimeError, as mmcv does, unless `reference` is of a floating dtype and the others are alike."""
    if not reference.is_floating_point():
        raise RuntimeError(f"the op is not implemented for {reference.dtype}: expected a floating dtype")
    for name, other in others.items():
        if other.dtype != reference.dtype or other.device != reference.device:
            wanted = f"{reference.dtype} on {reference.device}"
            raise RuntimeError(f"{name} is {other.dtype} on {other.device}: expected {wanted}, as the features are")


def exact(x: Tensor) -> Tensor:
    """Half precision in float32."""
    return x if x.dtype == torch.float64 else x.float()


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Gradients of function(*inputs) by autograd."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        output = function(*leaves)
    return torch.autograd.grad(output, leaves, grad_output.to(output.dtype))
