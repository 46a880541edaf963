"""RTMDet's targets by this project's batched assignment, in mmdet 3.x and mmrotate 1.x.

In a config:

    custom_imports = dict(imports=["rtmdet_fast.compat.mmdet"])
    model = dict(bbox_head=dict(type="BatchedRTMDetSepBNHead"))

registers the heads `BatchedRTMDetHead`, `BatchedRTMDetSepBNHead`, `BatchedRTMDetInsHead`, `BatchedRTMDetInsSepBNHead`
and the assigner `BatchedDynamicSoftLabelAssigner`; where mmrotate is installed also `BatchedRotatedRTMDetHead` and
`BatchedRotatedRTMDetSepBNHead`. For unchanged configs `patch()` does the same to mmdet's own classes, also those of
models that are built already; `unpatch()` restores them, and `with patched():` does both.

Parameters, outputs and losses are those of the originals; only who matches whom, and the targets that follow from it,
are computed otherwise: for all images at once, without tensors of priors x ground truths x classes. What the batched
assignment does not know (another sampler, assigner or IoU calculator, a subclass with targets of its own) stays with
mmdet's code under `patch()`, and is an error in the heads and the assigner named above.

Legend: B images, N priors (all levels), C classes, M ground truths (padded).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.dense_heads import RTMDetHead, RTMDetInsHead, RTMDetInsSepBNHead, RTMDetSepBNHead
from mmdet.models.task_modules import AssignResult, BboxOverlaps2D, DynamicSoftLabelAssigner, PseudoSampler
from mmdet.models.task_modules.prior_generators import anchor_inside_flags
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor

from rtmdet_fast.kernels.assign import dynamic_soft_label_assign

_UNMATCHED = -1e8  # overlap of background in mmdet's AssignResult
# the modules whose computation of targets this is
_PUBLISHED = ("mmdet.models.dense_heads.rtmdet_head", "mmrotate.models.dense_heads.rotated_rtmdet_head")
_ASSIGN, _GET_TARGETS = DynamicSoftLabelAssigner.assign, RTMDetHead.get_targets
_LOSSES = {RTMDetHead.loss_by_feat}  # these make no use of the sampling results


@TASK_UTILS.register_module()
class BatchedDynamicSoftLabelAssigner(DynamicSoftLabelAssigner):
    """As mmdet's `DynamicSoftLabelAssigner`, with its arguments; for one image, so that other heads can use it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if reason := _unknown_assigner(self):
            raise ValueError(reason)

    def assign(
        self,
        pred_instances: InstanceData,
        gt_instances: InstanceData,
        gt_instances_ignore: InstanceData | None = None,
        **kwargs: Any,
    ) -> AssignResult:
        """Matches pred_instances (`bboxes` [N, 4 or 5], `scores` [N, C] logits, `priors` [N, 4]) with gt_instances."""
        if not (len(gt_instances.bboxes) and len(pred_instances.bboxes)):  # of any shape: mmdet does not look
            return _ASSIGN(self, pred_instances, gt_instances, gt_instances_ignore, **kwargs)
        gt_boxes, gt_labels, gt_counts, gt_centers = _padded([gt_instances])
        assigned, iou, labels = _match(
            self,
            get_box_tensor(pred_instances.bboxes)[None],
            pred_instances.scores[None],
            pred_instances.priors,
            gt_boxes,
            gt_labels,
            gt_counts,
            gt_centers,
        )
        return _assign_result(gt_boxes.shape[1], assigned[0], iou[0], labels[0])


class _BatchedTargets:
    def get_targets(self, *args: Any, **kwargs: Any) -> tuple:
        if reason := _unknown_head(self):
            raise ValueError(reason)
        return _get_targets(self, *args, **kwargs)


@MODELS.register_module()
class BatchedRTMDetHead(_BatchedTargets, RTMDetHead):
    """`RTMDetHead` with batched targets."""


@MODELS.register_module()
class BatchedRTMDetSepBNHead(_BatchedTargets, RTMDetSepBNHead):
    """`RTMDetSepBNHead` with batched targets."""


@MODELS.register_module()
class BatchedRTMDetInsHead(_BatchedTargets, RTMDetInsHead):
    """`RTMDetInsHead` with batched targets."""


