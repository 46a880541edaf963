"""Greedy, class-aware non-maximum suppression of a batch, without coordinate offsets.

In order of falling score (ties: lower index first) a box is kept unless a kept box of its image and class has
IoU > `iou_threshold` with it. The decision is the one float64 arithmetic takes.

Dropped, neither kept nor suppressing others: boxes with a non-finite score or coordinate, boxes without area
(zero-size or inverted: x2 <= x1, y2 <= y1, w <= 0, h <= 0), and labels below 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rtmdet_fast.kernels.rotated_iou import HUGE, box_iou_rotated_reference


def batched_nms_padded(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_keep: int
) -> tuple[Tensor, Tensor]:
    """Class-aware NMS of every image in one call, with outputs of a fixed size.

    Args:
        boxes: [B, N, 4] xyxy or [B, N, 5] (cx, cy, w, h, radians).
        scores: [B, N]; rows to ignore (padding) have score -inf or NaN.
        labels: [B, N] integers; below 0 the row is ignored.
        iou_threshold: in [0, 1]; a box is suppressed above it, not at it.
        max_keep: the number of best kept boxes to return for an image.

    Returns:
        keep [B, max_keep] int64, indices into N by falling score, then -1; counts [B] int64.
    """
    _check(boxes, scores, labels, iou_threshold, max_keep)
    return batched_nms_padded_reference(boxes.detach(), scores.detach(), labels, float(iou_threshold), max_keep)


def nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
) -> tuple[Tensor, Tensor]:
    """As `mmcv.ops.nms`: boxes [N, 4] xyxy, scores [N] -> (dets [K, 5] with the score last, keep [K] int64).

    `offset` 1 takes x2 and y2 as inclusive pixels; `score_threshold` and `max_num` count only above 0.
    """
    if offset not in (0, 1):
        raise ValueError(f"offset={offset!r}: expected 0 or 1")
    keep = _keep(boxes, scores, None, iou_threshold, offset, score_threshold, max_num, box_dim=4)
    return _dets(boxes, scores, keep), keep


def nms_rotated(
    dets: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None, clockwise: bool = True
) -> tuple[Tensor, Tensor]:
    """As `mmcv.ops.nms_rotated`: dets [N, 5] (cx, cy, w, h, radians), scores [N] -> (dets [K, 6], keep [K]).

    `labels` [N] confine suppression to equal labels. Mirroring the angles (`clockwise=False`) mirrors
    every pair alike, so the result does not depend on it.
    """
    keep = _keep(dets, scores, labels, iou_threshold, box_dim=5)
    return _dets(dets, scores, keep), keep


def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, nms_cfg: Mapping[str, Any] | None, class_agnostic: bool = False
) -> tuple[Tensor, Tensor]:
    """As `mmcv.ops.batched_nms`: boxes [N, 4 or 5], scores [N], idxs [N] -> (dets [K, 5 or 6], keep [K]).

    `nms_cfg` holds `iou_threshold`, and may hold `type` ("nms", "nms_rotated"), `class_agnostic`, `max_num`,
    `score_threshold`, `offset`, and `split_thr`, which changes nothing here. None only sorts by score.
    """
    if nms_cfg is None:
        keep = scores.sort(descending=True, stable=True).indices
        return _dets(boxes, scores, keep), keep
    cfg = dict(nms_cfg)
    kind = cfg.pop("type", "nms")
    if kind not in ("nms", "nms_rotated"):
        raise ValueError(f"nms_cfg has type={kind!r}: expected 'nms' or 'nms_rotated'")
    cfg.pop("split_thr", None)
    class_agnostic = cfg.pop("class_agnostic", class_agnostic)
    if "iou_threshold" not in cfg:
        raise ValueError("nms_cfg lacks iou_threshold")
    keep = _keep(boxes, scores, None if class_agnostic else idxs, box_dim=5 if kind == "nms_rotated" else 4, **cfg)
    return _dets(boxes, scores, keep), keep


def torchvision_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """As `torchvision.ops.nms`: boxes [N, 4] xyxy, scores [N] -> keep [K] int64 by falling score."""
    return _keep(boxes, scores, None, iou_threshold)


def torchvision_batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """As `torchvision.ops.batched_nms`: suppression only between equal `idxs` [N] -> keep [K] int64."""
    return _keep(boxes, scores, idxs, iou_threshold)


def _keep(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
    box_dim: int = 4,
) -> Tensor:
    if boxes.ndim != 2 or boxes.shape[1] != box_dim:
        raise ValueError(f"boxes have shape {tuple(boxes.shape)}: expected [N, {box_dim}]")
    if scores.shape != boxes.shape[:1]:
        raise ValueError(f"scores have shape {tuple(scores.shape)}: expected [{len(boxes)}]")
    if idxs is None:
        idxs = torch.zeros_like(scores, dtype=torch.int64)
    elif len(idxs):
        idxs = idxs - idxs.amin()  # here any integer is a class, below 0 too
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    if score_threshold > 0:
        scores = scores.masked_fill(~(scores > score_threshold), -torch.inf)
    max_keep = min(max_num, len(boxes)) if max_num > 0 else len(boxes)
    keep, counts = batched_nms_padded(boxes[None], scores[None], idxs[None], iou_threshold, max_keep)
    return keep[0, : int(counts)]


def _dets(boxes: Tensor, scores: Tensor, keep: Tensor) -> Tensor:
    return torch.cat([boxes[keep], scores[keep, None]], dim=1)


def _check(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_keep: int) -> None:
    if boxes.ndim != 3 or boxes.shape[2] not in (4, 5):
        raise ValueError(f"boxes have shape {tuple(boxes.shape)}: expected [B, N, 4] or [B, N, 5]")
    for name, x in (("scores", scores), ("labels", labels)):
        if x.shape != boxes.shape[:2]:
            raise ValueError(f"{name} have shape {tuple(x.shape)}: expected {list(boxes.shape[:2])} as boxes have")
        if x.device != boxes.device:
            raise ValueError(f"{name} are on {x.device}, boxes on {boxes.device}")
    for name, x in (("boxes", boxes), ("scores", scores)):
        if not x.is_floating_point():
            raise TypeError(f"{name} are {x.dtype}: expected a floating dtype")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels are {labels.dtype}: expected integers")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold={iou_threshold!r}: expected a number in [0, 1]")
    if max_keep < 0:
        raise ValueError(f"max_keep={max_keep!r}: expected at least 0")


NEVER = 2**30  # start of the class of a dropped box


def _sorted(boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts each image by class, then falling score, then index; dropped boxes come last. All without a sync.

    Returns order [B, N] (index by rank, the place in order of score), rank [B, N] by slot (place after sorting),
    boxes [B, N, 4 or 5] by slot in float32 or float64, start [B, N] int32: the first slot of a slot's class.
    """
    N = boxes.shape[1]
    if boxes.dtype != torch.float64:
        boxes = boxes.float()
    size = boxes[..., 2:4] - boxes[..., :2] if boxes.shape[2] == 4 else boxes[..., 2:4]
    area = size[..., 0] * size[..., 1]
    usable = (boxes.abs().sum(2) < HUGE) & (size[..., 0] > 0) & (area >= torch.finfo(torch.float32).tiny)
    usable = usable & scores.isfinite() & (labels >= 0)
    order = scores.masked_fill(~usable, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    label, rank = labels.long().masked_fill(~usable, 2**63 - 1).gather(1, order).sort(dim=1, stable=True)
    boxes = boxes.gather(1, order.gather(1, rank)[..., None].expand(-1, -1, boxes.shape[2]))
    slot = torch.arange(N, device=boxes.device)
    first = torch.cat([label[:, :1] >= 0, label[:, 1:] != label[:, :-1]], 1)
    start = torch.where(first, slot, 0).cummax(1).values if N else slot.expand_as(label)
    return order, rank, boxes, start.masked_fill(label == 2**63 - 1, NEVER).int()


def _selected(kept: Tensor, order: Tensor, max_keep: int) -> tuple[Tensor, Tensor]:
    """The first `max_keep` indices of `order` [B, N] with `kept` [B, N], both by rank, then -1; and their counts."""
    place = kept.cumsum(1)
    keep = order.new_full((len(order), max_keep + 1), -1)
    keep.scatter_(1, torch.where(kept & (place <= max_keep), place - 1, max_keep), order)
    keep[:, max_keep] = -1  # the rest was sent there
    return keep[:, :max_keep].contiguous(), kept.sum(1).clamp(max=max_keep)


TILE = 64  # boxes of one class settled at once; in Triton, bits of a word


@torch.library.custom_op("rtmdet_fast::batched_nms_reference", mutates_args=())
def batched_nms_padded_reference(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_keep: int
) -> tuple[Tensor, Tensor]:
    """`batched_nms_padded` in PyTorch; opaque to `torch.compile`, since its loop depends on the boxes.

    A round settles the best TILE boxes left of every class of every image at once, then removes what they suppress.
    Memory stays at some rows of B N elements and one chunk of pairs.
    """
    B, N = scores.shape
    order, rank, boxes, start = _sorted(boxes, scores, labels)
    image = torch.arange(B, device=boxes.device)[:, None] * N
    usable = start < NEVER
    rank, group, boxes = (rank + image)[usable], (start + image)[usable], boxes[usable]
    kept = torch.zeros(B * N, dtype=torch.bool, device=boxes.device)  # by rank
    nowhere = boxes.new_tensor([[10 * HUGE, 10 * HUGE, -1, -1, 0]])[:, : boxes.shape[1]]  # meets no box
    slot = torch.arange(TILE, device=boxes.device)
    while len(rank):
        count = group.unique_consecutive(return_counts=True)[1]
        end = count.cumsum(0)
        first = end - count
        padded = torch.cat([boxes, nowhere])

        rows = first[:, None] + slot[: int(count.max())]
        rows = rows.where(rows < end[:, None], len(boxes))
        heads = padded[rows]
        keep = torch.cat([_settle(part, iou_threshold) for part in heads.split(32)]) & (rows < len(boxes))
        kept[rank[rows[keep]]] = True
        # a box that max_keep better ones beat is out, and suppresses only what comes later still
        full = kept.view(B, N).cumsum(1) >= max_keep
        place = torch.arange(len(rank), device=boxes.device) - first.repeat_interleave(count)
        alive = (place >= TILE) & ~full.view(-1)[rank]

        # tiles of the rest of each class, against its kept heads, moved to the front
        best = keep.long().argsort(dim=1, descending=True, stable=True)[:, : int(keep.sum(1).max())]
        heads = torch.where(keep[..., None], heads, nowhere).take_along_dim(best[..., None], 1)
        tiles = (count - 1).div(TILE, rounding_mode="floor")
        owner = torch.arange(len(count), device=boxes.device).repeat_interleave(tiles)
        number = torch.arange(len(owner), device=boxes.device) - (tiles.cumsum(0) - tiles)[owner]
        rows = (first[owner] + (number + 1) * TILE)[:, None] + slot
        rows = rows.where(rows < end[owner, None], len(boxes))
        hit = torch.zeros(len(padded), dtype=torch.bool, device=boxes.device)
        for i in range(0, len(owner), 32):
            part = rows[i : i + 32]
            hit[part] = _excess(heads[owner[i : i + 32]], padded[part], iou_threshold).amax(1) > 0
        alive &= ~hit[:-1]
        rank, group, boxes = rank[alive], group[alive], boxes[alive]
    return _selected(kept.view(B, N), order, max_keep)


@batched_nms_padded_reference.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_keep: int) -> tuple[Tensor, Tensor]:
    B = boxes.shape[0]
    return boxes.new_empty((B, max_keep), dtype=torch.int64), boxes.new_empty((B,), dtype=torch.int64)


