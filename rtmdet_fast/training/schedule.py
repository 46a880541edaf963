"""Learning rate, weight decay and weight averaging of the published recipe."""

from __future__ import annotations

import copy
import math
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

WARMUP_START = 1e-5
FINAL_FRACTION = 0.05


def learning_rate_factor(iteration: int, total: int, warmup: int = 1000) -> float:
    """Factor on the base rate: linear warm-up from 1e-5, flat to half, then a cosine per iteration to 5 %."""
    factor = 1.0
    if iteration < warmup - 1:
        factor = WARMUP_START + (1 - WARMUP_START) * iteration / (warmup - 1)
    begin = total // 2
    if iteration > begin:
        cosine = (1 + math.cos(math.pi * min((iteration - begin) / (total - begin), 1.0))) / 2
        factor *= FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine
    return factor


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on convolution weights only: BatchNorm and biases (one-dimensional) have none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def ema_momentum(step: int, momentum: float = 2e-4) -> float:
    """Share of the new weights at a step counted from 0: (1 - m) exp(-(1 + t) / 2000) + m."""
    return (1 - momentum) * math.exp(-(1 + step) / 2000) + momentum


Model = TypeVar("Model", bound=nn.Module)


class ModelEMA(Generic[Model]):
    """Exponential moving average of all parameters and floating-point buffers; other buffers are copied.

    A tensor that the head shares between levels is averaged once.
    """

    def __init__(self, model: Model, momentum: float = 2e-4):
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.momentum = momentum
        self.step = 0

    @torch.no_grad()
    def update(self, model: Model) -> None:
        averaged = [*self.model.parameters(), *self.model.buffers()]
        current = [*model.parameters(), *model.buffers()]
        floating: tuple[list[Tensor], list[Tensor]] = ([], [])
        others: tuple[list[Tensor], list[Tensor]] = ([], [])
        for ours, theirs in zip(averaged, current, strict=True):
            kind = floating if ours.is_floating_point() else others
            kind[0].append(ours)
            kind[1].append(theirs)
        # The first update takes the model over whole.
        weight = ema_momentum(self.step, self.momentum) if self.step else 1.0
        torch._foreach_lerp_(floating[0], floating[1], weight)
        if others[0]:
            torch._foreach_copy_(others[0], others[1])
        self.step += 1
