"""What stands on this project's kernels: NMS, overlaps of boxes, multi-scale deformable attention."""

from __future__ import annotations

import torch
from torch import Tensor

from rtmdet_fast.compat.mmcv_ext._common import check, fit, gradients
from rtmdet_fast.kernels import greedy_nms
from rtmdet_fast.kernels.rotated_iou import box_iou_rotated as _box_iou_rotated
from rtmdet_fast.ops.mmcv import multi_scale_deformable_attn_pytorch as _attention


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Boxes [N, 4] xyxy, scores [N] -> indices [K] of the kept, by falling score; `offset` 1: inclusive pixels."""
    if boxes.numel() == 0:
        return boxes.new_zeros(0, dtype=torch.int64)
    check(boxes)
    fit("boxes N 4, scores N", boxes, scores)
    return greedy_nms.greedy_nms(boxes, scores, iou_threshold, offset=offset)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Boxes [N, 4] xyxy, scores [N] -> indices [K] of the kept; into dets [N, 5] go boxes and lowered scores, first."""
    check(boxes, scores=scores, dets=dets)
    fit("boxes N 4, scores N, dets N 5", boxes, scores, dets)
    settings = iou_threshold, sigma, min_score, method, offset
    kept, index = greedy_nms.soft_nms(boxes.detach().numpy(), scores.detach().numpy(), *settings)
    dets[: len(index)] = torch.from_numpy(kept)
    return torch.from_numpy(index)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Dets [N, 5] with the score last -> of each box that NMS keeps, its index and those of the ones it suppresses."""
    check(dets)
    fit("dets N 5", dets)
    left = dets[:, 4].argsort(descending=True).cpu()
    boxes, matched = dets[:, :4].cpu(), []
    while len(left):
        best, left = left[:1], left[1:]
        iou = boxes.new_zeros(1, len(left))
        bbox_overlaps(boxes[best], boxes[left], iou, mode=0, aligned=False, offset=0)
        gone = iou[0] >= iou_threshold
        matched.append([*best.tolist(), *left[gone].tolist()])
        left = left[~gone]
    return matched


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Dets [N, 5, or 6 if `multi_label`], scores [N] -> indices [K] of the kept, by falling score.

    The column of labels is left out of account, as in mmcv; the other arguments are not needed.
    """
    if dets.numel() == 0:
        return dets.new_zeros(0, dtype=torch.int64)
    check(dets)
    fit("dets N columns, scores N", dets, scores, columns=6 if multi_label else 5)
    return greedy_nms.greedy_nms(dets[:, :5], scores, iou_threshold)


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int = 0, aligned: bool = False) -> None:
    """IoU of [N, 5 or more] with [M, 5 or more] into `ious` [N * M], or [N] if aligned.

    `mode_flag` 1 divides by the area of box 1. Columns from the sixth on are not read, as in mmcv.
    """
    check(boxes1, boxes2=boxes2, ious=ious)
    mode = "iof" if mode_flag else "iou"
    with torch.no_grad():
        ious.copy_(_box_iou_rotated(boxes1[:, :5], boxes2[:, :5], mode, bool(aligned)).view(ious.shape))


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """IoU of xyxy [N, 4] with [M, 4] into `ious` [N, M], or [N] if aligned; `mode` 1 divides by the area of box 1."""
    check(bboxes1, bboxes2=bboxes2, ious=ious)
    if aligned:
        fit("bboxes1 N 4, bboxes2 N 4, ious N", bboxes1, bboxes2, ious)
    else:
        fit("bboxes1 N 4, bboxes2 M 4, ious N M", bboxes1, bboxes2, ious)
    one = bboxes1 if aligned else bboxes1[:, None]
    sides = torch.minimum(one[..., 2:], bboxes2[:, 2:]) - torch.maximum(one[..., :2], bboxes2[:, :2]) + offset
    inter = sides.clamp(min=0).prod(-1)
    area1, area2 = ((x[..., 2:] - x[..., :2] + offset).prod(-1) for x in (one, bboxes2))
    ious.copy_(inter / (area1 if mode else area1 + area2 - inter))


def diff_iou_rotated_sort_vertices_forward(vertices: Tensor, mask: Tensor, num_valid: Tensor) -> Tensor:
    """The corners of two boxes' intersection, in order, for `mmcv.ops.diff_iou_rotated_2d`.

    vertices [B, N, 24, 2] relative to the mean of the valid ones, of which mask [B, N, 24] says which are (num_valid
    [B, N] how many): 8 corners, then 16 crossings of edges. Returns indices [B, N, 9] int32: at most 8 vertices by
    rising angle, the first again, and from there on a crossing that is not valid (all 9 if fewer than 3 are valid).
    """
    check(vertices)
    fit("vertices B N 24 2, mask B N 24, num_valid B N", vertices, mask, num_valid)
    angle = torch.atan2(vertices[..., 1], vertices[..., 0]).masked_fill(~mask, torch.inf)
    order = angle.argsort(dim=-1, stable=True)
    rank = torch.arange(mask.shape[-1], device=mask.device)
    count = num_valid[..., None].long()
    # Coinciding boxes have more vertices than the 8 of an octagon, some of them twice: the ones farthest from those
    # before them stay, in the order they are in.
    point = vertices.gather(2, order[..., None].expand_as(vertices))
    before = point.gather(2, ((rank - 1) % count.clamp(min=1))[..., None].expand_as(point))
    gap = (point - before).square().sum(-1).masked_fill(rank >= count, -1)
    first = gap.topk(8, dim=-1).indices.sort(-1).values
    index, count = order.gather(-1, first), count.clamp(max=8)
    pad = 8 + mask[..., 8:].long().argmin(-1, keepdim=True)
    slot = torch.arange(9, device=mask.device)
    index = torch.where(slot < count, torch.cat([index, pad], -1), pad)
    index = torch.where(slot == count, index[..., :1], index)
    return torch.where(num_valid[..., None] < 3, pad, index).int()


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """Value [B, S, H, D], shapes [L, 2], locations [B, Q, H, L, P, 2], weights [B, Q, H, L, P] -> [B, Q, H D]."""
    _check_attention(value, spatial_shapes, level_start_index, sampling_loc, attn_weight)
    with torch.no_grad():
        return _attention(value, spatial_shapes, sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Writes the gradients of value, locations and weights into the three last tensors."""
    _check_attention(value, spatial_shapes, level_start_index, sampling_loc, attn_weight)
    fit("grad_output B Q HD", grad_output, B=len(value), Q=sampling_loc.shape[1], HD=value.shape[2] * value.shape[3])
    check(value, grad_output=grad_output)
    inputs = value, sampling_loc, attn_weight
    found = gradients(lambda x, *rest: _attention(x, spatial_shapes, *rest), inputs, grad_output)
    for into, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), found, strict=True):
        into.copy_(gradient)


def _check_attention(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> None:
    check(value, sampling_loc=locations, attn_weight=weights)
    sizes = "value B S H D, spatial_shapes L 2, level_start_index L, sampling_loc B Q H L P 2, attn_weight B Q H L P"
    fit(sizes, value, shapes, starts, locations, weights)
