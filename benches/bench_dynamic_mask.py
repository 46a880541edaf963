"""Dynamic masks of RTMDet-Ins, and training with their Dice loss, beside the grouped convolutions that mmdet runs.

The coordinates reach 80 strides and the kernels are as large as a trained head's, so that masks are neither empty nor
full.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.harness import Case, Contender, compiled, own, relative_error
from rtmdet_fast.kernels import dynamic_mask_torch
from rtmdet_fast.kernels.dynamic_mask import dynamic_mask_dice_loss, dynamic_mask_logits

GROUND_TRUTHS = 20


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            _case(device, "inference", 1, 100, 640, torch.float32),
            _case(device, "inference", 1, 100, 320, torch.float32),
            _case(device, "training", 2, 100, 640, torch.float32),
        ]
    return [
        _case(device, "inference", 1, 100, 640, torch.float16),
        _case(device, "training", 2, 200, 640, torch.float16),
        _case(device, "training", 16, 1600, 640, torch.float16),
    ]


def _case(device: torch.device, mode: str, batch: int, instances: int, size: int, dtype: torch.dtype) -> Case:
    logits = mode == "inference"
    wrap: Callable[[Any], Any] = (lambda function: lambda *inputs: (function(*inputs[:5]),)) if logits else training
    op = dynamic_mask_logits if logits else _loss
    eager = eager_logits if logits else eager_loss
    return Case(
        op="dynamic_mask",
        name=f"{mode}, {str(dtype).removeprefix('torch.')}: {batch} x {size} px, {instances} instances",
        shapes={"features": [batch, 8, size // 8, size // 8], "kernels": [instances, 169]},
        inputs=partial(_inputs, device, batch, instances, size, dtype),
        expected=lambda *inputs: wrap(eager)(*(x.double() if x.is_floating_point() else x for x in inputs)),
        compare=lambda result, expected: relative_error(result, expected, 1e-4 if dtype == torch.float32 else 3e-2),
        contenders=[
            *own(device, wrap(op), wrap(_reference(logits))),
            Contender(name="mmdet", build=lambda: wrap(_mmdet(logits))),
            Contender(name="torch.compile", build=lambda: wrap(compiled(device, eager)()), graph=True),
            Contender(name="eager", build=lambda: wrap(eager), graph=logits),
        ],
    )


def _inputs(
    device: torch.device, batch: int, instances: int, size: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, ...]:
    """Ours, then the masks at full size: mmdet samples them itself."""
    g = torch.Generator(device).manual_seed(seed)
    rand = partial(torch.rand, generator=g, device=device)
    features = torch.randn(batch, 8, size // 8, size // 8, generator=g, device=device).to(dtype)
    kernels = (torch.randn(instances, 169, generator=g, device=device) / 3).to(dtype)
    strides = 8 * 2 ** torch.randint(3, (instances,), generator=g, device=device).float()
    image_index = torch.arange(instances, device=device) % batch
    center, side = rand(batch, GROUND_TRUTHS, 2, 1, 1) * size, 16 + rand(batch, GROUND_TRUTHS, 2, 1, 1) * size / 4
    pixel = torch.arange(size, device=device)
    inside = ((pixel[:, None] - center[:, :, 1]).abs() < side[:, :, 1]) & (
        (pixel - center[:, :, 0]).abs() < side[:, :, 0]
    )
    gt_index = torch.randint(GROUND_TRUTHS, (instances,), generator=g, device=device)
    return features, kernels, rand(instances, 2) * size, strides, image_index, gt_index, inside


def training(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The loss (sum) and the gradients of features and kernels."""

    def run(features: Tensor, kernels: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        leaves = features.detach().requires_grad_(), kernels.detach().requires_grad_()
        total = loss(*leaves, *rest).sum()
        return total.detach(), *torch.autograd.grad(total, leaves)

    return run


def _loss(*inputs: Tensor) -> Tensor:
    *tensors, gt_index, masks = inputs
    return dynamic_mask_dice_loss(*tensors, masks[:, :, 2::4, 2::4], gt_index)


def _reference(logits: bool) -> Callable[..., Tensor]:
    if logits:
        return lambda *tensors: dynamic_mask_torch.logits(*tensors, 8)
    return lambda *inputs: dynamic_mask_torch.dice(*inputs[:5], inputs[6][:, :, 2::4, 2::4], inputs[5], 8, 5e-6)[0]


def eager_logits(features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor) -> Tensor:
    """Grouped convolutions over the inputs [1, 10 K, H, W] of all instances."""
    K, (H, W) = len(kernels), features.shape[2:]
    y, x = torch.meshgrid(*(8 * torch.arange(n, device=features.device) for n in (H, W)), indexing="ij")
    relative = (points[:, :, None, None] - torch.stack([x, y])) / (8 * strides[:, None, None, None])
    z = torch.cat([relative.to(features.dtype), features[image_index]], 1).view(1, K * 10, H, W)
    w1, w2, w3, b1, b2, b3 = kernels.split((80, 64, 8, 8, 8, 1), 1)
    z = F.conv2d(z, w1.reshape(K * 8, 10, 1, 1), b1.flatten(), groups=K).relu()
    z = F.conv2d(z, w2.reshape(K * 8, 8, 1, 1), b2.flatten(), groups=K).relu()
    return F.conv2d(z, w3.reshape(K, 8, 1, 1), b3.flatten(), groups=K)[0]


def eager_loss(*inputs: Tensor) -> Tensor:
    *tensors, gt_index, masks = inputs
    up = F.interpolate(eager_logits(*tensors)[None], scale_factor=2, mode="bilinear")[0]
    p = up.to(torch.promote_types(up.dtype, torch.float32)).sigmoid().flatten(1)
    t = masks[:, :, 2::4, 2::4][tensors[4], gt_index].to(p.dtype).flatten(1)
    return 1 - 2 * (p * t).sum(1) / (p.square().sum(1) + t.square().sum(1) + 1e-5)


def _mmdet(logits: bool) -> Callable[..., Tensor]:
    """Its head's own functions, without the rest of the head."""
    from mmdet.models.dense_heads.rtmdet_ins_head import RTMDetInsHead  # type: ignore[import-not-found]
    from mmdet.models.losses import DiceLoss  # type: ignore[import-not-found]
    from mmdet.models.task_modules.prior_generators import MlvlPointGenerator  # type: ignore[import-not-found]

    head = SimpleNamespace(
        weight_nums=[80, 64, 8], bias_nums=[8, 8, 1], dyconv_channels=8, mask_loss_stride=4,
        prior_generator=MlvlPointGenerator(strides=[8, 16, 32], offset=0), loss_mask=DiceLoss(eps=5e-6),
    )  # fmt: skip
    head.parse_dynamic_params = partial(RTMDetInsHead.parse_dynamic_params, head)
    head._mask_predict_by_feat_single = partial(RTMDetInsHead._mask_predict_by_feat_single, head)

    def predict(features: Tensor, kernels: Tensor, points: Tensor, strides: Tensor, image_index: Tensor) -> Tensor:
        priors = torch.cat([points, strides[:, None].expand(-1, 2)], 1).to(features.dtype)
        return head._mask_predict_by_feat_single(features[0], kernels, priors)

    def loss(*inputs: Tensor) -> Tensor:
        features, kernels, points, strides, image_index, gt_index, masks = inputs
        priors = torch.cat([points, strides[:, None].expand(-1, 2)], 1).to(features.dtype)
        positives = [(image_index == image).nonzero()[:, 0] for image in range(len(features))]
        samples = [
            SimpleNamespace(pos_priors=priors[k], pos_inds=k, pos_assigned_gt_inds=gt_index[k]) for k in positives
        ]
        targets = [SimpleNamespace(masks=image) for image in masks]
        everyone = kernels.expand(len(features), *kernels.shape)
        return RTMDetInsHead.loss_mask_by_feat(head, features, everyone, samples, targets) * len(kernels)

    return predict if logits else loss
