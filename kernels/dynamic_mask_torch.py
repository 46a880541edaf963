"""The reference of `dynamic_mask` in plain PyTorch, which runs on CPUs, and in float64 everywhere.

The coordinates, affine in the pixel's place, fold into one matrix product for all instances of an image, and the other
layers are batched products, over as many instances as the cache holds. The ops are opaque to `torch.compile`, since
which instances go together depends on `image_index`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.kernels._dispatch import at_once

PARAMETERS = (80, 64, 8, 8, 8, 1)  # of an instance: W1, W2, W3, b1, b2, b3
CHUNK = 2**19  # elements of a layer's output: 2 MB, so that the few of them stay in the cache


def precision(features: Tensor, kernels: Tensor) -> torch.dtype:
    """Of everything that is computed."""
    return torch.float64 if torch.float64 in (features.dtype, kernels.dtype) else torch.float32


def layers(kernels: Tensor, points: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A [n, 8, 11], W2 [n, 8, 8], b2 [n, 8, 1], W3 [n, 1, 8], b3 [n, 1, 1] of `kernels` [n, 169].

    points [n, 2] of the priors, scale [n, 1, 1] 1 / (8 stride). The coordinates are affine in the place, so that
    x1 = relu(A [f; x; y; 1]).
    """
    n = kernels.shape[0]
    w1, w2, w3, b1, b2, b3 = kernels.split(PARAMETERS, 1)
    w1 = w1.reshape(n, 8, 10)
    slope = w1[:, :, :2] * scale
    constant = torch.baddbmm(b1[:, :, None], slope, points[:, :, None])
    a = torch.cat([w1[:, :, 2:], -slope, constant], 2)
    return a, w2.reshape(n, 8, 8), b2.reshape(n, 8, 1), w3.reshape(n, 1, 8), b3.reshape(n, 1, 1)


