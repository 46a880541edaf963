"""IoU of rotated boxes (cx, cy, w, h, radians), exact in float32 and continuous where edges coincide.

Box 2 is moved into the frame of box 1, a rectangle |x| <= a, |y| <= b. Going round the edges of box 2,

    intersection = -sum over edges of the integral of clamp(y, -b, b) dx over |x| <= a

Each term is continuous in every coordinate: no two edges are compared, so none can be taken for crossing or not
by a rounding error. A sum below four units in the last place of box 1's area, which rounding alone leaves between
disjoint boxes, is 0. The gradient follows from the parts of the edges inside the other box: pushing an edge
outwards by e adds e times its length inside (Reynolds' transport theorem).

The angle turns x towards y (clockwise on a screen, y down). Boxes with a non-finite value, a side <= 0, values
beyond some 1e18 or an area below 1.2e-38 have IoU 0 with everything, and gradient 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtmdet_fast.kernels._dispatch import at_once, cdiv, tl, triton, triton_op, use_triton, wrap_triton

HUGE = 1e18  # from here on squares near the end of float32

TUNING = {
    "aligned": 128,  # pairs of a program: one a thread of 4 warps
    "lanes": 32,  # boxes of the first set for a program of the pairwise kernel: one warp, which culls by itself
    "chunk": 32,  # boxes of the second set that it meets
    "reference_pairs": 2**16,  # at once: the dense temporaries of a chunk stay in the cache
}


def box_iou_rotated(
    bboxes1: Tensor, bboxes2: Tensor, mode: str | bool = "iou", aligned: bool = False, clockwise: bool = True
) -> Tensor:
    """IoU of bboxes1 [..., N, 5] with bboxes2 [..., M, 5] -> [..., N, M], or pair by pair [..., N] if `aligned`.

    float32, or float64 if either input is. Only the aligned form is differentiable. Names and order of the arguments
    are those of `mmcv.ops`: `mode` "iof" divides by the area of box 1 instead, `clockwise` False takes angles from x
    towards -y. A bool in third place is `aligned`, as in `box_iou_rotated_reference`; of boxes [..., 6], as mmrotate's
    evaluation passes them, the sixth column (the score) is left out of account.
    """
    boxes1, boxes2 = (x[..., :5] if x.ndim and x.shape[-1] == 6 else x for x in (bboxes1, bboxes2))
    if isinstance(mode, bool):
        aligned, mode = mode, "iou"
    _check(boxes1, boxes2, aligned, ("bboxes1", "bboxes2"))
    if mode not in ("iou", "iof"):
        raise ValueError(f"mode={mode!r}: expected 'iou' or 'iof'")
    boxes1, boxes2 = _promote(boxes1, boxes2)
    if not clockwise:
        boxes1, boxes2 = (torch.cat([x[..., :4], -x[..., 4:]], -1) for x in (boxes1, boxes2))
    if aligned:
        iou = (_aligned if use_triton(boxes1) else _Aligned.apply)(boxes1, boxes2)
    else:
        iou = (_pairwise if use_triton(boxes1) else _pairwise_reference)(boxes1.detach(), boxes2.detach())
    if mode == "iou":
        return iou
    area1, area2 = boxes1[..., 2:4].prod(-1), boxes2[..., 2:4].prod(-1)
    if not aligned:
        area1, area2 = area1[..., :, None], area2[..., None, :]
    ratio = torch.where(iou > 0, area2, 0) / torch.where(iou > 0, area1, 1)
    return iou * (1 + ratio) / (1 + iou)  # inter = iou (A + B) / (1 + iou)


def rotated_iou_loss(
    pred: Tensor, target: Tensor, mode: str = "linear", reduction: str = "mean", weight: Tensor | None = None
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
    leading = slice(None, -1) if aligned else slice(None, -2)
    if boxes1.shape[leading] != boxes2.shape[leading]:
        raise ValueError(
            f"{names[1]} has shape {tuple(boxes2.shape)}, which does not fit "
            f"{names[0]} {tuple(boxes1.shape)} with aligned={aligned}"
        )
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
    if iou.numel() == 0:
        return iou
    rows = max(1, at_once(boxes1.device, TUNING["reference_pairs"]) // M)
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
    usable = (boxes.abs().sum(-1) < HUGE) & (boxes[..., 2] > 0) & (area >= torch.finfo(torch.float32).tiny)
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
    tiny = torch.finfo(x.dtype).tiny
    return torch.where(x.abs() < tiny, tiny, x)


def _iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    a, b, x0, y0, dx, dy = _edges(boxes1, boxes2)
    x1, y1 = (
        torch.cat((at[1:], at[:1])) for at in (x0, y0)
    )  # the next corner, and not x0 + dx: the polygon stays closed
    xs, xe, run = x0.clamp(-a, a), x1.clamp(-a, a), _nonzero(dx)
    ys, ye = y0 + ((xs - x0) / run).clamp(0, 1) * dy, y1 - ((x1 - xe) / run).clamp(0, 1) * dy
    # from xs to xe the edge leaves |y| <= b outside of the share t1 .. t2, where clamp(y) is constant
    rise = _nonzero(ye - ys)
    t1, t2 = ((-b - ys) / rise).clamp(0, 1), ((b - ys) / rise).clamp(0, 1)
    t1, t2 = torch.minimum(t1, t2), torch.maximum(t1, t2)
    middle = ys + (t1 + t2) / 2 * (ye - ys)
    mean = t1 * ys.clamp(-b, b) + (t2 - t1) * middle.clamp(-b, b) + (1 - t2) * ye.clamp(-b, b)
    area1, area2 = _area(boxes1), _area(boxes2)
    inter = ((xs - xe) * mean).sum(0).minimum(area1).minimum(area2)
    iou = inter / (area1 + area2 - inter)
    return torch.where(inter > 4 * torch.finfo(inter.dtype).eps * area1, iou, 0)


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
    dw, dh = h * (share[0] + share[2]) / 2, w * (share[1] + share[3]) / 2
    da = -h * h * (along[0] + along[2]) - w * w * (along[1] + along[3])
    dinter = torch.stack([du * cos - dv * sin, du * sin + dv * cos, dw, dh, da], -1)
    zero = torch.zeros_like(w)
    darea = torch.stack([zero, zero, h, w, zero], -1)
    iou = _iou(boxes1, boxes2)[..., None]
    inter_to_union = (_area(boxes1) + _area(boxes2))[..., None] / (1 + iou)  # union = (A + B) / (1 + iou)
    grad = diou[..., None] * ((1 + iou) * dinter - iou * darea) / inter_to_union
    return torch.where((iou > 0) & (iou < 1), grad, 0)


@triton.jit
def _cos_sin(x):
    """cos x and sin x, or both negated where x lies in another half turn, after which a box is the same box.

    Series, since the library's cos and sin keep a stack frame for the reduction of huge arguments.
    """
    TERMS: tl.constexpr = 13 if x.dtype.scalar == tl.float64 else 7
    turns = tl.floor(x * 0.3183098861837907 + 0.5)
    x = x - turns * 3.140625 - turns * 9.67502593994140625e-4 - turns * 1.509957990978376432e-7  # pi in 3 parts
    cos, sin = x * 0 + 1, x * 0 + 1
    for k in tl.static_range(2 * TERMS, 0, -2):
        cos = 1 - x * x * cos * (1.0 / (k * (k - 1)))
        sin = 1 - x * x * sin * (1.0 / (k * (k + 1)))
    return cos, x * sin


@triton.jit
def _nonzero_tl(x):
    return tl.where(tl.abs(x) < 1.1754943508222875e-38, 1.1754943508222875e-38, x)  # the smallest normal number


@triton.jit
def _clamp(x, a):
    return tl.minimum(tl.maximum(x, -a), a)


@triton.jit
def _unit(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _edge_integral(x0, y0, x1, y1, dx, dy, a, b):
    """Integral of -clamp(y, -b, b) dx over |x| <= a, along the edge from (x0, y0) to (x1, y1)."""
    xs, xe, run = _clamp(x0, a), _clamp(x1, a), _nonzero_tl(dx)
    ys, ye = y0 + _unit((xs - x0) / run) * dy, y1 - _unit((x1 - xe) / run) * dy
    rise = _nonzero_tl(ye - ys)
    t, u = _unit((-b - ys) / rise), _unit((b - ys) / rise)
    t1, t2 = tl.minimum(t, u), tl.maximum(t, u)
    middle = ys + (t1 + t2) * 0.5 * (ye - ys)
    return (xs - xe) * (t1 * _clamp(ys, b) + (t2 - t1) * _clamp(middle, b) + (1 - t2) * _clamp(ye, b))


@triton.jit
def _relative(box1, box2):
    """Centre and half sides (as vectors) of box 2 in the frame of box 1."""
    x1, y1, _, _, a1 = box1
    x2, y2, w2, h2, a2 = box2
    cos, sin = _cos_sin(a1)
    u, v = (x2 - x1) * cos + (y2 - y1) * sin, (y2 - y1) * cos - (x2 - x1) * sin
    cos, sin = _cos_sin(a2 - a1)
    return u, v, cos * w2 * 0.5, sin * w2 * 0.5, -sin * h2 * 0.5, cos * h2 * 0.5


@triton.jit
def rotated_iou_pair(x1, y1, w1, h1, a1, x2, y2, w2, h2, a2):
    """IoU of two rotated boxes a lane; the ten tensors (or scalars) broadcast, and are all float32 or all float64.

    Centre, sides, radians. 0 where either box is unusable (see the module). Some 300 flops, 17 divisions among them, so
    cull by bounding circles first: `(x1-x2)^2 + (y1-y2)^2 < (r1+r2)^2` with `r = sqrt(w^2 + h^2) / 2`.
    """
    u, v, wx, wy, hx, hy = _relative((x1, y1, w1, h1, a1), (x2, y2, w2, h2, a2))
    ax, ay, bx, by = u + (wx - hx), v + (wy - hy), u + (wx + hx), v + (wy + hy)
    cx, cy, dx, dy = u - (wx - hx), v - (wy - hy), u - (wx + hx), v - (wy + hy)
    a, b = w1 * 0.5, h1 * 0.5
    inter = _edge_integral(ax, ay, bx, by, 2 * hx, 2 * hy, a, b)
    inter += _edge_integral(bx, by, cx, cy, -2 * wx, -2 * wy, a, b)
    inter += _edge_integral(cx, cy, dx, dy, -2 * hx, -2 * hy, a, b)
    inter += _edge_integral(dx, dy, ax, ay, 2 * wx, 2 * wy, a, b)
    area1, area2 = w1 * h1, w2 * h2
    inter = tl.minimum(inter, tl.minimum(area1, area2))
    EPS: tl.constexpr = 2.0**-52 if w1.dtype.scalar == tl.float64 else 2.0**-23
    most = tl.abs(x1) + tl.abs(y1) + w1 + h1 + tl.abs(a1) + tl.abs(x2) + tl.abs(y2) + w2 + h2 + tl.abs(a2)
    least = tl.minimum(tl.minimum(w1, h1), tl.minimum(w2, h2))
    usable = (most < 1e18) & (least > 0) & (tl.minimum(area1, area2) >= 1.1754943508222875e-38)
    usable = usable & (inter > 4 * EPS * area1)
    return tl.where(usable, inter / (area1 + area2 - inter), 0.0)


@triton.jit
def _edge_inside(x0, y0, dx, dy, a, b):
    """Share of the edge inside |x| <= a, |y| <= b, and its moment about the middle of the edge."""
    run, rise = _nonzero_tl(dx), _nonzero_tl(dy)
    tx, ux, ty, uy = (-a - x0) / run, (a - x0) / run, (-b - y0) / rise, (b - y0) / rise
    t1 = _unit(tl.maximum(tl.minimum(tx, ux), tl.minimum(ty, uy)))
    t2 = _unit(tl.minimum(tl.maximum(tx, ux), tl.maximum(ty, uy)))
    share = tl.maximum(t2 - t1, 0.0)
    return share, share * ((t1 + t2) * 0.5 - 0.5)


@triton.jit
def _store_gradient(grad_ptr, i, valid, diou, iou, box1, box2):
    """Gradient of diou * IoU for box 2, to row i of grad [N, 5]."""
    _, _, w1, h1, a1 = box1
    _, _, w2, h2, _ = box2
    u, v, wx, wy, hx, hy = _relative(box1, box2)
    a, b = w1 * 0.5, h1 * 0.5
    s0, m0 = _edge_inside(u + (wx - hx), v + (wy - hy), 2 * hx, 2 * hy, a, b)
    s1, m1 = _edge_inside(u + (wx + hx), v + (wy + hy), -2 * wx, -2 * wy, a, b)
    s2, m2 = _edge_inside(u - (wx - hx), v - (wy - hy), -2 * hx, -2 * hy, a, b)
    s3, m3 = _edge_inside(u - (wx + hx), v - (wy + hy), 2 * wx, 2 * wy, a, b)
    du, dv = 2 * (hy * (s0 - s2) - wy * (s1 - s3)), 2 * (wx * (s1 - s3) - hx * (s0 - s2))
    cos, sin = _cos_sin(a1)
    scale = diou * (1 + iou) / (w1 * h1 + w2 * h2)
    inner = scale * (1 + iou)
    moves = valid & (iou > 0) & (iou < 1)
    grad_ptr += i * 5
    tl.store(grad_ptr, tl.where(moves, inner * (du * cos - dv * sin), 0.0), mask=valid)
    tl.store(grad_ptr + 1, tl.where(moves, inner * (du * sin + dv * cos), 0.0), mask=valid)
    tl.store(grad_ptr + 2, tl.where(moves, h2 * (inner * (s0 + s2) * 0.5 - scale * iou), 0.0), mask=valid)
    tl.store(grad_ptr + 3, tl.where(moves, w2 * (inner * (s1 + s3) * 0.5 - scale * iou), 0.0), mask=valid)
    turn = -inner * (h2 * h2 * (m0 + m2) + w2 * w2 * (m1 + m3))
    tl.store(grad_ptr + 4, tl.where(moves, turn, 0.0), mask=valid)


@triton.jit
def load_box(ptr, mask, other, SIZE: tl.constexpr):
    """The SIZE numbers of a box a lane, `other` where masked."""
    box = ()
    for i in tl.static_range(SIZE):
        box += (tl.load(ptr + i, mask, other),)  # type: ignore[assignment]
    return box


@triton.jit(do_not_specialize=["n"])
def _aligned_kernel(
    boxes1_ptr, boxes2_ptr, diou_ptr, iou_ptr, grad1_ptr, grad2_ptr, n, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK pairs, one a thread: forward 44 bytes and 300 flops in float32, backward 84 bytes and 700 flops."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < n
    nan = float("nan")  # is near nothing
    box1, box2 = load_box(boxes1_ptr + i * 5, valid, nan, 5), load_box(boxes2_ptr + i * 5, valid, nan, 5)
    iou = rotated_iou_pair(*box1, *box2)
    if BACKWARD:  # recomputing the IoU is cheaper than saving it
        diou = tl.load(diou_ptr + i, mask=valid, other=0)
        _store_gradient(grad1_ptr, i, valid, diou, iou, box2, box1)
        _store_gradient(grad2_ptr, i, valid, diou, iou, box1, box2)
    else:
        tl.store(iou_ptr + i, iou, mask=valid)


@triton.jit(do_not_specialize=["n", "m"])
def _pairwise_kernel(boxes1_ptr, boxes2_ptr, iou_ptr, n, m, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK boxes of the first set, one a lane of a warp, by CHUNK boxes of the second, one after the other.

    Where no bounding circle meets that of box 2, the step ends after some 10 flops a pair instead of 300; neighbouring
    predictions lie together, so that few steps go on when 1 % of the pairs meet. Only these pairs are stored: the
    output, filled with zeros beforehand, is written once (4 bytes a pair) and hardly again.
    """
    image = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    nan = float("nan")
    x1, y1, w1, h1, a1 = load_box(boxes1_ptr + (image * n + i) * 5, i < n, nan, 5)
    r1 = tl.sqrt(w1 * w1 + h1 * h1) * 0.5
    iou_ptr += (image * n + i) * m
    for k in range(CHUNK):
        j = tl.program_id(1).to(tl.int64) * CHUNK + k
        x2, y2, w2, h2, a2 = load_box(boxes2_ptr + (image * m + j) * 5, j < m, nan, 5)
        reach = r1 + tl.sqrt(w2 * w2 + h2 * h2) * 0.5
        dx, dy = x1 - x2, y1 - y2
        near = dx * dx + dy * dy < reach * reach
        if tl.max(near.to(tl.int32), 0) > 0:
            iou = rotated_iou_pair(x1, y1, w1, h1, a1, x2, y2, w2, h2, a2)
            tl.store(iou_ptr + j, iou, mask=near)


