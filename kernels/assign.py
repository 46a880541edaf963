"""Label assignment for a whole batch: RTMDet's dynamic soft labels, and SimOTA and TaskAligned as other costs.

Dynamic soft labels (arXiv:2212.07784). A candidate is a prior inside at least one ground truth (rotated: inside by
0.01 px), and a candidate for all of them. With logit x, p = sigmoid(x) and y = IoU, ground truth j costs prior i

    sum over classes of bce(x, t) |t - p|^2  -  iou_weight log(y + 1e-7)  +  10^(distance / stride - center_radius)

where t is y at the class of j and 0 elsewhere. With s = log(1 + e^x) the class sum has a closed form,

    S(i) + y (s (y - 2p) - x (y - p)^2),    S(i) = sum over classes of s p^2

S is summed once a prior and the rest vanishes for disjoint boxes: nothing has the size N * M * C. Ground truth j wins
the k least costs, k = max(int(sum of the topk greatest IoUs), 1); a prior that several won goes to the least cost over
all ground truths, also one that had not won it.

SimOTA (arXiv:2107.08430) matches likewise with, for candidates inside any ground truth or any square of half side
center_radius * stride around a centre,

    cls_weight sum of bce(p, one-hot)  -  iou_weight log(y + 1e-7)  +  1e5 (not inside both box and square of j)

TaskAligned (arXiv:2108.07755): ground truth j wins the topk greatest p^alpha y^beta over all priors, as far as they are
above 0 and inside j by 0.01 px; a prior that several won goes to the greatest IoU among them.

What cannot match: ground truths from `gt_counts` on, with a label outside [0, C), a non-finite coordinate or centre, or
x2 < x1 or y2 < y1 (w < 0 or h < 0); priors with a non-finite box, logit or score (SimOTA: a score outside [0, 1]) or
a stride <= 0; pairs whose cost overflows. None of them changes what others get. As in the published assigners a
zero-size ground truth still competes for candidates, and a zero-size or inverted prediction has IoU 0 with all: it
counts for no k, and matches only where nothing costs less.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.kernels._dispatch import cdiv, tl, triton, triton_op, use_triton, wrap_triton
from rtmdet_fast.kernels.rotated_iou import _cos_sin, box_iou_rotated_reference, rotated_iou_pair

_EPS = 1e-7  # of the published IoU cost
_LOG2_10 = math.log2(10)
# priors a program takes at once: as many as fit its registers without spilling (tests/test_assign.py, test_lowering)
_PRIOR_BLOCK, _MATCH_BLOCK, _RESOLVE_BLOCK = 32, {4: 256, 5: 32}, 128
_CHUNK = 2**18  # elements of a temporary in the reference: 1 MB, so that the dozen of them stay in the cache


def dynamic_soft_label_assign(
    boxes: Tensor,
    logits: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor,
    gt_centers: Tensor | None = None,
    *,
    topk: int = 13,
    center_radius: float = 3.0,
    iou_weight: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Assigns at most one ground truth to every prior, as RTMDet's `DynamicSoftLabelAssigner`; not differentiable.

    Args:
        boxes: [B, N, 4] decoded xyxy in pixels, or [B, N, 5] (cx, cy, w, h, radians).
        logits: [B, N, C] before the sigmoid.
        priors: [N, 4] (x, y, stride, stride) in pixels.
        gt_boxes: [B, M, 4 or 5], padded.
        gt_labels: [B, M] integers in [0, C).
        gt_counts: [B] integers; what stands in the rows from there on does not matter.
        gt_centers: [B, M, 2] where distances are taken from, if not the box centres (mask centroids).

    Returns:
        assigned_gt [B, N] int64, -1 for background; assigned_iou [B, N], 0 for background, float32 (float64 for
        float64 boxes); assigned_labels [B, N] int64, -1 for background. Computed in that dtype, whatever the inputs'.

    Raises ValueError or TypeError, naming the argument, for shapes, dtypes or devices that do not fit.
    """
    return _assign(
        boxes,
        logits,
        priors,
        gt_boxes,
        gt_labels,
        gt_counts,
        gt_centers,
        "soft_label",
        topk,
        center_radius,
        iou_weight,
        1.0,
        "logits",
    )


