"""Greedy NMS of one image as mmcv and torchvision decide it, for their signatures in `rtmdet_fast.ops`.

Every box takes part. One without an area, or with a coordinate that is not finite, meets no other: it stays, and
suppresses nothing. On a CPU the IoU of xyxy boxes is computed as the originals' C++ does, operation by operation in the
boxes' dtype, so that a pair right at the threshold falls to the same side. For rotated boxes and on a GPU, where the
originals' rounding is the compiler's, float64 decides such a pair.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from rtmdet_fast.kernels._dispatch import use_triton
from rtmdet_fast.kernels.nms import batched_nms_padded, in_rounds, usable

TUNING = {
    "numpy": 2000,  # boxes up to which NumPy, whose calls cost less, is ahead of PyTorch
    "numpy_grouped": 1000,
    "block": 128,  # boxes that it settles among themselves at once
    "pairs": 2**16,  # at once: the temporaries stay in the cache
}


def greedy_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float,
    groups: Tensor | None = None, offset: int = 0, stable: bool = False,
) -> Tensor:  # fmt: skip
    """Boxes [N, 4] xyxy or [N, 5] rotated, scores [N] -> indices [K] int64 of the kept, by falling score (NaN first).

    Only boxes of equal `groups` [N], numbers of any kind, suppress each other; `offset` 1 takes x2 and y2 as inclusive
    pixels. Equal scores come by index if `stable` (torchvision's sort), else as they fall (mmcv's). Any
    `iou_threshold` is taken: below 0 boxes that do not touch suppress each other too, and a NaN suppresses nothing.
    """
    order = scores.detach().sort(descending=True, stable=stable).indices
    return order[settled(boxes[order], iou_threshold, groups if groups is None else groups[order], offset)]


def settled(boxes: Tensor, iou_threshold: float, groups: Tensor | None = None, offset: int = 0) -> Tensor:
    """As `greedy_nms`, of boxes [N, 4 or 5] that come the best first (of each group) -> [K] int64 or [N] bool."""
    boxes = boxes.detach()
    groups = groups if groups is None else torch.unique(groups, return_inverse=True)[1]
    if boxes.shape[1] == 5 or ((boxes.is_cuda or use_triton(boxes)) and not iou_threshold < 0):
        return _by_kernels(boxes, groups, float(iou_threshold), offset)
    groups = groups if groups is None else groups.cpu()
    return _on_cpu(boxes.cpu(), groups, float(iou_threshold), offset).to(boxes.device)


def kept_within(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, offset: int = 0, stable: bool = False
) -> Tensor:
    """Which boxes [N] are kept where the originals go from one of `idxs` [N] to the next, sorting each by itself."""
    member = torch.unique(idxs, return_inverse=True)[1]
    members = member.argsort(stable=True).split(member.bincount().tolist())
    best_first = (part[scores[part].sort(descending=True, stable=stable).indices] for part in members)
    order = torch.cat([idxs.new_zeros(0, dtype=torch.int64), *best_first])
    kept = torch.zeros_like(idxs, dtype=torch.bool)
    kept[order[settled(boxes[order], iou_threshold, idxs[order], offset)]] = True
    return kept


def move_apart(boxes: Tensor, idxs: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor | None]:
    """The originals' way to suppress within classes: `boxes` [N, 4 or 5] of class idx moved by idx x (maximum + 1).

    Also returns `groups` [N] for `greedy_nms`, which save pairs: classes that might meet all the same (coordinates
    below 0 reach into the class before) are one group. None where there is nothing to save.
    """
    rotated = boxes.shape[1] == 5
    reach = boxes[:, :2].max() + boxes[:, 2:4].max() if rotated else boxes.max()
    idxs = idxs.to(boxes)
    offset = (idxs * (reach + 1))[:, None]
    moved = torch.cat([boxes[:, :2] + offset, boxes[:, 2:]], 1) if rotated else boxes + offset
    if iou_threshold < 0 or not (rotated or boxes.is_cuda or len(boxes) > TUNING["numpy_grouped"]):
        return moved, None
    low, high = moved.detach()[:, :2], moved.detach()[:, 2:4]
    if rotated:
        radius = torch.hypot(*high.unbind(1))[:, None] / 2
        low, high = low - radius, low + radius
    return moved, _meeting(low, high, idxs)


def _meeting(low: Tensor, high: Tensor, idxs: Tensor) -> Tensor | None:
    """Groups [N] of neighbouring classes with boxes from `low` to `high` [N, 2] that may meet; None: beyond those."""
    classes, member = torch.unique(idxs, return_inverse=True)
    index = member[:, None].expand(-1, 2)
    first = low.new_full((len(classes) + 1, 2), torch.inf).scatter_reduce_(0, index, low, "amin")
    last = low.new_full((len(classes) + 1, 2), -torch.inf).scatter_reduce_(0, index, high, "amax")
    later = first[:-1].flip(0).cummin(0).values.flip(0)
    if not (low.isfinite() & high.isfinite()).all() or (last[:-1].cummax(0).values[:-2] > later[2:]).any():
        return None
    into_next, into_last = (high > first[member + 1]).all(1), (low < last[member - 1]).all(1)  # [-1] is empty
    sends, receives = (
        torch.zeros_like(classes).index_add_(0, member, x.to(classes)) > 0 for x in (into_next, into_last)
    )
    joined = torch.zeros_like(sends)
    joined[1:] = sends[:-1] & receives[1:]
    return (~joined).cumsum(0)[member]


def _by_kernels(boxes: Tensor, groups: Tensor | None, iou_threshold: float, offset: int) -> Tensor:
    """Which of boxes [N, 4 or 5], the best first, are kept -> [N] bool."""
    if boxes.shape[1] == 5:  # two sides below 0 are half a turn
        size = boxes[:, 2:4]
        boxes = torch.cat([boxes[:, :2], torch.where((size < 0).all(1, keepdim=True), -size, size), boxes[:, 4:]], 1)
    elif offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], 1)
    N = len(boxes)
    scores = torch.arange(N, 0, -1, dtype=torch.float64, device=boxes.device)
    groups = torch.zeros_like(scores, dtype=torch.int64) if groups is None else groups
    takes_part = usable(boxes, scores, groups)
    if boxes.shape[1] == 5:
        takes_part &= boxes[:, 2:4].prod(1) >= 1e-14  # mmcv's bound
        if iou_threshold < 0:
            first = takes_part.cumsum(0) == 1
            return ~takes_part | first
    kept = ~takes_part
    scores = scores.masked_fill(kept, -torch.inf)
    threshold = iou_threshold if iou_threshold <= 1 else 1.0  # NaN too
    keep, count = batched_nms_padded(boxes[None], scores[None], groups[None], threshold, N)
    kept[keep[0, : int(count)]] = True
    return kept


def _on_cpu(boxes: Tensor, groups: Tensor | None, iou_threshold: float, offset: int) -> Tensor:
    """Slots [K] or which [N] of the kept among boxes [N, 4], the best first."""
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    if iou_threshold < 0 or len(boxes) <= TUNING["numpy" if groups is None else "numpy_grouped"]:
        with np.errstate(all="ignore"):
            columns = boxes.numpy().T
            w, h = columns[2:] - columns[:2] + columns.dtype.type(offset)
            group = np.zeros_like(w) if groups is None else groups.numpy().astype(w.dtype)
            rows = np.stack([*columns, w * h, group])
            return torch.from_numpy(_settled(rows, w.dtype.type(iou_threshold), offset, groups is not None))
    size = boxes[:, 2:] - boxes[:, :2] + offset
    area = size.prod(1)
    meets = (area > 0) & area.isfinite()
    groups = torch.zeros_like(area, dtype=torch.int64) if groups is None else groups
    group, slot = groups[meets].sort(stable=True)
    rank = meets.nonzero()[:, 0][slot]
    threshold = iou_threshold if iou_threshold <= 1 else 2.0  # NaN too
    excess = partial(_excess, offset=offset)
    return in_rounds(rank, group, boxes[rank], (1, len(boxes)), threshold, len(boxes), excess)[0] | ~meets


def _excess(a: Tensor, b: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """IoU of a [G, m, 4] with b [G, n, 4], as the originals compute it, less the threshold -> [G, m, n]."""
    ax1, ay1, ax2, ay2 = a.permute(2, 0, 1).contiguous()[..., None]
    bx1, by1, bx2, by2 = b.permute(2, 0, 1).contiguous()[:, :, None]
    w = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1))
    h = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1))
    a_area, b_area = (ax2 - ax1 + offset) * (ay2 - ay1 + offset), (bx2 - bx1 + offset) * (by2 - by1 + offset)
    if offset:
        w, h = w.add_(offset), h.add_(offset)
    inter = w.clamp_(min=0).mul_(h.clamp_(min=0))
    return inter.div_((a_area + b_area).sub_(inter)).sub_(iou_threshold)


def _settled(rows: np.ndarray, threshold: np.floating, offset: int, grouped: bool) -> np.ndarray:
    """Slots of the kept among boxes in `rows` (x1, y1, x2, y2, area, group) [6, N], the best of each group first."""
    kept, block = [np.zeros(0, np.int64)], TUNING["block"]
    left = np.arange(rows.shape[1])
    while len(left):
        head, rows = rows[:, :block], rows[:, block:]
        bits = np.packbits(_suppresses(head, head, threshold, offset, grouped), axis=1, bitorder="little")
        width, data = bits.shape[1], bits.tobytes()
        best, gone = [], 0
        for i in range(len(bits)):
            if not gone >> i & 1:
                best.append(i)
                gone |= int.from_bytes(data[i * width : (i + 1) * width], "little")
        kept.append(left[best])
        head, left = head[:, best], left[block:]
        step = TUNING["pairs"] // len(best)
        parts = (rows[:, i : i + step] for i in range(0, len(left), step))
        hit = [_suppresses(head, part, threshold, offset, grouped).any(0) for part in parts]
        if hit:
            alive = ~np.concatenate(hit)
            rows, left = rows[:, alive], left[alive]
    return np.concatenate(kept)


def _suppresses(a: np.ndarray, b: np.ndarray, threshold: np.floating, offset: int, grouped: bool) -> np.ndarray:
    """Whether box i of a [6, M] suppresses box j of b [6, N] -> [M, N] bool."""
    ax1, ay1, ax2, ay2, a_area, a_group = a[..., None]
    bx1, by1, bx2, by2, b_area, b_group = b
    w, h = np.minimum(ax2, bx2), np.minimum(ay2, by2)
    w -= np.maximum(ax1, bx1)
    h -= np.maximum(ay1, by1)
    if offset:
        w += offset
        h += offset
    inter = np.maximum(w, 0, out=w)
    inter *= np.maximum(h, 0, out=h)
    union = np.add(a_area, b_area, out=h) - inter
    above = np.divide(inter, union, out=inter) > threshold
    return above & (a_group == b_group) if grouped else above


def soft_nms(
    boxes: np.ndarray, scores: np.ndarray,
    iou_threshold: float, sigma: float, min_score: float, method: int, offset: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Soft-NMS (Bodla et al., 2017) -> dets [K, 5] with the scores as lowered, indices [K], as mmcv orders them.

    `method` 0 sets the score of what overlaps a better box by `iou_threshold` or more to 0, 1 multiplies it by 1 - IoU,
    and 2 every score by exp(-IoU^2 / sigma); what falls below `min_score` is dropped.
    """
    dtype = boxes.dtype.type
    index = np.arange(len(scores))
    dets = np.concatenate([boxes, scores[:, None].astype(boxes.dtype)], 1)
    done = 0
    with np.errstate(all="ignore"):
        while done < len(dets):
            best = done + int(np.argmax(dets[done:, 4]))
            for x in (index, dets):
                x[[done, best]] = x[[best, done]]
            (x1, y1, x2, y2, _), rest = dets[done], dets[done + 1 :]
            inter = np.maximum(np.minimum(x2, rest[:, 2]) - np.maximum(x1, rest[:, 0]) + offset, 0)
            inter *= np.maximum(np.minimum(y2, rest[:, 3]) - np.maximum(y1, rest[:, 1]) + offset, 0)
            area = (rest[:, 2] - rest[:, 0] + offset) * (rest[:, 3] - rest[:, 1] + offset)
            iou = inter / ((x2 - x1 + offset) * (y2 - y1 + offset) + area - inter)
            if method == 2:
                rest[:, 4] *= np.exp(-(iou * iou) / dtype(sigma))
            else:
                rest[:, 4] *= np.where(iou >= dtype(iou_threshold), 1 - iou if method else 0, 1).astype(dtype)
            stays = ~(rest[:, 4] < dtype(min_score))
            # mmcv puts the last one in the place of each that is dropped: of equal scores the place decides
            count = int(stays.sum())
            holes, fill = np.flatnonzero(~stays[:count]), count + np.flatnonzero(stays[count:])[::-1]
            done += 1
            for x in (index, dets):
                x[done + holes] = x[done + fill]
            index, dets = index[: done + count], dets[: done + count]
    return dets, index
