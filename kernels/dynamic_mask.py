"""Masks of RTMDet-Ins (arXiv:2212.07784): three 1 x 1 convolutions with weights of the instance's own, and Dice.

Instance k has 169 numbers, W1 [8, 10], W2 [8, 8], W3 [8], b1 [8], b2 [8], b3 in this order. At each pixel, with the 8
features f of its image and r = (prior - pixel) / (8 stride), both in input pixels,

    x1 = relu(W1 [r; f] + b1);  x2 = relu(W2 x1 + b2);  logit = W3 x2 + b3
    p = sigmoid(logits, up-sampled x2, bilinear);  loss = 1 - 2 sum(p t) / (sum(p^2) + eps + sum(t^2) + eps)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_PARAMETERS = (80, 64, 8, 8, 8, 1)  # of an instance: W1, W2, W3, b1, b2, b3
_CHUNK = 2**19  # elements of a layer's output in the reference: 2 MB, so that the few of them stay in the cache


def dynamic_mask_logits(
    features: Tensor,
    kernels: Tensor,
    points: Tensor,
    strides: Tensor,
    image_index: Tensor,
    *,
    feature_stride: int = 8,
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
    return _logits_reference(features, kernels, points, strides, image_index, feature_stride)


def dynamic_mask_dice_loss(
    features: Tensor,
    kernels: Tensor,
    points: Tensor,
    strides: Tensor,
    image_index: Tensor,
    gt_masks: Tensor,
    gt_index: Tensor,
    *,
    feature_stride: int = 8,
    eps: float = 5e-6,
) -> Tensor:
    """Dice loss of each of K instances -> [K] float32, differentiable in `features` and `kernels`.

    Args:
        features, kernels, points, strides, image_index, feature_stride: as for `dynamic_mask_logits`.
        gt_masks: [B, M, 2H, 2W] bool or uint8 (not 0: inside), masks of the input's size sampled
            [feature_stride / 4 :: feature_stride / 2] along both sides; may be padded along M.
        gt_index: [K] int64, the instance's ground truth among the M of its image.
        eps: is added to both squared sums (see the module).
    """
    _check(features, kernels, points, strides, image_index, feature_stride)
    _check_masks(features, kernels, gt_masks, gt_index)
    return _dice_reference(
        features, kernels, points, strides, image_index, gt_masks, gt_index, feature_stride, float(eps)
    )[0]


def _check(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor, feature_stride: int
) -> None:
    if features.dim() != 4 or features.shape[1] != 8 or 0 in features.shape:
        raise ValueError(f"features: expected shape [B, 8, H, W], got {tuple(features.shape)}")
    count = kernels.shape[0] if kernels.dim() else 0
    for name, tensor, shape in (
        ("kernels", kernels, (count, sum(_PARAMETERS))),
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


def _precision(features: Tensor, kernels: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (features.dtype, kernels.dtype) else torch.float32


class _Instances:
    """The layers of some instances of one image, over all its pixels.

    The coordinates are affine in the pixel's place: x1 = relu(A [f; x; y; 1]), one product for all instances.
    """

    def __init__(self, kernels: Tensor, points: Tensor, strides: Tensor):
        w1, w2, w3, b1, b2, b3 = kernels.split(_PARAMETERS, 1)
        n = len(kernels)
        w1 = w1.reshape(n, 8, 10)
        self.points, self.scale = points[:, None], 1 / (8 * strides[:, None, None])
        slope = w1[:, :, :2] * self.scale
        constant = b1 + (slope * self.points).sum(2)
        self.a = torch.cat([w1[:, :, 2:], -slope, constant[:, :, None]], 2).view(8 * n, 11)
        self.w2, self.b2 = w2.reshape(n, 8, 8), b2.reshape(n, 8, 1)
        self.w3, self.b3 = w3.reshape(n, 1, 8), b3.reshape(n, 1, 1)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [11, H W] -> x1, x2 [n, 8, H W]."""
        x1 = (self.a @ x).relu_().view(-1, 8, x.shape[1])
        return x1, torch.baddbmm(self.b2, self.w2, x1).relu_()

    def logits(self, x: Tensor) -> Tensor:
        """x [11, H W] -> [n, H W]."""
        return torch.baddbmm(self.b3, self.w3, self.hidden(x)[1])[:, 0]

    def backward(self, x: Tensor, dlogits: Tensor) -> tuple[Tensor, Tensor]:
        """x [11, H W], dlogits [n, H W] -> gradients of the features [8, H W] and of the kernels [n, 169]."""
        x1, x2 = self.hidden(x)
        d3 = dlogits[:, None]
        dw3 = d3 @ x2.mT
        d2 = (self.w3.mT * d3).mul_(x2 > 0)
        dw2 = d2 @ x1.mT
        d1 = torch.bmm(self.w2.mT, d2).mul_(x1 > 0)
        da = (d1.flatten(0, 1) @ x.mT).view(-1, 8, 11)
        dw1 = torch.cat([(da[:, :, 10:] * self.points - da[:, :, 8:10]) * self.scale, da[:, :, :8]], 2)
        parts = (dw1, dw2, dw3, da[:, :, 10], d2.sum(2), d3.sum(2))
        return self.a[:, :8].mT @ d1.flatten(0, 1), torch.cat([part.flatten(1) for part in parts], 1)


