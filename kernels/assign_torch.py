"""Label assignment in PyTorch, on any device: the reference of assign.py.

It works through the ground truths in chunks, [B, chunk, candidates] at a time. Fields of boxes and centres are planes,
[4 or 5, ...] and [2, ...].
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.kernels._dispatch import at_once
from rtmdet_fast.kernels.rotated_iou import box_iou_rotated_reference

_EPS = 1e-7  # of the published IoU cost
_LOG2_10 = math.log2(10)
ROUNDING = 1e-6
"""How much of ATSS's threshold an IoU may lack: where all are equal, rounding must not decide."""
ANY_CLASS = 2**31 - 1
"""ATSS does not know how many there are."""
_INFINITY = struct.unpack("<q", struct.pack("<d", math.inf))[0]
_CHUNK = 2**18  # elements of a temporary: 1 MB, so that the dozen of them stay in the cache


class _Options(NamedTuple):
    method: str
    radius: float
    iou_weight: float
    cls_weight: float


class _GroundTruths(NamedTuple):
    """Invalid ones have size 0 and label 0 and stand at an infinite distance: they hold no prior and cost infinity."""

    box: Tensor  # [4 or 5, B, M]
    label: Tensor  # [B, M]
    center: Tensor  # [2, B, M]

    def part(self, j: slice) -> _GroundTruths:
        return _GroundTruths(*(field[..., j] for field in self))


class _Candidates(NamedTuple):
    """Priors that can match, padded; pads (and unusable ones) have box 0 and class sum inf."""

    cell: Tensor  # [B, Q], of class 0 in the flat scores
    x: Tensor  # [B, Q]
    y: Tensor
    stride: Tensor
    class_sum: Tensor
    box: Tensor  # [4 or 5, B, Q]

    def take(self, i: Tensor) -> _Candidates:
        return _Candidates(*(field.gather(-1, i.expand(*field.shape[:-2], *i.shape)) for field in self))


