"""Label assignment in Triton: the formulas of assign.py, in float32.

Batch 32, 8400 priors, 80 classes, 100 ground truths, fp16 logits: `_prior_kernel` reads the logits of the candidates
once, at most 43 MB, and writes 1 MB. `_match_kernel` goes through 27 M pairs at some 60 flops, 1.6 Gflop, and reads
32 bytes for each from the caches (box, prior, class sum), 0.9 GB; it reads logits only where boxes overlap, a few
per cent of the pairs. `_resolve_kernel` reads 2 MB of winners and repeats the pairs of those tiles of priors where
several ground truths won one. Beside the outputs 12 bytes a prior and 256 a ground truth are allocated: 4 MB.

Tuples group what functions pass among themselves: a box (x1, y1, x2, y2) or (cx, cy, w, h, radians), a prior (index, x,
y, stride, class sum, box), a ground truth (box, x and y of its centre, label, valid), weights (radius, iou_weight,
cls_weight). They are plain, and kernels take none, for the sake of torch.compile (2.13): Inductor loses tensors that
stand in a tuple, takes a tuple of numbers for one integer, and leaves classes out of the source that it copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from rtmdet_fast.kernels._dispatch import cdiv, tl, triton, triton_op, wrap_triton
from rtmdet_fast.kernels.assign_torch import ANY_CLASS, ROUNDING
from rtmdet_fast.kernels.rotated_iou import _cos_sin, rotated_iou_pair

# Read at each launch. All blocks are as large as fits the registers without spilling (tests: test_lowering).
TUNING = {
    "prior": {"BLOCK": 32, "BLOCK_M": 32, "BLOCK_C": 16, "num_warps": 4},  # priors times ground truths, or classes
    "match": {"BLOCK": 256, "num_warps": 1},  # one warp: no reduction waits for another
    "match_rotated": {"BLOCK": 32, "num_warps": 1},  # a prior a lane: a rotated IoU takes more registers
    "resolve": {"BLOCK": 128, "num_warps": 4},  # a prior a thread
    "nearest": {"BLOCK": 256, "num_warps": 1},  # as "match"
    "threshold": {"num_warps": 2},  # a candidate a lane
}


@triton.jit
def _load_box(ptr, index, mask, BOX: tl.constexpr):
    ptr += index.to(tl.int64) * BOX
    b0 = tl.load(ptr, mask, 0).to(tl.float32)
    b1 = tl.load(ptr + 1, mask, 0).to(tl.float32)
    b2 = tl.load(ptr + 2, mask, 0).to(tl.float32)
    b3 = tl.load(ptr + 3, mask, 0).to(tl.float32)
    if BOX == 5:
        return b0, b1, b2, b3, tl.load(ptr + 4, mask, 0).to(tl.float32)
    else:
        return b0, b1, b2, b3


@triton.jit
def _load_rows(ptr, index, mask):
    """The four columns of rows `index` of [N, 4], with a load for each row.

    Column by column the match kernel's loop over 256 priors (sm_90, float32) has 64 loads in place of 24 and 1,546
    instructions in place of 1,483, though 87 registers in place of 114.
    """
    rows = tl.load(ptr + index.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None], mask[:, None], 0).to(tl.float32)
    even, odd = tl.split(tl.reshape(rows, (index.shape[0], 2, 2)))
    column0, column2 = tl.split(even)
    column1, column3 = tl.split(odd)
    return column0, column1, column2, column3


@triton.jit
def _load_prior(prior_ptr, index, mask):
    prior_ptr += index.to(tl.int64) * 4
    x = tl.load(prior_ptr, mask, 0).to(tl.float32)
    y = tl.load(prior_ptr + 1, mask, 0).to(tl.float32)
    return x, y, tl.load(prior_ptr + 2, mask, 0).to(tl.float32)


@triton.jit
def _load_gt(gts, j, mask, C, BOX: tl.constexpr):
    """Ground truth(s) j of the image that begins at `row`; invalid ones have size 0 and label 0 and stand at inf."""
    box_ptr, label_ptr, center_ptr, row = gts
    j = j.to(tl.int64)
    box = _load_box(box_ptr + row * BOX, j, mask, BOX)
    label = tl.load(label_ptr + row + j, mask, -1)
    inf = float("inf")
    if BOX == 5:
        cx, cy, w, h, angle = box
    else:
        x1, y1, x2, y2 = box
        cx, cy, w, h, angle = (x1 + x2) * 0.5, (y1 + y2) * 0.5, x2 - x1, y2 - y1, x1 * 0
    if center_ptr is not None:
        center_ptr += row * 2
        cx = tl.load(center_ptr + j * 2, mask, 0).to(tl.float32)
        cy = tl.load(center_ptr + j * 2 + 1, mask, 0).to(tl.float32)
    valid = mask & (label >= 0) & (label < C) & (w >= 0) & (h >= 0) & (w * h < inf)
    valid = valid & (tl.abs(box[0]) + tl.abs(box[1]) < inf) & (tl.abs(angle) < inf) & (tl.abs(cx) + tl.abs(cy) < inf)
    box = [tl.where(valid, side, 0.0) for side in box]
    return box, tl.where(valid, cx, inf), tl.where(valid, cy, inf), tl.where(valid, label, 0), valid


@triton.jit
def _depth(x, y, box):
    """How far points lie inside a box, in pixels; below 0 outside."""
    if len(box) == 5:
        cx, cy, w, h, angle = box
        cos, sin = _cos_sin(angle)
        dx, dy = x - cx, y - cy
        return tl.minimum(w * 0.5 - tl.abs(dx * cos + dy * sin), h * 0.5 - tl.abs(dy * cos - dx * sin))
    else:
        x1, y1, x2, y2 = box
        return tl.minimum(tl.minimum(x - x1, x2 - x), tl.minimum(y - y1, y2 - y))


@triton.jit
def _center_depth(x, y, stride, cx, cy, radius):
    return radius * stride - tl.maximum(tl.abs(x - cx), tl.abs(y - cy))


@triton.jit
def _iou(gt_box, box):
    if len(box) == 5:
        gx, gy, gw, gh, angle = gt_box
        bx, by, bw, bh, _ = box
        gw, gh = tl.maximum(gw, 1e-3), tl.maximum(gh, 1e-3)
        reach = 0.5 * (tl.sqrt(gw * gw + gh * gh) + tl.sqrt(bw * bw + bh * bh))
        dx, dy = bx - gx, by - gy
        near = dx * dx + dy * dy < reach * reach
        iou = tl.zeros_like(dx)
        if tl.max(near.to(tl.int32), 0) > 0:  # most tiles of priors end here
            iou = tl.where(near, rotated_iou_pair(*box, gx, gy, gw, gh, angle), 0.0)
        return iou
    else:
        gx1, gy1, gx2, gy2 = gt_box
        x1, y1, x2, y2 = box
        w = tl.maximum(tl.minimum(gx2, x2) - tl.maximum(gx1, x1), 0.0)
        h = tl.maximum(tl.minimum(gy2, y2) - tl.maximum(gy1, y1), 0.0)
        union = (gx2 - gx1) * (gy2 - gy1) + (x2 - x1) * (y2 - y1) - w * h
        return w * h / tl.maximum(union, 1e-6)


@triton.jit
def _log1m(p):
    """log(1 - p), at least -100."""
    return tl.maximum(tl.log(1 - p), -100.0)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def _power(x, exponent):
    return tl.where(exponent == 0, 1.0, tl.exp2(exponent * tl.log2(x)))


@triton.jit
def _iou_and_cost(score_ptr, C, prior, gt, weights, METHOD: tl.constexpr):
    """Of one ground truth with a tile of priors; 0 and inf where the class sum is inf."""
    index, x, y, stride, class_sum, box = prior
    gt_box, cx, cy, label, _ = gt
    radius, iou_weight, cls_weight = [tl.full([], weight, tl.float32) for weight in weights]  # may come in float64
    usable = class_sum < float("inf")
    iou = tl.where(usable, _iou(gt_box, box), 0.0)
    score_ptr += index.to(tl.int64) * C + label
    if METHOD == "simota":
        p = tl.load(score_ptr, usable, 0).to(tl.float32)
        cost = class_sum + cls_weight * (_log1m(p) - tl.maximum(tl.log(p), -100.0)) - iou_weight * tl.log(iou + 1e-7)
        both = tl.minimum(_depth(x, y, gt_box), _center_depth(x, y, stride, cx, cy, radius))
        cost += tl.where(both > 0, 0.0, 1e5) + tl.where(cx < float("inf"), 0.0, float("inf"))
    else:
        score = tl.load(score_ptr, iou > 0, 0).to(tl.float32)
        if METHOD == "task_aligned":
            metric = _power(score, cls_weight) * _power(iou, iou_weight)
            cost = tl.where((iou > 0) & (metric > 0), -metric, float("inf"))
        else:
            p, s = 1 / (1 + tl.exp(-score)), _softplus(score)
            dx, dy = x - cx, y - cy
            far = tl.exp2((tl.sqrt(dx * dx + dy * dy) / stride - radius) * 3.321928094887362)  # log2(10)
            cls = iou * (s * (iou - 2 * p) - score * (iou - p) * (iou - p))
            cost = far + class_sum + cls - iou_weight * tl.log(iou + 1e-7)
    return iou, tl.where(usable, cost, float("inf"))


@triton.jit(do_not_specialize=["N", "M"])
def _prior_kernel(
    box_ptr, score_ptr, prior_ptr, gt_ptr, label_ptr, count_ptr, center_ptr, sum_ptr,
    N, M, C, radius, cls_weight,
    BOX: tl.constexpr, METHOD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Class sums of BLOCK priors of an image, 0 without scores; inf for those that are no candidates."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, stride = _load_prior(prior_ptr, n, n < N)
    box = _load_box(box_ptr + image * N * BOX, n, n < N, BOX)
    inf = float("inf")
    area = box[2] * box[3] if BOX == 5 else (box[2] - box[0]) * (box[3] - box[1])
    size = tl.abs(box[0]) + tl.abs(box[1]) + (tl.abs(box[4]) if BOX == 5 else 0.0)
    usable = (n < N) & (tl.abs(area) < inf) & (size < inf)
    # comparisons keep out NaN, which tl.maximum does not
    usable = usable & (stride > 0) & (tl.abs(x) + tl.abs(y) + stride < inf)
    if METHOD == "soft_label" or METHOD == "simota":
        gts = gt_ptr, label_ptr, center_ptr, image * M
        count = tl.minimum(tl.load(count_ptr + image), M).to(tl.int32)
        deepest = tl.full([BLOCK], -inf, tl.float32)
        first = count * 0
        while first < count:
            j = first + tl.arange(0, BLOCK_M)
            gt_box, cx, cy, _, _ = _load_gt(gts, j, j < count, C, BOX)
            depth = _depth(x[:, None], y[:, None], [side[None] for side in gt_box])
            if METHOD == "simota":
                reach = tl.full([], radius, tl.float32)
                square = _center_depth(x[:, None], y[:, None], stride[:, None], cx[None], cy[None], reach)
                depth = tl.maximum(depth, square)
            deepest = tl.maximum(deepest, tl.max(depth, 1))
            first += BLOCK_M
        usable = usable & (deepest > (0.01 if BOX == 5 and METHOD == "soft_label" else 0.0))
    class_sum = tl.zeros([BLOCK], tl.float32)
    if score_ptr is not None:
        score_ptr += image * N * C
        first = tl.program_id(0) * 0
        while first < C:
            c = first + tl.arange(0, BLOCK_C)
            inside = usable[:, None] & (c < C)[None]
            score = tl.load(score_ptr + n.to(tl.int64)[:, None] * C + c[None], inside, 0).to(tl.float32)
            term = score * 0  # NaN for an infinite score
            if METHOD == "soft_label":
                p = 1 / (1 + tl.exp(-score))
                term += _softplus(score) * p * p
            elif METHOD == "simota":
                term -= tl.where((score >= 0) & (score <= 1), _log1m(score), float("nan"))
            class_sum += tl.sum(tl.where(inside, term, 0.0), 1)
            first += BLOCK_C
        class_sum *= tl.full([], cls_weight, tl.float32)
    tl.store(sum_ptr + image * N + n, tl.where(usable & (class_sum < 1e30), class_sum, inf), n < N)


@triton.jit(do_not_specialize=["N", "M"])
def _match_kernel(
    box_ptr, score_ptr, prior_ptr, gt_ptr, label_ptr, count_ptr, center_ptr, sum_ptr, index_ptr, key_ptr,
    N, M, C, topk, radius, iou_weight, cls_weight,
    BOX: tl.constexpr, METHOD: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The priors that one ground truth wins, to index [B, M, LIST] into all of [B, N], and a key, 0 if it wins less.

    It goes through all priors with its topk IoUs and costs in registers: a list takes a block's best while that beats
    its worst. Blocks are visited last to first: priors stand fine to coarse, so that the few of the coarse levels set
    a bound that few others pass. No atomics here: an address that follows from the loop would have torch.compile
    believe that every input is written, and clone the logits.
    """
    j, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    gts = gt_ptr, label_ptr, center_ptr, image * M
    gt = _load_gt(gts, j, j < tl.load(count_ptr + image), C, BOX)
    gt_box, valid = gt[0], gt[4]
    box_ptr, score_ptr, sum_ptr = box_ptr + image * N * BOX, score_ptr + image * N * C, sum_ptr + image * N
    weights = radius, iou_weight, cls_weight
    inf = float("inf")
    lane, slot = tl.arange(0, BLOCK), tl.arange(0, LIST)
    # slots past topk are never the worst
    ious, costs = tl.where(slot < topk, 0.0, inf), tl.where(slot < topk, inf, -inf)
    index = tl.zeros([LIST], tl.int32)
    least_iou, most_cost = tl.min(ious, 0), tl.max(costs, 0)
    first = tl.where(valid, tl.cdiv(N, BLOCK) * BLOCK, 0)
    while first > 0:
        first -= BLOCK
        n = first + lane
        class_sum = tl.load(sum_ptr + n, n < N, inf)
        if tl.min(class_sum, 0) < inf:
            x, y, stride, _height = _load_rows(prior_ptr, n, n < N)
            box = _load_rows(box_ptr, n, n < N) if BOX == 4 else _load_box(box_ptr, n, n < N, BOX)
            prior = n, x, y, stride, class_sum, box
            iou, cost = _iou_and_cost(score_ptr, C, prior, gt, weights, METHOD)
            if METHOD != "task_aligned":
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
    if METHOD == "task_aligned":
        x, y, _ = _load_prior(prior_ptr, index, wins)
        box = _load_box(box_ptr, index, wins, BOX)
        wins = wins & (_depth(x, y, gt_box) > 0.01)
        key = (_iou(gt_box, box).to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - j)
    else:
        k = tl.maximum(tl.sum(tl.where(slot < topk, ious, 0.0), 0).to(tl.int32), 1)
        before = (costs[None] == costs[:, None]) & (slot[None] < slot[:, None])
        before = ((costs[None] < costs[:, None]) | before) & (slot < topk)[None]
        wins = wins & (tl.sum(before.to(tl.int32), 1) < k)
        key = tl.full([LIST], 1 << 40, tl.int64) + j
    out = (image * M + j) * LIST + slot
    tl.store(index_ptr + out, image * N + index)
    tl.store(key_ptr + out, tl.where(wins, key, 0))