@MODELS.register_module()
class BatchedRTMDetInsSepBNHead(_BatchedTargets, RTMDetInsSepBNHead):
    """`RTMDetInsSepBNHead` with batched targets."""


def patch() -> None:
    """Lets mmdet's `RTMDetHead` (and what derives from it) and `DynamicSoftLabelAssigner` match in batches."""
    RTMDetHead.get_targets, DynamicSoftLabelAssigner.assign = _patched_get_targets, _patched_assign


def unpatch() -> None:
    """Undoes `patch`."""
    RTMDetHead.get_targets, DynamicSoftLabelAssigner.assign = _GET_TARGETS, _ASSIGN


@contextmanager
def patched() -> Iterator[None]:
    """`patch` within the block; what was there before it is there again after it."""
    before = RTMDetHead.get_targets, DynamicSoftLabelAssigner.assign
    patch()
    try:
        yield
    finally:
        RTMDetHead.get_targets, DynamicSoftLabelAssigner.assign = before


def _patched_get_targets(head: RTMDetHead, *args: Any, **kwargs: Any) -> tuple:
    return (_GET_TARGETS if _unknown_head(head) else _get_targets)(head, *args, **kwargs)


def _patched_assign(assigner: DynamicSoftLabelAssigner, *args: Any, **kwargs: Any) -> AssignResult:
    own = BatchedDynamicSoftLabelAssigner.assign
    return (_ASSIGN if _unknown_assigner(assigner) else own)(assigner, *args, **kwargs)


def _unknown_assigner(assigner: Any) -> str | None:
    """What keeps the batched assignment from doing an assigner's work; None if it can."""
    if type(assigner) not in (DynamicSoftLabelAssigner, BatchedDynamicSoftLabelAssigner):
        return f"assigner is {type(assigner).__name__}: expected (Batched)DynamicSoftLabelAssigner"
    calculator = type(assigner.iou_calculator)
    if calculator is not BboxOverlaps2D and calculator.__name__ != "RBboxOverlaps2D":
        return f"iou_calculator is {calculator.__name__}: expected BboxOverlaps2D or RBboxOverlaps2D"
    if not 1 <= assigner.topk <= 64:
        return f"topk is {assigner.topk}: expected 1 to 64"
    return None


def _unknown_head(head: Any) -> str | None:
    if type(head)._get_targets_single.__module__ not in _PUBLISHED:
        return f"{type(head).__name__} computes targets of its own (_get_targets_single)"
    if type(head.sampler) is not PseudoSampler:
        return f"sampler is {type(head.sampler).__name__}: expected PseudoSampler"
    return _unknown_assigner(head.assigner)


def _get_targets(
    head: Any,
    cls_scores: Tensor,
    bbox_preds: Tensor,
    anchor_list: list[list[Tensor]],
    valid_flag_list: list[list[Tensor]],
    batch_gt_instances: Sequence[InstanceData],
    batch_img_metas: list[dict],
    batch_gt_instances_ignore: Sequence[InstanceData] | None = None,
    unmap_outputs: bool = True,
) -> tuple:
    """`RTMDetHead.get_targets` from logits [B, N, C] and decoded boxes [B, N, 4 or 5].

    The outputs cover all priors (`unmap_outputs` changes nothing), level by level: those outside an image, as
    `valid_flag_list` and `allowed_border` have it, match nothing and weigh 0.
    """
    lengths = [len(anchors) for anchors in anchor_list[0]]
    priors = torch.cat(anchor_list[0])
    border = head.train_cfg["allowed_border"]
    inside = torch.stack(
        [
            anchor_inside_flags(priors, torch.cat(flags), meta["img_shape"][:2], border)
            for flags, meta in zip(valid_flag_list, batch_img_metas, strict=True)
        ]
    )
    gt_boxes, gt_labels, gt_counts, gt_centers = _padded(batch_gt_instances)
    boxes = bbox_preds.detach().masked_fill(~inside[..., None], torch.nan)
    assigned, iou, labels = _match(
        head.assigner, boxes, cls_scores.detach(), priors, gt_boxes, gt_labels, gt_counts, gt_centers
    )
    positive = assigned >= 0
    weight = head.train_cfg["pos_weight"]
    weights = torch.where(positive, float(weight if weight > 0 else 1), inside.float())
    bbox_targets = priors.new_zeros(boxes.shape)
    if gt_boxes.shape[1]:
        if boxes.shape[2] == 5:  # the matching takes the boxes as they come
            gt_boxes = _padded(batch_gt_instances, head.angle_version)[0]
        target = gt_boxes.to(priors.dtype).gather(1, assigned.clamp(min=0)[..., None].expand_as(boxes))
        bbox_targets = torch.where(positive[..., None], target, bbox_targets)
    samples: list = [None] * len(inside)
    if type(head).loss_by_feat not in _LOSSES:
        samples = [
            head.sampler.sample(_assign_result(len(gt), *match), InstanceData(priors=priors), gt)
            for gt, *match in zip(batch_gt_instances, assigned, iou, labels, strict=True)
        ]
    labels = torch.where(positive, labels, head.num_classes)
    targets = (priors.expand(len(inside), -1, -1), labels, weights, bbox_targets, iou.to(priors.dtype))
    return (*(list(target.split(lengths, 1)) for target in targets), samples)


