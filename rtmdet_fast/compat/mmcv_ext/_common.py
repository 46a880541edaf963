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


def fit(pattern: str, *tensors: Tensor, **sizes: int) -> None:
    """Raises RuntimeError unless the tensors, all on one device, have the shapes of a pattern.

    In "rois K 5, output K C PH PW", say, equal letters are equal sizes, of which some may be given. mmcv reads and
    writes past the end of what does not fit, and PyTorch spreads what has size 1.
    """
    for part, tensor in zip(pattern.split(", "), tensors, strict=True):
        name, *dims = part.split()
        known = [int(dim) if dim.isdigit() else sizes.get(dim, size) for dim, size in zip(dims, tensor.shape)]  # noqa: B905
        if len(dims) != tensor.ndim or known != list(tensor.shape):
            wanted = ", ".join(f"{dim} = {sizes[dim]}" if dim in sizes else dim for dim in dims)
            raise RuntimeError(f"{name} has shape {tuple(tensor.shape)}: expected [{wanted}]")
        if tensor.device != tensors[0].device:
            raise RuntimeError(f"{name} is on {tensor.device}: expected {tensors[0].device}, where the others are")
        sizes |= zip(dims, tensor.shape, strict=True)


def exact(x: Tensor) -> Tensor:
    """Half precision in float32."""
    return x if x.dtype == torch.float64 else x.float()


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Gradients of function(*inputs) by autograd."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        output = function(*leaves)
    return torch.autograd.grad(output, leaves, grad_output.to(output.dtype))
