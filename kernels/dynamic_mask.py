"""Masks of RTMDet-Ins (arXiv:2212.07784): three 1 x 1 convolutions, weights of each instance's own; Dice loss.

Instance k has 169 numbers, W1 [8, 10], W2 [8, 8], W3 [8], b1 [8], b2 [8], b3 in this order. At each pixel, with the 8
features f of its image and r = (prior - pixel) / (8 stride), both in input pixels,

    x1 = relu(W1 [r; f] + b1);  x2 = relu(W2 x1 + b2);  logit = W3 x2 + b3
    p = sigmoid(logits, up-sampled x2, bilinear);  loss = 1 - 2 sum(p t) / (sum(p^2) + eps + sum(t^2) + eps)

Counts, for an instance and a pixel of the features; no GPU was at hand, nothing of the Triton path is measured.
- A logit is 152 FMAs, against 16 (fp16) or 32 bytes of features, which all instances of the image share and the L2
  cache serves, and 4 bytes out. On an H200 (datasheet: 33.5 T fp32 FMA/s, 4.8 TB/s) these are 4.5 ps and 0.8 ps:
  bound by arithmetic. As grouped convolutions the same is some 60 floats through memory (the repeated input, and each
  layer's and each ReLU's input and output), 50 ps.
- Hence a program holds the 169 parameters of its instance in registers and walks over 2,048 pixels, so that loading
  them adds little: of 226 instructions a pixel 152 are FMAs (fp32, sm_90). A thread has one pixel at a time. With two,
  loads want neighbours and arithmetic does not, and all 18 tensors of a step change layout through shared memory.
- The loss needs neighbours' logits. Each program computes its strip and the row above and below (a tenth more), leaves
  them in a buffer [K, H, W], and after a barrier, which orders a program's global memory too, reads each pixel's 3 x 3
  from there, that is from L1. Recomputing them in registers would be 152 FMAs each.
- Backward, 16 outputs have a share in a logit: 16 sigmoids more, rather than a buffer of [K, 2H, 2W].
- Gradients of the parameters are 169 sums over pixels. With 169 sums in registers nothing else fits, so two launches
  keep 88 and 81 of them, and load the parameters again for each 64 pixels of a warp (232 and 168 loads): 520 FMAs.
  Gradients of the features are sums over instances, thus programs of another shape: 280 FMAs, and 296 loads for each
  128 pixels of a warp. A multiprocessor loads for one warp a clock and multiplies for four: loads bound the former.
Saved for the backward pass are the inputs and two numbers an instance. Each launch has at most two buffers [K, H, W],
or 169 partial sums for each 1,024 pixels. There are no atomics: results are the same to the bit from run to run.

On a CPU the reference folds the coordinates, affine in the pixel's place, into one matrix product for all instances of
an image, and the other layers are batched products, over as many instances as the cache holds.
"""

# Triton's tuples cannot be unpacked into others, and its tensors are no types of Python's:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"
from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from rtmdet_fast.kernels._dispatch import cdiv, tl, triton, triton_op, use_triton, wrap_triton
from rtmdet_fast.kernels.batch_norm import sigmoid

_PARAMETERS = (80, 64, 8, 8, 8, 1)  # of an instance: W1, W2, W3, b1, b2, b3
# pixels a Triton program takes: of the logits, which repays loading 169 parameters; of the gradients of the parameters,
# where the sums over the lanes cost as much as two of 16 steps
_STRIP, _TILE = 2048, 1024
_PROGRAMS = 2048  # of the gradients of the features, to fill a GPU also where the batch is small
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
    op = _logits if _takes_triton(features, kernels) else _logits_reference
    return op(features, kernels, points, strides, image_index, feature_stride)


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
    op = _dice if _takes_triton(features, kernels) else _dice_reference
    return op(features, kernels, points, strides, image_index, gt_masks, gt_index, feature_stride, float(eps))[0]