@triton_op("rtmdet_fast::box_iou_rotated")
def _pairwise(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    boxes1, boxes2 = boxes1.contiguous(), boxes2.contiguous()
    n, m = boxes1.shape[-2], boxes2.shape[-2]
    iou = boxes1.new_zeros(*boxes1.shape[:-1], m)
    if iou.numel():
        block, chunk = TUNING["lanes"], TUNING["chunk"]
        grid = (cdiv(n, block), cdiv(m, chunk), iou.numel() // (n * m))
        wrap_triton(_pairwise_kernel)[grid](boxes1, boxes2, iou, n, m, CHUNK=chunk, BLOCK=block, num_warps=1)
    return iou


def _launch_aligned(*arguments: Any, backward: bool) -> None:
    block = TUNING["aligned"]
    wrap_triton(_aligned_kernel)[(cdiv(arguments[-1], block),)](*arguments, BACKWARD=backward, BLOCK=block)


@triton_op("rtmdet_fast::box_iou_rotated_aligned")
def _aligned(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    boxes1, boxes2 = boxes1.contiguous(), boxes2.contiguous()
    iou = boxes1.new_empty(boxes1.shape[:-1])
    if n := iou.numel():
        _launch_aligned(boxes1, boxes2, iou, iou, iou, iou, n, backward=False)
    return iou


@triton_op("rtmdet_fast::box_iou_rotated_aligned_backward")
def _aligned_backward(diou: Tensor, boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    diou, boxes1, boxes2 = diou.contiguous(), boxes1.contiguous(), boxes2.contiguous()
    grad1, grad2 = torch.empty_like(boxes1), torch.empty_like(boxes2)
    if n := diou.numel():
        _launch_aligned(boxes1, boxes2, diou, diou, grad1, grad2, n, backward=True)
    return grad1, grad2


_aligned.register_autograd(
    lambda ctx, diou: _aligned_backward(diou, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