@triton.jit(do_not_specialize=["N", "M"])
def _resolve_kernel(
    box_ptr, score_ptr, prior_ptr, gt_ptr, label_ptr, count_ptr, center_ptr, sum_ptr,
    won_ptr, assigned_ptr, iou_ptr, assigned_label_ptr,
    N, M, C, radius, iou_weight, cls_weight,
    BOX: tl.constexpr, METHOD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The ground truths of BLOCK priors of an image: of several that won a prior the cheapest of all."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out = image * N + n
    won = tl.load(won_ptr + out, n < N, 0)
    gts = gt_ptr, label_ptr, center_ptr, image * M
    box = _load_box(box_ptr + image * N * BOX, n, won > 0, BOX)
    if METHOD == "task_aligned" or METHOD == "atss":
        assigned = 0x7FFFFFFF - (won & 0xFFFFFFFF).to(tl.int32)
    else:
        contested = (won >> 40) > 1
        assigned = tl.where(contested, -1, (won & ((1 << 40) - 1)).to(tl.int32))
        if tl.max(contested.to(tl.int32), 0) > 0:
            weights = radius, iou_weight, cls_weight
            x, y, stride = _load_prior(prior_ptr, n, contested)
            prior = n, x, y, stride, tl.load(sum_ptr + out, contested, float("inf")), box
            least = tl.full([BLOCK], float("inf"), tl.float32)
            count = tl.minimum(tl.load(count_ptr + image), M).to(tl.int32)
            j = count * 0
            while j < count:
                gt = _load_gt(gts, j, j >= 0, C, BOX)
                _, cost = _iou_and_cost(score_ptr + image * N * C, C, prior, gt, weights, METHOD)
                assigned = tl.where(cost < least, j, assigned)
                least = tl.minimum(least, cost)
                j += 1
    match = (won > 0) & (assigned >= 0)
    gt_box, _, _, label, _ = _load_gt((gt_ptr, label_ptr, None, image * M), assigned, match, C, BOX)
    tl.store(assigned_ptr + out, tl.where(match, assigned, -1), n < N)
    tl.store(iou_ptr + out, tl.where(match, _iou(gt_box, box), 0.0), n < N)
    tl.store(assigned_label_ptr + out, tl.where(match, label, -1), n < N)


@triton.jit(do_not_specialize=["N", "M", "level"])
def _nearest_kernel(
    prior_ptr, gt_ptr, label_ptr, count_ptr, sum_ptr, near_ptr,
    N, M, any_class, level, level_stride, topk,
    BOX: tl.constexpr, LEVELS: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The priors of a level that are nearest to the centre of one ground truth, to near [B, M, LEVELS, LIST]; else -1.

    A key is the squared distance, whose bits are in the order of floats, and below it the prior: no two are equal.
    """
    j, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    gts = gt_ptr, label_ptr, None, image * M
    _, cx, cy, _, valid = _load_gt(gts, j, j < tl.load(count_ptr + image), any_class, BOX)
    lane, slot = tl.arange(0, BLOCK), tl.arange(0, LIST)
    infinity = tl.full([], 0x7F800000 << 32, tl.int64)
    keys = tl.where(slot < topk, infinity + slot, -1)  # slots past topk are never the worst
    worst = tl.max(keys, 0)
    sum_ptr += image * N
    first = tl.program_id(0) * 0
    while first < tl.where(valid, N, 0):
        n = first + lane
        x, y, stride, _height = _load_rows(prior_ptr, n, n < N)
        mine = (n < N) & (stride == tl.full([], level_stride, tl.float32))
        if tl.max(mine.to(tl.int32), 0) > 0:
            dx, dy = x - cx, y - cy
            bits = (dx * dx + dy * dy).to(tl.int32, bitcast=True).to(tl.int64)
            usable = mine & (tl.load(sum_ptr + n, mine, 0) < float("inf"))
            key = tl.where(usable & ((bits << 32) < infinity), (bits << 32) | n, 0x7FFFFFFFFFFFFFFF)
            best = tl.min(key, 0)
            while best < worst:
                keys = tl.where(keys == worst, best, keys)
                key = tl.where(key == best, 0x7FFFFFFFFFFFFFFF, key)
                worst, best = tl.max(keys, 0), tl.min(key, 0)
        first += BLOCK
    near = tl.where((slot < topk) & (keys < infinity), (keys & 0xFFFFFFFF).to(tl.int32), -1)
    tl.store(near_ptr + ((image * M + j) * LEVELS + level) * LIST + slot, near)


@triton.jit(do_not_specialize=["N", "M"])
def _threshold_kernel(
    prior_ptr, gt_ptr, label_ptr, count_ptr, near_ptr, index_ptr, key_ptr,
    N, M, any_class, anchor_scale, rounding,
    BOX: tl.constexpr, NEAR: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Which of NEAR candidates one ground truth wins: index into all of [B, N] and key as `_match_kernel` has them."""
    j, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    gts = gt_ptr, label_ptr, None, image * M
    gt_box, _, _, _, _ = _load_gt(gts, j, j < tl.load(count_ptr + image), any_class, BOX)
    slot = tl.arange(0, SLOTS)
    out = (image * M + j) * NEAR + slot
    index = tl.load(near_ptr + out, slot < NEAR, -1)
    real = index >= 0
    x, y, stride = _load_prior(prior_ptr, index, real)
    side = stride * tl.full([], anchor_scale, tl.float32)
    half = side * 0.5
    if BOX == 5:
        iou = _iou(gt_box, (x, y, side, side, x * 0))
    else:
        iou = _iou(gt_box, (x - half, y - half, x + half, y + half))
    iou = tl.where(real, iou, 0.0)
    count = tl.sum(real.to(tl.float32), 0)
    mean = tl.sum(iou, 0) / tl.maximum(count, 1.0)
    deviation = tl.where(real, iou - mean, 0.0)
    deviation = tl.sqrt(tl.sum(deviation * deviation, 0) / tl.maximum(count - 1, 1.0))
    wins = real & (iou >= (mean + deviation) * (1 - tl.full([], rounding, tl.float32)))
    wins = wins & (_depth(x, y, gt_box) > 0.01)
    key = (iou.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - j)
    tl.store(index_ptr + out, image * N + tl.maximum(index, 0), slot < NEAR)
    tl.store(key_ptr + out, tl.where(wins, key, 0), slot < NEAR)


def _nothing(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gt = boxes.new_full(boxes.shape[:2], -1, dtype=torch.int64)
    return gt, boxes.new_zeros(boxes.shape[:2], dtype=torch.promote_types(boxes.dtype, torch.float32)), gt.clone()


def _resolved(
    inputs: Sequence[Any], won: Tensor, C: int, weights: tuple[float, float, float], kind: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches `_resolve_kernel`; `inputs` are its first eight."""
    boxes, M = inputs[0], inputs[3].shape[1]
    assigned, labels = (boxes.new_empty(boxes.shape[:2], dtype=torch.int64) for _ in range(2))
    iou = boxes.new_empty(boxes.shape[:2], dtype=torch.promote_types(boxes.dtype, torch.float32))
    tuning, (B, N) = TUNING["resolve"], boxes.shape[:2]
    outputs, grid = (assigned, iou, labels), (cdiv(N, tuning["BLOCK"]), B)
    wrap_triton(_resolve_kernel)[grid](*inputs, won, *outputs, N, M, C, *weights, **kind, **tuning)
    return outputs


@triton_op("rtmdet_fast::assign")
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
    (B, N, C), M, BOX = scores.shape, gt_boxes.shape[1], boxes.shape[2]
    if B * N * M == 0:
        return _nothing(boxes)
    inputs: list[Tensor | None] = [t.contiguous() for t in (boxes, scores, priors, gt_boxes, gt_labels, gt_counts)]
    inputs.append(None if gt_centers is None else gt_centers.contiguous())
    inputs.append(boxes.new_empty((B, N), dtype=torch.float32))  # class sums
    LIST = triton.next_power_of_2(topk)
    index, key = (boxes.new_empty((B * M * LIST,), dtype=torch.int64) for _ in range(2))
    weights, kind = (radius, iou_weight, cls_weight), {"BOX": BOX, "METHOD": method}
    tuning = TUNING["prior"]
    grid = cdiv(N, tuning["BLOCK"]), B
    wrap_triton(_prior_kernel)[grid](*inputs, N, M, C, radius, cls_weight, **kind, **tuning)
    tuning = TUNING["match_rotated" if BOX == 5 else "match"]
    wrap_triton(_match_kernel)[(M, B)](*inputs, index, key, N, M, C, topk, *weights, **kind, LIST=LIST, **tuning)
    # The upper bits count how many won a prior, the lower 40 sum them: of one it is the index. TaskAligned: the upper
    # bits are the IoU, and the first of those with the greatest is wanted. In both the order does not matter.
    won = boxes.new_zeros((B * N,), dtype=torch.int64)
    won = won.scatter_reduce(0, index, key, "amax") if method == "task_aligned" else won.scatter_add(0, index, key)
    return _resolved(inputs, won, C, weights, kind)


@triton_op("rtmdet_fast::atss")
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
    (B, N, BOX), M, LEVELS, LIST = boxes.shape, gt_boxes.shape[1], len(strides), triton.next_power_of_2(topk)
    if B * N * M * LEVELS == 0:
        return _nothing(boxes)
    boxes, priors, *gts = (t.contiguous() for t in (boxes, priors, gt_boxes, gt_labels, gt_counts))
    sums = boxes.new_empty((B, N), dtype=torch.float32)  # 0, or inf for what cannot match
    near = boxes.new_empty((B, M, LEVELS, LIST), dtype=torch.int32)
    index, key = (boxes.new_empty((near.numel(),), dtype=torch.int64) for _ in range(2))
    tuning = TUNING["prior"]
    grid, kind = (cdiv(N, tuning["BLOCK"]), B), {"BOX": BOX, "METHOD": "atss"}
    inputs = boxes, None, priors, *gts, None, sums
    wrap_triton(_prior_kernel)[grid](*inputs, N, M, ANY_CLASS, 0.0, 1.0, **kind, **tuning)
    tuning = TUNING["nearest"]
    for level, stride in enumerate(strides):
        arguments = priors, *gts, sums, near, N, M, ANY_CLASS, level, stride, topk
        wrap_triton(_nearest_kernel)[(M, B)](*arguments, BOX=BOX, LEVELS=LEVELS, LIST=LIST, **tuning)
    sizes = {"BOX": BOX, "NEAR": LEVELS * LIST, "SLOTS": triton.next_power_of_2(LEVELS * LIST)}
    arguments = priors, *gts, near, index, key, N, M, ANY_CLASS, anchor_scale, ROUNDING
    wrap_triton(_threshold_kernel)[(M, B)](*arguments, **sizes, **TUNING["threshold"])
    won = boxes.new_zeros((B * N,), dtype=torch.int64).scatter_reduce(0, index, key, "amax")
    return _resolved(inputs, won, ANY_CLASS, (0.0, 0.0, 0.0), kind)