@torch.library.custom_op("rtmdet_fast::assign_reference", mutates_args=())
def assign(
    boxes: Tensor,
    scores: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor,
    gt_centers: Optional[Tensor],  # noqa: UP045 (what torch.library reads)
    method: str,
    topk: int,
    radius: float,
    iou_weight: float,
    cls_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Opaque to `torch.compile`, since it goes on with the candidates alone."""
    (B, N, C), M = scores.shape, gt_boxes.shape[1]
    options = _Options(method, radius, iou_weight, cls_weight)
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    assigned_gt = boxes.new_full((B, N), -1, dtype=torch.int64)
    assigned_iou, assigned_labels = boxes.new_zeros((B, N), dtype=dtype), assigned_gt.clone()

    scores = scores.contiguous()
    gts = _ground_truths(gt_boxes.to(dtype), gt_labels.long(), gt_counts, gt_centers, C)
    index, prior = _candidates(boxes, scores, priors.to(dtype), gts, options)

    # the winners of each ground truth, as indices into the candidates
    Q, k = index.shape[1], min(topk, index.shape[1])
    if k == 0 or M == 0:
        return assigned_gt, assigned_iou, assigned_labels
    rank, won = torch.arange(k, device=boxes.device), []
    for j in _chunks(M, B * Q, boxes.device):
        iou, cost = _iou_and_cost(prior, scores, gts.part(j), options)
        value, i = _least(cost, k)
        wins = value < torch.inf
        if method == "task_aligned":
            x, y = (field.gather(1, i.flatten(1)).view(i.shape) for field in (prior.x, prior.y))
            wins &= _depth(x, y, gts.box[:, :, j, None]) > 0.01
            value = -iou.gather(2, i)  # decides between ground truths that won the same prior
        else:
            wins &= rank < (-_least(iou.neg_(), k)[0].sum(-1)).int().clamp(min=1)[..., None]
        won.append((i, wins, torch.where(wins, value, torch.inf)))
    i, wins, value = (torch.cat(t, 1).flatten(1) for t in zip(*won, strict=True))

    matched = _matched(i, wins, value, M, Q)
    if method != "task_aligned":
        contested, valid = _compact(i.new_zeros((B, Q)).scatter_add_(1, i, wins.long()) > 1)
        rivals = prior.take(contested)
        least, best = value.new_full(contested.shape, torch.inf), torch.zeros_like(contested)
        for j in _chunks(M, contested.numel(), boxes.device):
            value, arg = _iou_and_cost(rivals, scores, gts.part(j), options)[1].min(1)
            best = torch.where(value < least, arg + j.start, best)
            least = torch.minimum(least, value)
        image = torch.arange(B, device=boxes.device)[:, None].expand_as(contested)
        matched[image[valid], contested[valid]] = best[valid]

    b, q = (matched < M).nonzero(as_tuple=True)
    winner, i = matched[b, q], index[b, q]
    assigned_gt[b, i], assigned_labels[b, i] = winner, gts.label[b, winner]
    assigned_iou[b, i] = _iou(gts.box[:, b, winner], prior.box[:, b, q], aligned=True)
    return assigned_gt, assigned_iou, assigned_labels


@torch.library.custom_op("rtmdet_fast::atss_reference", mutates_args=())
def atss(
    boxes: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor,
    strides: Sequence[float],
    topk: int,
    anchor_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, BOX), M = boxes.shape, gt_boxes.shape[1]
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    assigned_gt = boxes.new_full((B, N), -1, dtype=torch.int64)
    assigned_iou, assigned_labels = boxes.new_zeros((B, N), dtype=dtype), assigned_gt.clone()
    gts = _ground_truths(gt_boxes.to(dtype), gt_labels.long(), gt_counts, None, ANY_CLASS)
    x, y, stride, _ = priors.to(dtype).T.contiguous()
    levels = [(stride == s).nonzero()[:, 0] for s in strides]
    if B * M * sum(map(len, levels)) == 0:
        return assigned_gt, assigned_iou, assigned_labels
    box, side = boxes.to(dtype).movedim(-1, 0), anchor_scale * stride
    usable = _is_finite(box) & (x + y).isfinite()
    half = side / 2
    anchor = torch.stack([x, y, side, side, 0 * x] if BOX == 5 else [x - half, y - half, x + half, y + half])

    won = []
    for j in _chunks(M, B * N, boxes.device):
        part = gts.part(j)
        near = [_nearest(x, y, usable, level, part.center, topk) for level in levels]
        i, real = (torch.cat(found, -1) for found in zip(*near, strict=True))  # [B, m, topk of each level]
        pairs = part.box[..., None].expand(-1, *i.shape).flatten(1), anchor[:, i.flatten()]
        iou = torch.where(real, _iou(*pairs, aligned=True).view(i.shape), 0)
        count = real.sum(-1, keepdim=True)
        mean = iou.sum(-1, keepdim=True) / count
        deviation = ((iou - mean).square() * real).sum(-1, keepdim=True).div((count - 1).clamp(min=1)).sqrt()
        wins = real & (iou >= (mean + deviation) * (1 - ROUNDING)) & (_depth(x[i], y[i], part.box[..., None]) > 0.01)
        won.append((i, wins, torch.where(wins, -iou, torch.inf)))
    i, wins, value = (torch.cat(t, 1).flatten(1) for t in zip(*won, strict=True))

    matched = _matched(i, wins, value, M, N)
    b, i = (matched < M).nonzero(as_tuple=True)
    winner = matched[b, i]
    assigned_gt[b, i], assigned_labels[b, i] = winner, gts.label[b, winner]
    assigned_iou[b, i] = _iou(gts.box[:, b, winner], box[:, b, i], aligned=True)
    return assigned_gt, assigned_iou, assigned_labels


@assign.register_fake
@atss.register_fake
def _(boxes: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    gt = boxes.new_empty(boxes.shape[:2], dtype=torch.int64)
    return gt, boxes.new_empty(boxes.shape[:2], dtype=torch.promote_types(boxes.dtype, torch.float32)), gt.clone()


def _matched(i: Tensor, wins: Tensor, value: Tensor, M: int, Q: int) -> Tensor:
    """Of the ground truths that won prior i the one of the least value, and of equal ones the first: [B, Q], or M.

    i, wins, value [B, M * k]: what each ground truth has chosen; value is inf where it does not win.
    """
    least = value.new_full((len(i), Q), torch.inf).scatter_reduce_(1, i, value, "amin")
    winner = torch.arange(M, device=i.device).repeat_interleave(i.shape[1] // M)
    winner = torch.where(wins & (value == least.gather(1, i)), winner, M)
    return i.new_full((len(i), Q), M).scatter_reduce_(1, i, winner, "amin")


def _nearest(x: Tensor, y: Tensor, usable: Tensor, level: Tensor, center: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The usable priors of a level nearest to m centres [2, B, m], of equal ones the first: indices, and which of them
    are real [B, m, k]."""
    dx, dy = x[level] - center[0, ..., None], y[level] - center[1, ..., None]
    distance = torch.where(usable[:, None, level], dx.square_().addcmul_(dy, dy), torch.inf)
    # The bits of floats above 0 are in the order of the floats. The last ones, of which float32 uses none, make way for
    # the place in the level: no two are equal, whichever way the least are found.
    bits = len(level).bit_length()
    place = torch.arange(len(level), device=x.device)
    key = distance.double().view(torch.int64).bitwise_and_(-1 << bits).bitwise_or_(place)
    value, i = _least(key, min(topk, len(level)))
    return level[i], value < _INFINITY


def _is_finite(box: Tensor) -> Tensor:
    """Whether boxes [4 or 5, ...] and their areas are."""
    area = box[2] * box[3] if len(box) == 5 else (box[2] - box[0]) * (box[3] - box[1])
    return box.isfinite().all(0) & area.isfinite()


def _ground_truths(boxes: Tensor, label: Tensor, counts: Tensor, centers: Tensor | None, classes: int) -> _GroundTruths:
    box = boxes.movedim(-1, 0)
    size = box[2:4] if len(box) == 5 else box[2:] - box[:2]
    center = box[:2] if len(box) == 5 else (box[:2] + box[2:]) / 2
    if centers is not None:
        center = centers.to(box.dtype).movedim(-1, 0)
    valid = (torch.arange(boxes.shape[1], device=boxes.device) < counts[:, None]) & (label >= 0) & (label < classes)
    valid &= box.isfinite().all(0) & (size >= 0).all(0) & size.prod(0).isfinite() & center.isfinite().all(0)
    # contiguous: one image's may come expanded
    box, label = torch.where(valid, box, 0).contiguous(), torch.where(valid, label, 0).contiguous()
    return _GroundTruths(box, label, torch.where(valid, center, torch.inf).contiguous())


def _candidates(
    boxes: Tensor, scores: Tensor, priors: Tensor, gts: _GroundTruths, options: _Options
) -> tuple[Tensor, _Candidates]:
    """Which of the N priors, [B, Q], and what they are."""
    (B, N, C), (method, radius, _, cls_weight) = scores.shape, options
    x, y, stride, _ = priors.T.contiguous()
    inside = ((stride > 0) & (stride < torch.inf)).expand(B, N)
    if method != "task_aligned":
        deepest = priors.new_full((B, N), -torch.inf)
        for j in _chunks(gts.label.shape[1], B * N, boxes.device):
            depth = _depth(x, y, gts.box[:, :, j, None])
            if method == "simota":
                depth = torch.maximum(depth, _center_depth(x, y, stride, gts.center[:, :, j, None], radius))
            torch.maximum(deepest, depth.amax(1), out=deepest)
        inside = inside & (deepest > (0.01 if len(gts.box) == 5 and method == "soft_label" else 0))
    index, valid = _compact(inside)
    image = torch.arange(B, device=boxes.device)[:, None]
    box = boxes[image, index].to(priors.dtype).movedim(-1, 0)
    class_sum = _class_sums(scores, index, method, priors.dtype) * cls_weight
    valid = valid & _is_finite(box) & (class_sum < 1e30)
    class_sum, box = torch.where(valid, class_sum, torch.inf), torch.where(valid, box, 0).contiguous()
    return index, _Candidates((image * N + index) * C, x[index], y[index], stride[index], class_sum, box)


def _iou_and_cost(prior: _Candidates, scores: Tensor, gts: _GroundTruths, options: _Options) -> tuple[Tensor, Tensor]:
    """[B, m, Q] of m ground truths with Q candidates."""
    method, radius, iou_weight, cls_weight = options
    cell, x, y, stride, class_sum = (field[:, None] for field in prior[:5])
    scores, label, center = scores.view(-1), gts.label[..., None], gts.center[..., None]
    iou = _iou(gts.box, prior.box)
    if method == "simota":
        p = scores[cell + label].to(iou.dtype)
        cls = class_sum + cls_weight * ((-p).log1p().clamp(min=-100) - p.log().clamp(min=-100))
        depth = torch.minimum(_depth(x, y, gts.box[..., None]), _center_depth(x, y, stride, center, radius))
        cost = cls - iou_weight * (iou + _EPS).log() + torch.where(depth > 0, 0, 1e5)
        return iou, cost.masked_fill_(center[0] == torch.inf, torch.inf)
    # the class term vanishes where boxes are disjoint: it is computed for the other few per cent alone
    m, Q = iou.shape[1:]
    pair = iou.view(-1).nonzero()[:, 0]
    row = pair.div(Q, rounding_mode="floor")
    column = pair - (row - row.div(m, rounding_mode="floor")) * Q
    overlap, score = iou.view(-1)[pair], scores[cell.flatten()[column] + label.flatten()[row]].to(iou.dtype)
    if method == "task_aligned":
        cost = torch.full_like(iou, torch.inf)
        metric = (score**cls_weight * overlap**iou_weight).add_(0 * class_sum.flatten()[column])
        cost.view(-1)[pair] = torch.where(metric > 0, -metric, torch.inf)
        return iou, cost
    dx, dy = x - center[0], y - center[1]
    distance = dx.square_().addcmul_(dy, dy).sqrt_()
    cost = distance.div_(stride).sub_(radius).mul_(_LOG2_10).exp2_().add_(class_sum)
    p, s = score.sigmoid(), F.softplus(score)
    cls = overlap * (s * (overlap - 2 * p) - score * (overlap - p).square())
    touching = cost.view(-1)[pair] + cls - iou_weight * (overlap + _EPS).log()
    cost -= iou_weight * math.log(_EPS)
    cost.view(-1)[pair] = touching
    return iou, cost


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


def _class_sums(scores: Tensor, index: Tensor, method: str, dtype: torch.dtype) -> Tensor:
    """The part of the cost that no ground truth changes, [B, Q]; NaN or inf where a score is unusable."""
    out = scores.new_empty(index.shape, dtype=dtype)
    image = torch.arange(len(index), device=index.device)[:, None]
    for i in _chunks(index.shape[1], len(index) * scores.shape[2], index.device):
        x = scores[image, index[:, i]].to(dtype)
        if method == "soft_label":
            p = x.sigmoid()
            out[:, i] = F.softplus(x).mul_(p).mul_(p).sum(-1)
        elif method == "simota":
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


def _chunks(n: int, width: int, device: torch.device) -> list[slice]:
    """Slices of range(n) that make at most a chunk of rows of `width`; none of rows of nothing."""
    step = max(1, at_once(device, _CHUNK) // max(width, 1))
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
