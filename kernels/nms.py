"""Greedy, class-aware non-maximum suppression of a batch, without coordinate offsets.

In order of falling score (ties: lower index first) a box is kept unless a kept box of its image and class has
IoU > `iou_threshold` with it. The decision is the one float64 arithmetic takes.

Dropped, neither kept nor suppressing others: boxes with a non-finite score or coordinate, boxes without area
(zero-size or inverted: x2 <= x1, y2 <= y1, w <= 0, h <= 0), and labels below 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtmdet_fast.kernels import _dispatch
from rtmdet_fast.kernels._dispatch import at_once, cdiv, memory_barrier, tl, triton, triton_op, use_triton, wrap_triton
from rtmdet_fast.kernels.rotated_iou import HUGE, box_iou_rotated_reference, load_box, rotated_iou_pair

NEVER = 2**30  # start of the class of a dropped box; slots are 32-bit integers below it
_NEVER = tl.constexpr(NEVER)

TUNING: dict[str, Any] = {
    "words": 2**22,  # of 8 bytes, held at once by the Triton kernels: 32 MB, which stay in the L2 cache of an H200
    # the float64 path holds many registers, so a thread has 4 pairs at a time, or 1
    "axis_aligned": {"ROWS": 16, "SPLIT": 8, "num_warps": 8},
    "rotated": {"ROWS": 1, "SPLIT": 64, "num_warps": 2},
    "scan_rows": 256,  # that the scan reads at once: 2 words a thread of 4 warps
    "many_classes": 8,  # in the reference: from here on a round settles small tiles of each, side by side
    "tile": 256,  # boxes of a class that it settles at once
    "tile_of_many": 64,
    "pairs": 2**16,  # at once: the temporaries stay in the cache
}


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
    op = _batched_nms if use_triton(boxes) else batched_nms_padded_reference
    return op(boxes.detach(), scores.detach(), labels, float(iou_threshold), max_keep)


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


def usable(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Which boxes [..., N, 4 or 5] take part in suppression at all -> [..., N] bool."""
    if boxes.dtype != torch.float64:
        boxes = boxes.float()
    size = boxes[..., 2:4] - boxes[..., :2] if boxes.shape[-1] == 4 else boxes[..., 2:4]
    area = size[..., 0] * size[..., 1]
    solid = (boxes.abs().sum(-1) < HUGE) & (size[..., 0] > 0) & (area >= torch.finfo(torch.float32).tiny)
    return solid & scores.isfinite() & (labels >= 0)


