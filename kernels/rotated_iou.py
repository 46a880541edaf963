"""IoU of rotated boxes (cx, cy, w, h, radians), exact in float32 and continuous where edges coincide.

Box 2 is moved into the frame of box 1, a rectangle |x| <= a, |y| <= b. Going round the edges of box 2,

    intersection = -sum over edges of the integral of clamp(y, -b, b) dx over |x| <= a

Each term is continuous in every coordinate: no two edges are compared, so none can be taken for crossing or not
by a rounding error, and no epsilon is needed. The gradient follows from the parts of the edges inside the other
box: pushing an edge outwards by e adds e times its length inside (Reynolds' transport theorem).

The angle turns x towards y (clockwise on a screen, y down). Boxes with a non-finite value, a side <= 0 or an area
that leaves float32 have IoU 0 with everything, and gradient 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from rtmdet_fast.kernels._dispatch import tl, triton, use_triton


def box_iou_rotated(
    boxes1: Tensor, boxes2: Tensor, aligned: bool = False, *, mode: str = "iou", clockwise: bool = True
) -> Tensor:
    """IoU of boxes1 [..., N, 5] with boxes2 [..., M, 5] -> [..., N, M], or pair by pair [..., N] if `aligned`.

    float32, or float64 if either input is. Only the aligned form is differentiable. `mode` "iof" divides by
    the area of box 1 instead; `clockwise` False takes angles from x towards -y (both as in `mmcv.ops`).
    """
    _check(boxes1, boxes2, aligned, ("boxes1", "boxes2"))
    if mode not in ("iou", "iof"):
        raise ValueError(f"mode={mode!r}: expected 'iou' or 'iof'")
    boxes1, boxes2 = _promote(boxes1, boxes2)
    if not clockwise:
        flip = boxes1.new_tensor([1, 1, 1, 1, -1])
        boxes1, boxes2 = boxes1 * flip, boxes2 * flip
    if aligned:
        iou = (_aligned if use_triton(boxes1) else _Aligned.apply)(boxes1, boxes2)
    else:
        iou = (_pairwise if use_triton(boxes1) else _pairwise_reference)(boxes1.detach(), boxes2.detach())
    if mode == "iou":
        return iou
    area1, area2 = boxes1[..., 2:4].prod(-1), boxes2[..., 2:4].prod(-1)
    if not aligned:
        area1, area2 = area1[..., :, None], area2[..., None, :]
    # inter = iou (A + B) / (1 + iou)
    return torch.where(iou > 0, iou * (1 + area2 / area1) / (1 + iou), 0)


def rotated_iou_loss(
    pred: Tensor,
    target: Tensor,
    mode: str = "linear",
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Rotated IoU loss of pred [N, 5] against target [N, 5]: 1 - IoU, 1 - IoU^2 or -log IoU.

    In float32 whatever the inputs (float64 if either is). The gradient is finite everywhere; it is 0 for
    disjoint boxes, as in the published loss (mmrotate `RotatedIoULoss`, which also floors IoU at 1e-6), and
    at IoU 1, the maximum. `weight` [N] scales the terms; "mean" divides by N.
    """
    if mode not in ("linear", "log", "square"):
        raise ValueError(f"mode={mode!r}: expected 'linear', 'log' or 'square'")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean', 'sum' or 'none'")
    _check(pred, target, True, ("pred", "target"))
    iou = box_iou_rotated(pred, target, aligned=True).clamp(min=1e-6)
    loss = -iou.log() if mode == "log" else 1 - (iou if mode == "linear" else iou.square())
    if weight is not None:
        if weight.shape != loss.shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}: expected {list(loss.shape)}")
        loss = loss * weight
    if reduction == "none":
        return loss
    return loss.sum() / max(loss.numel(), 1) if reduction == "mean" else loss.sum()