def dynamic_soft_label_assign_reference(
    boxes: Tensor,
    logits: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor,
    gt_centers: Tensor | None = None,
    *,
    topk: int = 13,
    center_radius: float = 3.0,
    iou_weight: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dynamic_soft_label_assign` in PyTorch, on any device."""
    return _assign(
        boxes,
        logits,
        priors,
        gt_boxes,
        gt_labels,
        gt_counts,
        gt_centers,
        "soft_label",
        topk,
        center_radius,
        iou_weight,
        1.0,
        "logits",
        reference=True,
    )


def simota_assign(
    boxes: Tensor,
    scores: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor,
    *,
    topk: int = 10,
    center_radius: float = 2.5,
    iou_weight: float = 3.0,
    cls_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `dynamic_soft_label_assign` with YOLOX's cost; `scores` [B, N, C] in [0, 1] (class times objectness)."""
    return _assign(
        boxes,
        scores,
        priors,
        gt_boxes,
        gt_labels,
        gt_counts,
        None,
        "simota",
        topk,
        center_radius,
        iou_weight,
        cls_weight,
        "scores",
    )


def task_aligned_assign(
    boxes: Tensor,
    scores: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor,
    *,
    topk: int = 13,
    alpha: float = 1.0,
    beta: float = 6.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `dynamic_soft_label_assign` with TOOD's alignment metric; `scores` [B, N, C] in [0, 1].

    Returns also the metric [B, N] of each prior with its ground truth, 0 for background.
    """
    gt, iou, label = _assign(
        boxes, scores, priors, gt_boxes, gt_labels, gt_counts, None, "task_aligned", topk, 0.0, beta, alpha, "scores"
    )
    score = scores.detach().to(iou.dtype).gather(2, label.clamp(min=0)[..., None])[..., 0]
    return gt, iou, label, torch.where(gt < 0, 0, score**alpha * iou**beta)


def _assign(
    boxes: Tensor,
    scores: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor,
    gt_centers: Tensor | None,
    cost: str,
    topk: int,
    radius: float,
    iou_weight: float,
    cls_weight: float,
    name: str,
    reference: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = {
        "boxes": boxes,
        name: scores,
        "priors": priors,
        "gt_boxes": gt_boxes,
        "gt_labels": gt_labels,
        "gt_counts": gt_counts,
    }
    if gt_centers is not None:
        tensors["gt_centers"] = gt_centers
    for key, x in tensors.items():
        integer = key in ("gt_labels", "gt_counts")
        if x.is_floating_point() == integer or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"{key} is {x.dtype}: expected {'an integer' if integer else 'a floating'} dtype")
        if x.device != boxes.device:
            raise ValueError(f"{key} is on {x.device}, boxes on {boxes.device}")
    if boxes.ndim != 3 or boxes.shape[2] not in (4, 5):
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}: expected [B, N, 4 or 5]")
    if scores.ndim != 3 or scores.shape[:2] != boxes.shape[:2] or scores.shape[2] == 0:
        raise ValueError(f"{name} has shape {tuple(scores.shape)}: expected {[*boxes.shape[:2]]} and C > 0 classes")
    if gt_boxes.ndim != 3:
        raise ValueError(f"gt_boxes has shape {tuple(gt_boxes.shape)}: expected [B, M, {boxes.shape[2]}]")
    B, N, M = *boxes.shape[:2], gt_boxes.shape[1]
    shapes = {
        "priors": (N, 4),
        "gt_boxes": (B, M, boxes.shape[2]),
        "gt_labels": (B, M),
        "gt_counts": (B,),
        "gt_centers": (B, M, 2),
    }
    for key in shapes.keys() & tensors.keys():
        if tensors[key].shape != shapes[key]:
            raise ValueError(f"{key} has shape {tuple(tensors[key].shape)}: expected {list(shapes[key])}")
    if not isinstance(topk, int) or not 1 <= topk <= 64:
        raise ValueError(f"topk={topk!r}: expected an integer from 1 to 64")
    takes_triton = use_triton(boxes) and boxes.dtype != torch.float64  # in which the kernels do not compute
    op: Any = _forward if takes_triton and not reference else _reference
    centers = None if gt_centers is None else gt_centers.detach()
    return op(
        boxes.detach(),
        scores.detach(),
        priors.detach(),
        gt_boxes.detach(),
        gt_labels,
        gt_counts,
        centers,
        cost,
        topk,
        float(radius),
        float(iou_weight),
        float(cls_weight),
    )


class _Candidates(NamedTuple):
    """Priors that can match, padded; pads (and unusable ones) have box 0 and class sum inf."""

    prior: Tensor  # [B, Q] into N
    x: Tensor  # [B, Q]
    y: Tensor
    stride: Tensor
    class_sum: Tensor
    box: Tensor  # [4 or 5, B, Q]

    def take(self, i: Tensor) -> _Candidates:
        return _Candidates(*(f.gather(-1, i.expand(*f.shape[:-2], *i.shape)) for f in self))


@torch.library.custom_op("rtmdet_fast::assign_reference", mutates_args=())
def _reference(
    boxes: Tensor,
    scores: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor,
    gt_centers: Optional[Tensor],  # noqa: UP045 (what torch.library reads)
    cost: str,
    topk: int,
    radius: float,
    iou_weight: float,
    cls_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """In PyTorch, on any device; opaque to `torch.compile`, since it goes on with the candidates alone.

    Works through the ground truths in chunks, [B, chunk, candidates] at a time, with fields as planes [4 or 5, ...].
    """
    (B, N, C), M = scores.shape, gt_boxes.shape[1]
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    assigned_gt = boxes.new_full((B, N), -1, dtype=torch.int64)
    assigned_iou, assigned_labels = boxes.new_zeros((B, N), dtype=dtype), assigned_gt.clone()

    scores, label = scores.contiguous(), gt_labels.long()
    real = (torch.arange(M, device=boxes.device) < gt_counts[:, None]) & (label >= 0) & (label < C)
    gt = gt_boxes.to(dtype).movedim(-1, 0)
    size = gt[2:4] if len(gt) == 5 else gt[2:] - gt[:2]
    real &= gt.isfinite().all(0) & (size >= 0).all(0) & size.prod(0).isfinite()
    center = gt[:2] if len(gt) == 5 else (gt[:2] + gt[2:]) / 2
    if gt_centers is not None:
        center = gt_centers.to(dtype).movedim(-1, 0)
        real &= center.isfinite().all(0)
    # at an infinite distance and of size zero an unreal ground truth holds no prior and costs infinity
    gt, label, center = torch.where(real, gt, 0), torch.where(real, label, 0), torch.where(real, center, torch.inf)
    gt, label, center = gt.contiguous(), label.contiguous(), center.contiguous()  # one image's may come expanded

    x, y, stride, _ = priors.to(dtype).T.contiguous()
    inside = ((stride > 0) & (stride < torch.inf)).expand(B, N)
    if cost != "task_aligned":
        deepest = boxes.new_full((B, N), -torch.inf, dtype=dtype)
        for j in _chunks(M, B * N):
            depth = _depth(x, y, gt[:, :, j, None])
            if cost == "simota":
                depth = torch.maximum(depth, _center_depth(x, y, stride, center[:, :, j, None], radius))
            torch.maximum(deepest, depth.amax(1), out=deepest)
        inside = inside & (deepest > (0.01 if len(gt) == 5 and cost == "soft_label" else 0))
    index, valid = _compact(inside)
    image = torch.arange(B, device=boxes.device)[:, None]
    box = boxes[image, index].to(dtype).movedim(-1, 0)
    area = box[2] * box[3] if len(gt) == 5 else (box[2] - box[0]) * (box[3] - box[1])
    class_sum = _class_sums(scores, index, cost, dtype) * cls_weight
    valid = valid & box.isfinite().all(0) & area.isfinite() & (class_sum < 1e30)
    prior = _Candidates(
        index,
        x[index],
        y[index],
        stride[index],
        torch.where(valid, class_sum, torch.inf),
        torch.where(valid, box, 0).contiguous(),
    )

    def pairs(prior: _Candidates, j: slice) -> tuple[Tensor, Tensor]:
        cell = (image * N + prior.prior) * C  # of class 0 in the flat scores
        return _pairs(
            prior,
            cell,
            scores.view(-1),
            gt[:, :, j],
            label[:, j],
            center[:, :, j],
            cost,
            radius,
            iou_weight,
            cls_weight,
        )

    # the winners of each ground truth, as indices into the candidates
    Q, k = index.shape[1], min(topk, index.shape[1])
    rank, won = torch.arange(k, device=boxes.device), []
    for j in _chunks(M, B * Q):
        iou, price = pairs(prior, j)
        value, i = _least(price, k)
        wins = value < torch.inf
        if cost == "task_aligned":
            at = i.flatten(1)
            at_x, at_y = (f.gather(1, at).view(i.shape) for f in (prior.x, prior.y))
            wins &= _depth(at_x, at_y, gt[:, :, j, None]) > 0.01
            value = -iou.gather(2, i)  # decides between ground truths that won the same prior
        else:
            wins &= rank < (-_least(iou.neg_(), k)[0].sum(-1)).int().clamp(min=1)[..., None]
        won.append((i, wins, torch.where(wins, value, torch.inf)))
    if k == 0 or M == 0:
        return assigned_gt, assigned_iou, assigned_labels
    i, wins, value = (torch.cat(t, 1).flatten(1) for t in zip(*won, strict=True))

    # of the ground truths that won a prior the least value, and of equal ones the first
    least = value.new_full((B, Q), torch.inf).scatter_reduce_(1, i, value, "amin")
    who = torch.arange(M, device=boxes.device).repeat_interleave(k)
    who = torch.where(wins & (value == least.gather(1, i)), who, M)
    matched = i.new_full((B, Q), M).scatter_reduce_(1, i, who, "amin")
    if cost != "task_aligned":
        several, valid = _compact(i.new_zeros((B, Q)).scatter_add_(1, i, wins.long()) > 1)
        rest = prior.take(several)
        least, best = value.new_full(several.shape, torch.inf), torch.zeros_like(several)
        for j in _chunks(M, several.numel()):
            value, arg = pairs(rest, j)[1].min(1)
            best = torch.where(value < least, arg + j.start, best)
            least = torch.minimum(least, value)
        matched[image.expand_as(several)[valid], several[valid]] = best[valid]

    b, q = (matched < M).nonzero(as_tuple=True)
    who, i = matched[b, q], index[b, q]
    assigned_gt[b, i], assigned_labels[b, i] = who, label[b, who]
    assigned_iou[b, i] = _iou(gt[:, b, who], prior.box[:, b, q], aligned=True)
    return assigned_gt, assigned_iou, assigned_labels


@_reference.register_fake
def _(boxes: Tensor, scores: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    gt = boxes.new_empty(boxes.shape[:2], dtype=torch.int64)
    return gt, boxes.new_empty(boxes.shape[:2], dtype=torch.promote_types(boxes.dtype, torch.float32)), gt.clone()


def _pairs(
    prior: _Candidates,
    cell: Tensor,
    scores: Tensor,
    gt: Tensor,
    label: Tensor,
    center: Tensor,
    cost: str,
    radius: float,
    iou_weight: float,
    cls_weight: float,
) -> tuple[Tensor, Tensor]:
    """IoU and cost [B, m, Q] of ground truths gt [4 or 5, B, m] for candidates."""
    iou = _iou(gt, prior.box)
    x, y, stride, class_sum = (f[:, None] for f in prior[1:5])
    gt, center = gt[..., None], center[..., None]
    if cost == "simota":
        p = scores[cell[:, None] + label[..., None]].to(iou.dtype)
        cls = class_sum + cls_weight * ((-p).log1p().clamp(min=-100) - p.log().clamp(min=-100))
        both = torch.minimum(_depth(x, y, gt), _center_depth(x, y, stride, center, radius)) > 0
        price = cls - iou_weight * (iou + _EPS).log() + torch.where(both, 0, 1e5)
        return iou, price.masked_fill_(center[0] == torch.inf, torch.inf)
    # the class term vanishes where boxes are disjoint: it is computed for the other few per cent alone
    m, Q = iou.shape[1:]
    pair = iou.view(-1).nonzero()[:, 0]
    row = pair.div(Q, rounding_mode="floor")
    column = pair - (row - row.div(m, rounding_mode="floor")) * Q
    overlap, logit = iou.view(-1)[pair], scores[cell.view(-1)[column] + label.flatten()[row]].to(iou.dtype)
    if cost == "task_aligned":
        price = torch.full_like(iou, torch.inf)
        metric = (logit**cls_weight * overlap**iou_weight).add_(0 * class_sum.flatten()[column])
        price.view(-1)[pair] = torch.where(metric > 0, -metric, torch.inf)
        return iou, price
    dx, dy = x - center[0], y - center[1]
    distance = dx.square_().addcmul_(dy, dy).sqrt_()
    price = distance.div_(stride).sub_(radius).mul_(_LOG2_10).exp2_().add_(class_sum)
    p, s = logit.sigmoid(), F.softplus(logit)
    cls = overlap * (s * (overlap - 2 * p) - logit * (overlap - p).square())
    touching = price.view(-1)[pair] + cls - iou_weight * (overlap + _EPS).log()
    price -= iou_weight * math.log(_EPS)
    price.view(-1)[pair] = touching
    return iou, price


def _iou(gt: Tensor, box: Tensor, aligned: bool = False) -> Tensor:
    """IoU [..., m, Q] of gt [4 or 5, ..., m] with box [4 or 5, ..., Q], or [..., m] of pairs."""
    if len(gt) == 5:
        # the prediction first, as the published assigner has it: of the slightest overlaps the order decides
        gt = torch.cat([gt[:2], gt[2:4].clamp(min=1e-3), gt[4:]])
        iou = box_iou_rotated_reference(box.movedim(0, -1), gt.movedim(0, -1), aligned)
        return iou if aligned else iou.mT.contiguous()
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = (gt, box) if aligned else (gt[..., None], box[..., None, :])
    w = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    h = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    inter = w.mul_(h)
    union = ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1)).sub_(inter)
    return inter.div_(union.clamp_(min=1e-6))


def _depth(x: Tensor, y: Tensor, gt: Tensor) -> Tensor:
    """How far points lie inside boxes gt [4 or 5, ...], in pixels; below 0 outside."""
    if len(gt) == 4:
        x1, y1, x2, y2 = gt
        return torch.minimum(torch.minimum(x - x1, x2 - x), torch.minimum(y - y1, y2 - y))
    cos, sin, dx, dy = gt[4].cos(), gt[4].sin(), x - gt[0], y - gt[1]
    return torch.minimum(gt[2] / 2 - (dx * cos + dy * sin).abs(), gt[3] / 2 - (dy * cos - dx * sin).abs())


def _center_depth(x: Tensor, y: Tensor, stride: Tensor, center: Tensor, radius: float) -> Tensor:
    return radius * stride - torch.maximum((x - center[0]).abs(), (y - center[1]).abs())


def _class_sums(scores: Tensor, index: Tensor, cost: str, dtype: torch.dtype) -> Tensor:
    """The part of the cost that no ground truth changes, [B, Q]; NaN or inf where a score is unusable."""
    out = scores.new_empty(index.shape, dtype=dtype)
    image = torch.arange(len(index), device=index.device)[:, None]
    for i in _chunks(index.shape[1], len(index) * scores.shape[2]):
        x = scores[image, index[:, i]].to(dtype)
        if cost == "soft_label":
            p = x.sigmoid()
            out[:, i] = F.softplus(x).mul_(p).mul_(p).sum(-1)
        elif cost == "simota":
            out[:, i] = -(-x).log1p().clamp(min=-100).sum(-1)
            x = x.sqrt()  # NaN below 0
        else:
            out[:, i] = 0
        out[:, i] += 0 * (x.amin(-1) + x.amax(-1))
    return out


def _compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where mask [B, N] holds: index [B, Q], padded with 0, and which of it is real [B, Q]."""
    b, i = mask.nonzero(as_tuple=True)
    count = mask.sum(1)
    index = i.new_zeros(len(mask), int(count.max()) if len(mask) else 0)
    index[b, torch.arange(len(b), device=b.device) - (count.cumsum(0) - count)[b]] = i
    return index, torch.arange(index.shape[1], device=b.device) < count[:, None]


def _chunks(n: int, width: int) -> list[slice]:
    """Slices of range(n) that make at most _CHUNK elements of rows of `width`; none of rows of nothing."""
    step = max(1, _CHUNK // max(width, 1))
    return [slice(i, min(i + step, n)) for i in range(0, n if width else 0, step)]


def _least(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k least of the last dimension, rising, and where: twice as fast as `topk` by first ruling out most of it."""
    n = x.shape[-1] // 8
    if n < 64 * k:  # below that `topk` changes to a slower algorithm
        return x.topk(k, largest=False)
    group = x[..., : 8 * n].unflatten(-1, (8, n)).amin(-2).topk(k, largest=False, sorted=False).indices
    at = (group[..., None, :] + n * torch.arange(8, device=x.device)[:, None]).flatten(-2)
    at = torch.cat([at, torch.arange(8 * n, x.shape[-1], device=x.device).expand(*at.shape[:-1], -1)], -1)
    value, i = x.gather(-1, at).topk(k, largest=False)
    return value, at.gather(-1, i)


# Batch 32, 8400 priors, 80 classes, 100 ground truths, fp16 logits: `_prior_kernel` reads the logits of the candidates
# once, at most 43 MB, and writes 1 MB. `_match_kernel` goes through 27 M pairs at some 60 flops, 1.6 Gflop, and reads
# 32 bytes for each from the caches (box, prior, class sum), 0.9 GB; it reads logits only where boxes overlap, a few
# per cent of the pairs. `_resolve_kernel` reads 2 MB of winners and repeats the pairs of those blocks of priors where
# several ground truths won one. Beside the outputs 12 bytes a prior and 256 a ground truth are allocated: 4 MB.
@triton.jit
def _load_gt(gt_ptr, label_ptr, center_ptr, j, mask, C, BOX: tl.constexpr, CENTERS: tl.constexpr):
    """Box, centre, label and realness of ground truth(s) j; what is not real has size 0, label 0 and stands at inf."""
    j = j.to(tl.int64)
    g0 = tl.load(gt_ptr + j * BOX, mask, 0).to(tl.float32)
    g1 = tl.load(gt_ptr + j * BOX + 1, mask, 0).to(tl.float32)
    g2 = tl.load(gt_ptr + j * BOX + 2, mask, 0).to(tl.float32)
    g3 = tl.load(gt_ptr + j * BOX + 3, mask, 0).to(tl.float32)
    label = tl.load(label_ptr + j, mask, -1)
    if BOX == 5:
        angle = tl.load(gt_ptr + j * BOX + 4, mask, 0).to(tl.float32)
        w, h, cx, cy = g2, g3, g0, g1
    else:
        angle = g0 * 0
        w, h, cx, cy = g2 - g0, g3 - g1, (g0 + g2) * 0.5, (g1 + g3) * 0.5
    if CENTERS:
        cx = tl.load(center_ptr + j * 2, mask, 0).to(tl.float32)
        cy = tl.load(center_ptr + j * 2 + 1, mask, 0).to(tl.float32)
    inf = float("inf")
    real = mask & (label >= 0) & (label < C) & (w >= 0) & (h >= 0) & (w * h < inf)
    real = real & (tl.abs(g0) + tl.abs(g1) < inf) & (tl.abs(angle) < inf) & (tl.abs(cx) + tl.abs(cy) < inf)
    g0, g1, g2 = tl.where(real, g0, 0.0), tl.where(real, g1, 0.0), tl.where(real, g2, 0.0)
    g3, angle = tl.where(real, g3, 0.0), tl.where(real, angle, 0.0)
    cx, cy = tl.where(real, cx, inf), tl.where(real, cy, inf)
    return g0, g1, g2, g3, angle, cx, cy, tl.where(real, label, 0), real


@triton.jit
def _load_box(box_ptr, n, mask, BOX: tl.constexpr):
    box_ptr += n.to(tl.int64) * BOX
    b0 = tl.load(box_ptr, mask, 0).to(tl.float32)
    b1 = tl.load(box_ptr + 1, mask, 0).to(tl.float32)
    b2 = tl.load(box_ptr + 2, mask, 0).to(tl.float32)
    b3 = tl.load(box_ptr + 3, mask, 0).to(tl.float32)
    b4 = b0 * 0
    if BOX == 5:
        b4 = tl.load(box_ptr + 4, mask, 0).to(tl.float32)
    return b0, b1, b2, b3, b4


@triton.jit
def _load_prior(prior_ptr, n, mask):
    prior_ptr += n.to(tl.int64) * 4
    x = tl.load(prior_ptr, mask, 0).to(tl.float32)
    y = tl.load(prior_ptr + 1, mask, 0).to(tl.float32)
    return x, y, tl.load(prior_ptr + 2, mask, 0).to(tl.float32)


@triton.jit
def _depth_tl(x, y, g0, g1, g2, g3, angle, BOX: tl.constexpr):
    if BOX == 5:
        cos, sin = _cos_sin(angle)
        dx, dy = x - g0, y - g1
        return tl.minimum(g2 * 0.5 - tl.abs(dx * cos + dy * sin), g3 * 0.5 - tl.abs(dy * cos - dx * sin))
    else:
        return tl.minimum(tl.minimum(x - g0, g2 - x), tl.minimum(y - g1, g3 - y))


@triton.jit
def _center_depth_tl(x, y, stride, cx, cy, radius):
    return radius * stride - tl.maximum(tl.abs(x - cx), tl.abs(y - cy))


@triton.jit
def _iou_tl(g0, g1, g2, g3, angle, b0, b1, b2, b3, b4, BOX: tl.constexpr):
    if BOX == 5:
        w, h = tl.maximum(g2, 1e-3), tl.maximum(g3, 1e-3)
        reach = 0.5 * (tl.sqrt(w * w + h * h) + tl.sqrt(b2 * b2 + b3 * b3))
        dx, dy = b0 - g0, b1 - g1
        near = dx * dx + dy * dy < reach * reach
        iou = tl.zeros_like(dx)
        if tl.max(near.to(tl.int32), 0) > 0:  # most blocks of priors end here
            iou = tl.where(near, rotated_iou_pair(b0, b1, b2, b3, b4, g0, g1, w, h, angle), 0.0)
    else:
        w = tl.maximum(tl.minimum(g2, b2) - tl.maximum(g0, b0), 0.0)
        h = tl.maximum(tl.minimum(g3, b3) - tl.maximum(g1, b1), 0.0)
        union = (g2 - g0) * (g3 - g1) + (b2 - b0) * (b3 - b1) - w * h
        iou = w * h / tl.maximum(union, 1e-6)
    return iou


@triton.jit
def _log1m_tl(p):
    """log(1 - p), at least -100."""
    return tl.maximum(tl.log(1 - p), -100.0)


@triton.jit
def _power_tl(x, exponent):
    return tl.where(exponent == 0, 1.0, tl.exp2(exponent * tl.log2(x)))


@triton.jit
def _pair_tl(
    score_ptr,
    n,
    x,
    y,
    stride,
    class_sum,
    b0,
    b1,
    b2,
    b3,
    b4,
    g0,
    g1,
    g2,
    g3,
    angle,
    cx,
    cy,
    label,
    C,
    radius,
    iou_weight,
    cls_weight,
    BOX: tl.constexpr,
    COST: tl.constexpr,
):
    """IoU and cost of one ground truth for a block of priors; 0 and inf where the class sum is inf."""
    usable = class_sum < float("inf")
    iou = tl.where(usable, _iou_tl(g0, g1, g2, g3, angle, b0, b1, b2, b3, b4, BOX), 0.0)
    score_ptr += n.to(tl.int64) * C + label
    if COST == "simota":
        p = tl.load(score_ptr, usable, 0).to(tl.float32)
        cost = class_sum + cls_weight * (_log1m_tl(p) - tl.maximum(tl.log(p), -100.0)) - iou_weight * tl.log(iou + 1e-7)
        both = tl.minimum(_depth_tl(x, y, g0, g1, g2, g3, angle, BOX), _center_depth_tl(x, y, stride, cx, cy, radius))
        cost += tl.where(both > 0, 0.0, 1e5) + tl.where(cx < float("inf"), 0.0, float("inf"))
    else:
        score = tl.load(score_ptr, iou > 0, 0).to(tl.float32)
        if COST == "task_aligned":
            metric = _power_tl(score, cls_weight) * _power_tl(iou, iou_weight)
            cost = tl.where((iou > 0) & (metric > 0), -metric, float("inf"))
        else:
            p = 1 / (1 + tl.exp(-score))
            s = tl.maximum(score, 0.0) + tl.log(1 + tl.exp(-tl.abs(score)))
            dx, dy = x - cx, y - cy
            far = tl.exp2((tl.sqrt(dx * dx + dy * dy) / stride - radius) * 3.321928094887362)  # log2(10)
            cls = iou * (s * (iou - 2 * p) - score * (iou - p) * (iou - p))
            cost = far + class_sum + cls - iou_weight * tl.log(iou + 1e-7)
    return iou, tl.where(usable, cost, float("inf"))


@triton.jit
def _prior_kernel(
    box_ptr,
    score_ptr,
    prior_ptr,
    gt_ptr,
    label_ptr,
    count_ptr,
    center_ptr,
    sum_ptr,
    N,
    M,
    C,
    radius,
    cls_weight,
    BOX: tl.constexpr,
    CENTERS: tl.constexpr,
    COST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Class sum of every candidate, inf for the other priors."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, stride = _load_prior(prior_ptr, n, n < N)
    b0, b1, b2, b3, b4 = _load_box(box_ptr + image * N * BOX, n, n < N, BOX)
    inf = float("inf")
    area = b2 * b3 if BOX == 5 else (b2 - b0) * (b3 - b1)
    usable = (n < N) & (tl.abs(area) < inf) & (tl.abs(b0) + tl.abs(b1) + tl.abs(b4) < inf)
    # comparisons keep out NaN, which tl.maximum does not
    usable = usable & (stride > 0) & (tl.abs(x) + tl.abs(y) + stride < inf)
    if COST != "task_aligned":
        gt_ptr, label_ptr, center_ptr = gt_ptr + image * M * BOX, label_ptr + image * M, center_ptr + image * M * 2
        count = tl.minimum(tl.load(count_ptr + image), M).to(tl.int32)
        deepest = tl.full([BLOCK], -inf, tl.float32)
        first = count * 0
        while first < count:
            j = first + tl.arange(0, BLOCK_M)
            g0, g1, g2, g3, angle, cx, cy, _, _ = _load_gt(gt_ptr, label_ptr, center_ptr, j, j < count, C, BOX, CENTERS)
            depth = _depth_tl(x[:, None], y[:, None], g0[None], g1[None], g2[None], g3[None], angle[None], BOX)
            if COST == "simota":
                square = _center_depth_tl(
                    x[:, None], y[:, None], stride[:, None], cx[None], cy[None], tl.full([], radius, tl.float32)
                )
                depth = tl.maximum(depth, square)
            deepest = tl.maximum(deepest, tl.max(depth, 1))
            first += BLOCK_M
        usable = usable & (deepest > (0.01 if BOX == 5 and COST == "soft_label" else 0.0))
    class_sum = tl.zeros([BLOCK], tl.float32)
    score_ptr += image * N * C
    first = tl.program_id(0) * 0
    while first < C:
        c = first + tl.arange(0, BLOCK_C)
        inside = usable[:, None] & (c < C)[None]
        score = tl.load(score_ptr + n.to(tl.int64)[:, None] * C + c[None], inside, 0).to(tl.float32)
        term = score * 0  # NaN for an infinite score
        if COST == "soft_label":
            p = 1 / (1 + tl.exp(-score))
            term += (tl.maximum(score, 0.0) + tl.log(1 + tl.exp(-tl.abs(score)))) * p * p
        elif COST == "simota":
            term -= tl.where((score >= 0) & (score <= 1), _log1m_tl(score), float("nan"))
        class_sum += tl.sum(tl.where(inside, term, 0.0), 1)
        first += BLOCK_C
    class_sum *= tl.full([], cls_weight, tl.float32)
    tl.store(sum_ptr + image * N + n, tl.where(usable & (class_sum < 1e30), class_sum, inf), n < N)


@triton.jit
def _match_kernel(
    box_ptr,
    score_ptr,
    prior_ptr,
    gt_ptr,
    label_ptr,
    count_ptr,
    center_ptr,
    sum_ptr,
    index_ptr,
    key_ptr,
    N,
    M,
    C,
    topk,
    radius,
    iou_weight,
    cls_weight,
    BOX: tl.constexpr,
    CENTERS: tl.constexpr,
    COST: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The priors that one ground truth wins, to index [B, M, LIST] into all of [B, N], and a key, 0 if it wins less.

    It goes through all priors with its topk IoUs and costs in registers: a list takes a block's best while that beats
    its worst. Blocks are visited last to first: priors stand fine to coarse, so that the few of the coarse levels set
    a bound that few others pass. No atomics here: an address that follows from the loop would have torch.compile
    believe that every input is written, and clone the logits.
    """
    j, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    gt_ptr, label_ptr, center_ptr = gt_ptr + image * M * BOX, label_ptr + image * M, center_ptr + image * M * 2
    g0, g1, g2, g3, angle, cx, cy, label, real = _load_gt(
        gt_ptr, label_ptr, center_ptr, j, j < tl.load(count_ptr + image), C, BOX, CENTERS
    )
    box_ptr, score_ptr, sum_ptr = box_ptr + image * N * BOX, score_ptr + image * N * C, sum_ptr + image * N
    radius, iou_weight = tl.full([], radius, tl.float32), tl.full([], iou_weight, tl.float32)
    cls_weight = tl.full([], cls_weight, tl.float32)
    inf = float("inf")
    lane, slot = tl.arange(0, BLOCK), tl.arange(0, LIST)
    # slots past topk are never the worst
    ious, costs = tl.where(slot < topk, 0.0, inf), tl.where(slot < topk, inf, -inf)
    index = tl.zeros([LIST], tl.int32)
    least_iou, most_cost = tl.min(ious, 0), tl.max(costs, 0)
    first = tl.where(real, tl.cdiv(N, BLOCK) * BLOCK, 0)
    while first > 0:
        first -= BLOCK
        n = first + lane
        class_sum = tl.load(sum_ptr + n, n < N, inf)
        if tl.min(class_sum, 0) < inf:
            x, y, stride = _load_prior(prior_ptr, n, n < N)
            b0, b1, b2, b3, b4 = _load_box(box_ptr, n, n < N, BOX)
            iou, cost = _pair_tl(
                score_ptr,
                n,
                x,
                y,
                stride,
                class_sum,
                b0,
                b1,
                b2,
                b3,
                b4,
                g0,
                g1,
                g2,
                g3,
                angle,
                cx,
                cy,
                label,
                C,
                radius,
                iou_weight,
                cls_weight,
                BOX,
                COST,
            )
            if COST != "task_aligned":
                best, at = tl.max(iou, 0, return_indices=True)
                while best > least_iou:
                    _, worst = tl.min(ious, 0, return_indices=True)
                    ious, iou = tl.where(slot == worst, best, ious), tl.where(lane == at, 0.0, iou)
                    least_iou = tl.min(ious, 0)
                    best, at = tl.max(iou, 0, return_indices=True)
            best, at = tl.min(cost, 0, return_indices=True)
            while best < most_cost:
                _, worst = tl.max(costs, 0, return_indices=True)
                costs = tl.where(slot == worst, best, costs)
                index = tl.where(slot == worst, first + at, index)
                cost = tl.where(lane == at, inf, cost)
                most_cost = tl.max(costs, 0)
                best, at = tl.min(cost, 0, return_indices=True)
    wins = (slot < topk) & (costs < inf)
    if COST == "task_aligned":
        x, y, stride = _load_prior(prior_ptr, index, wins)
        b0, b1, b2, b3, b4 = _load_box(box_ptr, index, wins, BOX)
        wins = wins & (_depth_tl(x, y, g0, g1, g2, g3, angle, BOX) > 0.01)
        iou = _iou_tl(g0, g1, g2, g3, angle, b0, b1, b2, b3, b4, BOX)
        key = (iou.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - j)
    else:
        k = tl.maximum(tl.sum(tl.where(slot < topk, ious, 0.0), 0).to(tl.int32), 1)
        earlier = (costs[None] == costs[:, None]) & (slot[None] < slot[:, None])
        ahead = ((costs[None] < costs[:, None]) | earlier) & (slot < topk)[None]
        wins = wins & (tl.sum(ahead.to(tl.int32), 1) < k)
        key = tl.full([LIST], 1 << 40, tl.int64) + j
    out = (image * M + j) * LIST + slot
    tl.store(index_ptr + out, image * N + index)
    tl.store(key_ptr + out, tl.where(wins, key, 0))


@triton.jit
def _resolve_kernel(
    box_ptr,
    score_ptr,
    prior_ptr,
    gt_ptr,
    label_ptr,
    count_ptr,
    center_ptr,
    sum_ptr,
    won_ptr,
    assigned_ptr,
    iou_ptr,
    assigned_label_ptr,
    N,
    M,
    C,
    radius,
    iou_weight,
    cls_weight,
    BOX: tl.constexpr,
    CENTERS: tl.constexpr,
    COST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The one ground truth of every prior: of several that won it the cheapest of all."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out = image * N + n
    won = tl.load(won_ptr + out, n < N, 0)
    gt_ptr, label_ptr, center_ptr = gt_ptr + image * M * BOX, label_ptr + image * M, center_ptr + image * M * 2
    b0, b1, b2, b3, b4 = _load_box(box_ptr + image * N * BOX, n, won > 0, BOX)
    if COST == "task_aligned":
        assigned = 0x7FFFFFFF - (won & 0xFFFFFFFF).to(tl.int32)
    else:
        several = (won >> 40) > 1
        assigned = tl.where(several, -1, (won & ((1 << 40) - 1)).to(tl.int32))
        if tl.max(several.to(tl.int32), 0) > 0:
            radius, iou_weight = tl.full([], radius, tl.float32), tl.full([], iou_weight, tl.float32)
            cls_weight = tl.full([], cls_weight, tl.float32)
            x, y, stride = _load_prior(prior_ptr, n, several)
            class_sum = tl.load(sum_ptr + out, several, float("inf"))
            least = tl.full([BLOCK], float("inf"), tl.float32)
            count = tl.minimum(tl.load(count_ptr + image), M).to(tl.int32)
            j = count * 0
            while j < count:
                g0, g1, g2, g3, angle, cx, cy, label, _ = _load_gt(
                    gt_ptr, label_ptr, center_ptr, j, j >= 0, C, BOX, CENTERS
                )
                _, cost = _pair_tl(
                    score_ptr + image * N * C,
                    n,
                    x,
                    y,
                    stride,
                    class_sum,
                    b0,
                    b1,
                    b2,
                    b3,
                    b4,
                    g0,
                    g1,
                    g2,
                    g3,
                    angle,
                    cx,
                    cy,
                    label,
                    C,
                    radius,
                    iou_weight,
                    cls_weight,
                    BOX,
                    COST,
                )
                assigned = tl.where(cost < least, j, assigned)
                least = tl.minimum(least, cost)
                j += 1
    match = (won > 0) & (assigned >= 0)
    g0, g1, g2, g3, angle, _, _, label, _ = _load_gt(gt_ptr, label_ptr, center_ptr, assigned, match, C, BOX, False)
    iou = _iou_tl(g0, g1, g2, g3, angle, b0, b1, b2, b3, b4, BOX)
    tl.store(assigned_ptr + out, tl.where(match, assigned, -1), n < N)
    tl.store(iou_ptr + out, tl.where(match, iou, 0.0), n < N)
    tl.store(assigned_label_ptr + out, tl.where(match, label, -1), n < N)


@triton_op("rtmdet_fast::assign")
def _forward(
    boxes: Tensor,
    scores: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor,
    gt_centers: Optional[Tensor],  # noqa: UP045 (what torch.library reads)
    cost: str,
    topk: int,
    radius: float,
    iou_weight: float,
    cls_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, C), M = scores.shape, gt_boxes.shape[1]
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    if B * N * M == 0:
        nothing = boxes.new_full((B, N), -1, dtype=torch.int64)
        return nothing, boxes.new_zeros((B, N), dtype=dtype), nothing.clone()
    assigned, labels = (boxes.new_empty((B, N), dtype=torch.int64) for _ in range(2))
    iou = boxes.new_empty((B, N), dtype=dtype)
    centers = gt_boxes if gt_centers is None else gt_centers
    inputs = [t.contiguous() for t in (boxes, scores, priors, gt_boxes, gt_labels, gt_counts, centers)]
    class_sum = boxes.new_empty((B, N), dtype=torch.float32)
    LIST = triton.next_power_of_2(topk)
    index, key = (boxes.new_empty((B * M * LIST,), dtype=torch.int64) for _ in range(2))
    same = {"BOX": boxes.shape[2], "CENTERS": gt_centers is not None, "COST": cost}
    wrap_triton(_prior_kernel)[(cdiv(N, _PRIOR_BLOCK), B)](
        *inputs, class_sum, N, M, C, radius, cls_weight, **same, BLOCK=_PRIOR_BLOCK, BLOCK_M=32, BLOCK_C=16
    )
    wrap_triton(_match_kernel)[(M, B)](
        *inputs,
        class_sum,
        index,
        key,
        N,
        M,
        C,
        topk,
        radius,
        iou_weight,
        cls_weight,
        **same,
        LIST=LIST,
        BLOCK=_MATCH_BLOCK[boxes.shape[2]],
        num_warps=1,
    )
    # The upper bits count how many won a prior, the lower 40 sum them: of one it is the index. TaskAligned: the upper
    # bits are the IoU, and the first of those with the greatest is wanted. In both the order does not matter.
    won = boxes.new_zeros((B * N,), dtype=torch.int64)
    won = won.scatter_reduce(0, index, key, "amax") if cost == "task_aligned" else won.scatter_add(0, index, key)
    wrap_triton(_resolve_kernel)[(cdiv(N, _RESOLVE_BLOCK), B)](
        *inputs,
        class_sum,
        won,
        assigned,
        iou,
        labels,
        N,
        M,
        C,
        radius,
        iou_weight,
        cls_weight,
        **same,
        BLOCK=_RESOLVE_BLOCK,
    )
    return assigned, iou, labels
