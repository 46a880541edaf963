"""Masks of RTMDet-Ins (arXiv:2212.07784): three 1 x 1 convolutions, weights of each instance's own; Dice loss.

Instance k has 169 numbers, W1 [8, 10], W2 [8, 8], W3 [8], b1 [8], b2 [8], b3 in this order. At each pixel, with the 8
features f of its image and r = (prior - pixel) / (8 stride), both in input pixels,

    x1 = relu(W1 [r; f] + b1);  x2 = relu(W2 x1 + b2);  logit = W3 x2 + b3
    p = sigmoid(logits, up-sampled x2, bilinear);  loss = 1 - 2 sum(p t) / (sum(p^2) + eps + sum(t^2) + eps)

Saved for the backward pass are the inputs and two numbers an instance.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rtmdet_fast.kernels import dynamic_mask_torch, dynamic_mask_triton
from rtmdet_fast.kernels._dispatch import use_triton
from rtmdet_fast.kernels.dynamic_mask_torch import PARAMETERS, precision


def dynamic_mask_logits(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor, *, feature_stride: int = 8
) -> Tensor:
    """Mask logits of K instances -> [K, H, W] float32, differentiable in `features` and `kernels`.

    Args:
        features: [B, 8, H, W] mask features; pixel (i, j) lies at (j, i) * feature_stride in the input.
        kernels: [K, 169] of each instance (see the module).
        points: [K, 2] the prior's (x, y) in input pixels.
        strides: [K] stride of the prior's level.
        image_index: [K] int64, the instance's image in the batch, in any order.
        feature_stride: input pixels per pixel of `features`.

    fp16 and bf16 are computed in fp32, also under autocast: in fp16 a coordinate of 1000 pixels is off by 0.25.
    float64 stays float64. An index out of range raises on a CPU, and on a GPU gives NaN.
    """
    _check(features, kernels, points, strides, image_index, feature_stride)
    return _backend(features, kernels).logits(features, kernels, points, strides, image_index, feature_stride)


def dynamic_mask_dice_loss(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor,
    gt_masks: Tensor, gt_index: Tensor, *, feature_stride: int = 8, eps: float = 5e-6,
) -> Tensor:  # fmt: skip
    """Dice loss of each of K instances -> [K] float32, differentiable in `features` and `kernels`.

    The arguments of `dynamic_mask_logits`, and:

    Args:
        gt_masks: [B, M, 2H, 2W] bool or uint8 (not 0: inside), masks of the input's size sampled
            [feature_stride / 4 :: feature_stride / 2] along both sides; may be padded along M.
        gt_index: [K] int64, the instance's ground truth among the M of its image.
        eps: is added to both squared sums (see the module).

    Where `image_index` is -1 there is no instance: loss and gradients are 0, and its other values do not matter but for
    `gt_index`, which is one of the M.
    """
    instances = features, kernels, points, strides, image_index
    _check(*instances, feature_stride)
    _check_masks(features, kernels, gt_masks, gt_index)
    return _backend(features, kernels).dice(*instances, gt_masks, gt_index, feature_stride, float(eps))[0]


def _backend(features: Tensor, kernels: Tensor) -> Any:
    """The module whose ops take these tensors."""
    fits_triton = use_triton(features) and precision(features, kernels) == torch.float32
    return dynamic_mask_triton if fits_triton else dynamic_mask_torch


def _check(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor, feature_stride: int
) -> None:
    if features.dim() != 4 or features.shape[1] != 8 or 0 in features.shape:
        raise ValueError(f"features: expected shape [B, 8, H, W], got {tuple(features.shape)}")
    count = kernels.shape[0] if kernels.dim() else 0
    for name, tensor, shape in (
        ("kernels", kernels, (count, sum(PARAMETERS))),
        ("points", points, (count, 2)),
        ("strides", strides, (count,)),
        ("image_index", image_index, (count,)),
    ):
        _check_tensor(name, tensor, shape, features)
    for name, tensor in (("features", features), ("kernels", kernels)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if image_index.dtype != torch.int64:
        raise TypeError(f"image_index: expected int64, got {image_index.dtype}")
    if feature_stride < 1:
        raise ValueError(f"feature_stride: expected at least 1, got {feature_stride}")


def _check_masks(features: Tensor, kernels: Tensor, gt_masks: Tensor, gt_index: Tensor) -> None:
    (B, _, H, W), M = features.shape, gt_masks.shape[1] if gt_masks.dim() > 1 else 0
    _check_tensor("gt_masks", gt_masks, (B, M, 2 * H, 2 * W), features)
    _check_tensor("gt_index", gt_index, (kernels.shape[0],), features)
    if gt_masks.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"gt_masks: expected bool or uint8, got {gt_masks.dtype}")
    if gt_index.dtype != torch.int64:
        raise TypeError(f"gt_index: expected int64, got {gt_index.dtype}")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], features: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != features.device:
        raise ValueError(f"{name}: on {tensor.device}, but features are on {features.device}")


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.feature_stride = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _save_dice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.feature_stride, _ = inputs
    ctx.set_materialize_grads(False)  # of the sums: zeros in every backward pass
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _backward(op: Any, ctx: Any, doutput: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs, of which only the first two, features and kernels, have one."""
    if doutput is None:  # what came after had no gradient for its input
        return (None,) * len(ctx.needs_input_grad)
    gradients = op(doutput, *ctx.saved_tensors, ctx.feature_stride)
    return *gradients, *[None] * (len(ctx.needs_input_grad) - 2)


for _ops in (dynamic_mask_torch, dynamic_mask_triton):
    _ops.logits.register_autograd(partial(_backward, _ops.logits_backward), setup_context=_save_logits)
    _ops.dice.register_autograd(partial(_backward, _ops.dice_backward), setup_context=_save_dice)