def _sorted(boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts each image by class, then falling score, then index; dropped boxes come last. All without a sync.

    Returns order [B, N] (index by rank, the place in order of score), rank [B, N] by slot (place after sorting),
    boxes [B, N, 4 or 5] by slot in float32 or float64, start [B, N] int32: the first slot of a slot's class.
    """
    N = boxes.shape[1]
    if boxes.dtype != torch.float64:
        boxes = boxes.float()
    valid = usable(boxes, scores, labels)
    order = scores.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    label, rank = labels.long().masked_fill(~valid, 2**63 - 1).gather(1, order).sort(dim=1, stable=True)
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


@torch.library.custom_op("rtmdet_fast::batched_nms_reference", mutates_args=())
def batched_nms_padded_reference(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_keep: int
) -> tuple[Tensor, Tensor]:
    """`batched_nms_padded` in PyTorch; opaque to `torch.compile`, since its loop depends on the boxes.

    A round settles the best boxes left of every class of every image at once, then removes what they suppress.
    Memory stays at some rows of B N elements and one chunk of pairs.
    """
    B, N = scores.shape
    order, rank, boxes, start = _sorted(boxes, scores, labels)
    image = torch.arange(B, device=boxes.device)[:, None] * N
    valid = start < NEVER
    rows = (rank + image)[valid], (start + image)[valid], boxes[valid]
    kept = in_rounds(*rows, (B, N), iou_threshold, max_keep, _excess)
    return _selected(kept, order, max_keep)


def in_rounds(
    rank: Tensor, group: Tensor, boxes: Tensor, shape: tuple[int, int],
    iou_threshold: float, max_keep: int, excess: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:  # fmt: skip
    """Which of `shape` [B, N] boxes, by rank, are kept; rank (of B N), group and boxes are sorted by group, then rank.

    `excess(a, b, iou_threshold)` of boxes [G, m, 4 or 5] and [G, n, 4 or 5] is above 0 where their IoU exceeds it.
    """
    kept = torch.zeros(shape, dtype=torch.bool, device=boxes.device).view(-1)
    nowhere = boxes.new_tensor([[10 * HUGE, 10 * HUGE, -1, -1, 0]])[:, : boxes.shape[1]]  # meets no box
    while len(rank):
        count = group.unique_consecutive(return_counts=True)[1]
        tile = TUNING["tile_of_many" if len(count) > TUNING["many_classes"] else "tile"]
        chunk = max(1, at_once(boxes.device, TUNING["pairs"]) // tile**2)  # tiles at once
        slot = torch.arange(tile, device=boxes.device)
        end = count.cumsum(0)
        first = end - count
        padded = torch.cat([boxes, nowhere])

        rows = first[:, None] + slot[: int(count.max())]
        rows = rows.where(rows < end[:, None], len(boxes))
        heads = padded[rows]
        keep = torch.cat([_settle(excess(part, part, iou_threshold)) for part in heads.split(chunk)])
        keep &= rows < len(boxes)
        kept[rank[rows[keep]]] = True
        # a box that max_keep better ones beat is out, and suppresses only what comes later still
        full = kept.view(shape).cumsum(1) >= max_keep
        place = torch.arange(len(rank), device=boxes.device) - first.repeat_interleave(count)
        alive = (place >= tile) & ~full.view(-1)[rank]

        # tiles of the rest of each class, against its kept heads, moved to the front
        best = keep.long().argsort(dim=1, descending=True, stable=True)[:, : int(keep.sum(1).max())]
        heads = torch.where(keep[..., None], heads, nowhere).take_along_dim(best[..., None], 1)
        tiles = (count - 1).div(tile, rounding_mode="floor")
        owner = torch.arange(len(count), device=boxes.device).repeat_interleave(tiles)
        number = torch.arange(len(owner), device=boxes.device) - (tiles.cumsum(0) - tiles)[owner]
        rows = (first[owner] + (number + 1) * tile)[:, None] + slot
        rows = rows.where(rows < end[owner, None], len(boxes))
        hit = torch.zeros(len(padded), dtype=torch.bool, device=boxes.device)
        for i in range(0, len(owner), chunk):
            part = rows[i : i + chunk]
            hit[part] = excess(heads[owner[i : i + chunk]], padded[part], iou_threshold).amax(1) > 0
        alive &= ~hit[:-1]
        rank, group, boxes = rank[alive], group[alive], boxes[alive]
    return kept.view(shape)


@batched_nms_padded_reference.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_keep: int) -> tuple[Tensor, Tensor]:
    B = boxes.shape[0]
    return boxes.new_empty((B, max_keep), dtype=torch.int64), boxes.new_empty((B,), dtype=torch.int64)


def _settle(excess: Tensor) -> Tensor:
    """Greedy NMS of the boxes, sorted, that are in each of G classes, from their `excess` [G, n, n] -> [G, n] bool."""
    suppresses = excess.triu(1).gt_(0)
    keep, before = suppresses.new_ones(len(excess), 1, excess.shape[1]), None
    while before is None or not torch.equal(keep, before):  # as often as the longest chain of suppressions
        before, keep = keep, (keep.bmm(suppresses) == 0).to(keep.dtype)
    return keep[:, 0] > 0


def _excess(a: Tensor, b: Tensor, iou_threshold: float) -> Tensor:
    """Above 0 where IoU of a [G, m, 4 or 5] with b [G, n, 4 or 5] > threshold, as float64 decides -> [G, m, n]."""
    columns_a, columns_b = a.permute(2, 0, 1).contiguous()[..., None], b.permute(2, 0, 1).contiguous()[:, :, None]
    if len(columns_a) == 5:  # contiguous columns make what follows three times faster
        (ax, ay, aw, ah, _), (bx, by, bw, bh, _) = columns_a, columns_b
        dx, dy, reach = ax - bx, ay - by, (torch.hypot(aw, ah) + torch.hypot(bw, bh)) / 2
        near = dx.mul_(dx).addcmul_(dy, dy) < reach.mul_(reach)
        excess = torch.zeros_like(dx)
        g, i, j = near.nonzero(as_tuple=True)
        iou = box_iou_rotated_reference(a[g, i].double(), b[g, j].double(), aligned=True)
        excess[g, i, j] = (iou - iou_threshold).to(excess.dtype)
        return excess
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = columns_a, columns_b
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


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _iou(a, b, ROTATED: tl.constexpr):
    if ROTATED:
        iou = rotated_iou_pair(*a, *b)
    else:
        ax1, ay1, ax2, ay2 = a
        bx1, by1, bx2, by2 = b
        width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
        height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
        inter = width * height
        iou = inter / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter)
    return iou


@triton.jit
def _float64(box):
    wide = ()
    for i in tl.static_range(len(box)):
        wide += (box[i].to(tl.float64),)  # type: ignore[assignment]
    return wide


@triton.jit(do_not_specialize=["n", "first_tile", "tiles"])
def _words_kernel(
    boxes_ptr, start_ptr, threshold_ptr, words_ptr, n, rows, first_tile, tiles,
    ROTATED: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of 64 columns by every SPLIT-th group of ROWS rows from the start of the columns' first class on.

    Bit c of words [B, tiles, rows] at row i: box i suppresses box c of the tile, if kept itself.
    """
    SIZE: tl.constexpr = 5 if ROTATED else 4
    image = tl.program_id(2).to(tl.int64)
    first = (first_tile + tl.program_id(0)) * 64
    boxes_ptr += image * n * SIZE
    start_ptr += image * n
    words_ptr += (image * tiles + tl.program_id(0)) * rows
    j = first + tl.arange(0, 64)
    start = tl.load(start_ptr + j, mask=j < n, other=_NEVER)
    b = load_box((boxes_ptr + j * SIZE)[None, :], (j < n)[None, :], 0, SIZE)
    bit = tl.full([64], 1, tl.int64) << tl.arange(0, 64).to(tl.int64)
    threshold64 = tl.load(threshold_ptr)
    threshold = threshold64.to(boxes_ptr.dtype.element_ty)
    row = tl.load(start_ptr + first) // ROWS * ROWS + tl.program_id(1) * ROWS
    while row < first + 64:
        i = row + tl.arange(0, ROWS)
        a = load_box((boxes_ptr + i * SIZE)[:, None], (i < n)[:, None], 0, SIZE)
        pair = (i[:, None] >= start[None, :]) & (i[:, None] < j[None, :])  # of one class, the better one first
        if ROTATED:
            reach = (tl.sqrt(a[2] * a[2] + a[3] * a[3]) + tl.sqrt(b[2] * b[2] + b[3] * b[3])) * 0.5
            dx, dy = a[0] - b[0], a[1] - b[1]
            pair = pair & (dx * dx + dy * dy < reach * reach)
        word = tl.zeros([ROWS], tl.int64)
        if tl.max(tl.max(pair.to(tl.int32), 1), 0) > 0:
            iou = _iou(a, b, ROTATED)
            above = pair & (iou > threshold)
            if boxes_ptr.dtype.element_ty == tl.float32:  # too close to call: float64 decides
                close = pair & (tl.abs(iou - threshold) <= (1e-5 if ROTATED else 2e-6))
                if tl.max(tl.max(close.to(tl.int32), 1), 0) > 0:
                    above = tl.where(close, _iou(_float64(a), _float64(b), ROTATED) > threshold64, above)
            word = tl.sum(tl.where(above, bit[None, :], 0), 1)
        tl.store(words_ptr + i, word, mask=i < n)
        row += ROWS * SPLIT


@triton.jit(do_not_specialize=["n", "first_tile", "tiles"])
def _scan_kernel(start_ptr, words_ptr, kept_ptr, n, rows, first_tile, tiles, AMD: tl.constexpr, ROWS: tl.constexpr):
    """The classes that start in a tile of 64 boxes (in the first one: or earlier), decided tile by tile."""
    image = tl.program_id(1).to(tl.int64)
    start_ptr += image * n
    kept_ptr += image * n
    words_ptr += image * tiles * rows
    lane = tl.arange(0, 64).to(tl.int64)
    tile = tl.program_id(0)
    highest = (first_tile + tile) * 64 + 64
    lowest = tl.where(tile == 0, 0, highest - 64)
    more = tile < tiles
    while more:
        first = (first_tile + tile) * 64
        tile_ptr = words_ptr + tile.to(tl.int64) * rows
        start = tl.load(start_ptr + first + lane, mask=first + lane < n, other=_NEVER)
        owned = (start >= lowest) & (start < highest)
        # what kept boxes of earlier tiles suppress here
        suppressed = tl.zeros([ROWS], tl.int64)
        row = tl.min(tl.where(owned, start, _NEVER), 0)
        while row < first:
            i = row + tl.arange(0, ROWS)
            kept = tl.load(kept_ptr + i, mask=i < first, other=0)
            suppressed |= tl.where(kept, tl.load(tile_ptr + i, mask=i < first, other=0), 0)
            row += ROWS
        words = tl.load(tile_ptr + first + lane, mask=owned, other=0)
        alive = tl.sum(tl.where(owned, tl.full([64], 1, tl.int64) << lane, 0), 0) & ~tl.reduce(suppressed, 0, _or)
        keep = alive
        changed = True
        while changed:  # as often as the longest chain of suppressions within the tile
            next_keep = alive & ~tl.reduce(tl.where(((keep >> lane) & 1) > 0, words, 0), 0, _or)
            changed = next_keep != keep
            keep = next_keep
        tl.store(kept_ptr + first + lane, ((keep >> lane) & 1) > 0, mask=owned)
        memory_barrier(AMD)  # other threads read these in the next tile
        tile += 1
        first = (first_tile + tile) * 64
        start_of_next = tl.load(start_ptr + first, mask=(tile < tiles) & (first < n), other=_NEVER)
        more = (start_of_next >= lowest) & (start_of_next < highest)


def _blocks(images: int, boxes: int) -> list[tuple[int, int]]:
    """Tiles of 64 columns in blocks, (first, how many), whose words [images, tiles, rows up to their end] fit."""
    blocks, first, total = [], 0, cdiv(boxes, 64)
    room = TUNING["words"] // (64 * images)
    while first < total:
        tiles = min(total - first, max(1, (math.isqrt(first * first + 4 * room) - first) // 2))
        blocks.append((first, tiles))
        first += tiles
    return blocks


@triton_op("rtmdet_fast::batched_nms")
def _batched_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_keep: int
) -> tuple[Tensor, Tensor]:
    """First every pair of a class, in parallel, into bits; then a scan over 64 boxes at a time, for each class.

    5,000 boxes of 80 classes are 160,000 pairs (some 20 flops each) and 40 kB of words an image; of one class,
    12.5 million pairs and 1.6 MB. How many there are is known to the GPU alone, and asking it would make the host wait:
    so columns go by in blocks, that the words of all rows up to them fit into a buffer.
    """
    order, rank, boxes, start = _sorted(boxes, scores, labels)
    (B, N), rotated = scores.shape, boxes.shape[2] == 5
    kept = torch.zeros((B, N), dtype=torch.bool, device=boxes.device)  # by slot
    if B * N > 0:
        config = TUNING["rotated" if rotated else "axis_aligned"]
        threshold = torch.full((1,), iou_threshold, dtype=torch.float64, device=boxes.device)
        blocks = _blocks(B, N)
        words = torch.empty(
            max(B * tiles * 64 * (first + tiles) for first, tiles in blocks), dtype=torch.int64, device=boxes.device
        )
        for first, tiles in blocks:
            sizes = N, 64 * (first + tiles), first, tiles
            wrap_triton(_words_kernel)[(tiles, config["SPLIT"], B)](
                boxes, start, threshold, words, *sizes, ROTATED=rotated, **config
            )
            wrap_triton(_scan_kernel)[(tiles, B)](
                start, words, kept, *sizes, AMD=_dispatch.IS_AMD, ROWS=TUNING["scan_rows"]
            )
    by_rank = torch.zeros((B, N), dtype=torch.bool, device=boxes.device).scatter_(1, rank, kept)
    return _selected(by_rank, order, max_keep)