def _settle(boxes: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS of boxes [G, n, 4 or 5], sorted, in each of G classes -> keep [G, n] bool."""
    suppresses = _excess(boxes, boxes, iou_threshold).triu(1).gt_(0)
    keep, before = suppresses.new_ones(len(boxes), 1, boxes.shape[1]), None
    while before is None or not torch.equal(keep, before):  # as often as the longest chain of suppressions
        before, keep = keep, (keep.bmm(suppresses) == 0).to(keep.dtype)
    return keep[:, 0] > 0


def _excess(a: Tensor, b: Tensor, iou_threshold: float) -> Tensor:
    """Above 0 where IoU of a [G, m, 4 or 5] with b [G, n, 4 or 5] > threshold, as float64 decides -> [G, m, n]."""
    if a.shape[2] == 5:
        radius_a, radius_b = torch.hypot(a[..., 2], a[..., 3]) / 2, torch.hypot(b[..., 2], b[..., 3]) / 2
        dx, dy = a[:, :, None, 0] - b[:, None, :, 0], a[:, :, None, 1] - b[:, None, :, 1]
        reach = radius_a[:, :, None] + radius_b[:, None]
        near = dx.mul_(dx).addcmul_(dy, dy) < reach.mul_(reach)
        excess = torch.zeros_like(dx)
        g, i, j = near.nonzero(as_tuple=True)
        iou = box_iou_rotated_reference(a[g, i].double(), b[g, j].double(), aligned=True)
        excess[g, i, j] = (iou - iou_threshold).to(excess.dtype)
        return excess
    ax1, ay1, ax2, ay2 = a[:, :, None].unbind(3)
    bx1, by1, bx2, by2 = b[:, None].unbind(3)
    w = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1))
    h = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1))
    # inter / (A + B - inter) > t  <=>  inter / (A + B) > t / (1 + t); float32 is within 6e-7 of that ratio
    bound = iou_threshold / (1 + iou_threshold)
    excess = (w * h).div_((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1)).sub_(bound)
    overlap = torch.minimum(w, h)
    distance = excess.abs()
    if distance.amin() <= 1e-6 * bound:
        g, i, j = ((distance <= 1e-6 * bound) & (overlap > 0)).nonzero(as_tuple=True)
        p, q = a[g, i].double(), b[g, j].double()
        inter = (torch.minimum(p[:, 2:], q[:, 2:]) - torch.maximum(p[:, :2], q[:, :2])).prod(1)
        union = (p[:, 2:] - p[:, :2]).prod(1) + (q[:, 2:] - q[:, :2]).prod(1) - inter
        excess[g, i, j] = (inter / union - iou_threshold).to(excess.dtype)
    return torch.minimum(overlap, excess)
