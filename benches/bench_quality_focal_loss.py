"""Quality focal loss with its gradient, of the logits of RTMDet at 640 px, one prior in a hundred with a label.

"dense" is the definition with targets [B, N, C], which "torch.compile" compiles; mmdet's picks the positives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.harness import Case, Contender, compiled, own, relative_error
from rtmdet_fast.kernels.quality_focal_loss import quality_focal_loss, quality_focal_loss_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
PASSES = 3  # over the logits, as the kernel's docstring counts them


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [_case(device, 2, 8400, 80, torch.float32)]
    return [
        *(_case(device, 32, 8400, 80, dtype) for dtype in (torch.bfloat16, torch.float32)),
        _case(device, 32, 8400, 3, torch.bfloat16, headline=False),
    ]


def _case(device: torch.device, batch: int, n: int, classes: int, dtype: torch.dtype, headline: bool = True) -> Case:
    shape = (batch, n, classes)
    return Case(
        op="quality_focal_loss",
        name=f"forward and backward, {str(dtype).removeprefix('torch.')}: {list(shape)}",
        shapes={"logits": list(shape)},
        inputs=partial(_inputs, shape, dtype, device),
        expected=lambda logits, labels, quality: training(dense)(logits.double(), labels, quality.double()),
        compare=lambda result, expected: relative_error(result, expected, TOLERANCE[dtype]),
        contenders=[
            *own(device, training(quality_focal_loss), training(quality_focal_loss_reference), graph_reference=True),
            Contender(name="torch.compile", build=lambda: training(compiled(device, dense)()), graph=True),
            Contender(name="dense", build=lambda: training(dense), graph=True),
            Contender(name="mmdet", build=_mmdet),
        ],
        # labels and quality are read twice
        bytes=batch * n * (PASSES * classes * dtype.itemsize + 2 * (8 + 4)),
        headline=headline,
    )


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator(device).manual_seed(seed)
    logits = (torch.randn(shape, generator=g, device=device) * 2 - 4).to(dtype)
    rand = partial(torch.rand, shape[:2], generator=g, device=device)
    matched = rand() < 0.01
    labels = torch.where(matched, (rand() * shape[2]).long(), -1)
    return logits, labels, torch.where(matched, rand(), 0.0)


def training(op: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(logits: Tensor, labels: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        loss = op(leaf, labels, quality)
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    return run


def dense(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = torch.where(
        labels[..., None] == torch.arange(logits.shape[2], device=logits.device), quality[..., None], 0
    )
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return ((logits.sigmoid() - target).square() * bce).sum()


def _mmdet() -> Any:
    from mmdet.models.losses.gfocal_loss import quality_focal_loss  # type: ignore[import-not-found]

    def loss(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        classes = logits.shape[2]
        target = labels.flatten().where(labels.flatten() >= 0, classes), quality.flatten()
        return quality_focal_loss(logits.float().view(-1, classes), target).sum()

    return training(loss)
