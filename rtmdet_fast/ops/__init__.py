"""The hot paths as functions, stable to import. Signatures and answers are those of `mmcv.ops` where mmcv has the op.

`rtmdet_fast.ops.torchvision` has `nms` and `batched_nms` with torchvision's signatures.
"""

from rtmdet_fast.kernels.assign import atss_assign, dynamic_soft_label_assign, simota_assign, task_aligned_assign
from rtmdet_fast.kernels.bn_silu import bn_silu
from rtmdet_fast.kernels.deformable_attention import box_deformable_attention, deformable_attention
from rtmdet_fast.kernels.dwconv_bn_silu import dwconv_bn_silu
from rtmdet_fast.kernels.dynamic_mask import dynamic_mask_dice_loss, dynamic_mask_logits
from rtmdet_fast.kernels.nms import batched_nms_padded
from rtmdet_fast.kernels.quality_focal_loss import quality_focal_loss
from rtmdet_fast.kernels.rotated_iou import box_iou_rotated, rotated_iou_loss
from rtmdet_fast.ops.mmcv import (
    MultiScaleDeformableAttnFunction,
    batched_nms,
    multi_scale_deformable_attn_pytorch,
    nms,
    nms_rotated,
    soft_nms,
)

__all__ = [
    "MultiScaleDeformableAttnFunction",
    "atss_assign",
    "batched_nms",
    "batched_nms_padded",
    "bn_silu",
    "box_deformable_attention",
    "box_iou_rotated",
    "deformable_attention",
    "dwconv_bn_silu",
    "dynamic_mask_dice_loss",
    "dynamic_mask_logits",
    "dynamic_soft_label_assign",
    "multi_scale_deformable_attn_pytorch",
    "nms",
    "nms_rotated",
    "quality_focal_loss",
    "rotated_iou_loss",
    "simota_assign",
    "soft_nms",
    "task_aligned_assign",
]