def _takes_triton(features: Tensor, kernels: Tensor) -> bool:
    return use_triton(features) and _precision(features, kernels) == torch.float32


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
    """Instances in the order of their images, in parts small enough for the cache, and their layers.

    The coordinates are affine in the pixel's place: x1 = relu(A [f; x; y; 1]), one product for all instances of a part.
    """

    def __init__(
        self,
        features: Tensor,
        kernels: Tensor,
        points: Tensor,
        strides: Tensor,
        image_index: Tensor,
        feature_stride: int,
    ):
        (B, _, H, W), n = features.shape, len(kernels)
        images = image_index.tolist()
        if n and not 0 <= min(images) <= max(images) < B:
            raise ValueError(f"image_index: expected indices in [0, {B})")
        self.features, self.feature_stride, self.dtype = features, feature_stride, _precision(features, kernels)
        self.counts = [images.count(image) for image in range(B)]
        self.order = None if images == sorted(images) else image_index.argsort(stable=True)

        kernels, points, strides = (self.sorted(x).to(self.dtype) for x in (kernels, points, strides))
        w1, w2, w3, b1, b2, b3 = kernels.split(_PARAMETERS, 1)
        w1 = w1.reshape(n, 8, 10)
        self.points, self.scale = points[:, None], 1 / (8 * strides[:, None, None])
        slope = w1[:, :, :2] * self.scale
        constant = torch.baddbmm(b1[:, :, None], slope, points[:, :, None])
        self.a = torch.cat([w1[:, :, 2:], -slope, constant], 2)
        self.w2, self.b2 = w2.reshape(n, 8, 8), b2.reshape(n, 8, 1)
        self.w3, self.b3 = w3.reshape(n, 1, 8), b3.reshape(n, 1, 1)
        # Used by every part in turn: memory from malloc would not be in the cache.
        self.size = max(1, min(n, _CHUNK // (8 * H * W)))
        self.x1, self.x2 = (features.new_empty(self.size, 8, H * W, dtype=self.dtype) for _ in range(2))

    def sorted(self, x: Tensor) -> Tensor:
        """x [K, ...] in the order of the images."""
        return x if self.order is None else x[self.order]

    def unsorted(self, x: Tensor) -> Tensor:
        """x [K, ...] in the caller's order."""
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)

    def parts(self) -> Iterator[tuple[int, slice, Tensor]]:
        """(image, some of its instances, its pixels [11, H W]: the features, x and y in input pixels, 1)."""
        H, W = self.features.shape[2:]
        step, device = self.feature_stride, self.features.device
        y, x = (torch.arange(0, n * step, step, dtype=self.dtype, device=device) for n in (H, W))
        y, x = torch.meshgrid(y, x, indexing="ij")
        places = torch.stack([x, y, torch.ones_like(x)])
        start = 0
        for image, count in enumerate(self.counts):
            end = start + count
            if count:
                pixels = torch.cat([self.features[image].to(self.dtype), places]).flatten(1)
            for first in range(start, end, self.size):
                yield image, slice(first, min(first + self.size, end)), pixels
            start = end

    def hidden(self, k: slice, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [11, H W] -> x1, x2 [n, 8, H W], until the next part."""
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


@torch.library.custom_op("rtmdet_fast::dynamic_mask_logits_reference", mutates_args=())
def _logits_reference(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor, feature_stride: int
) -> Tensor:
    """Opaque to `torch.compile`, since which instances go together depends on `image_index`."""
    logits = features.new_empty(_logits_shape(features, kernels), dtype=_precision(features, kernels))
    with torch.autocast(features.device.type, enabled=False):
        instances = _Instances(features, kernels, points, strides, image_index, feature_stride)
        for _, k, pixels in instances.parts():
            instances.logits(k, pixels, out=logits[k])
    return instances.unsorted(logits)


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
        instances = _Instances(features, kernels, points, strides, image_index, feature_stride)
        dlogits = instances.sorted(dlogits)
        for image, k, pixels in instances.parts():
            dpixels, dkernels[k] = instances.backward(k, pixels, dlogits[k].flatten(1))
            dfeatures[image] += dpixels.view_as(dfeatures[image])
    return dfeatures.to(features.dtype), instances.unsorted(dkernels)


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
    sums = features.new_empty((len(kernels), 2), dtype=_precision(features, kernels))
    with torch.autocast(features.device.type, enabled=False):
        instances = _Instances(features, kernels, points, strides, image_index, feature_stride)
        gt_index = instances.sorted(gt_index)
        for image, k, pixels in instances.parts():
            p = instances.probabilities(k, pixels).flatten(1)
            t = gt_masks[image, gt_index[k]].bool().to(p.dtype).flatten(1)
            sums[k, 0] = (p * t).sum(1)
            sums[k, 1] = p.square_().sum(1) + t.sum(1) + 2 * eps
        sums = instances.unsorted(sums)
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
        instances = _Instances(features, kernels, points, strides, image_index, feature_stride)
        gt_index, sums, dloss = (instances.sorted(x) for x in (gt_index, sums, dloss))
        for image, k, pixels in instances.parts():
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


def _check_gt_index(gt_masks: Tensor, gt_index: Tensor) -> None:
    if len(gt_index) and not 0 <= int(gt_index.amin()) <= int(gt_index.amax()) < gt_masks.shape[1]:
        raise ValueError(f"gt_index: expected indices in [0, {gt_masks.shape[1]})")


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


@triton.jit
def _load_parameters(ptr):
    """The 169 parameters of an instance, as scalars in fp32."""
    w = ()
    for i in tl.static_range(169):
        w = w + (tl.load(ptr + i).to(tl.float32),)
    return w


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _inputs(features_ptr, p, inside, px, py, scale, width, pixels, feature_stride):
    """(x, y relative to the prior, 8 features) at the pixels `p` of an image."""
    x = ((px - (p % width * feature_stride).to(tl.float32)) * scale,)
    x = x + ((py - (p // width * feature_stride).to(tl.float32)) * scale,)
    for c in tl.static_range(8):
        x = x + (tl.load(features_ptr + c * pixels + p, mask=inside, other=0).to(tl.float32),)
    return x


@triton.jit
def _parameter(w, INDEX: tl.constexpr, HELD: tl.constexpr):
    """From the tuple `w` or, if not HELD, from memory at `w`."""
    return w[INDEX] if HELD else tl.load(w + INDEX).to(tl.float32)


@triton.jit
def _layer(w, x, W: tl.constexpr, B: tl.constexpr, HELD: tl.constexpr):
    """relu(weights x + bias), 8 tensors; the weights start at W, the biases at B."""
    y = ()
    for o in tl.static_range(8):
        v = _parameter(w, B + o, HELD) + _parameter(w, W + len(x) * o, HELD) * x[0]
        for i in tl.static_range(1, len(x)):
            v += _parameter(w, W + len(x) * o + i, HELD) * x[i]
        y = y + (_relu(v),)
    return y


@triton.jit
def _layer_backward(w, x, d, W: tl.constexpr):
    """Gradients, 8 tensors, of what the ReLU that gave `x` takes, from those `d` of what the layer after it gives."""
    dx = ()
    for i in tl.static_range(8):
        v = _parameter(w, W + i, False) * d[0]
        for o in tl.static_range(1, len(d)):
            v += _parameter(w, W + 8 * o + i, False) * d[o]
        dx = dx + (tl.where(x[i] <= 0, 0.0, v),)
    return dx


@triton.jit
def _prior(points_ptr, strides_ptr, index_ptr, k, images):
    """px, py, 1 / (8 stride), image (0 where out of range), whether it is in range."""
    image = tl.load(index_ptr + k)
    known = (image >= 0) & (image < images)
    scale = 1 / (8 * tl.load(strides_ptr + k))
    return tl.load(points_ptr + 2 * k), tl.load(points_ptr + 2 * k + 1), scale, tl.where(known, image, 0), known


@triton.jit
def _store_logits(
    features_ptr,
    kernel_ptr,
    points_ptr,
    strides_ptr,
    index_ptr,
    logits_ptr,
    k,
    first,
    last,
    images,
    width,
    pixels,
    feature_stride,
    BLOCK: tl.constexpr,
):
    """Logits of instance k at its pixels first..last - 1, NaN for an image out of range."""
    px, py, scale, image, known = _prior(points_ptr, strides_ptr, index_ptr, k, images)
    features_ptr += image * 8 * pixels
    logits_ptr += k * pixels
    w = _load_parameters(kernel_ptr + k * 169)
    p = first + tl.arange(0, BLOCK)
    while first < last:
        x = _inputs(features_ptr, p, p < last, px, py, scale, width, pixels, feature_stride)
        x2 = _layer(w, _layer(w, x, 0, 152, True), 80, 160, True)
        z = w[168] + w[144] * x2[0]
        for i in tl.static_range(1, 8):
            z += w[144 + i] * x2[i]
        tl.store(logits_ptr + p, tl.where(known, z, float("nan")), mask=p < last)
        p += BLOCK
        first += BLOCK


@triton.jit
def _logits_kernel(
    features_ptr,
    kernels_ptr,
    points_ptr,
    strides_ptr,
    index_ptr,
    logits_ptr,
    images,
    height,
    width,
    feature_stride,
    rows,
    strips,
    BLOCK: tl.constexpr,
):
    """`rows` rows of one instance a program."""
    k = (tl.program_id(0) // strips).to(tl.int64)
    row = tl.program_id(0) % strips * rows
    _store_logits(
        features_ptr,
        kernels_ptr,
        points_ptr,
        strides_ptr,
        index_ptr,
        logits_ptr,
        k,
        row * width,
        tl.minimum(row + rows, height) * width,
        images,
        width,
        height * width,
        feature_stride,
        BLOCK,
    )


@triton.jit
def _between(a, b, c, PLACE: tl.constexpr):
    """Value at output row (column) 2i + PLACE, PLACE -1..2, from the logits of rows i - 1, i and i + 1."""
    if PLACE == -1:
        v = 0.75 * a + 0.25 * b
    elif PLACE == 0:
        v = 0.25 * a + 0.75 * b
    elif PLACE == 1:
        v = 0.75 * b + 0.25 * c
    else:
        v = 0.25 * b + 0.75 * c
    return v


@triton.jit
def _share(i, size, PLACE: tl.constexpr):
    """How much of output row (column) 2i + PLACE comes from row i of `size`; at the border an output is one row's."""
    if PLACE == -1:
        v = tl.where(i > 0, 0.25, 0.0)
    elif PLACE == 0:
        v = tl.where(i > 0, 0.75, 1.0)
    elif PLACE == 1:
        v = tl.where(i < size - 1, 0.75, 1.0)
    else:
        v = tl.where(i < size - 1, 0.25, 0.0)
    return v


@triton.jit
def _dice_kernel(
    features_ptr,
    kernels_ptr,
    points_ptr,
    strides_ptr,
    index_ptr,
    gt_masks_ptr,
    gt_index_ptr,
    logits_ptr,
    partial_ptr,
    dloss_ptr,
    sums_ptr,
    dlogits_ptr,
    images,
    masks,
    height,
    width,
    feature_stride,
    rows,
    strips,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes `rows` rows of one instance: sums [K, strips, 3] of p t, p^2 and t^2, or dlogits [K, H, W].

    First their logits and those of the row above and below, into `logits` [K, H, W]: what neighbouring programs write
    to the same place is equal. Then, at each pixel, its neighbours' logits from there and the four outputs it lies
    nearest to; backward, all sixteen it has a share in.
    """
    k = (tl.program_id(0) // strips).to(tl.int64)
    strip = tl.program_id(0) % strips
    row = strip * rows
    end = tl.minimum(row + rows, height)
    pixels = height * width
    _store_logits(
        features_ptr,
        kernels_ptr,
        points_ptr,
        strides_ptr,
        index_ptr,
        logits_ptr,
        k,
        tl.maximum(row - 1, 0) * width,
        tl.minimum(end + 1, height) * width,
        images,
        width,
        pixels,
        feature_stride,
        BLOCK,
    )
    tl.debug_barrier()  # other threads of this program read them

    image, gt = tl.load(index_ptr + k), tl.load(gt_index_ptr + k)
    known = (image >= 0) & (image < images) & (gt >= 0) & (gt < masks)
    gt_masks_ptr += tl.where(known, image * masks + gt, 0) * 4 * pixels
    logits_ptr += k * pixels
    if BACKWARD:
        inter, total = tl.load(sums_ptr + 2 * k), tl.load(sums_ptr + 2 * k + 1)
        target = 2 * tl.load(dloss_ptr + k) / total  # d loss / dp = square p - target t
        square = 2 * target * (inter / total)
    zeros = tl.zeros([BLOCK], tl.float32)
    pt, pp, tt = zeros, zeros, zeros
    first = row * width
    last = end * width
    while first < last:
        p = first + tl.arange(0, BLOCK)
        inside = p < last
        i, j = p // width, p % width
        up, down = tl.maximum(i - 1, 0) * width, tl.minimum(i + 1, height - 1) * width
        columns = ()
        for dj in tl.static_range(-1, 2):
            at = tl.minimum(tl.maximum(j + dj, 0), width - 1)
            columns = columns + (tl.load(logits_ptr + up + at, mask=inside, other=0),)
            columns = columns + (tl.load(logits_ptr + i * width + at, mask=inside, other=0),)
            columns = columns + (tl.load(logits_ptr + down + at, mask=inside, other=0),)
        dz = zeros
        for r in tl.static_range(-1 if BACKWARD else 0, 3 if BACKWARD else 2):
            left = _between(columns[0], columns[1], columns[2], r)
            middle = _between(columns[3], columns[4], columns[5], r)
            right = _between(columns[6], columns[7], columns[8], r)
            y = 2 * i + r
            for c in tl.static_range(-1 if BACKWARD else 0, 3 if BACKWARD else 2):
                x = 2 * j + c
                there = inside & (y >= 0) & (y < 2 * height) & (x >= 0) & (x < 2 * width) & known
                t = tl.load(gt_masks_ptr + y.to(tl.int64) * 2 * width + x, mask=there, other=0) != 0
                prob = sigmoid(_between(left, middle, right, c))
                if BACKWARD:
                    dp = square * prob - tl.where(t, target, 0.0)
                    dz += _share(i, height, r) * _share(j, width, c) * dp * prob * (1 - prob)
                else:
                    prob = tl.where(inside, prob, 0.0)
                    pt += tl.where(t, prob, 0.0)
                    pp += prob * prob
                    tt += t.to(tl.float32)
        if BACKWARD:
            tl.store(dlogits_ptr + k * pixels + p, dz, mask=inside)
        first += BLOCK
    if not BACKWARD:
        partial_ptr += (k * strips + strip) * 3
        tl.store(partial_ptr, tl.where(known, tl.sum(pt, 0), float("nan")))
        tl.store(partial_ptr + 1, tl.sum(pp, 0))
        tl.store(partial_ptr + 2, tl.sum(tt, 0))


@triton.jit
def _halves(x):
    """The even and the odd elements of each tensor, one after the other: a thread holds two neighbours."""
    halves = ()
    for i in tl.static_range(len(x)):
        first, second = tl.split(tl.reshape(x[i], [x[i].shape[0] // 2, 2]))
        halves = halves + (first, second)
    return halves


@triton.jit
def _dkernels_kernel(
    features_ptr,
    kernels_ptr,
    points_ptr,
    strides_ptr,
    index_ptr,
    dlogits_ptr,
    partial_ptr,
    images,
    width,
    pixels,
    feature_stride,
    each,
    tiles,
    FIRST_LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the parameters over `each` pixels of one instance a program -> [K, tiles, 169].

    Those of the first layer or those of the others: 169 sums leave too few registers for the rest.
    """
    SUMS: tl.constexpr = 88 if FIRST_LAYER else 81
    k = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    px, py, scale, image, _known = _prior(points_ptr, strides_ptr, index_ptr, k, images)
    features_ptr += image * 8 * pixels
    dlogits_ptr += k * pixels
    w = kernels_ptr + k * 169
    sums = ()
    for _i in tl.static_range(SUMS):
        sums = sums + (tl.zeros([BLOCK // 2], tl.float32),)
    first = tile * each
    last = tl.minimum(first + each, pixels)
    while first < last:
        p = first + tl.arange(0, BLOCK)
        inside = p < last
        x = _inputs(features_ptr, p, inside, px, py, scale, width, pixels, feature_stride)
        dlogit = tl.load(dlogits_ptr + p, mask=inside, other=0)
        # w, which the compiler cannot know: parameters kept from pass to pass, or from step to step, would spill
        forward, backward = w + (first >> 30), w + (first >> 31)
        x1 = _layer(forward, x, 0, 152, False)
        x2 = _layer(forward, x1, 80, 160, False)
        d2 = _layer_backward(forward, x2, (dlogit,), 144)
        updated = ()
        if FIRST_LAYER:
            d1 = _layer_backward(backward, x1, d2, 80)
            d1, x = _halves(d1), _halves(x)
            for o in tl.static_range(8):
                updated = updated + (sums[11 * o] + d1[2 * o] + d1[2 * o + 1],)
                for i in tl.static_range(10):
                    updated = updated + (sums[11 * o + 1 + i] + d1[2 * o] * x[2 * i] + d1[2 * o + 1] * x[2 * i + 1],)
        else:
            d2, d3, x2, x1 = _halves(d2), _halves((dlogit,)), _halves(x2), _halves(x1)
            for o in tl.static_range(8):
                updated = updated + (sums[10 * o] + d2[2 * o] + d2[2 * o + 1],)
                updated = updated + (sums[10 * o + 1] + d3[0] * x2[2 * o] + d3[1] * x2[2 * o + 1],)
                for i in tl.static_range(8):
                    updated = updated + (sums[10 * o + 2 + i] + d2[2 * o] * x1[2 * i] + d2[2 * o + 1] * x1[2 * i + 1],)
            updated = updated + (sums[80] + d3[0] + d3[1],)
        sums = updated
        first += BLOCK
    partial_ptr += (k * tiles + tile) * 169
    for o in tl.static_range(8):
        if FIRST_LAYER:
            tl.store(partial_ptr + 152 + o, tl.sum(sums[11 * o], 0))
            for i in tl.static_range(10):
                tl.store(partial_ptr + 10 * o + i, tl.sum(sums[11 * o + 1 + i], 0))
        else:
            tl.store(partial_ptr + 160 + o, tl.sum(sums[10 * o], 0))
            tl.store(partial_ptr + 144 + o, tl.sum(sums[10 * o + 1], 0))
            for i in tl.static_range(8):
                tl.store(partial_ptr + 80 + 8 * o + i, tl.sum(sums[10 * o + 2 + i], 0))
    if not FIRST_LAYER:
        tl.store(partial_ptr + 168, tl.sum(sums[80], 0))


@triton.jit
def _dfeatures_kernel(
    features_ptr,
    kernels_ptr,
    points_ptr,
    strides_ptr,
    dlogits_ptr,
    order_ptr,
    start_ptr,
    partial_ptr,
    images,
    width,
    pixels,
    feature_stride,
    tiles,
    groups,
    BLOCK: tl.constexpr,
):
    """Gradients of the features at BLOCK pixels of one image a program, over every groups-th instance of the image.

    [groups, B, 8, H, W]. The instances of image b are order[start[b]] to order[start[b + 1] - 1].
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = p < pixels
    features_ptr += image * 8 * pixels
    features = ()
    sums = ()
    for c in tl.static_range(8):
        features = features + (tl.load(features_ptr + c * pixels + p, mask=inside, other=0).to(tl.float32),)
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
    x = (p % width * feature_stride).to(tl.float32)
    y = (p // width * feature_stride).to(tl.float32)
    at = tl.load(start_ptr + image) + tl.program_id(1)
    end = tl.load(start_ptr + image + 1)
    while at < end:
        k = tl.load(order_ptr + at)
        scale = 1 / (8 * tl.load(strides_ptr + k))
        dx = (tl.load(points_ptr + 2 * k) - x) * scale
        dy = (tl.load(points_ptr + 2 * k + 1) - y) * scale
        dlogit = tl.load(dlogits_ptr + k * pixels + p, mask=inside, other=0)
        w = kernels_ptr + k * 169
        backward = w + (at >> 62)  # w: see _dkernels_kernel
        x1 = _layer(w, (dx, dy) + features, 0, 152, False)
        d2 = _layer_backward(backward, _layer(w, x1, 80, 160, False), (dlogit,), 144)
        d1 = _layer_backward(backward, x1, d2, 80)
        updated = ()
        for c in tl.static_range(8):
            v = sums[c]
            for o in tl.static_range(8):
                v += _parameter(backward, 10 * o + 2 + c, False) * d1[o]
            updated = updated + (v,)
        sums = updated
        at += groups
    partial_ptr += (tl.program_id(1) * images + image) * 8 * pixels
    for c in tl.static_range(8):
        tl.store(partial_ptr + c * pixels + p, sums[c], mask=inside)


def _arguments(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor
) -> tuple[Tensor, ...]:
    return (
        features.contiguous(),
        kernels.contiguous(),
        points.float().contiguous(),
        strides.float().contiguous(),
        image_index.contiguous(),
    )


def _strips(H: int, W: int) -> tuple[int, int]:
    """Rows a program takes, and how many such strips there are."""
    rows = cdiv(H, min(H, cdiv(H * W, _STRIP)))
    return rows, cdiv(H, rows)


@triton_op("rtmdet_fast::dynamic_mask_logits")
def _logits(
    features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor, feature_stride: int
) -> Tensor:
    arguments = _arguments(features, kernels, points, strides, image_index)
    B, _, H, W = features.shape
    logits = features.new_empty(_logits_shape(features, kernels), dtype=torch.float32)
    if len(kernels):
        rows, strips = _strips(H, W)
        wrap_triton(_logits_kernel)[(len(kernels) * strips,)](
            *arguments, logits, B, H, W, feature_stride, rows, strips, BLOCK=128, num_warps=4
        )
    return logits


@triton_op("rtmdet_fast::dynamic_mask_logits_backward")
def _logits_backward(
    dlogits: Tensor,
    features: Tensor,
    kernels: Tensor,
    points: Tensor,
    strides: Tensor,
    image_index: Tensor,
    feature_stride: int,
) -> tuple[Tensor, Tensor]:
    return _gradients(dlogits.contiguous(), features, kernels, points, strides, image_index, feature_stride)


@triton_op("rtmdet_fast::dynamic_mask_dice")
def _dice(
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
    strips = _strips(*features.shape[2:])[1]
    partial = features.new_empty((len(kernels), strips, 3), dtype=torch.float32)
    if len(kernels):
        logits = features.new_empty(_logits_shape(features, kernels), dtype=torch.float32)
        _launch_dice(
            features, kernels, points, strides, image_index, gt_masks, gt_index, feature_stride, logits, partial=partial
        )
    inter, squares, inside = partial.sum(1).unbind(1)
    total = squares + inside + 2 * eps
    return 1 - 2 * inter / total, torch.stack([inter, total], 1)


@triton_op("rtmdet_fast::dynamic_mask_dice_backward")
def _dice_backward(
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
    dlogits = features.new_empty(_logits_shape(features, kernels), dtype=torch.float32)
    if len(kernels):
        _launch_dice(
            features,
            kernels,
            points,
            strides,
            image_index,
            gt_masks,
            gt_index,
            feature_stride,
            torch.empty_like(dlogits),
            backward=(dloss.contiguous(), sums.contiguous(), dlogits),
        )
    return _gradients(dlogits, features, kernels, points, strides, image_index, feature_stride)


def _launch_dice(
    features: Tensor,
    kernels: Tensor,
    points: Tensor,
    strides: Tensor,
    image_index: Tensor,
    gt_masks: Tensor,
    gt_index: Tensor,
    feature_stride: int,
    logits: Tensor,
    partial: Tensor | None = None,
    backward: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    (B, _, H, W), M = features.shape, gt_masks.shape[1]
    gt_masks = gt_masks.contiguous()
    if gt_masks.dtype == torch.bool:
        gt_masks = gt_masks.view(torch.uint8)
    rows, strips = _strips(H, W)
    wrap_triton(_dice_kernel)[(len(kernels) * strips,)](
        *_arguments(features, kernels, points, strides, image_index),
        gt_masks,
        gt_index.contiguous(),
        logits,
        logits if partial is None else partial,
        *(backward or (logits, logits, logits)),
        B,
        M,
        H,
        W,
        feature_stride,
        rows,
        strips,
        BACKWARD=backward is not None,
        BLOCK=128,
        num_warps=4,
    )


def _gradients(
    dlogits: Tensor,
    features: Tensor,
    kernels: Tensor,
    points: Tensor,
    strides: Tensor,
    image_index: Tensor,
    feature_stride: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of features and kernels from those of the logits, without atomics: partial sums, added in order."""
    (B, _, H, W), K = features.shape, len(kernels)
    if K == 0:
        return torch.zeros_like(features), torch.empty_like(kernels)
    features_, kernels_, points, strides, image_index = _arguments(features, kernels, points, strides, image_index)
    tiles = cdiv(H * W, _TILE)
    dkernels = features.new_empty((K, tiles, sum(_PARAMETERS)), dtype=torch.float32)
    for first_layer in (True, False):
        wrap_triton(_dkernels_kernel)[(K * tiles,)](
            features_,
            kernels_,
            points,
            strides,
            image_index,
            dlogits,
            dkernels,
            B,
            W,
            H * W,
            feature_stride,
            _TILE,
            tiles,
            FIRST_LAYER=first_layer,
            BLOCK=64,
            num_warps=1,
        )
    order = image_index.argsort(stable=True)
    images = torch.arange(B + 1, device=image_index.device)
    start = torch.searchsorted(image_index[order], images)  # an index out of range is in no image
    tiles = cdiv(H * W, 128)
    groups = max(1, min(8, _PROGRAMS // (B * tiles)))
    dfeatures = features.new_empty((groups, B, 8, H, W), dtype=torch.float32)
    wrap_triton(_dfeatures_kernel)[(B * tiles, groups)](
        features_,
        kernels_,
        points,
        strides,
        dlogits,
        order,
        start,
        dfeatures,
        B,
        W,
        H * W,
        feature_stride,
        tiles,
        groups,
        BLOCK=128,
        num_warps=1,
    )
    return dfeatures.sum(0).to(features.dtype), dkernels.sum(1).to(kernels.dtype)


def _logits_setup(ctx, inputs, output):
    *tensors, ctx.feature_stride = inputs
    ctx.save_for_backward(*tensors)


def _dice_setup(ctx, inputs, output):
    *tensors, ctx.feature_stride, _ = inputs
    ctx.save_for_backward(output[1], *tensors)


for _op, _op_backward in ((_logits, _logits_backward), (_logits_reference, _logits_reference_backward)):
    _op.register_autograd(
        lambda ctx, dlogits, backward=_op_backward: (
            *backward(dlogits, *ctx.saved_tensors, ctx.feature_stride),
            *[None] * 4,
        ),
        setup_context=_logits_setup,
    )
for _op, _op_backward in ((_dice, _dice_backward), (_dice_reference, _dice_reference_backward)):
    _op.register_autograd(
        lambda ctx, dloss, dsums, backward=_op_backward: (
            *backward(dloss, *ctx.saved_tensors, ctx.feature_stride),
            *[None] * 7,
        ),
        setup_context=_dice_setup,
    )