def _check(boxes1: Tensor, boxes2: Tensor, aligned: bool, names: tuple[str, str]) -> None:
    if not isinstance(aligned, bool):
        raise TypeError(f"aligned={aligned!r}: expected a bool")
    for name, x in zip(names, (boxes1, boxes2), strict=True):
        if x.ndim < 2 or x.shape[-1] != 5:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected [..., 5] (cx, cy, w, h, radians)")
        if not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}: expected a floating dtype")
    same = slice(None, -1) if aligned else slice(None, -2)
    if boxes1.shape[same] != boxes2.shape[same]:
        raise ValueError(f"{names[1]} has shape {tuple(boxes2.shape)}, which does not fit "
                         f"{names[0]} {tuple(boxes1.shape)} with aligned={aligned}")
    if boxes1.device != boxes2.device:
        raise ValueError(f"{names[1]} is on {boxes2.device}, {names[0]} on {boxes1.device}")


def _promote(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if torch.float64 in (boxes1.dtype, boxes2.dtype) else torch.float32
    return boxes1.to(dtype), boxes2.to(dtype)


def box_iou_rotated_reference(boxes1: Tensor, boxes2: Tensor, aligned: bool = False) -> Tensor:
    """`box_iou_rotated` in PyTorch, on any device."""
    _check(boxes1, boxes2, aligned, ("boxes1", "boxes2"))
    boxes1, boxes2 = _promote(boxes1, boxes2)
    return _Aligned.apply(boxes1, boxes2) if aligned else _pairwise_reference(boxes1.detach(), boxes2.detach())


@torch.library.custom_op("rtmdet_fast::box_iou_rotated_reference", mutates_args=())
def _pairwise_reference(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Opaque to `torch.compile`: only the pairs whose bounding circles meet are computed."""
    N, M = boxes1.shape[-2], boxes2.shape[-2]
    iou = boxes1.new_zeros(*boxes1.shape[:-1], M)
    rows = max(1, 2**17 // max(M, 1))  # the dense temporaries of a chunk stay in the cache
    for image, one, two in zip(iou.view(-1, N, M), boxes1.reshape(-1, N, 5), boxes2.reshape(-1, M, 5), strict=True):
        x2, y2 = two[:, 0], two[:, 1]
        r2 = _radius(two)
        for out, part in zip(image.split(rows), one.split(rows), strict=True):
            reach = _radius(part)[:, None] + r2
            dx, dy = part[:, :1] - x2, part[:, 1:2] - y2
            near = dx.mul_(dx).addcmul_(dy, dy) < reach.mul_(reach)
            pair = near.view(-1).nonzero()[:, 0]
            i = pair.div(M, rounding_mode="floor")
            out.view(-1)[pair] = _iou(part[i], two[pair - i * M])
    return iou


@_pairwise_reference.register_fake
def _(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return boxes1.new_empty(*boxes1.shape[:-1], boxes2.shape[-2])


class _Aligned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, boxes1: Tensor, boxes2: Tensor) -> Tensor:
        ctx.save_for_backward(boxes1, boxes2)
        return _iou(boxes1, boxes2)

    @staticmethod
    def backward(ctx: Any, diou: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        boxes1, boxes2 = ctx.saved_tensors
        return _iou_backward(diou, boxes2, boxes1), _iou_backward(diou, boxes1, boxes2)


def _area(boxes: Tensor) -> Tensor:
    """Area [...] of boxes [..., 5]; NaN for those that match nothing."""
    area = boxes[..., 2] * boxes[..., 3]
    usable = boxes.isfinite().all(-1) & (boxes[..., 2] > 0) & (area > 0) & (area < torch.inf)
    return torch.where(usable, area, torch.nan)


def _radius(boxes: Tensor) -> Tensor:
    """Radius [...] of the bounding circle; NaN, which no distance is less than, for those that match nothing."""
    return torch.hypot(boxes[..., 2], boxes[..., 3]) / 2 + 0 * _area(boxes)


def _edges(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, ...]:
    """In the frame of box 1: half sides a, b [...]; start x, y and direction dx, dy of box 2's edges [4, ...].

    The edges go round from x towards y; the first and third are the sides of length h, the others of length w.
    """
    x1, y1, w1, h1, a1 = boxes1.unbind(-1)
    x2, y2, w2, h2, a2 = boxes2.unbind(-1)
    cos, sin, dx, dy = a1.cos(), a1.sin(), x2 - x1, y2 - y1
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    cos, sin = (a2 - a1).cos(), (a2 - a1).sin()
    wx, wy, hx, hy = cos * w2, sin * w2, -sin * h2, cos * h2
    x = torch.stack([u + (wx - hx) / 2, u + (wx + hx) / 2, u - (wx - hx) / 2, u - (wx + hx) / 2])
    y = torch.stack([v + (wy - hy) / 2, v + (wy + hy) / 2, v - (wy - hy) / 2, v - (wy + hy) / 2])
    return w1 / 2, h1 / 2, x, y, torch.stack([hx, -wx, -hx, wx]), torch.stack([hy, -wy, -hy, wy])


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.finfo(x.dtype).tiny, x)


def _iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    a, b, x0, y0, dx, dy = _edges(boxes1, boxes2)
    x1, y1 = x0.roll(-1, 0), y0.roll(-1, 0)  # the next corner, and not x0 + dx: the polygon stays closed
    xs, xe, run = x0.clamp(-a, a), x1.clamp(-a, a), _nonzero(dx)
    ys, ye = y0 + ((xs - x0) / run).clamp(0, 1) * dy, y1 - ((x1 - xe) / run).clamp(0, 1) * dy
    # from xs to xe the edge leaves |y| <= b outside of the share t1 .. t2, where clamp(y) is constant
    rise = _nonzero(ye - ys)
    t1, t2 = ((-b - ys) / rise).clamp(0, 1), ((b - ys) / rise).clamp(0, 1)
    t1, t2 = torch.minimum(t1, t2), torch.maximum(t1, t2)
    middle = ys + (t1 + t2) / 2 * (ye - ys)
    mean = t1 * ys.clamp(-b, b) + (t2 - t1) * middle.clamp(-b, b) + (1 - t2) * ye.clamp(-b, b)
    area1, area2 = _area(boxes1), _area(boxes2)
    inter = ((xs - xe) * mean).sum(0).clamp(min=0).minimum(area1).minimum(area2)
    iou = inter / (area1 + area2 - inter)
    return torch.where(iou > 0, iou, 0)


def _iou_backward(diou: Tensor, boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Gradient for boxes2 [..., 5] of the aligned IoU with boxes1, given that of the IoU [...]."""
    a, b, x0, y0, dx, dy = _edges(boxes1, boxes2)
    # the share t1 .. t2 of each edge lies inside box 1
    tx, ux = (-a - x0) / _nonzero(dx), (a - x0) / _nonzero(dx)
    ty, uy = (-b - y0) / _nonzero(dy), (b - y0) / _nonzero(dy)
    t1 = torch.maximum(torch.minimum(tx, ux), torch.minimum(ty, uy)).clamp(0, 1)
    t2 = torch.minimum(torch.maximum(tx, ux), torch.maximum(ty, uy)).clamp(0, 1)
    share = (t2 - t1).clamp(min=0)
    along = share * ((t1 + t2) / 2 - 0.5)
    w, h = boxes2[..., 2], boxes2[..., 3]
    du, dv = (dy * share).sum(0), -(dx * share).sum(0)
    cos, sin = boxes1[..., 4].cos(), boxes1[..., 4].sin()
    dinter = torch.stack([
        du * cos - dv * sin,
        du * sin + dv * cos,
        h * (share[0] + share[2]) / 2,
        w * (share[1] + share[3]) / 2,
        -h * h * (along[0] + along[2]) - w * w * (along[1] + along[3]),
    ], -1)
    zero = torch.zeros_like(w)
    darea = torch.stack([zero, zero, h, w, zero], -1)
    iou = _iou(boxes1, boxes2)[..., None]
    inter_to_union = (_area(boxes1) + _area(boxes2))[..., None] / (1 + iou)  # union = (A + B) / (1 + iou)
    grad = diou[..., None] * ((1 + iou) * dinter - iou * darea) / inter_to_union
    return torch.where((iou > 0) & (iou < 1), grad, 0)