def _pixels(features: Tensor, feature_stride: int, dtype: torch.dtype) -> Tensor:
    """features [8, H, W] -> [11, H W]: the features, x and y in input pixels, 1."""
    _, H, W = features.shape
    y, x = torch.meshgrid(*(torch.arange(n, dtype=dtype, device=features.device) for n in (H, W)), indexing="ij")
    return torch.cat([features.to(dtype), feature_stride * torch.stack([x, y]), torch.ones_like(x)[None]]).flatten(1)


def _chunks(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor, feature_stride: int
) -> Iterator[tuple[int, Tensor, Tensor, _Instances]]:
    """(image, indices of some of its instances, its pixels [11, H W], their layers)."""
    B, _, H, W = features.shape
    if len(image_index) and not 0 <= int(image_index.amin()) <= int(image_index.amax()) < B:
        raise ValueError(f"image_index: expected indices in [0, {B})")
    dtype = _precision(features, kernels)
    order = image_index.argsort(stable=True)
    for image, indices in enumerate(order.split(image_index.bincount(minlength=B).tolist())):
        if not len(indices):  # which split would give as one empty chunk
            continue
        pixels = _pixels(features[image], feature_stride, dtype)
        for k in indices.split(max(1, _CHUNK // (8 * H * W))):
            yield image, k, pixels, _Instances(kernels[k].to(dtype), points[k].to(dtype), strides[k].to(dtype))


@torch.library.custom_op("rtmdet_fast::dynamic_mask_logits_reference", mutates_args=())
def _logits_reference(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor, feature_stride: int
) -> Tensor:
    """Opaque to `torch.compile`, since which instances go together depends on `image_index`."""
    logits = features.new_empty(_logits_shape(features, kernels), dtype=_precision(features, kernels))
    with torch.autocast(features.device.type, enabled=False):
        for _, k, pixels, instances in _chunks(features, kernels, points, strides, image_index, feature_stride):
            logits[k] = instances.logits(pixels).view(-1, *logits.shape[1:])
    return logits


@torch.library.custom_op("rtmdet_fast::dynamic_mask_logits_reference_backward", mutates_args=())
def _logits_reference_backward(
    dlogits: Tensor,
    features: Tensor,
    kernels: Tensor,
    points: Tensor,
    strides: Tensor,
    image_index: Tensor,
    feature_stride: int,
) -> tuple[Tensor, Tensor]:
    dtype = _precision(features, kernels)
    dfeatures, dkernels = torch.zeros(features.shape, dtype=dtype, device=features.device), torch.empty_like(kernels)
    with torch.autocast(features.device.type, enabled=False):
        for image, k, pixels, instances in _chunks(features, kernels, points, strides, image_index, feature_stride):
            dpixels, dkernel = instances.backward(pixels, dlogits[k].flatten(1))
            dfeatures[image] += dpixels.view_as(dfeatures[image])
            dkernels[k] = dkernel.to(dkernels.dtype)
    return dfeatures.to(features.dtype), dkernels


@torch.library.custom_op("rtmdet_fast::dynamic_mask_dice_reference", mutates_args=())
def _dice_reference(
    features: Tensor,
    kernels: Tensor,
    points: Tensor,
    strides: Tensor,
    image_index: Tensor,
    gt_masks: Tensor,
    gt_index: Tensor,
    feature_stride: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Losses [K], and what the backward pass needs of each instance: [K, 2] with sum(p t) and the denominator."""
    _check_gt_index(gt_masks, gt_index)
    H, W = features.shape[2:]
    sums = features.new_empty((len(kernels), 2), dtype=_precision(features, kernels))
    with torch.autocast(features.device.type, enabled=False):
        for image, k, pixels, instances in _chunks(features, kernels, points, strides, image_index, feature_stride):
            p = _upsample(instances.logits(pixels).view(-1, H, W)).sigmoid_().flatten(1)
            t = gt_masks[image, gt_index[k]].bool().to(p.dtype).flatten(1)
            sums[k, 0] = (p * t).sum(1)
            sums[k, 1] = p.square_().sum(1) + t.sum(1) + 2 * eps
    return 1 - 2 * sums[:, 0] / sums[:, 1], sums


@torch.library.custom_op("rtmdet_fast::dynamic_mask_dice_reference_backward", mutates_args=())
def _dice_reference_backward(
    dloss: Tensor,
    sums: Tensor,
    features: Tensor,
    kernels: Tensor,
    points: Tensor,
    strides: Tensor,
    image_index: Tensor,
    gt_masks: Tensor,
    gt_index: Tensor,
    feature_stride: int,
) -> tuple[Tensor, Tensor]:
    H, W = features.shape[2:]
    dfeatures, dkernels = (
        torch.zeros(features.shape, dtype=sums.dtype, device=features.device),
        torch.empty_like(kernels),
    )
    with torch.autocast(features.device.type, enabled=False):
        for image, k, pixels, instances in _chunks(features, kernels, points, strides, image_index, feature_stride):
            p = _upsample(instances.logits(pixels).view(-1, H, W)).sigmoid_()
            t = gt_masks[image, gt_index[k]].bool().to(p.dtype)
            (inter, total), scale = sums[k].mT[..., None, None], 2 * dloss[k, None, None]
            # d loss / dp = 2 (2 p sum(pt) / total - t) / total, times p (1 - p)
            dz = (2 * inter / total * p).sub_(t).mul_(scale / total).mul_(p).mul_(1 - p)
            dlogits = torch.ops.aten.upsample_bilinear2d_backward(
                dz[None], (2 * H, 2 * W), (1, len(k), H, W), False, 2.0, 2.0
            )[0]
            dpixels, dkernel = instances.backward(pixels, dlogits.flatten(1))
            dfeatures[image] += dpixels.view_as(dfeatures[image])
            dkernels[k] = dkernel.to(dkernels.dtype)
    return dfeatures.to(features.dtype), dkernels


def _check_gt_index(gt_masks: Tensor, gt_index: Tensor) -> None:
    if len(gt_index) and not 0 <= int(gt_index.amin()) <= int(gt_index.amax()) < gt_masks.shape[1]:
        raise ValueError(f"gt_index: expected indices in [0, {gt_masks.shape[1]})")


def _upsample(logits: Tensor) -> Tensor:
    return F.interpolate(logits[None], scale_factor=2, mode="bilinear", align_corners=False)[0]


def _logits_shape(features: Tensor, kernels: Tensor) -> tuple[int, int, int]:
    return kernels.shape[0], features.shape[2], features.shape[3]


@_logits_reference.register_fake
def _(features, kernels, points, strides, image_index, feature_stride):
    return features.new_empty(_logits_shape(features, kernels), dtype=_precision(features, kernels))


@_dice_reference.register_fake
def _(features, kernels, points, strides, image_index, gt_masks, gt_index, feature_stride, eps):
    dtype = _precision(features, kernels)
    return features.new_empty(len(kernels), dtype=dtype), features.new_empty((len(kernels), 2), dtype=dtype)


@_logits_reference_backward.register_fake
def _(dlogits, features, kernels, points, strides, image_index, feature_stride):
    return torch.empty(features.shape, dtype=features.dtype, device=features.device), torch.empty_like(kernels)


@_dice_reference_backward.register_fake
def _(dloss, sums, features, kernels, points, strides, image_index, gt_masks, gt_index, feature_stride):
    return torch.empty(features.shape, dtype=features.dtype, device=features.device), torch.empty_like(kernels)


def _logits_setup(ctx, inputs, output):
    *tensors, ctx.feature_stride = inputs
    ctx.save_for_backward(*tensors)


def _dice_setup(ctx, inputs, output):
    *tensors, ctx.feature_stride, _ = inputs
    ctx.save_for_backward(output[1], *tensors)


_logits_reference.register_autograd(
    lambda ctx, dlogits: (
        *_logits_reference_backward(dlogits, *ctx.saved_tensors, ctx.feature_stride),
        *[None] * 4,
    ),
    setup_context=_logits_setup,
)
_dice_reference.register_autograd(
    lambda ctx, dloss, dsums: (
        *_dice_reference_backward(dloss, *ctx.saved_tensors, ctx.feature_stride),
        *[None] * 7,
    ),
    setup_context=_dice_setup,
)
