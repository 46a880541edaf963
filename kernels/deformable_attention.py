"""Multi-scale deformable attention (arXiv:2010.04159), as RT-DETR's decoder has it (arXiv:2304.08069, v2: 2407.17140).

Each head h of a query q samples `value` at P points, p of them on the level l of p, and adds the samples:

    out[q, h] = sum_p a[q, h, p] value_l(p)[x W_l - 1/2, y H_l - 1/2][h]      (x, y) = location[q, h, p] in [0, 1]

bilinear with zeros outside, or discrete: the pixel trunc(x W_l + 1/2), trunc(y H_l + 1/2), moved inside. For queries
with boxes (cx, cy, w, h), where level l has n_l points,

    a = softmax over p of the logits;    location = (cx, cy) + offset / n_l (w, h) / 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtmdet_fast.kernels import deformable_attention_torch, deformable_attention_triton
from rtmdet_fast.kernels._dispatch import unwatched, use_triton
from rtmdet_fast.kernels.deformable_attention_torch import box_locations, precision


def deformable_attention(
    value: Tensor, sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, points: Sequence[int], *,
    method: str = "bilinear", published_clamp: bool = False,
) -> Tensor:  # fmt: skip
    """Weighted samples [B, Q, H D] in the dtype of `value`, differentiable in the three tensors.

    Args:
        value: [B, S, H, D], the levels' pixels row by row, one level after the other.
        sizes: (height, width) of each level, S pixels in all.
        locations: [B, Q, H, P, 2] (x, y), from 0 to 1 within the level of each point.
        weights: [B, Q, H, P], as they are: no softmax is taken.
        points: number of points on each level, P in all.
        method: "bilinear", or "discrete" (RT-DETRv2), whose locations get no gradient.
        published_clamp: discrete, move x into the height of the level, too, as the published RT-DETRv2 does: on maps
            wider than high that are other columns (on maps higher than wide that one fails, and this one does not).

    fp16 and bf16 are computed in fp32, also under autocast; float64 in any argument is computed in float64. A location
    of NaN or infinity gives NaN (discrete: some pixel).
    """
    _check(value, sizes, points, method)
    _check_points(value, weights, "weights", locations, "locations", points)
    settings = [n for size in sizes for n in size], list(points), method, published_clamp
    if _takes_triton(sizes, value, locations, weights):
        return _triton(value, None, locations, weights, *settings)
    return _reference(value, locations, weights, *settings)


def box_deformable_attention(
    value: Tensor, sizes: Sequence[tuple[int, int]], references: Tensor, offsets: Tensor, logits: Tensor,
    points: Sequence[int], *, method: str = "bilinear", published_clamp: bool = False,
) -> Tensor:  # fmt: skip
    """`deformable_attention` around boxes, with the softmax of the weights (see the module), in one kernel.

    The arguments of `deformable_attention`, and:

    Args:
        references: [B, Q, 4] boxes (cx, cy, w, h) in [0, 1], with a gradient too.
        offsets: [B, Q, H, P, 2]; the number of points of the level leads from the centre of the box to its edge.
        logits: [B, Q, H, P], of the weights; the softmax is taken over the points of all levels together.
    """
    _check(value, sizes, points, method)
    _check_points(value, logits, "logits", offsets, "offsets", points)
    _check_tensor("references", references, (value.shape[0], logits.shape[1], 4), value)
    settings = [n for size in sizes for n in size], list(points), method, published_clamp
    if _takes_triton(sizes, value, references, offsets, logits):
        return _triton(value, references, offsets, logits, *settings)
    dtype = precision(value, references, offsets, logits)
    references, offsets, logits = (x.to(dtype) for x in (references, offsets, logits))
    locations = box_locations(references, offsets, points)
    return _reference(value, locations, logits.softmax(3), *settings)


def _triton(value: Tensor, *arguments: Any) -> Tensor:
    op = deformable_attention_triton.attention
    return op.undispatched(value, *arguments) if unwatched(value) else op(value, *arguments)


def _reference(value: Tensor, *arguments: Any) -> Tensor:
    op = deformable_attention_torch
    return op.undispatched(value, *arguments) if unwatched(value) else op.attention(value, *arguments)[0]


def _takes_triton(sizes: Sequence[tuple[int, int]], value: Tensor, *others: Tensor) -> bool:
    # the kernels' backward adds in any order, which may be forbidden, or only warned of; a trace cannot ask which
    forbidden = (
        torch.is_grad_enabled()
        and torch.are_deterministic_algorithms_enabled()
        and (torch.compiler.is_compiling() or not torch.is_deterministic_algorithms_warn_only_enabled())
    )
    fits = precision(value, *others) == torch.float32 and deformable_attention_triton.fits(sizes)
    return use_triton(value) and fits and not forbidden


def _check(value: Tensor, sizes: Sequence[tuple[int, int]], points: Sequence[int], method: str) -> None:
    if value.dim() != 4:
        raise ValueError(f"value: expected shape [B, S, H, D], got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"value: expected a floating-point tensor, got {value.dtype}")
    if any(height < 1 or width < 1 for height, width in sizes):
        raise ValueError(f"sizes: expected a height and width of at least 1 for each level, got {tuple(sizes)}")
    if sum(height * width for height, width in sizes) != value.shape[1]:
        raise ValueError(f"sizes: expected {value.shape[1]} pixels as in value, got {tuple(sizes)}")
    if len(points) != len(sizes) or any(count < 1 for count in points):
        raise ValueError(f"points: expected at least 1 for each of {len(sizes)} levels, got {tuple(points)}")
    if method not in ("bilinear", "discrete"):
        raise ValueError(f"method: expected bilinear or discrete, got {method!r:.40}")


def _check_points(
    value: Tensor, weights: Tensor, weights_name: str, locations: Tensor, locations_name: str, points: Sequence[int]
) -> None:
    (B, _, H, _), P = value.shape, sum(points)
    Q = weights.shape[1] if weights.dim() == 4 else 0
    _check_tensor(weights_name, weights, (B, Q, H, P), value)
    _check_tensor(locations_name, locations, (B, Q, H, P, 2), value)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], value: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != value.device:
        raise ValueError(f"{name}: on {tensor.device}, but value is on {value.device}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
