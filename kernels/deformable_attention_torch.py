"""The reference of `deformable_attention` in plain PyTorch, which runs on CPUs, and in float64 everywhere.

Counts, for the decoder of RT-DETR at 640 px (300 queries, 8 heads, 12 points, 32 channels): 28,800 samples are 115,200
rows of `value` of 128 bytes, 15 MB, of which `value` has 8.6 MB, and 3.7 M FMAs. Sampling level by level with
`grid_sample` copies `value` to channels first, where the 32 channels of a place lie in 32 cache lines, and stores each
sample, 3.7 MB, to weight and add it afterwards. Here `value` stays as it is, and a head of a query is one bag of
`embedding_bag`: the numbers of its 48 rows and a coefficient for each, bilinear weight times attention weight, which is
all that is stored, 1.4 MB; backward finds the numbers and the bilinear weights kept. It is a bag for each row of
`value`, whose terms are rows of the upstream gradient: the bags of the forward pass, transposed, and nothing is added
in an order that depends on threads.

The ops are opaque to `torch.compile`. For export there is `deformable_attention_grid_sample`, in standard operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def precision(*tensors: Tensor) -> torch.dtype:
    """Of everything that is computed."""
    return torch.float64 if torch.float64 in (x.dtype for x in tensors) else torch.float32


def box_locations(references: Tensor, offsets: Tensor, points: Sequence[int]) -> Tensor:
    """references [B, Q, 4] (cx, cy, w, h), offsets [B, Q, H, P, 2] -> locations [B, Q, H, P, 2].

    An offset of the number of points of its level leads from the centre of the box to its edge.
    """
    scale = [[0.5 / count] for count in points for _ in range(count)]
    centre, size = references[:, :, None, None, :2], references[:, :, None, None, 2:]
    return centre + offsets * torch.tensor(scale, dtype=offsets.dtype, device=offsets.device) * size


def deformable_attention_grid_sample(
    value: Tensor, sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, points: Sequence[int], *,
    method: str = "bilinear", published_clamp: bool = False,
) -> Tensor:  # fmt: skip
    """`deformable_attention` in standard operators (GridSample, or GatherElements), for `torch.onnx.export`.

    Of boxes: `locations` is `box_locations(references, offsets, points)`, `weights` the softmax of the logits.
    """
    (B, _, H, D), Q = value.shape, locations.shape[1]
    levels = value.permute(0, 2, 3, 1).flatten(0, 1).split([height * width for height, width in sizes], 2)
    locations = locations.transpose(1, 2).flatten(0, 1)
    samples = []
    for level, (height, width), places in zip(levels, sizes, locations.split(list(points), 2), strict=True):
        if method == "bilinear":
            image = level.unflatten(2, (height, width))
            samples.append(F.grid_sample(image, 2 * places - 1, align_corners=False))
        else:
            x, y = _nearest(places, height, width, published_clamp)
            index = (y * width + x).flatten(1)[:, None].expand(-1, D, -1)
            samples.append(level.gather(2, index).unflatten(2, (Q, -1)))
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]
    out = (torch.cat(samples, 3) * weights).sum(3)  # [B H, D, Q]
    return out.unflatten(0, (B, H)).permute(0, 3, 1, 2).flatten(2)


def _nearest(locations: Tensor, height: int, width: int, published_clamp: bool) -> tuple[Tensor, Tensor]:
    """(x, y) of the pixels that the discrete method takes."""
    x, y = ((locations[..., axis] * size + 0.5).long() for axis, size in enumerate((width, height)))
    return x.clamp(0, (min(height, width) if published_clamp else width) - 1), y.clamp(0, height - 1)


class _Corners(NamedTuple):
    """Of each sample T pixels along either axis, x and y, 2 (bilinear) or 1: [2, B, Q, H, T, P].

    Pixels outside have a coefficient of 0, and the number of one inside.
    """

    pixels: Tensor
    coefficients: Tensor
    derivatives: Tensor  # of the coefficients, by the location; [0] if the method is discrete


def _bilinear_corners(places: Tensor, size: Tensor) -> _Corners:
    """places [2, B, Q, H, P], pixel 0 reaching from 0 to 1, in levels of `size` [2, 1, 1, 1, 1, P] pixels."""
    places = places - 0.5
    before = places.floor()
    part = places - before
    before = before.int()
    wanted = torch.stack([before, before + 1], 4)
    pixels = wanted.clamp(min=0).minimum(size - 1)
    inside = pixels == wanted
    coefficients = torch.stack([1 - part, part], 4) * inside
    derivatives = inside * (places.new_tensor([[-1], [1]]) * size)
    return _Corners(pixels, coefficients, derivatives)


def _discrete_corners(places: Tensor, size: Tensor) -> _Corners:
    pixels = (places + 0.5).int().clamp_(min=0)[:, :, :, :, None].minimum(size - 1)
    return _Corners(pixels, places.new_ones(pixels.shape), places.new_empty(0))


def _sampled(
    value: Tensor, sizes: Sequence[int], locations: Tensor, points: Sequence[int], method: str, published_clamp: bool
) -> tuple[Tensor, _Corners]:
    """Rows [B, Q, H, T, T, P] of `value` as [B S H, D], and corners."""
    (B, S, H, _), device = value.shape, value.device
    heights, widths = sizes[::2], sizes[1::2]
    *starts, _ = accumulate((h * w for h, w in zip(heights, widths, strict=True)), initial=0)
    integer = torch.int32 if B * S * H < 2**31 else torch.int64
    of_levels = torch.tensor([widths, heights, starts], dtype=integer, device=device)
    of_points = of_levels.repeat_interleave(torch.tensor(points, device=device), 1)
    (width, height, start), size = of_points, of_points[:2]
    clamped = width.minimum(height) if published_clamp and method == "discrete" else width
    places = locations.movedim(-1, 0).contiguous() * size[:, None, None, None]  # so that all that follows is contiguous
    corners = _bilinear_corners if method == "bilinear" else _discrete_corners
    found = corners(places, torch.stack([clamped, height])[:, None, None, None, None])
    x, y = found.pixels.to(integer)
    image = torch.arange(0, B * S, S, dtype=integer, device=device).view(B, 1, 1, 1, 1)
    head = torch.arange(H, dtype=integer, device=device).view(H, 1, 1)
    begin = (y * width + (image + start)) * H + head
    return begin[:, :, :, :, None] + (x * H)[:, :, :, None], found


def _outer(y: Tensor, x: Tensor) -> Tensor:
    """[B, Q, H, T, P] of either axis -> [B, Q, H, T, T, P]."""
    return y[:, :, :, :, None] * x[:, :, :, None]


def _sum(x: Tensor, dim: int) -> Tensor:
    """Over one or two, which `sum` is slow at."""
    first, *rest = x.unbind(dim)
    return sum(rest, first)


def _bags(rows: Tensor, table: Tensor, coefficients: Tensor) -> Tensor:
    """Sums of rows of `table`."""
    return F.embedding_bag(rows, table, per_sample_weights=coefficients, mode="sum")


class _ByRow(NamedTuple):
    """Terms of bags [N, K] in the order of the rows of the table that they take, those of a row in their own order."""

    order: Tensor  # [N K] where each stood
    bags: Tensor  # [N K] which bag it is of
    starts: Tensor  # [rows of the table] where the terms of each row begin
    rows: Tensor  # [N K] which row it takes


def _by_row(rows: Tensor, count: int) -> _ByRow:
    """rows: int [N, K], all below `count`."""
    N, K = rows.shape
    if rows.is_cpu:  # bags by rows are a sparse matrix, and SciPy transposes one by counting, without a sort
        from scipy.sparse import csr_array  # type: ignore[import-untyped]

        numbers = rows.numpy().ravel()
        places = np.arange(N * K, dtype=numbers.dtype)
        begin = np.arange(0, N * K + 1, K, dtype=numbers.dtype)
        found = csr_array((places, numbers, begin), shape=(N, count)).tocsc()
        row_of = np.repeat(np.arange(count), np.diff(found.indptr))
        return _ByRow(*(torch.from_numpy(x).long() for x in (found.data, found.indices, found.indptr[:-1], row_of)))
    in_order, order = rows.flatten().sort(stable=True)
    counts = torch.bincount(in_order, minlength=count)
    return _ByRow(order, order // K, counts.cumsum(0) - counts, in_order.long())


def undispatched(value: Tensor, *arguments: Any) -> Tensor:
    """What `attention` has first."""
    return _attention(value, *arguments)[0]


def _attention(
    value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int], points: Sequence[int],
    method: str, published_clamp: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """[B, Q, H D]; sizes are height and width of each level, one after the other. Then what backward wants again: rows
    and, of the corners, coefficients and derivatives."""
    (B, _, H, D), Q = value.shape, locations.shape[1]
    dtype = precision(value, locations, weights)
    rows, corners = _sampled(value, sizes, locations.to(dtype), points, method, published_clamp)
    kept = rows, corners.coefficients, corners.derivatives
    if not weights.numel() or not value.numel():
        return value.new_zeros(B, Q, H * D), *kept
    x, y = corners.coefficients
    coefficients = _outer(y * weights.to(dtype)[:, :, :, None], x)
    table = value.reshape(-1, D).to(dtype)
    out = _bags(rows.view(B * Q * H, -1), table, coefficients.view(B * Q * H, -1)).view(B, Q, H * D).to(value.dtype)
    return out, *kept


attention = torch.library.custom_op("rtmdet_fast::deformable_attention_reference", _attention, mutates_args=())


@torch.library.custom_op("rtmdet_fast::deformable_attention_reference_backward", mutates_args=())
def attention_backward(
    dout: Tensor, value: Tensor, locations: Tensor, weights: Tensor, rows: Tensor, coefficients: Tensor,
    derivatives: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of value, locations (empty if the method is discrete) and weights."""
    D, dtype = value.shape[3], coefficients.dtype
    discrete = derivatives.dim() == 1
    dlocations = torch.empty_like(locations[:0] if discrete else locations)
    if not weights.numel() or not value.numel():
        return torch.zeros_like(value), dlocations, torch.zeros_like(weights)
    wide_weights = weights.to(dtype)[:, :, :, None]
    x, y = coefficients

    # Both gradients in the order of the rows of value, which then is read from its beginning to its end, while the
    # upstream rows, 0.3 MB an image, stay in the cache.
    table, dout = value.reshape(-1, D).to(dtype), dout.reshape(-1, D).to(dtype)
    order, bags, starts, numbers = _by_row(rows.view(len(dout), -1), len(table))
    in_order = _outer(y * wide_weights, x).flatten().index_select(0, order)
    dvalue = F.embedding_bag(bags, dout, starts, mode="sum", per_sample_weights=in_order)
    # what the bags of the forward pass would have as the gradients of their coefficients, value and dout exchanged
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(table, dout, bags, starts, numbers, 0)
    products = torch.empty_like(products).scatter_(0, order, products).view(rows.shape)
    by_row = _sum(products * x[:, :, :, None], 4)
    dweights = _sum(by_row * y, 3).to(weights.dtype)
    if not discrete:
        x_slope, y_slope = derivatives
        by_column = _sum(products * x_slope[:, :, :, None], 4)
        dx, dy = _sum(by_column * y, 3), _sum(by_row * y_slope, 3)
        dlocations = (torch.stack([dx, dy], 4) * wide_weights.squeeze(3)[..., None]).to(locations.dtype)
    return dvalue.view_as(value).to(value.dtype), dlocations, dweights


@attention.register_fake
def _(value, locations, weights, sizes, points, method, published_clamp):
    (B, S, H, D), (_, Q, _, P) = value.shape, weights.shape
    bilinear = method == "bilinear"
    corners = 2 if bilinear else 1
    integer = torch.int32 if B * S * H < 2**31 else torch.int64
    rows = value.new_empty(B, Q, H, corners, corners, P, dtype=integer)
    coefficients = value.new_empty(2, B, Q, H, corners, P, dtype=precision(value, locations, weights))
    derivatives = coefficients.new_empty(coefficients.shape if bilinear else 0)
    return value.new_empty(B, Q, H * D), rows, coefficients, derivatives


@attention_backward.register_fake
def _(dout, value, locations, weights, rows, coefficients, derivatives):
    dlocations = locations[:0] if derivatives.dim() == 1 else locations
    return value.new_empty(value.shape), dlocations.new_empty(dlocations.shape), weights.new_empty(weights.shape)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.bilinear = inputs[5] == "bilinear"


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 7
    dvalue, dlocations, dweights = attention_backward(dout, *ctx.saved_tensors)
    return dvalue, dlocations if ctx.bilinear else None, dweights, None, None, None, None


attention.register_autograd(_backward, setup_context=_save)
