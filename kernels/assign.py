"""Label assignment for a whole batch: RTMDet's dynamic soft labels, SimOTA and TaskAligned as other costs, and ATSS.

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

ATSS (arXiv:1912.02424) goes by priors alone, each of which has one anchor around it, a square of side anchor_scale *
stride. Candidates of ground truth j are on each level the topk priors nearest to its centre, of equally near ones the
first. It wins those with

    IoU of the anchor with j  >=  mean + standard deviation (n - 1) of that IoU over the candidates

that lie inside j by 0.01 px; a prior that several won goes to the anchor's greatest IoU among them. The IoU that comes
back, to learn from, is that of the predicted boxes, as generalised focal loss has it (arXiv:2006.04388).

What cannot match: ground truths from `gt_counts` on, with a label outside [0, C) (ATSS,
which knows no C: below 0), a non-finite coordinate or centre, or
x2 < x1 or y2 < y1 (w < 0 or h < 0); priors with a non-finite box, logit or score (SimOTA: a score outside [0, 1]) or
a stride <= 0; pairs whose cost overflows. None of them changes what others get. As in the published assigners a
zero-size ground truth still competes for candidates, and a zero-size or inverted prediction has IoU 0 with all: it
counts for no k, and matches only where nothing costs less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rtmdet_fast.kernels import assign_torch, assign_triton
from rtmdet_fast.kernels._dispatch import use_triton


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
    inputs = boxes, logits, priors, gt_boxes, gt_labels, gt_counts, gt_centers
    return _assign(inputs, "soft_label", topk, center_radius, iou_weight)


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
    inputs = boxes, logits, priors, gt_boxes, gt_labels, gt_counts, gt_centers
    return _assign(inputs, "soft_label", topk, center_radius, iou_weight, reference=True)


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
    inputs = boxes, scores, priors, gt_boxes, gt_labels, gt_counts, None
    return _assign(inputs, "simota", topk, center_radius, iou_weight, cls_weight)


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
    inputs = boxes, scores, priors, gt_boxes, gt_labels, gt_counts, None
    gt, iou, label = _assign(inputs, "task_aligned", topk, 0.0, iou_weight=beta, cls_weight=alpha)
    score = scores.detach().to(iou.dtype).gather(2, label.clamp(min=0)[..., None])[..., 0]
    return gt, iou, label, torch.where(gt < 0, 0, score**alpha * iou**beta)


def atss_assign(
    boxes: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor,
    *,
    strides: Sequence[float],
    topk: int = 9,
    anchor_scale: float = 8.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `dynamic_soft_label_assign` by ATSS, for which neither scores nor boxes matter; of rotated boxes anchors have
    the angle 0.

    Args:
        strides: of the levels, in pixels; priors of one stride are a level, and those of none of these match nothing.
        topk: candidates of a level, for each ground truth.
        anchor_scale: sides of an anchor, in strides.
    """
    names = "boxes", "priors", "gt_boxes", "gt_labels", "gt_counts"
    tensors = _checked(dict(zip(names, (boxes, priors, gt_boxes, gt_labels, gt_counts), strict=True)), topk)
    levels = [float(stride) for stride in strides]
    if len(set(levels)) < len(levels) or not all(0 < level < math.inf for level in levels):
        raise ValueError(f"strides={strides!r}: expected different numbers of pixels above 0")
    op = assign_triton.atss if _takes_triton(boxes) else assign_torch.atss
    return op(*tensors.values(), levels, topk, float(anchor_scale))


def _assign(
    inputs: tuple[Tensor | None, ...],
    method: str,
    topk: int,
    radius: float,
    iou_weight: float,
    cls_weight: float = 1.0,
    reference: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    name = "logits" if method == "soft_label" else "scores"
    names = "boxes", name, "priors", "gt_boxes", "gt_labels", "gt_counts", "gt_centers"
    tensors = _checked({key: x for key, x in zip(names, inputs, strict=True) if x is not None}, topk)
    op = assign_triton.assign if _takes_triton(tensors["boxes"]) and not reference else assign_torch.assign
    return op(*map(tensors.get, names), method, topk, float(radius), float(iou_weight), float(cls_weight))


def _takes_triton(boxes: Tensor) -> bool:
    return use_triton(boxes) and boxes.dtype != torch.float64  # in which the kernels do not compute


def _checked(inputs: dict[str, Tensor], topk: int) -> dict[str, Tensor]:
    """The inputs by name, detached. Raises ValueError or TypeError where one does not fit."""
    tensors = {key: x.detach() for key, x in inputs.items()}
    boxes, gt_boxes = tensors["boxes"], tensors["gt_boxes"]
    for key, x in tensors.items():
        integer = key in ("gt_labels", "gt_counts")
        if x.is_floating_point() == integer or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"{key} is {x.dtype}: expected {'an integer' if integer else 'a floating'} dtype")
        if x.device != boxes.device:
            raise ValueError(f"{key} is on {x.device}, boxes on {boxes.device}")
    if boxes.ndim != 3 or boxes.shape[2] not in (4, 5):
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}: expected [B, N, 4 or 5]")
    for key in tensors.keys() & {"logits", "scores"}:
        shape = tensors[key].shape
        if len(shape) != 3 or shape[:2] != boxes.shape[:2] or shape[2] == 0:
            raise ValueError(f"{key} has shape {tuple(shape)}: expected {[*boxes.shape[:2]]} and C > 0 classes")
    if gt_boxes.ndim != 3:
        raise ValueError(f"gt_boxes has shape {tuple(gt_boxes.shape)}: expected [B, M, {boxes.shape[2]}]")
    (B, N, D), M = boxes.shape, gt_boxes.shape[1]
    shapes = {"priors": (N, 4), "gt_boxes": (B, M, D), "gt_labels": (B, M), "gt_counts": (B,), "gt_centers": (B, M, 2)}
    for key in shapes.keys() & tensors.keys():
        if tensors[key].shape != shapes[key]:
            raise ValueError(f"{key} has shape {tuple(tensors[key].shape)}: expected {list(shapes[key])}")
    if not isinstance(topk, int) or not 1 <= topk <= 64:
        raise ValueError(f"topk={topk!r}: expected an integer from 1 to 64")
    return tensors