def _match(
    assigner: DynamicSoftLabelAssigner,
    boxes: Tensor,
    logits: Tensor,
    priors: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_counts: Tensor,
    gt_centers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if boxes.shape[2] == 5:  # as mmrotate does before it takes IoUs
        boxes = torch.cat([boxes[..., :2].clamp(-1e7, 1e7), boxes[..., 2:4].clamp(min=1e-3), boxes[..., 4:]], -1)
    return dynamic_soft_label_assign(
        boxes,
        logits,
        priors,
        gt_boxes,
        gt_labels,
        gt_counts,
        gt_centers,
        topk=assigner.topk,
        center_radius=assigner.soft_center_radius,
        iou_weight=assigner.iou_weight,
    )


def _assign_result(num_gt: int, assigned: Tensor, iou: Tensor, labels: Tensor) -> AssignResult:
    """Of one image [N]; where nothing could match, mmdet's overlaps are all 0."""
    positive = assigned >= 0
    background = torch.where(positive.any(), _UNMATCHED, 0.0)
    return AssignResult(num_gt, assigned + 1, torch.where(positive, iou, background), labels=labels)


def _padded(
    gts: Sequence[InstanceData], angle_version: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Boxes [B, M, 4 or 5], labels [B, M], counts [B] and, where there are masks, their centres of mass [B, M, 2]."""
    boxes = [get_box_tensor(gt.bboxes.regularize_boxes(angle_version) if angle_version else gt.bboxes) for gt in gts]
    width = max(b.shape[-1] for b in boxes) or 4  # no boxes may have shape [0] in mmdet
    boxes = [b if len(b) else b.new_zeros(0, width) for b in boxes]
    pad = torch.nn.utils.rnn.pad_sequence
    centers = pad([_center_of_mass(gt.masks) for gt in gts], True) if "masks" in gts[0] else None
    counts = torch.tensor([len(b) for b in boxes], device=boxes[0].device)
    return pad(boxes, True), pad([gt.labels.long() for gt in gts], True), counts, centers


def _center_of_mass(masks: Tensor) -> Tensor:
    """(x, y) [K, 2] in pixels of masks [K, H, W] bool; (0, 0) of an empty one."""
    columns, rows = masks.sum(1), masks.sum(2)  # integers: exact, whatever the size
    x = (columns * torch.arange(columns.shape[1], device=masks.device)).sum(1)
    y = (rows * torch.arange(rows.shape[1], device=masks.device)).sum(1)
    return torch.stack([x, y], 1) / columns.sum(1).float().clamp(min=1e-7)[:, None]


def _register_rotated() -> None:
    try:
        from mmrotate.models.dense_heads import RotatedRTMDetHead, RotatedRTMDetSepBNHead
        from mmrotate.registry import MODELS as ROTATED
    except (ImportError, AssertionError, AttributeError) as error:  # it asserts versions, and needs e2cnn
        warnings.warn(f"mmrotate does not import, so its heads are left alone: {error}", stacklevel=3)
        return
    _LOSSES.add(RotatedRTMDetHead.loss_by_feat)
    for base in (RotatedRTMDetHead, RotatedRTMDetSepBNHead):
        name = f"Batched{base.__name__}"
        head = type(name, (_BatchedTargets, base), {"__doc__": f"`{base.__name__}` with batched targets."})
        globals()[name] = ROTATED.register_module(module=head)


if importlib.util.find_spec("mmrotate"):
    _register_rotated()