def places(height: int, width: int, stride: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[x; y; 1] of the pixels of the features [3, H, W], in input pixels."""
    y, x = (torch.arange(0, n * stride, stride, dtype=dtype, device=device) for n in (height, width))
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])


class Instances:
    """Instances in the order of their images, in chunks small enough for the cache, and their layers.

    The first layer is one product for all instances of a chunk. Those of image -1 are left out if `padded`.
    """

    def __init__(
        self, features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, index: Tensor, feature_stride: int,
        *, padded: bool = False,
    ):  # fmt: skip
        B, _, H, W = features.shape
        images = index.tolist()
        real = [image for image in images if image != -1] if padded else images
        n = len(real)
        if n and not 0 <= min(real) <= max(real) < B:
            raise ValueError(f"image_index: expected indices in [0, {B})")
        self.features, self.feature_stride, self.dtype = features, feature_stride, precision(features, kernels)
        self.counts = [real.count(image) for image in range(B)]
        self.all = len(images)
        self.order = None
        if n < self.all or images != sorted(images):
            self.order = index.argsort(stable=True)[self.all - n :]

        kernels, points, strides = (self.sorted(x).to(self.dtype) for x in (kernels, points, strides))
        self.points, self.scale = points[:, None], 1 / (8 * strides[:, None, None])
        self.a, self.w2, self.b2, self.w3, self.b3 = layers(kernels, points, self.scale)
        # Used by every chunk in turn: memory from malloc would not be in the cache.
        self.chunk = max(1, min(n, at_once(features.device, CHUNK) // (8 * H * W)))
        self.x1, self.x2 = (features.new_empty(self.chunk, 8, H * W, dtype=self.dtype) for _ in range(2))

    def sorted(self, x: Tensor) -> Tensor:
        """x [K, ...] in the order of the images, without padding."""
        return x if self.order is None else x[self.order]

    def unsorted(self, x: Tensor) -> Tensor:
        """`sorted` x in the caller's order, with 0 for padding."""
        return x if self.order is None else x.new_zeros(self.all, *x.shape[1:]).index_copy_(0, self.order, x)

    def chunks(self) -> Iterator[tuple[int, slice, Tensor]]:
        """(image, some of its instances, its pixels [11, H W]: the features, x and y in input pixels, 1)."""
        H, W = self.features.shape[2:]
        coordinates = places(H, W, self.feature_stride, self.dtype, self.features.device)
        start = 0
        for image, count in enumerate(self.counts):
            end = start + count
            if count:
                pixels = torch.cat([self.features[image].to(self.dtype), coordinates]).flatten(1)
            for first in range(start, end, self.chunk):
                yield image, slice(first, min(first + self.chunk, end)), pixels
            start = end

    def hidden(self, k: slice, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [11, H W] -> x1, x2 [n, 8, H W], until the next chunk."""
        n = k.stop - k.start
        x1, x2 = self.x1[:n], self.x2[:n]
        torch.mm(self.a[k].flatten(0, 1), x, out=x1.view(8 * n, -1)).relu_()
        return x1, torch.baddbmm(self.b2[k], self.w2[k], x1, out=x2).relu_()

    def logits(self, k: slice, x: Tensor, out: Tensor) -> None:
        """x [11, H W] -> out [n, H, W]."""
        torch.baddbmm(self.b3[k], self.w3[k], self.hidden(k, x)[1], out=out.view(len(out), 1, -1))

    def probabilities(self, k: slice, x: Tensor) -> Tensor:
        """x [11, H W] -> [n, 2 H, 2 W], of the up-sampled logits."""
        logits = x.new_empty(1, k.stop - k.start, *self.features.shape[2:])
        self.logits(k, x, out=logits[0])
        return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)[0].sigmoid_()

    def backward(self, k: slice, x: Tensor, dlogits: Tensor) -> tuple[Tensor, Tensor]:
        """x [11, H W], dlogits [n, H W] -> gradients of the features [8, H W] and of the kernels [n, 169]."""
        x1, x2 = self.hidden(k, x)
        d3 = dlogits[:, None]
        dw3 = d3 @ x2.mT
        d2 = torch.ops.aten.threshold_backward(self.w3[k].mT * d3, x2, 0)  # half the time of mul_(x2 > 0)
        dw2 = d2 @ x1.mT
        d1 = torch.ops.aten.threshold_backward(self.w2[k].mT @ d2, x1, 0).flatten(0, 1)
        da = (d1 @ x.mT).view(-1, 8, 11)
        dw1 = torch.cat([(da[:, :, 10:] * self.points[k] - da[:, :, 8:10]) * self.scale[k], da[:, :, :8]], 2)
        parts = (dw1, dw2, dw3, da[:, :, 10], d2.sum(2), d3.sum(2))
        return self.a[k, :, :8].flatten(0, 1).mT @ d1, torch.cat([part.flatten(1) for part in parts], 1)


def _logits_shape(features: Tensor, kernels: Tensor) -> tuple[int, int, int]:
    return kernels.shape[0], features.shape[2], features.shape[3]


@torch.library.custom_op("rtmdet_fast::dynamic_mask_logits_reference", mutates_args=())
def logits(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor, feature_stride: int
) -> Tensor:
    """Logits [K, H, W]."""
    out = features.new_empty(_logits_shape(features, kernels), dtype=precision(features, kernels))
    with torch.autocast(features.device.type, enabled=False):
        instances = Instances(features, kernels, points, strides, image_index, feature_stride)
        for _, k, pixels in instances.chunks():
            instances.logits(k, pixels, out=out[k])
    return instances.unsorted(out)


@torch.library.custom_op("rtmdet_fast::dynamic_mask_logits_reference_backward", mutates_args=())
def logits_backward(
    dlogits: Tensor,
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor, feature_stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of features and kernels."""
    dfeatures = features.new_zeros(features.shape, dtype=precision(features, kernels))
    dkernels = torch.empty_like(kernels)
    with torch.autocast(features.device.type, enabled=False):
        instances = Instances(features, kernels, points, strides, image_index, feature_stride)
        dlogits = instances.sorted(dlogits)
        for image, k, pixels in instances.chunks():
            dpixels, dkernels[k] = instances.backward(k, pixels, dlogits[k].flatten(1))
            dfeatures[image] += dpixels.view_as(dfeatures[image])
    return dfeatures.to(features.dtype), instances.unsorted(dkernels)


@torch.library.custom_op("rtmdet_fast::dynamic_mask_dice_reference", mutates_args=())
def dice(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor,
    gt_masks: Tensor, gt_index: Tensor, feature_stride: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses [K], and what the backward pass needs of each instance: [K, 2] with sum(p t) and the denominator."""
    if len(gt_index) and not 0 <= int(gt_index.amin()) <= int(gt_index.amax()) < gt_masks.shape[1]:
        raise ValueError(f"gt_index: expected indices in [0, {gt_masks.shape[1]})")
    with torch.autocast(features.device.type, enabled=False):
        instances = Instances(features, kernels, points, strides, image_index, feature_stride, padded=True)
        gt_index = instances.sorted(gt_index)
        sums = features.new_empty((len(gt_index), 2), dtype=instances.dtype)
        for image, k, pixels in instances.chunks():
            p = instances.probabilities(k, pixels).flatten(1)
            t = gt_masks[image, gt_index[k]].bool().to(p.dtype).flatten(1)
            sums[k, 0] = (p * t).sum(1)
            sums[k, 1] = p.square_().sum(1) + t.sum(1) + 2 * eps
    return instances.unsorted(1 - 2 * sums[:, 0] / sums[:, 1]), instances.unsorted(sums)


@torch.library.custom_op("rtmdet_fast::dynamic_mask_dice_reference_backward", mutates_args=())
def dice_backward(
    dloss: Tensor, sums: Tensor,
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor,
    gt_masks: Tensor, gt_index: Tensor, feature_stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of features and kernels."""
    H, W = features.shape[2:]
    dfeatures = features.new_zeros(features.shape, dtype=sums.dtype)
    with torch.autocast(features.device.type, enabled=False):
        instances = Instances(features, kernels, points, strides, image_index, feature_stride, padded=True)
        gt_index, sums, dloss = (instances.sorted(x) for x in (gt_index, sums, dloss))
        dkernels = kernels.new_empty(len(gt_index), kernels.shape[1])
        for image, k, pixels in instances.chunks():
            p = instances.probabilities(k, pixels)
            t = gt_masks[image, gt_index[k]].bool().to(p.dtype)
            (inter, total), scale = sums[k].mT[..., None, None], 2 * dloss[k, None, None]
            # d loss / dp = 2 (2 p sum(p t) / total - t) / total
            dz = torch.ops.aten.sigmoid_backward((2 * inter / total * p).sub_(t).mul_(scale / total), p)
            dlogits = torch.ops.aten.upsample_bilinear2d_backward(
                dz[None], (2 * H, 2 * W), (1, len(p), H, W), False, 2.0, 2.0
            )[0]
            dpixels, dkernels[k] = instances.backward(k, pixels, dlogits.flatten(1))
            dfeatures[image] += dpixels.view_as(dfeatures[image])
    return dfeatures.to(features.dtype), instances.unsorted(dkernels)


@logits.register_fake
def _(features, kernels, points, strides, image_index, feature_stride):
    return features.new_empty(_logits_shape(features, kernels), dtype=precision(features, kernels))


@dice.register_fake
def _(features, kernels, points, strides, image_index, gt_masks, gt_index, feature_stride, eps):
    dtype = precision(features, kernels)
    return features.new_empty(len(kernels), dtype=dtype), features.new_empty((len(kernels), 2), dtype=dtype)


@logits_backward.register_fake
def _(dlogits, features, kernels, points, strides, image_index, feature_stride):
    return features.new_empty(features.shape), torch.empty_like(kernels)


@dice_backward.register_fake
def _(dloss, sums, features, kernels, points, strides, image_index, gt_masks, gt_index, feature_stride):
    return features.new_empty(features.shape), torch.empty_like(kernels)
